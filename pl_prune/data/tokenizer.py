"""Tokenizers of transformers, by name or folder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pl_prune.core.types import PruneError


def load_tokenizer(name: str, length: int) -> Any:
    """Load a fast tokenizer.

    Args:
        name: A name on the Hugging Face Hub, or a folder with the tokenizer's files.
        length: How many tokens a sample is to have.

    Returns:
        The tokenizer.

    Raises:
        PruneError: If transformers is missing, there is no such tokenizer, it is a slow one, or its network does not
            read so many tokens.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise PruneError(
            f"Expected transformers for the tokenizer {name!r}; found it missing. Run `pip install 'pl_prune[zoo]'`."
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise PruneError(
            f"Expected a tokenizer under the name {name!r}; found none ({str(error).splitlines()[0][:200]}). Set "
            "data.init_args.tokenizer to a name on the Hugging Face Hub or to a folder with tokenizer.json or vocab.txt."
        ) from error
    if not tokenizer.is_fast:
        raise PruneError(
            f"Expected a fast tokenizer, which knows where its tokens are in the text; found {type(tokenizer).__name__} "
            f"for {name!r}. Choose a network that has one."
        )
    if length > tokenizer.model_max_length:
        raise PruneError(
            f"Expected at most {tokenizer.model_max_length} tokens a sample, which is what {name!r} reads; found {length}. "
            "Make samples shorter."
        )
    return tokenizer


def check_tokens(ids: Tensor, trainer: Any) -> None:
    """Raise if tokens are not of the vocabulary of the network that is to read them, before a GPU fails on them unnamed.

    Args:
        ids: All tokens.
        trainer: The trainer that asked for the data, or None; its module's `network` is looked at if transformers made it.

    Raises:
        PruneError: If a token is too large.
    """
    network = getattr(getattr(trainer, "lightning_module", None), "network", None)
    if hasattr(network, "get_input_embeddings"):
        known = network.get_input_embeddings().num_embeddings
        if int(ids.max()) >= known:
            raise PruneError(
                f"Expected tokens below {known}, the vocabulary of {type(network).__name__}; found {int(ids.max())}. "
                "Set data.init_args.tokenizer to the name of the network."
            )
