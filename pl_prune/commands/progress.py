"""What a study says while it runs: a display of done, running and failed on a terminal, else a line for each event."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, TextIO

from pl_prune.report.terminal import terminal

if TYPE_CHECKING:
    from pl_prune.runs.study import Study

_MARK = "pl-prune study: "


class Progress:
    """Show the progress of a study, within a `with` statement.

    Args:
        work: The study.
        stream: Where to.
    """

    def __init__(self, work: Study, stream: TextIO) -> None:
        self._work = work
        self._stream = stream
        self._console = terminal(stream)
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self._console is not None:
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar
            from rich.table import Column

            self._bar = Bar(
                TextColumn("{task.completed:.0f} of {task.total:.0f} runs done", markup=False),
                BarColumn(20),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
                console=self._console,
                refresh_per_second=2,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task("", total=self._work.total)
            self._bar.start()
            self._look()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._look()
            self._bar.stop()

    def say(self, line: str) -> None:
        """Tell of an event.

        Args:
            line: In words.
        """
        if self._bar is None:
            with suppress(OSError):  # whoever listened is gone, and the work goes on
                self._stream.write(f"{_MARK}{line}\n")
                self._stream.flush()
            return
        if ": FAILED, " in line:
            self._print(line)
        self._look()

    def _print(self, line: str) -> None:
        from rich.text import Text

        self._bar.console.print(Text(line, "red"), soft_wrap=True)

    def _look(self) -> None:
        done, failed, running = len(self._work.results()), len(self._work.failures()), self._work.running()
        told = ([f"{failed} failed"] if failed else []) + ([f"running {', '.join(running)}"] if running else [])
        self._bar.update(self._task, completed=done, total=self._work.total, description="; ".join(told), refresh=True)

    def follow(self, count: int, command: Sequence[str]) -> list[int]:
        """Start processes that share the machine's cores and GPUs, and wait for them.

        Args:
            count: How many.
            command: Arguments of `pl-prune`.

        Returns:
            Their exit statuses.

        Raises:
            KeyboardInterrupt: If the user ends it; the processes have ended then, too.
        """
        threads = max(1, (os.cpu_count() or 1) // count)
        env = {"OMP_NUM_THREADS": str(threads), **os.environ}
        pipe = None if self._bar is None else subprocess.PIPE
        words = [sys.executable, "-m", "pl_prune", *command]
        processes = [subprocess.Popen(words, env=env | own, stderr=pipe, text=True) for own in gpu_shares(count)]
        try:
            if self._bar is not None:
                self._listen(processes)
            return [process.wait() for process in processes]
        except KeyboardInterrupt:
            for process in processes:  # the terminal has told them as well
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.terminate()
            raise

    def _listen(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        """Take in what the processes say until all have ended."""
        lines: SimpleQueue[str] = SimpleQueue()
        readers = [Thread(target=_read, args=(process, lines), daemon=True) for process in processes]
        for reader in readers:
            reader.start()
        last = ""
        while any(reader.is_alive() for reader in readers) or not lines.empty():
            try:
                line = lines.get(timeout=1).rstrip("\n")
            except Empty:
                self._look()
                continue
            if line.startswith(_MARK + "Expected ") and line != last:  # said by each of them
                self._print(line)
                last = line
            elif line.startswith(_MARK):
                self.say(line.removeprefix(_MARK))
            elif line:
                self._print(line)


def gpu_shares(count: int) -> list[dict[str, str]]:
    """Divide the GPUs that this process sees among processes.

    Args:
        count: How many processes.

    Returns:
        `CUDA_VISIBLE_DEVICES` for each: a share of its own, or where there are more processes than GPUs one GPU, by
        turns; nothing where there are fewer than two GPUs.
    """
    import torch

    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = told.split(",") if told else list(map(str, range(torch.cuda.device_count())))
    if len(gpus) < 2:
        return [{}] * count
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[n::count] or [gpus[n % len(gpus)]])} for n in range(count)]


def _read(process: subprocess.Popen[str], lines: SimpleQueue[str]) -> None:
    assert process.stderr is not None
    with process.stderr as said:
        for line in said:
            lines.put(line)
