"""The adversarial examples of the batch in training, made once, whoever asks for them first."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor, nn


class Examples:
    """Keep the adversarial examples of one batch, for every callback that trains on them."""

    def __init__(self) -> None:
        self._of: weakref.ref[Tensor] | None = None
        self._when: object = None
        self._made: Tensor | None = None

    def of(self, x: Tensor, when: object, make: Callable[[], Tensor]) -> Tensor:
        """Return the adversarial examples of a batch.

        Args:
            x: Its images: this very tensor, not one like it.
            when: The place of the batch in the training, since a loader may give the same tensor again.
            make: Attacks the batch, when it is asked for the first time.

        Returns:
            The examples, the same tensor each time.
        """
        made = self._made
        if made is None or self._of is None or self._of() is not x or self._when != when:
            made = make()
            self._of, self._when, self._made = weakref.ref(x), when, made
        return made

    def forget(self) -> None:
        """Let the batch go."""
        self._of = self._when = self._made = None


_BY_MODULE: weakref.WeakKeyDictionary[nn.Module, Examples] = weakref.WeakKeyDictionary()


def examples_of(module: nn.Module) -> Examples:
    """Return the examples that a module is trained on.

    Args:
        module: The module.

    Returns:
        One object for each module.
    """
    return _BY_MODULE.setdefault(module, Examples())
