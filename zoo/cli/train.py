"""`zoo train`: Lightning's command line with this zoo's tasks and configs; `python train.py` is the same.

What is wrong with a config, data or a checkpoint is said in one line; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.catalog import nearest
from zoo.cli.errors import code_for, with_code
from zoo.sources import configs_dir

__all__ = ["add_parser", "find_config", "main"]


def add_parser(subparsers: Any) -> None:
    """Add `train`, for the list of commands: its arguments are Lightning's and go to `main`."""
    subparsers.add_parser(
        "train",
        help="train, validate or test by a config, from a checkpoint on",
        description="zoo train fit --config classification/repavit_tiny_cifar10 --data.init_args.data_dir DIR",
    )


def run(args: argparse.Namespace) -> int:
    """Train; reached only where the command's name does not come first."""
    return main(sys.argv[2:])


def find_config(name: str) -> str:
    """Return the path of a config.

    Args:
        name: A file; or a config of this zoo as `TASK/NAME`, `NAME`, or its path in the repository.

    Raises:
        ValueError: There is neither; the message names the nearest.
    """
    if Path(name).is_file() or "\n" in name or name.lstrip().startswith("{"):  # jsonargparse takes text, too
        return name
    root = configs_dir()
    known = {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}
    wanted = name.removeprefix("configs/").removesuffix(".yaml")
    found = [path for key, path in known.items() if wanted in (key, key.rpartition("/")[2])]
    if len(found) == 1:
        return str(found[0])
    bare = {key.rpartition("/")[2]: key for key in known}
    near = nearest(wanted, list(known)) or [bare[key] for key in nearest(wanted.rpartition("/")[2], list(bare))]
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Configs of this zoo: {', '.join(known)}."
    raise ValueError(f"There is no config {name!r}. {hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run Lightning's command line.

    Args:
        argv: Arguments after the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        given = _with_paths(given)  # before anything is imported, which takes long
    except ValueError as error:
        return _failed(str(error), 2)
    try:
        import lightning.pytorch.cli  # noqa: F401
    except ImportError as error:
        return _failed(f"Training needs {error.name}, which is missing: pip install 'ffn-zoo[train]'.", 2, module="")
    from zoo.tasks.arguments import explained
    from zoo.tasks.command import run_lightning

    try:
        with warnings.catch_warnings():
            run_lightning(given)
    except argparse.ArgumentError as error:
        if debug:
            raise
        return _failed(explained(str(error)), 2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # every failure is one line here; --debug shows the rest
        if debug:
            raise
        return _failed(reason(error), 1)
    return 0


def _failed(said: str, code: int, module: str = "tasks") -> int:
    """Print the line of an error with the code of its kind, and return the exit code."""
    print(f"error: {with_code(said, code_for(said, module))}", file=sys.stderr)
    return code


def _with_paths(arguments: list[str]) -> list[str]:
    """Replace names of configs by paths, and put them before the options: these change what is in them."""
    from zoo.tasks.arguments import COMMANDS

    configs: list[str] = []
    others: list[str] = []
    left = iter(arguments)
    for argument in left:
        option, equals, value = argument.partition("=")
        if option not in ("--config", "-c"):
            others.append(argument)
        elif (name := value if equals else next(left, None)) is not None:
            configs.append(f"{option}={_readable(find_config(name))}")
        else:
            others.append(argument)  # for the parser, which says what is missing
    first = next((place for place, argument in enumerate(others) if argument in COMMANDS), -1) + 1
    return others[:first] + configs + others[first:]


def _readable(config: str) -> str:
    """Return a config's path; refuse a file that is no YAML, whose name the parser would not tell."""
    import yaml

    if not Path(config).is_file():  # text
        return config
    try:
        settings = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{config} is no YAML that can be read: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{config} holds no settings: expected trainer, model and data, each with its own.")
    return config


def reason(error: BaseException) -> str:
    """Return what an error says in one line; that of its cause where a library has wrapped it."""
    while str(error).startswith("Does not validate against") and error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if lines[1:] and lines[0].startswith("Problem with given class_path"):  # what the class itself has raised
        return lines[1]
    if lines and lines[0].startswith("Caught ") and "worker process" in lines[0]:  # by a DataLoader, with a traceback
        return lines[-1].partition(": ")[2] or lines[-1]
    said = lines[0] if lines else type(error).__name__
    usual = isinstance(error, (ValueError, OSError, ImportError, RuntimeError))
    return said if usual or not lines else f"{type(error).__name__}: {said}"
