"""What a study says while it runs."""

from __future__ import annotations

import io
import re
import sys

import pytest

from pl_prune.commands import progress as room
from pl_prune.commands.progress import Progress


class Work:
    """A study of three runs, as far as its progress goes."""

    total = 3

    def __init__(self):
        self.done, self.failed, self.busy = [], {}, ["a_seed=[0]"]

    def results(self):
        return self.done

    def failures(self):
        return self.failed

    def running(self):
        return self.busy


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")


def bare(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_away_from_a_terminal_each_event_is_a_line():
    stream = io.StringIO()
    with Progress(Work(), stream) as progress:
        progress.say("0 of 3 runs are done")
        progress.say("a: started")
    assert stream.getvalue() == "pl-prune study: 0 of 3 runs are done\npl-prune study: a: started\n"


def test_a_terminal_shows_done_running_and_failed():
    stream, work = Screen(), Work()
    with Progress(work, stream) as progress:
        progress.say("a_seed=[0]: started")
        work.done, work.failed, work.busy = ["a"], {"b": "ValueError"}, []
        progress.say("b: FAILED, ValueError: [red]")
    text = bare(stream.getvalue())
    assert "0 of 3 runs done" in text
    assert "running a_seed=[0]" in text
    assert "b: FAILED, ValueError: [red]\n" in text
    assert re.search(r"1 of 3 runs done .* 1 failed", text.splitlines()[-1])
    assert "started" not in text


def test_work_goes_on_when_nobody_listens():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with Progress(Work(), Gone()) as progress:
        progress.say("a: started")


SPEAK = "import sys; sys.stderr.write({said!r}); sys.exit({status})"


@pytest.mark.parametrize("screen", [True, False])
def test_workers_are_waited_for_and_heard(screen, monkeypatch, tmp_path):
    said = "pl-prune study: a: started\npl-prune study: Expected x; found y. Fix.\na warning\n"
    (tmp_path / "pl_prune.py").write_text(SPEAK.format(said=said, status=2))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    stream = Screen() if screen else io.StringIO()
    with Progress(Work(), stream) as progress:
        assert progress.follow(2, ["study"]) == [2, 2]
    text = bare(stream.getvalue())
    assert text.count("Expected x; found y. Fix.\n") == (1 if screen else 0)  # elsewhere they speak for themselves
    assert text.count("a warning\n") == (2 if screen else 0)
    assert "started" not in text


def test_an_interrupt_ends_the_workers(monkeypatch, tmp_path):
    (tmp_path / "pl_prune.py").write_text("import time; time.sleep(60)")
    monkeypatch.chdir(tmp_path)
    started = []

    class Process(room.subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

        def wait(self, timeout=None):
            if timeout is None and self.poll() is None and sys._getframe(1).f_code.co_name in ("<listcomp>", "follow"):
                raise KeyboardInterrupt
            return super().wait(0.1 if timeout == 10 else timeout)

    monkeypatch.setattr(room.subprocess, "Popen", Process)
    with Progress(Work(), io.StringIO()) as progress, pytest.raises(KeyboardInterrupt):
        progress.follow(2, [])
    assert len(started) == 2
    for process in started:
        assert room.subprocess.Popen.wait(process, 10) == -15
