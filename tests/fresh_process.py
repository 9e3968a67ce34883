"""Python anew, without the seconds that importing torch and timm takes: a twin of this process, forked before zoo is
imported, forks again for every piece of code.

What imports torch for the first time, or must not import it, is for `subprocess`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path
from typing import Any, BinaryIO

_twin: tuple[BinaryIO, BinaryIO] | None = None  # where work goes in, and exit codes come out


def start() -> None:
    """Fork the twin, which waits for work until this process ends."""
    global _twin
    if not hasattr(os, "fork") or "zoo" in sys.modules:
        return
    work, answers = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(work[1])
        os.close(answers[0])
        _serve(os.fdopen(work[0], "rb"), os.fdopen(answers[1], "wb"))
    os.close(work[0])
    os.close(answers[1])
    _twin = os.fdopen(work[1], "wb"), os.fdopen(answers[0], "rb")


def run(
    code: str, *args: str, cwd: str | Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code as `python -c CODE ARGS` does, in a process that has torch and timm but not zoo.

    Args:
        code: The program.
        args: Of its `sys.argv`, after the first.
        cwd: Its folder; None for that of this process.
        env: Its whole environment; None for that of this process.
    """
    environment = dict(os.environ if env is None else env)
    if _twin is None:
        command = [sys.executable, "-c", code, *args]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        job = dict(code=code, args=args, cwd=str(cwd or Path.cwd()), env=environment, out=str(out), err=str(err))
        _twin[0].write(json.dumps(job).encode() + b"\n")
        _twin[0].flush()
        answer = _twin[1].readline()
        return subprocess.CompletedProcess(["python", "-c", code, *args], int(answer), out.read_text(), err.read_text())


def _serve(work: BinaryIO, answers: BinaryIO) -> None:
    """Fork for every line of work; never return."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of the parent is the end of work
    for line in work:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                work.close()
                answers.close()
                code = _execute(**json.loads(line))
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        answers.write(b"%d\n" % os.waitstatus_to_exitcode(status))
        answers.flush()
    os._exit(0)


def _execute(code: str, args: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> int:
    """Run code in this process; return the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, (path, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), *((path, os.O_WRONLY | os.O_CREAT) for path in (out, err))]
    ):
        os.dup2(os.open(path, flags, 0o600), number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, closefd=False) for number, mode in enumerate(("r", "w", "w"))
    )
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.path[:0] = ["-c", *args], [""]
    main: Any = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    try:
        exec(compile(code, "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
