"""`zoo verify` and `zoo publish`: check model cards, and put them on the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zoo.catalog import nearest
from zoo.cli.output import FailureError, UsageError, hush, note, print_json, print_table, progress, table
from zoo.sources import beside, cards_dir, no_shipped_weights


def add_parser(subparsers: Any) -> None:
    """Add `verify` and `publish`."""
    parser = subparsers.add_parser(
        "verify",
        help="check model cards and their weights",
        description="Check cards and weights: digests, finite values, strict loading, metrics and protocols, pictures.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME.TAG", help="published weights, or folders of cards")
    parser.add_argument("--all", action="store_true", help="all cards of this distribution")
    parser.set_defaults(run=run_verify)

    parser = subparsers.add_parser(
        "publish",
        help="put a model on the Hugging Face Hub",
        description="Check a model card with its weights, then upload its folder to the Hub in one commit.",
    )
    parser.add_argument("name", metavar="NAME.TAG", help="published weights, or the folder of a card")
    parser.add_argument("--repo-id", required=True, metavar="ORG/NAME", help="repository; it is made if need be")
    parser.add_argument("--dry-run", action="store_true", help="check and list the files, upload nothing")
    parser.add_argument("--token", help="access token (default: that of `hf auth login`, or HF_TOKEN)")
    parser.add_argument("--message", help="first line of the commit")
    parser.set_defaults(run=run_publish)


def _folder(name: str) -> Path:
    """Return the card folder of a published name, or of a path."""
    known = {card.parent.name: card.parent for card in sorted(cards_dir().glob("[!.]*/README.md"))}
    if name in known:
        return known[name]
    if Path(name).is_dir():
        return Path(name).resolve()  # "mine/" and "." have a name
    if Path(name).is_file():
        raise UsageError(f"{name} is a file: name the folder with config.json, weights and card that it lies in.")
    if (absent := no_shipped_weights()) is not None:
        raise UsageError(f"There is no folder {name}. {absent}")
    if "/" in name or "\\" in name:  # no published name has these
        raise UsageError(f"There is no file or folder {name}.{beside(Path(name))}")
    near = nearest(name, list(known))
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(f"There is no card of {name!r}. {hint}Cards: {', '.join(known) or 'none'}.")


def run_verify(args: argparse.Namespace) -> int:
    """Check the cards; exit code 1 if one has a problem."""
    if bool(args.names) == args.all:
        raise UsageError("Give names, or --all." if not args.names else "Give names or --all, not both.")
    named = [_folder(name) for name in args.names]
    if args.all and (absent := no_shipped_weights()) is not None:
        raise UsageError(absent)
    from zoo.cards.card import check_card, published

    folders = published() if args.all else named
    hush(args, diffusers=any((folder / "model_index.json").is_file() for folder in folders))
    found: dict[str, list[str]] = {}
    with progress(args) as bar:
        for folder in bar.track(folders, description="checking"):
            found[folder.name] = check_card(folder)
    bad = sum(bool(problems) for problems in found.values())
    if args.json:
        print_json([{"name": name, "ok": not problems, "problems": problems} for name, problems in found.items()])
    elif args.quiet:
        for name, problems in found.items():
            if problems:
                print(name)
    else:
        rows = table("card", "result")
        for name, problems in found.items():
            rows.add_row(name, "\n".join(problems) or "good")
        print_table(rows, f"{len(found) - bad} of {len(found)} good.")
    return 1 if bad else 0


def run_publish(args: argparse.Namespace) -> int:
    """Check a card and upload it; exit code 1 if the card has a problem."""
    folder = _folder(args.name)
    from zoo import hub

    try:
        hub.check_repo_id(args.repo_id)  # in a dry run, too
    except hub.HubError as error:
        raise UsageError(str(error)) from error
    from zoo.cards.card import check_card

    hush(args, diffusers=(folder / "model_index.json").is_file())
    with progress(args) as bar:
        bar.add_task("checking", total=None)
        problems = check_card(folder)
    files = hub.files_of(folder)
    result: dict[str, Any] = {
        "name": folder.name,
        "repo_id": args.repo_id,
        "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
        "problems": problems,
        "commit": None,
    }
    if not problems and not args.dry_run:
        result["commit"] = hub.upload(folder, args.repo_id, token=args.token, message=args.message)
    if args.json:
        print_json(result)
    elif args.quiet:
        print(result["commit"] or "")
    else:
        rows = table("file", "bytes", right=("bytes",), title=f"{folder.name} for {args.repo_id}")
        for name, size in result["files"].items():
            rows.add_row(name, f"{size:,}")
        print_table(rows)
    if problems:
        raise FailureError(f"{folder.name} is not fit to publish: {' '.join(problems)}")
    if args.dry_run:
        note(args, "Dry run: the card is good, nothing was uploaded.")
    elif not args.quiet and not args.json:
        print_table(f"Published: {result['commit']}")
    return 0
