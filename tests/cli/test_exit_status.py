"""What a script sees: 0 done, 1 left or failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from pl_prune.__main__ import COMMANDS, HELP, main

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])


def test_every_command_is_in_the_help_and_has_its_room():
    for title, group in COMMANDS.items():
        assert title in HELP
        for name, what in group.items():
            assert f"  {name:<11} {what}\n" in HELP
            room = "trainer" if "training" in title else name.replace("-", "_")
            assert callable(importlib.import_module(f"pl_prune.commands.{room}").run)


@pytest.mark.parametrize("command", [name for group in list(COMMANDS.values())[1:] for name in group])
def test_every_command_of_ours_has_help_and_refuses_unknown_options(command, capfd):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    elsewhere = ("inspect", "masks")  # the help of `fit`, and of each of its own commands
    assert "--json" in capfd.readouterr().out or command in elsewhere
    with pytest.raises(SystemExit, match="2"):
        main([command, "--no-such-option"])


@pytest.mark.parametrize(("typed", "meant"), [("studdy", "study"), ("inspct", "inspect"), ("Doctor", "doctor")])
def test_an_unknown_command_is_answered_with_the_closest(typed, meant, capfd):
    assert main([typed]) == 2
    assert f"found '{typed}'. Did you mean `pl-prune {meant}`?" in capfd.readouterr().err


@pytest.mark.parametrize("by_lightning", [False, True])
def test_an_interrupt_ends_in_130_without_a_traceback(by_lightning, monkeypatch, capfd):
    def interrupted(argv):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if by_lightning:
                sys.exit(1)
            raise

    monkeypatch.setattr(importlib.import_module("pl_prune.commands.doctor"), "run", interrupted)
    assert main(["doctor"]) == 130
    assert capfd.readouterr().err == "pl-prune doctor: interrupted\n"


def test_other_exits_and_errors_of_others_pass(monkeypatch):
    room = importlib.import_module("pl_prune.commands.doctor")
    for error in (SystemExit(3), ImportError("no module of yours"), ValueError("not ours")):

        def fail(argv, error=error):
            raise error

        monkeypatch.setattr(room, "run", fail)
        with pytest.raises(type(error), match=str(error)):
            main(["doctor"])


def test_jsonargparse_that_is_missing_is_named_with_its_extra(monkeypatch, capfd):
    def fail(argv):
        raise ModuleNotFoundError("Requirement 'jsonargparse[signatures]>=4.39' not met")

    monkeypatch.setattr(importlib.import_module("pl_prune.commands.trainer"), "run", fail)
    assert main(["fit"]) == 2
    assert "pip install 'pl_prune[cli]'" in capfd.readouterr().err


def test_ctrl_c_during_a_real_fit():
    words = ["fit", "--config", QUICKSTART, "--trainer.max_epochs=5000", "--trainer.enable_progress_bar=false"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pl_prune", *words]
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, preexec_fn=heed) as process:
        try:
            metrics, deadline = Path("runs/quickstart/snip/metrics.jsonl"), time.monotonic() + 120
            while not (metrics.is_file() and metrics.read_text()):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            error = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error
    assert error.endswith("pl-prune fit: interrupted\n")


def test_a_fit_without_batches_is_refused(capfd):
    assert main(["fit", "--config", QUICKSTART, "--trainer.limit_train_batches=0"]) == 2
    assert "found trainer.limit_train_batches=0. Leave it out" in capfd.readouterr().err
    assert not Path("runs").exists()


def test_a_refused_fit_leaves_no_configuration():
    assert main(["fit", "--config", QUICKSTART, "--prune.select.include=[network.fetures.0]"]) == 2
    assert {p.name for p in Path("runs").rglob("*") if p.is_file()} <= {"lock"}


def test_a_damaged_record_of_a_study_is_named(capfd):
    Path("study.json").write_text("{")
    assert main(["report", "."]) == 2
    assert "pl-prune report: Expected a study's record in 'study.json'; found something else" in capfd.readouterr().err
