"""`zoo app`: a page to classify, restore, generate and look models up, with the shipped weights and the user's own."""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path
from typing import Any

from zoo.cli.output import UsageError, at_least, hush, note, number
from zoo.sources import no_shipped_weights


def add_parser(subparsers: Any) -> None:
    """Add `app`."""
    parser = subparsers.add_parser(
        "app",
        help="serve a page to try all this in a browser",
        description="Serve a page with four tabs: classify, restore, generate, explore. It works offline with the "
        "shipped weights, and with models of yours. Pictures of visitors are deleted.",
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="more models: weight files, folders, pipelines, Hub ids"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 is every network")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="a public address of Gradio's for 72 hours")
    parser.add_argument("--max-file-size", default="64mb", metavar="SIZE", help="of an upload (default: 64mb)")
    parser.add_argument(
        "--max-pixels", type=number, default=24e6, metavar="N", help="most pixels of a picture (default: 24M)"
    )
    parser.add_argument("--max-queue", type=int, default=32, metavar="N", help="most requests that wait (default: 32)")
    parser.add_argument("--keep", type=number, default=600, metavar="SECONDS", help="files live so long (default: 600)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument(
        "--space", type=Path, metavar="FOLDER", help="write a Hugging Face Space with this page instead"
    )
    parser.add_argument("--force", action="store_true", help="replace the files of an older Space")


def run(args: argparse.Namespace) -> int:
    """Serve the page until it is stopped."""
    if args.space is not None:
        from zoo.cli.app.space import write_space

        for file in write_space(args.space, force=args.force):
            print(file)
        return 0
    at_least(args, max_queue=1, max_pixels=1, keep=10)
    if args.port is not None and not 1 <= args.port <= 65535:
        raise UsageError(f"--port goes from 1 to 65535, got {args.port}.")
    from zoo.cli.app.offers import Offers
    from zoo.cli.app.service import Limits, Service

    offers = Offers.of(args.models)  # a wrong name is said before anything is imported
    if (absent := no_shipped_weights()) is not None:
        if not args.models:
            raise UsageError(f"{absent} Or name models of yours.")
        note(args, absent)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError("`zoo app` needs the 'app' extra (gradio is missing): pip install 'ffn-zoo[app]'.") from error
    hush(argparse.Namespace(quiet=True, json=False), diffusers=True)
    from zoo.cli.app.page import serve

    stop = threading.Event()
    for name in ("SIGTERM", "SIGHUP"):  # of a service manager, of a closed terminal: what visitors uploaded goes, too
        if hasattr(signal, name) and threading.current_thread() is threading.main_thread():
            signal.signal(getattr(signal, name), lambda number, frame: stop.set())
    service = Service(offers, Limits(pixels=int(args.max_pixels)), device=args.device)

    def tell(address: str) -> None:
        print(address if args.quiet else f"The page is at {address} (Ctrl+C stops it).", flush=True)
        if args.share:
            note(args, "It can be reached from the internet, by everyone who has the address.")

    serve(
        service,
        host=args.host,
        port=args.port,
        share=args.share,
        open_browser=args.open,
        max_file_size=args.max_file_size,
        max_queue=args.max_queue,
        keep=int(args.keep),
        tell=tell,
        stop=stop,
    )
    return 0
