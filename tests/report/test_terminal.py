from __future__ import annotations

import io
import json
import math
import re
import sys

import pytest

from pl_prune.report.table import Alarm, Facts, Strong, Table, as_text
from pl_prune.report.terminal import finite, show, show_json

TABLE = Table(
    ("prunable parameter", "kept", "empty kernels", ""),
    [
        ("network.[red]features[/red].0.weight", "255 / 288", "0.0%", ""),
        ("network.features.3.weight", Strong("5,005 / 18,432"), "11.8%", Alarm("COLLAPSED")),
    ],
)
PARTS = [TABLE, "", Facts([("method", "SNIP() at [bold] 0.9"), ("path input to output", Alarm("NO"))]), "/a/path " * 20]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")


def shown(parts) -> str:
    screen = Screen()
    show(parts, screen)
    return screen.getvalue()


def bare(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_what_is_no_terminal_gets_plain_text():
    stream = io.StringIO()
    show(PARTS, stream)
    assert stream.getvalue() == as_text(PARTS) + "\n"
    assert "**5,005 / 18,432**" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("width", [30, 50, 80, 200])
def test_a_table_keeps_to_the_width_and_loses_nothing(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = bare(shown([TABLE])).splitlines()
    assert max(map(len, lines)) <= width
    together = sorted("".join(lines).replace("─", "").replace(" ", ""))
    assert together == sorted("".join([*TABLE.head, *TABLE.rows[0], *TABLE.rows[1]]).replace(" ", ""))


def test_a_wide_terminal_shows_every_cell_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = bare(shown(PARTS))
    for cell in [*TABLE.head, *TABLE.rows[0], *TABLE.rows[1], "SNIP() at [bold] 0.9"]:
        assert cell in text
    assert "**" not in text
    assert ("/a/path " * 20).strip() in text.replace("\n", "")


def test_what_stands_out_is_coloured_and_no_color_is_respected(monkeypatch):
    coloured = shown(PARTS)
    assert re.search(r"\x1b\[1;32m *5,005 / 18,432", coloured)
    assert re.search(r"\x1b\[1;31m *COLLAPSED", coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", shown(PARTS))
    assert bare(shown(PARTS)) == bare(coloured)


def test_a_terminal_that_cannot_draw_gets_plain_text(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert shown(PARTS) == as_text(PARTS) + "\n"


def test_without_rich_text_is_plain(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert shown(PARTS) == as_text(PARTS) + "\n"


def test_an_empty_table_is_its_head():
    assert bare(shown([Table(("run", "sparsity"), [])])).split()[:2] == ["run", "sparsity"]


def test_json_has_null_for_what_is_not_finite():
    stream = io.StringIO()
    show_json({"a": [1.5, math.nan, (math.inf, -math.inf)], 2: {"b": 3, "c": None, "d": "NaN", "e": True}}, stream)
    assert json.loads(stream.getvalue(), parse_constant=pytest.fail) == {
        "a": [1.5, None, [None, None]],
        "2": {"b": 3, "c": None, "d": "NaN", "e": True},
    }
    assert finite(0.1) == 0.1
