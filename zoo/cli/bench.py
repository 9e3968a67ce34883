"""`zoo bench`: models, techniques and caches against their rivals, in one process and in turns."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.catalog import did_you_mean, nearest
from zoo.cli.errors import require_library
from zoo.cli.inputs import ENGINES
from zoo.cli.models import add_model_args, find_model, model_args
from zoo.cli.output import (
    UsageError,
    check_target,
    hush,
    note,
    pick_device,
    print_json,
    print_table,
    progress,
    replacing,
    table,
)
from zoo.cli.pipelines import REQUEST, Plan, add_request, check_request, load_pipeline, plan_calls
from zoo.sources import beside

if TYPE_CHECKING:
    from zoo.bench import Benchmark, Settings
    from zoo.bench.timing import Progress
    from zoo.caching.presets import CacheSetting, Subject

SUITES = {
    "repavit": "merged RePaViT-Large against timm's ViT-Large",
    "repaffn": "RePa FFN in training against the mask formulation",
    "engines": "every backbone family and CFSR x2 on every engine against eager PyTorch: speed and loss",
    "backbones": "each merged backbone against its authors' formulation of the hot block, batch 1 and 16",
    "cfsr": "merged CFSR x2 against the plain formulation",
    "tiling": "memory of tiled restoration against its budget",
    "restorers": "merged and streamed restorers against their authors' formulation, time and memory",
    "caching": "every cache of diffusers against fewer steps in the same time",
    "moe": "a mixture of experts against the masked loop over its experts and the dense layer",
    "ffn": "techniques that make feed-forward layers smaller, by budget, on a trained model, with rivals",
    "kernels": "Triton kernels against eager and compiled PyTorch and library calls; on a CPU, plain formulas",
    "policy": "caches on a diffusion policy: plans a second and success against fewer steps",
}
"""Named benchmarks; the same names as `zoo.bench.suites.SUITES`, which costs the import of torch."""

_PLOTS = (".png", ".svg", ".pdf")
_PRECISIONS = ("fp32", "bf16", "fp16", "int8")
"""The same names as `zoo.bench.grid.PRECISIONS`, which costs the import of torch."""
_STEPS = 25
_CACHES = (
    "step-forecast", "cg-taylor", "bac", "bac-shared", "taylorseer", "diffusers-taylorseer", "first-block", "mag",
    "pyramid", "faster", "sea", "text-kv",
)  # fmt: skip
"""The same names as `zoo.caching.presets.PRESETS`, which costs the import of torch."""
_PICTURED = ("caching", "engines", "ffn", "kernels", "pipelines")
"""Benchmarks that write a plot beside their table."""

_FFN = {
    "data": "data",
    "model": "model",
    "samples": "samples",
    "budgets": "budgets",
    "recover": "recovery",
    "techniques": "techniques",
    "rival": "rivals",
}
"""Options of `zoo bench ffn`, and what its function calls them."""


_DROPPED = ("20 to 80 % (ms)", "input", "params (M)", "GMACs", "images/s", "taken")
"""Columns that a narrow terminal leaves out, in this order."""


def add_parser(subparsers: Any) -> None:
    """Add `bench`."""
    parser = subparsers.add_parser(
        "bench",
        help="measure speed and memory",
        description="Time models or pipelines in turns, in one process: the first against the second, and further "
        "ones. A model alone runs merged against its training form, a pipeline with --caches without and with them. "
        "Exit code 1: a number that a named benchmark has to reach was "
        "not reached.",
        epilog="named benchmarks: " + "; ".join(f"{name}: {what}" for name, what in SUITES.items()),
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="models by name, file, folder or Hub id; pipelines likewise; named benchmarks, or all",
    )
    parser.add_argument(
        "--batch", metavar="N,M", help="inputs of one call (default: 4; or the benchmark's own); several of models"
    )
    parser.add_argument(
        "--engine",
        metavar="A,B",
        help=f"run each model on each of these, the first being its reference: {', '.join(ENGINES)}; ffn takes one",
    )
    parser.add_argument(
        "--precision",
        metavar="A,B",
        help=f"run each model in each of these, where its engine does: {', '.join(_PRECISIONS)}",
    )
    parser.add_argument(
        "--threads",
        metavar="N,M",
        help="CPU threads (default: OMP_NUM_THREADS, else 2; or the benchmark's own); several of models",
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="timed rounds (default: 15; or the benchmark's own)")
    parser.add_argument(
        "--count", type=int, metavar="N", help="pictures in all that quality is measured on: caching, or pipelines"
    )
    parser.add_argument(
        "--caches",
        metavar="A,B=VALUE",
        help="measure caches on one pipeline, beside fewer steps: "
        f"{', '.join(_CACHES)}, cache-dit; a value sets updates, threshold or interval; all",
    )
    parser.add_argument("--steps", type=int, metavar="N", help=f"of a pipeline's scheduler (default: {_STEPS})")
    add_request(parser)
    parser.set_defaults(device="cpu", is_of_pipelines=False)
    parser.add_argument("--tune", action="store_true", help="find and store the best tiles of kernels first, on a GPU")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="height and width of the models' input")
    add_model_args(parser)
    parser.add_argument("--no-merge", action="store_true", help="leave the models in training form")
    parser.add_argument("--memory", action="store_true", help="measure the models' peak memory too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw quality or work against time: png, svg, pdf")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="write NAME.json and NAME.md there")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    group = parser.add_argument_group("zoo bench ffn", "all leaves it out unless --data is given")
    group.add_argument("--data", metavar="DIR", help="labelled images, as for zoo compress; accuracy needs them")
    group.add_argument(
        "--model", metavar="NAME", help="classifier by name, file or folder; without weights only times are measured"
    )
    group.add_argument("--samples", type=int, metavar="N", help="images for calibration (default: 256)")
    group.add_argument("--budgets", metavar="A,B", help="shares of the work that stay (default: 0.75,0.5,0.35)")
    group.add_argument("--recover", type=int, metavar="STEPS", help="let the best learn from the dense model")
    group.add_argument("--techniques", metavar="A;B", help='such as "prune, activation; RePa" (default: all)')
    group.add_argument(
        "--rival", action="append", metavar="NAME", help="model that was trained smaller; may be given again"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    suites = [name for name in args.names if name in SUITES]
    if args.names == ["all"]:
        suites = [name for name in SUITES if name != "ffn" or args.data]
    _check(args, suites)
    targets = _targets(args, suites)
    for target in targets:
        check_target(target, force=args.force)
    benchmarks = _measure(args, suites)
    if args.json:
        from zoo.bench.report import to_json

        print_json(to_json(benchmarks))
    elif args.quiet:
        for benchmark in benchmarks:
            _print_ratios(benchmark)
    else:
        _print(benchmarks)
    _write(args, suites, benchmarks)
    return 0 if all(goal.reached for benchmark in benchmarks for goal in benchmark.goals) else 1


def _check(args: argparse.Namespace, suites: list[str]) -> None:
    """Refuse calls that make no sense, before torch is imported."""
    if suites and len(suites) != len(args.names) and args.names != ["all"]:
        raise UsageError(f"Give models or named benchmarks, not both; named: {', '.join(suites)}.")
    if suites:
        for option in ("size", "model_args", "no_merge", "memory"):
            if getattr(args, option):
                raise UsageError(f"--{option.replace('_', '-')} is for models; {suites[0]} is a named benchmark.")
        if args.plot and len(suites) > 1:
            raise UsageError("--plot takes one named benchmark; with -o, each that can be drawn gets a plot.")
    if args.data is not None and not Path(args.data).is_dir():
        raise UsageError(f"--data names no folder: {args.data}.{beside(Path(args.data))}")
    if args.data is not None and args.size is not None:
        raise UsageError("Accuracy is measured at the size of the weights: leave out the --size, or the --data.")
    given = [name for name in _FFN if getattr(args, name) is not None]
    if suites and set(suites) & {"ffn", "engines"}:
        given = [] if "ffn" in suites else [name for name in given if name not in ("data", "samples")]
    elif not suites:
        given = [name for name in given if name not in ("data", "samples")]
    if given:
        raise UsageError(f"--{given[0]} is for `zoo bench ffn`.")
    for option, known in (("engine", ENGINES), ("precision", _PRECISIONS)):
        chosen = _words(args, option)
        one_more = suites == ["ffn"] and option == "engine"
        if chosen and not one_more and ((suites and suites != ["engines"]) or args.count is not None):
            raise UsageError(f"--{option} is for models and `zoo bench engines`; give names of models.")
        if one_more and len(chosen) > 1:
            raise UsageError(f"--engine takes one name for ffn, beside eager, got {args.engine}.")
        if wrong := [name for name in chosen if name not in known]:
            hint = did_you_mean(wrong[0], known)
            raise UsageError(f"--{option} takes {', '.join(known)}, got {wrong[0]!r}.{hint}")
    if args.precision is not None and args.dtype != "float32":
        raise UsageError(f"--precision says the type, too: leave out --dtype {args.dtype}.")
    if args.plot and args.plot.suffix.lower() not in _PLOTS:
        raise UsageError(f"--plot writes {', '.join(_PLOTS)}, not {args.plot.name!r}.")
    if args.plot:
        require_library("matplotlib", "--plot")
    given = [option for option in ("caches", "steps", *REQUEST) if getattr(args, option) not in (None, [])]
    if suites and given:
        raise UsageError(f"--{given[0].replace('_', '-')} is for pipelines; {suites[0]} is a named benchmark.")
    if args.count is not None and suites and not {"caching", "ffn"} & set(suites):
        raise UsageError(
            "--count is for `zoo bench caching`, `ffn` and pipelines: pictures that quality is measured on."
        )
    args.batches, args.pools = _counts(args, "batch"), _counts(args, "threads")
    if (several := max(args.batches, args.pools, key=len)) and len(several) > 1 and suites not in ([], ["engines"]):
        option = "batch" if several is args.batches else "threads"
        raise UsageError(f"--{option} takes one number for {suites[0]}, got {getattr(args, option)}.")
    check_request(args, "rounds", "size", "count", "steps", "samples", "recover")
    if args.caches is not None and len(args.names) > 1:
        raise UsageError("--caches takes one pipeline; without it, pipelines are compared with each other.")
    _caches(args)
    if args.tune and ("kernels" not in suites or not args.device.startswith("cuda")):
        raise UsageError("--tune is for `zoo bench kernels --device cuda`: tiles of kernels are found on their GPU.")
    if not suites:
        _check_names(args, given)


def _check_names(args: argparse.Namespace, given: list[str]) -> None:
    """Refuse names of nothing, and pipelines and models together."""
    kinds = {}
    for name in args.names:
        try:
            kinds[name] = find_model(name, weights=False).kind
        except ValueError as error:
            near = nearest(name, list(SUITES), 1) if Path(name).name == name else []
            raise UsageError(f"{error}{f' A named benchmark is called {near[0]}.' if near else ''}") from error
    given += [] if args.count is None else ["count"]
    pipelines = [name for name, kind in kinds.items() if kind == "pipeline"]
    models = [name for name, kind in kinds.items() if kind not in ("pipeline", "hub")]  # a Hub id may be either
    if models and pipelines:
        raise UsageError(f"{models[0]} is a model and {pipelines[0]} a pipeline: give one kind.")
    if models and given:
        raise UsageError(f"--{given[0].replace('_', '-')} is for pipelines; {models[0]} is a model.")
    args.is_of_pipelines = bool(given or pipelines)
    own = ("size", "model_args", "no_merge", "memory", "engine", "precision", "data", "samples")
    for option in own if args.is_of_pipelines else ():
        if getattr(args, option):
            raise UsageError(f"--{option.replace('_', '-')} is for models; {args.names[0]} is a pipeline.")
    for option, numbers in (("batch", args.batches), ("threads", args.pools)) if args.is_of_pipelines else ():
        if len(numbers) > 1:
            raise UsageError(f"--{option} takes one number for pipelines, got {getattr(args, option)}.")
    model_args(args)  # refuses what is not KEY=VALUE
    if args.samples is not None and args.data is None:
        raise UsageError("--samples counts images of --data; give it, too.")


def _caches(args: argparse.Namespace) -> dict[str, float | None]:
    """Return the caches that are asked for, each with its value; None stands for all from mild to strong."""
    found: dict[str, float | None] = {}
    known = [*_CACHES, "cache-dit", "all"]
    for part in [] if args.caches is None else args.caches.split(","):
        name, _, value = part.strip().partition("=")
        if name not in known:
            raise UsageError(f"--caches takes {', '.join(known)}, got {name!r}.{did_you_mean(name, known)}")
        try:
            found[part.strip()] = _number(value) if value else None
        except ValueError as error:
            raise UsageError(
                f"--caches takes NAME=NUMBER, for example cg-taylor=0.03; got {part.strip()!r}."
            ) from error
    return found


def _ffn_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `zoo.bench.ffn.ffn` that are given.

    Raises:
        UsageError: The budgets are no numbers.
    """
    options = {_FFN[name]: getattr(args, name) for name in _FFN if getattr(args, name) is not None}
    if args.engine is not None:
        options["engine"] = args.engine
    if args.budgets is not None:
        try:
            options["budgets"] = tuple(float(part) for part in args.budgets.split(","))
        except ValueError as error:
            raise UsageError(f"--budgets takes shares such as 0.75,0.5, got {args.budgets!r}.") from error
    if args.techniques is not None:
        options["techniques"] = [part.strip() for part in args.techniques.split(";") if part.strip()]
    return options


def _words(args: argparse.Namespace, option: str) -> list[str]:
    """Return the names that an option lists, each once."""
    given = getattr(args, option)
    found = list(dict.fromkeys(name.strip() for name in (given or "").split(",") if name.strip()))
    if given is not None and not found:
        raise UsageError(f"--{option} takes one or more names, got {given!r}.")
    return found


def _counts(args: argparse.Namespace, option: str) -> list[int]:
    """Return the numbers that an option lists, each once; none where it is not given.

    Raises:
        UsageError: One is no whole number, or below 1.
    """
    given = getattr(args, option)
    if given is None:
        return []
    try:
        found = [int(part) for part in given.split(",")]
    except ValueError as error:
        raise UsageError(f"--{option} takes whole numbers such as 1 or 1,16, got {given!r}.") from error
    if min(found) < 1:
        raise UsageError(f"--{option} must be at least 1, got {min(found)}.")
    return list(dict.fromkeys(found))


def _usual_threads() -> int:
    """Return the number of threads where none is asked for: what the environment says to every such program, else 2."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(said) if said.isdecimal() and int(said) > 0 else 2


def _targets(args: argparse.Namespace, suites: list[str]) -> list[Path]:
    files = [] if args.plot is None else [args.plot]
    if args.output is not None:
        files += [args.output / f"{name}.{suffix}" for name in suites or [_unnamed(args)] for suffix in ("json", "md")]
        files += [args.output / f"{name}.png" for name in _PICTURED if name in (suites or [_unnamed(args)])]
    return files


def _unnamed(args: argparse.Namespace) -> str:
    """Return what files are called where the user gave models or pipelines, no named benchmark."""
    if not args.is_of_pipelines:
        return "models"
    return "pipelines" if args.caches is None else "caching"


def _measure(args: argparse.Namespace, suites: list[str]) -> list[Benchmark]:
    from zoo.bench import Grid, Settings, compare_grid, compare_models
    from zoo.bench.grid import PRECISIONS

    hush(args, diffusers=True)

    args.batch = args.batches[0] if args.batches else None
    args.threads = args.pools[0] if args.pools else None if suites else _usual_threads()
    overrides = {name: getattr(args, name) for name in ("batch", "dtype", "threads", "rounds", "count")}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    overrides |= {"device": str(pick_device(args.device)), "tune": args.tune}
    if args.model_args:
        overrides["model_args"] = tuple(model_args(args).items())
    with progress(args) as display:
        task = display.add_task("preparing", total=None)

        def tell(what: str, done: int, total: int) -> None:
            display.update(task, description=what, completed=done, total=total)

        if suites:
            from zoo.bench.suites import run as run_suites  # needs diffusers, which models do not

            options = {"ffn": _ffn_options(args) if "ffn" in suites else {}, "engines": _grid_options(args)}
            return run_suites(suites, tell, options=options, **overrides)
        settings = Settings(**overrides)
        if args.is_of_pipelines:
            return [_measure_pipelines(args, settings, tell)]
        common: dict[str, Any] = dict(size=args.size, merge=not args.no_merge, memory=args.memory, progress=tell)
        varied = _grid_options(args)
        if not varied:
            return [compare_models(args.names, settings, plotted=args.plot is not None, **common)]
        common |= {name: varied.pop(name) for name in ("data", "samples") if name in varied}
        precision = next(name for name, dtype in PRECISIONS.items() if dtype == args.dtype)
        usual = {"precisions": (precision,), "batches": (settings.batch,), "threads": (settings.threads,)}
        return [compare_grid(args.names, Grid(**{**usual, **varied}), settings, **common)]


def _grid_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what of `zoo.bench.grid` is asked for; nothing where one call of each model is to be timed."""
    found: dict[str, Any] = {
        "engines": tuple(_words(args, "engine")),
        "precisions": tuple(_words(args, "precision")),
        "batches": tuple(args.batches),
        "threads": tuple(args.pools),
        "data": args.data,
        "samples": args.samples,
    }
    found = {name: value for name, value in found.items() if value}
    plain = found.keys() <= {"batches", "threads"} and all(len(value) == 1 for value in found.values())
    return {} if plain and args.names != ["engines"] else found


def _number(text: str) -> float:
    """Return a number; whole ones as int, as counts have to be."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _measure_pipelines(args: argparse.Namespace, settings: Settings, tell: Progress) -> Benchmark:
    """Compare pipelines, or caches on one."""
    import torch

    from zoo.bench.pipelines import Sampler, compare_pipelines

    steps = args.steps or _STEPS
    samplers, plans = [], []
    for name in args.names:
        pipe, _ = load_pipeline(args, name)
        plan = plan_calls(args, pipe, name=name, count=args.count, batch=args.batch)
        plans.append(plan)

        def make(number: int, which: range, plan: Plan = plan) -> torch.Tensor:
            return torch.cat(plan.run(number, which=which))

        labels = [item["class_labels"] for item in plan.items] if "class_labels" in plan.items[0] else None
        count, batch = len(plan.items), min(plan.batch, len(plan.items))
        samplers.append(
            Sampler(name=name, pipe=pipe, make=make, count=count, batch=batch, labels=labels, guidance=args.guidance)
        )
    if args.caches is None:
        return compare_pipelines(samplers, settings, steps=steps, progress=tell)
    from zoo.bench.caching import compare_caches
    from zoo.bench.timing import torch_threads
    from zoo.caching.presets import Subject

    (sampler,), (plan,) = samplers, plans
    other = replace(plan, seed=plan.seed + len(plan.items))  # calibrated on other noises than those measured
    with torch_threads(settings.threads):
        subject = Subject(
            pipe=sampler.pipe, run=lambda: other.run(steps, which=other.first), steps=steps, guidance=args.guidance
        )
        return compare_caches(
            sampler.name,
            sampler.make,
            sampler.count,
            _candidates(args, subject),
            subject,
            replace(settings, batch=sampler.batch),
            judge=sampler.judge(settings.device),
            progress=tell,
        )


def _candidates(args: argparse.Namespace, subject: Subject) -> list[CacheSetting]:
    """Return the settings that --caches asks for; what does not fit the pipeline is said and left out."""
    from zoo.bench.cache_dit import cache_dit_settings
    from zoo.caching.presets import CACHE_FAILURES, PRESETS, cache_setting, cache_settings

    found: list[CacheSetting] = []
    for part, value in _caches(args).items():
        name = part.partition("=")[0]
        if name in ("cache-dit", "all"):
            found += cache_dit_settings(subject.steps)
            if name == "cache-dit" and not found:
                raise UsageError("cache-dit is not installed: pip install cache-dit.")
        for one in PRESETS if name == "all" else [name] if name in PRESETS else []:
            try:
                made = cache_settings(subject, [one]) if value is None else [cache_setting(one, subject, value)]
                if value is not None:
                    with made[0].on(subject.pipe):
                        pass  # a value that cannot be is refused before anything is measured
                found += made
            except CACHE_FAILURES as error:
                if name != "all":
                    raise UsageError(f"--caches {part}: {error}") from error
                note(args, f"{PRESETS[one].method} does not work on this pipeline: {error}")
    return found


def _print(benchmarks: list[Benchmark]) -> None:
    from zoo.bench.report import columns, facts, remarks

    for benchmark in benchmarks:
        shown = columns(benchmark)
        headings = [column.heading for column in shown]
        words = [heading for heading in headings[1:] if heading in ("engine", "taken", "precision", "input")]
        numbers = [heading for heading in headings[1:] if heading not in words]
        rows = table(*headings, title=benchmark.title, right=numbers, drop=_DROPPED)
        for entry in benchmark.entries:
            rows.add_row(*(column.text(entry) for column in shown))
        print_table(rows, facts(benchmark.conditions), facts(benchmark.environment), *remarks(benchmark), "")


def _print_ratios(benchmark: Benchmark) -> None:
    """Print name and times as fast, or name and milliseconds, one line an entry."""
    for entry in benchmark.entries:
        value = entry.speedup.median if entry.speedup else entry.time.median if entry.time else None
        if value is not None and entry.name != benchmark.reference:
            print(f"{entry.name}\t{value:.3f}")


def _write(args: argparse.Namespace, suites: list[str], benchmarks: list[Benchmark]) -> None:
    from zoo.bench.report import can_plot, dumps, markdown

    if args.plot is not None:
        with replacing(args.plot, force=args.force) as temporary:
            _draw(benchmarks, suites, temporary)
    if args.output is None:
        return
    for name in suites or [_unnamed(args)]:
        own = [each for each in benchmarks if each.name == name or each.name.startswith(f"{name}_")]
        texts = {"json": dumps(own), "md": "\n".join(map(markdown, own))}
        for suffix, text in texts.items():
            with replacing(args.output / f"{name}.{suffix}", force=args.force) as temporary:
                temporary.write_text(text, encoding="utf-8")
        if name in _PICTURED and (name not in ("caching", "pipelines") or can_plot(own[0])):
            with replacing(args.output / f"{name}.png", force=args.force) as temporary:
                _draw(own, [name], temporary)


def _draw(benchmarks: list[Benchmark], suites: list[str], path: Path) -> None:
    """Draw times as fast of kernels and engines, accuracy of smaller layers, or quality against time of all else."""
    from zoo.bench.report import plot, plot_ratios

    if suites == ["ffn"]:
        from zoo.bench.ffn import plot_quality

        plot_quality(benchmarks[0], path)
    elif suites == ["kernels"]:
        plot_ratios(benchmarks, path)
    elif suites == ["engines"]:
        from zoo.bench.engines import plot_families

        plot_families(benchmarks, path)
    elif benchmarks[0].entries[0].settings:
        from zoo.bench.grid_plot import plot_grid

        plot_grid(benchmarks[0], path)
    else:
        plot(benchmarks[0], path)
