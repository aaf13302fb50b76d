"""The book is built strictly: every page is in it, every link and anchor leads somewhere, every public name is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fragments import PAGES, ROOT

import pl_prune

pytest.importorskip("mkdocs", reason="pip install 'pl_prune[docs]'")
pytest.importorskip("mkdocstrings", reason="pip install 'pl_prune[docs]'")


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return site


def test_it_has_every_page(book):
    built = {path.parent.name for path in book.glob("*/index.html")} | {"index"}
    assert set(PAGES) <= built


def test_every_public_name_is_in_the_reference(book):
    text = "".join(path.read_text() for path in sorted((book / "reference").glob("*/index.html")))
    anchors = set(re.findall(r'id="pl_prune\.(\w+)"', text))
    assert anchors == set(pl_prune.__all__) - {"__version__"}


def test_doctests_are_shown_as_code(book):
    assert "&gt;&gt;&gt;" in (book / "reference" / "core" / "index.html").read_text()
    for path in (book / "reference").glob("*/index.html"):
        assert "<p>&gt;&gt;&gt;" not in path.read_text()
        assert "<blockquote>" not in path.read_text()


def test_it_asks_no_other_host_for_anything(book):
    loaded = re.compile(r'<(?:script|img|link)[^>]*(?:src|href)="(https?://[^"]+)"')
    assert {host for path in book.rglob("*.html") for host in loaded.findall(path.read_text())} == set()
