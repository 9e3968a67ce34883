"""Seed bugs of one line in the package, one at a time, and tell which of them the tests let live: `make mutate`.

Why not mutmut or cosmic-ray: mutmut first runs the whole suite, and both start Python anew for each bug, of which the
imports of torch, timm and diffusers take longer than most tests here; cosmic-ray writes its bugs into the checkout;
and most of their operators (`+` becomes `<<`) make bugs that nobody writes. Here one process imports the libraries once
and forks for every bug; the child loads the changed module from memory and runs the tests that belong to it until one
fails. The bugs are of the kinds that reviewers found: a bound off by one, a sign, a condition, a dropped argument, a
dropped `detach` or `round`.

    python -m tests.mutate --count 200 --seed 0 [AREA ...] [-o survivors.json]
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# area -> modules, test files; those with the shortest tests first
AREAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "weights": (("weights", "record"), ("test_loading_mutants.py", "test_weights.py", "test_record.py")),
    "hub": (("hub",), ("test_loading_mutants.py", "test_hub.py")),
    "pictures": (
        ("pictures.picture", "pictures.image", "pictures.read", "pictures.write", "pictures.restore", "pictures.color"),
        ("pictures/test_pictures_mutants.py", "pictures/test_restore.py", "pictures/test_formats.py"),
    ),
    "tiling": (("pictures.tiling",), ("pictures/test_pictures_mutants.py", "pictures/test_tiling.py")),
    "data": (
        ("data.degradations", "data.images", "data.labelled_images", "data.paired_images", "data.photos",
         "data.resize", "data.samplers"),
        ("data",),
    ),
    "metrics": (("evaluation.metrics", "evaluation.protocols"), ("evaluation",)),
    "caching": (
        ("caching.bac", "caching.cg_taylor", "caching.runs", "caching.schedules", "caching.taylor"),
        ("caching/test_caching_mutants.py", "caching/test_schedules.py", "caching/test_taylor.py",
         "caching/test_runs.py", "caching/test_bac.py", "caching/test_cg_taylor.py", "caching/test_core.py"),
    ),
    "moe": (
        ("moe.losses", "moe.router", "moe.experts", "moe.distillation", "moe.dense2moe", "ffn.importance", "ffn.ewa"),
        ("moe/test_moe_mutants.py", "moe/test_losses.py", "ffn/test_ewa.py", "ffn/test_importance.py",
         "moe/test_experts.py", "moe/test_distillation.py", "moe/test_dense2moe.py"),
    ),
    "tasks": (
        ("tasks.classification", "tasks.optim", "tasks.restoration", "tasks.teachers", "tasks.callbacks",
         "tasks.freezing"),
        ("tasks/test_tasks_mutants.py", "tasks/test_teachers.py", "tasks/test_freezing.py",
         "tasks/test_classification.py", "tasks/test_restoration.py", "tasks/test_checkpoint_io.py",
         "tasks/test_resume.py"),
    ),
}  # fmt: skip

_LIBRARIES = (
    "torch", "timm", "torchvision", "diffusers", "diffusers.hooks", "lightning.pytorch.cli", "torchmetrics", "datasets",
    "pytest", "_pytest.assertion.rewrite", "hypothesis", "skimage.metrics", "tensorboard", "huggingface_hub",
)  # fmt: skip

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
}  # fmt: skip
_NAMES = {
    "min": "max", "max": "min", "ceil": "floor", "floor": "ceil", "any": "all", "all": "any", "startswith": "endswith",
    "amin": "amax", "amax": "amin", "argmax": "argmin", "BICUBIC": "NEAREST", "mean": "sum",
}  # fmt: skip
_DROPPED = {"detach", "round", "floor", "abs", "clip", "clamp", "clamp_", "float", "lower", "sorted", "flip", "copy"}
_SILENT = {
    "ValueError",
    "TypeError",
    "RuntimeError",
    "FileNotFoundError",
    "CheckpointError",
    "PictureError",
    "HubError",
}
_SILENT |= {"warn", "warning", "OSError", "ImportError", "debug", "info"}


@dataclass(frozen=True)
class Mutant:
    """A bug.

    Args:
        area: Key of `AREAS`.
        module: Name without "zoo.".
        line: Where.
        before: The statement or expression.
        after: What it becomes.
    """

    area: str
    module: str
    line: int
    before: str
    after: str


def mutations(tree: ast.Module) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield (expression, wrong expression) for every bug that can be seeded in a module."""
    for node in _live(tree):
        yield from ((node, after) for after in _variants(node))


def seeded(tree: ast.Module, node: ast.expr, after: ast.expr) -> str:
    """Return the source of a module with one expression replaced."""

    class Replace(ast.NodeTransformer):
        def visit(self, visited: ast.AST) -> ast.AST:
            return after if visited is node else self.generic_visit(visited)

    memo: dict[int, Any] = {id(node): node}  # the copy keeps this very node, to be found
    return ast.unparse(ast.fix_missing_locations(Replace().visit(copy.deepcopy(tree, memo))))


def _live(tree: ast.Module) -> Iterator[Any]:
    """Yield the nodes that compute: no annotations, documentation, messages or registrations."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.expr):
            yield node
        if isinstance(node, ast.Call) and _name(node.func) in _SILENT:
            continue
        if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)):
            continue
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "bases", "msg"):
                continue
            waiting += [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, ast.AST)]


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _variants(node: ast.expr) -> Iterator[ast.expr]:
    """Yield wrong versions of an expression."""

    def changed(**fields: Any) -> ast.expr:
        other = copy.copy(node)
        for field, value in fields.items():
            setattr(other, field, value)
        return other

    if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
        yield changed(ops=[_SWAPS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in _SWAPS:
        yield changed(op=_SWAPS[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield changed(body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield changed(value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield changed(value=node.value + 1 if isinstance(node.value, int) else node.value * 1.5 + (node.value == 0))
    elif isinstance(node, ast.Name) and node.id in _NAMES and isinstance(node.ctx, ast.Load):
        yield changed(id=_NAMES[node.id])
    elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
        yield changed(attr=_NAMES[node.attr])
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr in _DROPPED:
            yield node.func.value
        elif _name(node.func) in _DROPPED and node.args:
            yield node.args[0]
        for index, keyword in enumerate(node.keywords):
            if keyword.arg is not None:
                yield changed(keywords=node.keywords[:index] + node.keywords[index + 1 :])


class _Seeded(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Finds and loads one module from changed source."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        return (
            importlib.util.spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None
        )

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec", dont_inherit=True)


def load_libraries() -> None:
    """Import what the tests need, the package and the tests' own helpers left out."""
    sys.path.insert(0, str(ROOT))
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for name in _LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    importlib.import_module("torch").set_num_threads(1)
    if any(name == "zoo" or name.startswith("zoo.") for name in sys.modules):
        raise RuntimeError("zoo is imported already: a bug would not be seen.")


def run_tests(tests: tuple[str, ...], changed: Mapping[str, str], seconds: int) -> tuple[bool, float]:
    """Run tests in a child with changed modules (name without "zoo." -> source); return (all passed, CPU seconds)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            for name, source in changed.items():
                path = ROOT.joinpath("zoo", *name.split(".")).with_suffix(".py")
                sys.meta_path.insert(0, _Seeded(f"zoo.{name}", str(path), source))
            import pytest

            options = ["-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-p", "no:randomly"]
            status = pytest.main([*options, *(str(ROOT / "tests" / test) for test in tests)])
        finally:
            os._exit(int(status))
    _, code = os.waitpid(child, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return code == 0, spent


def sample(areas: list[str], count: int, seed: int) -> list[tuple[Mutant, str]]:
    """Draw bugs, as many of each area, with the source that holds them."""
    rng, drawn = random.Random(seed), []
    for place, area in enumerate(areas):
        found = []
        for module in AREAS[area][0]:
            path = ROOT.joinpath("zoo", *module.split(".")).with_suffix(".py")
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [(module, tree, node, after) for node, after in mutations(tree)]
        wanted = count // len(areas) + (place < count % len(areas))
        for module, tree, node, after in rng.sample(found, min(wanted, len(found))):
            mutant = Mutant(area, module, node.lineno, ast.unparse(node), ast.unparse(after))
            drawn.append((mutant, seeded(tree, node, after)))
    return drawn


def main() -> int:
    """Seed a sample of bugs and print which of them lived."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"of {', '.join(AREAS)}; default: all")
    parser.add_argument("--count", type=int, default=200, help="bugs in all")
    parser.add_argument("--seed", type=int, default=0, help="which")
    parser.add_argument("-o", "--output", type=Path, help="JSON file, written after every bug")
    args = parser.parse_args()
    areas = args.areas or list(AREAS)
    if unknown := set(areas) - set(AREAS):
        parser.error(f"no area {', '.join(unknown)}; there are {', '.join(AREAS)}")
    load_libraries()
    results: list[dict[str, Any]] = []
    limits: dict[str, int] = {}
    for mutant, source in sample(areas, args.count, args.seed):
        tests = AREAS[mutant.area][1]
        if mutant.area not in limits:
            passed, spent = run_tests(tests, {}, 3600)
            if not passed:
                print(f"{mutant.area}: the tests fail without any bug", file=sys.stderr)
                return 1
            limits[mutant.area] = int(60 + 5 * spent)  # an endless loop counts as found
            print(f"{mutant.area}: {spent:.0f} CPU s without a bug", flush=True)
        passed, spent = run_tests(tests, {mutant.module: source}, limits[mutant.area])
        results.append({**asdict(mutant), "killed": not passed, "seconds": round(spent, 1)})
        said = "LIVES" if passed else "killed"
        print(f"{said}  zoo/{mutant.module.replace('.', '/')}.py:{mutant.line}  {mutant.before}  ->  {mutant.after}",
              flush=True)  # fmt: skip
        if args.output:
            args.output.write_text(json.dumps(results, indent=1) + "\n")
    killed = sum(result["killed"] for result in results)
    print(f"{killed} of {len(results)} killed: {killed / len(results):.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
