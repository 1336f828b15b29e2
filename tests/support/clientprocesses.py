"""Processes for clients that start with torch and the clients' libraries imported: forks of one that has done so.

Nearly all of the time of a client's process goes into its imports.  Each client still runs in a process of its own,
which starts from libraries that nobody has used.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

from lora_fx.exporters import running

FRESH = running._run
"""What lora_fx itself does."""
LIBRARIES = (
    "peft",
    "transformers",
    "diffusers.loaders.lora_pipeline",
    "diffusers.models.unets.unet_2d_condition",
    "torchao",
)
"""What is imported beforehand, of what is installed; the others start threads when they are imported, or import fast."""


class ClientProcesses:
    """Forks a process for each client from one that is started for the first."""

    def __init__(self) -> None:
        self._parent: subprocess.Popen[str] | None = None

    def run(self, work: str, result: str, seconds: float) -> subprocess.CompletedProcess[str]:
        """Do what `running._run` does."""
        if self._parent is None:
            code = f"import sys; sys.path.extend({sys.path!r}); from {__name__} import serve; serve()"
            command = [sys.executable, "-c", code]
            environment = {**os.environ, **running._OFFLINE}
            self._parent = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        errors = f"{result}.stderr"
        self._parent.stdin.write(json.dumps([work, result, errors, seconds]) + "\n")
        self._parent.stdin.flush()
        status = json.loads(self._parent.stdout.readline())
        if status is None:
            raise subprocess.TimeoutExpired("client", seconds)
        return subprocess.CompletedProcess("client", status, "", Path(errors).read_text())

    def close(self) -> None:
        if self._parent is not None:
            self._parent.kill()
            self._parent.communicate()


def serve() -> None:
    """Read (work, result, errors, seconds) from standard input, a line each; write the exit status of each client."""
    warnings.simplefilter("ignore")
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        work, result, errors, seconds = json.loads(line)
        child = os.fork()
        if child == 0:
            _be_client(work, result, errors)
        answers.write(json.dumps(_status(child, seconds)) + "\n")
        answers.flush()


def _be_client(work: str, result: str, errors: str) -> None:
    kept = os.open(errors, os.O_WRONLY | os.O_CREAT)
    os.dup2(kept, 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    status = 1
    try:
        exec(running._START.format(paths=sys.path, work=work, result=result), {})
        status = 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        assert sys.__stderr__ is not None
        sys.__stderr__.flush()
    finally:
        os._exit(status)


def _status(child: int, seconds: float) -> int | None:
    """Return how a child has ended, as `subprocess` says it; None after killing one that took too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
