"""The `zoo` command. Nothing here imports torch: a command does when it runs, so that help and lists come at once.

A command is a module of this package with `add_parser(subparsers)` and `run(args) -> exit code`; a module of several
commands sets `run` as a default of each parser. Exit codes: 0 all done, 1 some inputs or the work failed, 2 the call
was wrong.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from zoo.catalog import did_you_mean, nearest
from zoo.cli import (
    app,
    bench,
    classify,
    compress,
    demo,
    evaluate,
    export,
    finetune,
    generate,
    listing,
    moe,
    publishing,
    restore,
    train,
    tuning,
)
from zoo.cli.errors import code_of, missing_library, with_code
from zoo.cli.output import UsageError
from zoo.notices import in_one_line
from zoo.version import __version__

__all__ = ["main", "parse"]

_MODULES = (
    listing, classify, restore, finetune, train, evaluate, generate, tuning, moe, compress, bench, demo, app, export,
    publishing,
)  # fmt: skip
_WRONG_CALL = (ValueError, TypeError, FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are exceptions with the nearest right choice."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if wrong:
            choices = [choice.strip("' ") for choice in wrong[2].split(",")]
            what = message.partition(":")[0].removeprefix("argument ")
            message = f"{wrong[1]!r} is not a {what}.{did_you_mean(wrong[1], choices)} Choices: {', '.join(choices)}."
        raise UsageError(message)


class _Command(_Parser):
    """The parser of one command, with the options that every command has."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        shared = self.add_argument_group("in every command")
        shared.add_argument("--json", action="store_true", help="print the result for programs")
        shared.add_argument("-q", "--quiet", action="store_true", help="print the bare result, no remarks, no progress")
        shared.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _parser() -> tuple[_Parser, Any]:
    parser = _Parser(
        prog="zoo",
        description="Vision and diffusion models whose feed-forward networks are made fast.",
        epilog="`zoo COMMAND --help` explains a command. Models are called NAME or, with weights, NAME.TAG. "
        "The code at the end of an error line leads to its cure in the documents: docs/errors.md.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ffn-zoo {__version__}")
    parser.add_argument("--print-completion", metavar="SHELL", help="print completion for bash, zsh or tcsh")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Command)
    for module in _MODULES:
        known = set(commands.choices)
        module.add_parser(commands)
        for name in commands.choices.keys() - known:
            if commands.choices[name].get_default("run") is None:
                commands.choices[name].set_defaults(run=module.run)
    return parser, commands.choices


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the options of a command as its `run` takes them.

    Args:
        argv: Arguments after the program's name.

    Raises:
        UsageError: There is no such command or option; the message names the nearest.
    """
    parser, commands = _parser()
    if not argv:
        parser.print_help()
        raise SystemExit(2)
    command = argv[0]
    if command == "--print-completion":
        _print_completion(parser, argv[1:])
        raise SystemExit(0)
    if not command.startswith("-") and command not in commands:
        hint = did_you_mean(command, commands)
        raise UsageError(f"There is no command {command!r}.{hint} Commands: {', '.join(commands)}.")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        options = re.findall(r"--[\w-]+|-\w\b", commands[command].format_help())
        near = nearest(unknown[0].partition("=")[0], options, 1) if unknown[0].startswith("-") else []
        raise UsageError(
            f"`zoo {command}` does not take {unknown[0]!r}. "
            + (f"Did you mean {near[0]}?" if near else f"`zoo {command} --help` shows what it takes.")
        )
    return args


def _print_completion(parser: argparse.ArgumentParser, given: list[str]) -> None:
    """Print what a shell needs to complete commands, options, choices and files."""
    import shtab

    shells = list(shtab.SUPPORTED_SHELLS)
    if len(given) != 1 or given[0] not in shells:
        raise UsageError(f"--print-completion takes {', '.join(shells)}; got {' '.join(given) or 'nothing'}.")
    parser.prog = "zoo"
    parsers = [parser]
    for each in parsers:
        for action in each._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += list(dict.fromkeys(action.choices.values()))
            elif not action.choices and action.nargs != 0 and (action.type is Path or action.metavar in _OF_FILES):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, given[0]))


_OF_FILES = ("FILE", "FOLDER", "DIR", "MODEL", "NAME", "NAME.TAG", "PHOTOS")
"""Names of values for which a shell offers files."""


def _run_package() -> None:
    """Run the package itself, which registers the models, where `zoo_command` has put that off."""
    package = sys.modules["zoo"]
    if not hasattr(package, "__all__"):
        spec = package.__spec__
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(package)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `zoo` command.

    Args:
        argv: Arguments after the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8, and terminals need not know Unicode
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if given[:1] == ["train"]:  # its options are Lightning's
        return train.main(given[1:])
    usual = warnings.showwarning
    try:
        args = parse(given)
        warnings.showwarning = in_one_line(usual, quiet=bool(getattr(args, "quiet", False)))
        if args.run.__module__ != listing.__name__:
            _run_package()
        return int(args.run(args))
    except KeyboardInterrupt:
        print("zoo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # every failure is one line here; --debug shows the rest
        if "--debug" in given:
            raise
        said = missing_library(error) or " ".join(str(error).split()) or type(error).__name__
        print(f"zoo: error: {with_code(said, code_of(error))}", file=sys.stderr)
        return 2 if isinstance(error, _WRONG_CALL) else 1
    finally:
        warnings.showwarning = usual
