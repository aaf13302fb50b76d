"""What the README and the docs show must run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from criteria_list import concrete

import pl_prune

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_blocks_are_found():
    assert len(BLOCKS) == 2


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
@pytest.mark.parametrize("block", BLOCKS, ids=["lightning", "torch"])
def test_a_block_of_the_readme_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    exec(block, space)
    pruned = space["YourModule" if "YourModule" in space else "masks"]
    assert pruned is not None
    assert "YourModule" not in space or (tmp_path / "runs" / "mine" / "report.json").is_file()


def test_the_page_on_criteria_shows_a_working_one():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adding_a_criterion.md").read_text(), re.DOTALL)
    space: dict = {}
    exec(code.replace("from dataclasses", "from __future__ import annotations\nfrom dataclasses", 1), space)
    import torch
    from torch import nn

    import pl_prune as plp

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    batch = [(torch.ones(2, 3),)]
    loss = lambda m, b: m(b[0]).square().mean()  # noqa: E731
    own = plp.score(model, space["WeightedGradient"](), batch, loss)
    assert torch.allclose(own["0.weight"], plp.score(model, plp.SNIP(), batch, loss)["0.weight"])


def test_the_page_on_baselines_shows_masks_of_the_sparsity_asked_for():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "baselines.md").read_text(), re.DOTALL)
    space: dict = {}
    exec(code, space)
    for name, asked in {"random_ticket": 0.9, "expander": 0.9, "two_of_four": 0.5}.items():
        assert space[name].sparsity() == pytest.approx(asked, abs=1e-3), name


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_every_criterion_and_allocation_is_listed(page):
    text = (ROOT / page).read_text()
    for cls in concrete(pl_prune.Criterion) + (concrete(pl_prune.Allocation) if page == "README.md" else []):
        assert f"`{cls.__name__}`" in text, cls.__name__


@pytest.mark.parametrize("page", ["README.md", *[f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")]])
def test_no_table_is_left_to_be_filled_in(page):
    assert not re.findall(r"^[A-Z0-9]+$", (ROOT / page).read_text(), re.MULTILINE)


def test_every_test_that_a_page_names_exists():
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "papers_and_code.md").read_text())
    defined = {name for p in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", p.read_text())}
    assert len(named) > 5
    assert set(named) <= defined


def test_every_link_leads_somewhere():
    links = 0
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
            links += 1
    assert links > 5
