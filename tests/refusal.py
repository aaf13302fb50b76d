"""How a refusal reads: what was expected, what was found, how to fix it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pl_prune import PruneError


@contextmanager
def expect_refusal(*parts: str) -> Iterator[None]:
    """Pass if the body raises a `PruneError` of the form "Expected A; found B. Fix." that holds every part."""
    with pytest.raises(PruneError) as caught:
        yield
    message = str(caught.value)
    assert re.fullmatch(r"Expected .+; found .+\. \S.+", message, re.DOTALL), message
    for part in parts:
        assert part in message
