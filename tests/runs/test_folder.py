from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from refusal import expect_refusal

import pl_prune as plp
from pl_prune.runs.lock import is_locked, locked

MASKS = plp.MaskSet({"a.weight": torch.tensor([[True, False, True]]), "b.weight": torch.zeros(4, 2, dtype=torch.bool)})


def test_a_finished_run_is_read_back(tmp_path):
    run = plp.RunFolder(tmp_path / "run")
    run.begin(0)
    run.log({"epoch": 0, "step": 5, "seconds": 1.0, "acc": 0.5})
    assert not run.finished
    run.finish({"metrics": {"acc": 0.5}}, MASKS)
    again = plp.RunFolder(tmp_path / "run")
    assert again.finished
    assert again.result() == {"metrics": {"acc": 0.5}}
    assert again.metrics() == [{"epoch": 0, "step": 5, "seconds": 1.0, "acc": 0.5}]
    assert again.masks() == MASKS
    assert again.report() == {}
    assert (
        json.loads((again.path / "environment.json").read_text())["packages"]["torch"]
        == torch.__version__.split("+")[0]
    )
    assert not list(again.path.glob("*.part"))


def test_going_on_drops_what_will_be_done_again(tmp_path):
    run = plp.RunFolder(tmp_path)
    run.begin(0)
    for step in (5, 10, 15):
        run.log({"step": step})
    run.begin(10)
    assert run.metrics() == [{"step": 5}, {"step": 10}]
    run.begin(0)
    assert run.metrics() == []


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    run = plp.RunFolder(tmp_path)
    run.begin(0)
    run.log({"step": 5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')
    assert run.metrics() == [{"step": 5}]


def test_what_is_not_a_finished_run_is_named(tmp_path):
    with expect_refusal("found no run", str(tmp_path)):
        plp.RunFolder(tmp_path).result()
    run = plp.RunFolder(tmp_path)
    run.begin(0)
    with expect_refusal("found one that is not finished", "Run its command again", "--ckpt_path"):
        run.result()
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\nno JSON\n{"epoch": 2')
    with expect_refusal("line 2 of", "metrics.jsonl", "Delete the line"):
        run.metrics()
    for text in ("{", "[1]"):
        (tmp_path / "result.json").write_text(text)
        with expect_refusal("result.json", "Delete the file"):
            run.result()
    run.finish({}, MASKS)
    whole = (tmp_path / "masks.safetensors").read_bytes()
    (tmp_path / "masks.safetensors").write_bytes(whole[:-3])
    with expect_refusal("masks.safetensors", "damaged"):
        run.masks()


def test_a_run_is_held_by_one_process_and_free_after_it(tmp_path):
    run = plp.RunFolder(tmp_path / "run")
    code = (
        "import sys, time; from pathlib import Path; from pl_prune.runs.lock import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, run.path / "lock"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    try:
        assert is_locked(run.path / "lock")
        with expect_refusal(str(run.path), f"process {holder.pid}", "Wait"), run.locked():
            pytest.fail("held twice")
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert not is_locked(run.path / "lock")
    with run.locked():
        assert is_locked(run.path / "lock")


def test_a_lock_can_be_waited_for(tmp_path):
    with locked(tmp_path / "lock", wait=True):
        assert is_locked(tmp_path / "lock")
    assert not is_locked(tmp_path / "lock")
    assert not is_locked(tmp_path / "nothing")
