"""Real processes of the entry points, forked from one that has imported the libraries.

To import torch, Lightning and transformers takes longer than most runs that tests start. Python's forkserver imports
them once per test run, before any OpenMP region, after which a forked process would hang.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["torch", "lightning.pytorch.cli", "transformers", "datasets", "kvpress", "peft", "torch.utils.tensorboard"]
)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Started:
    """A script of the checkout and its arguments in a process and a process group of its own, in ``folder``; ``log``
    takes what it prints.
    """

    def __init__(self, command: list[str], log: Path, folder: Path = ROOT, **environment: str) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        self.log = log
        given = (command, log, folder, os.environ | environment)
        self.process: BaseProcess = FORKSERVER.Process(target=_main, args=given)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def printed(self) -> str:
        return self.log.read_text()

    def poll(self) -> int | None:
        """The exit code, minus the signal's number where one ended it; None while it runs."""
        return self.process.exitcode

    def wait(self, seconds: float = 300) -> int:
        """The exit code, once it has ended."""
        self.process.join(seconds)
        code = self.poll()
        assert code is not None, f"still running after {seconds} s: {self.printed[-2000:]}"
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End its whole group, ranks and workers too."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.join()


def _main(command: list[str], log: Path, folder: Path, environment: dict[str, str]) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    multiprocessing.set_start_method(None, force=True)  # of what it starts itself, as of a fresh process
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # Lightning reads it when it is imported
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    script = str(ROOT / command[0])
    sys.argv = [script, *command[1:]]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
