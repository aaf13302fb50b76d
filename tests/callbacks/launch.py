"""Start processes of a test side by side, and let none of them outlive it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack


def launch(*commands: list[object], timeout: float = 240, warnings: str = "ignore") -> list[str]:
    """Run Python's arguments side by side to a good end, and return what each wrote to stderr."""
    env = {**os.environ, "PYTHONWARNINGS": warnings}
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        running = [
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=env,
                stdout=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
            )
            for command, file in zip(commands, files, strict=True)
        ]
        try:
            for process in running:
                process.wait(timeout)
        finally:
            for process in running:
                _end(process)
            said = [file.seek(0) or file.read() for file in files]
        assert [process.returncode for process in running] == [0] * len(running), "\n".join(s[-3000:] for s in said)
        return said


def free_port() -> int:
    """Return a port of the loopback device that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end(process: subprocess.Popen) -> None:
    """Ask a process and its group to stop, which lets a launcher stop its workers; then make them."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, sign)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                continue
