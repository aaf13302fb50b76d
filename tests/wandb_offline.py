"""Weights & Biases with no network: its own agent on a sweep file, and what an offline run left on the disk."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

pytest.importorskip("wandb")

_SERVICE = "wandb.apis.public.sweeps"
_BLOCK, _HEAD = 32768, 7  # of the log format of LevelDB, in which wandb keeps its records


def run_sweep(sweep: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], folder: Path, path: Path) -> None:
    """Let wandb's agent start runs of a sweep one after another, with given values, in a folder; all must end well.

    Only the three questions that the agent asks the sweep's server are answered here. The rest is wandb's: macros, the parameter
    file, the environment and the processes.

    Args:
        sweep: The content of the sweep file.
        runs: Values by parameter, for each run.
        folder: Where `program` runs.
        path: Where `program` is found before anywhere else.
    """
    try:
        from wandb.apis.public.sweeps import _agent_heartbeat, _register_agent, _sweep_with_runs  # noqa: F401
        from wandb.wandb_agent import Agent

        assert Agent.POLL_INTERVAL
    except (ImportError, AttributeError) as error:
        pytest.skip(f"wandb's agent has other private names than those of wandb 0.31: {error}")
    orders = iter([
        *(
            {"type": "run", "run_id": f"run{i}", "program": sweep["program"], "args": _args(v)}
            for i, v in enumerate(runs)
        ),
        {"type": "exit"},
    ])
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_SWEEP_ID": "sweep", "WANDB_DIR": str(folder)}
    before = Path.cwd()
    os.chdir(folder)
    try:
        with (
            mock.patch.dict(os.environ, {**quiet, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}),
            mock.patch(f"{_SERVICE}._sweep_with_runs", return_value={"config": yaml.safe_dump(dict(sweep))}),
            mock.patch(f"{_SERVICE}._register_agent", return_value={"id": "agent"}),
            mock.patch(
                f"{_SERVICE}._agent_heartbeat", lambda api, agent, metrics, busy: [] if busy else [next(orders)]
            ),
            mock.patch("wandb.Api", mock.Mock()),
            mock.patch.object(Agent, "POLL_INTERVAL", 0.05),
        ):
            agent = Agent(None, multiprocessing.Queue(), sweep_id="sweep")
            agent.run()
    finally:
        os.chdir(before)
    assert (agent._finished, agent._failed) == (len(runs), 0)


def _args(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"value": value} for name, value in values.items()}


def offline_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    """Read back the only offline run below a folder: its configuration, its history, and where its media are."""
    try:
        from wandb.proto.wandb_internal_pb2 import Record
    except ImportError as error:
        pytest.skip(f"wandb's records are elsewhere than in wandb 0.31: {error}")
    (file,) = folder.rglob("*.wandb")
    config: dict[str, Any] = {}
    history = []
    for content in _records(file.read_bytes()):
        record = Record.FromString(content)
        for update in [*record.run.config.update, *record.config.update]:
            config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
        if record.history.item:
            items = record.history.item
            history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return config, history, file.parent / "files"


def _records(content: bytes) -> Iterator[bytes]:
    at, parts = _HEAD, b""  # the file's own head is as long as that of a record
    while at + _HEAD <= len(content):
        if _BLOCK - at % _BLOCK < _HEAD:
            at += _BLOCK - at % _BLOCK
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + _HEAD : at + _HEAD + size]
        at += _HEAD + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""
