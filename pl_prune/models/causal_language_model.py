"""The next token of a text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from pl_prune.models.from_transformers import load_network

_IGNORED = -100


class Perplexity(MeanMetric):
    """The exponential of the mean negative log-likelihood of a token, over all tokens of all batches.

    Update it with the mean of a batch, and as `weight` the number of its tokens. torchmetrics' `Perplexity` takes the
    logarithm after the softmax, and is infinite where that underflows.
    """

    def compute(self) -> Tensor:
        """Return the perplexity.

        Returns:
            A scalar.
        """
        return super().compute().exp()


class CausalLanguageModel(LightningModule):
    """Train any decoder of transformers by the cross-entropy of the next token, and log loss and perplexity.

    It knows nothing of pruning. The optimizer comes from the command line or the recipe; in Python, give
    `configure_optimizers`.

    Args:
        network: Name on the Hugging Face Hub, or a folder with config.json and weights.
        pretrained: Whether to load weights; without, config.json is enough, and weights are drawn anew.

    Shape:
        Batches are dicts with `input_ids` (N, T); where there are `labels` (N, T), those of -100 do not count, else
        tokens that `attention_mask` (N, T) leaves out do not.

    Raises:
        PruneError: If there is no such network.
    """

    def __init__(self, network: str, pretrained: bool = True) -> None:
        super().__init__()
        self.network = load_network("AutoModelForCausalLM", network, pretrained)
        self.network.config.use_cache = False  # keys and values of a text that does not go on
        self.val_perplexity, self.test_perplexity = Perplexity(), Perplexity()
        self.example_input_array = {"input_ids": torch.arange(8)[None]}  # few tokens are enough to trace groups

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits.

        Args:
            input_ids: Tokens (N, T).
            attention_mask: 1 for tokens, 0 for padding (N, T).

        Returns:
            Logits of the token after each (N, T, vocabulary).
        """
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        return self.network(input_ids=input_ids, **mask).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a training batch.

        Args:
            batch: Tokens.
            batch_idx: Its number in the epoch.

        Returns:
            Mean cross-entropy of the next token.
        """
        loss, _ = self._loss(batch)
        self.log("train/loss", loss, on_epoch=True, on_step=False, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss and perplexity of validation.

        Args:
            batch: Tokens.
            batch_idx: Its number in the epoch.
        """
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss and perplexity of the test.

        Args:
            batch: Tokens.
            batch_idx: Its number in the epoch.
        """
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the likeliest token after each.

        Args:
            batch: Tokens.
            batch_idx: Its number in the epoch.

        Returns:
            Tokens (N, T).
        """
        return self(batch["input_ids"], batch.get("attention_mask")).argmax(2)

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a token, and how many tokens count."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        labels = batch.get("labels")
        if labels is None:
            labels = ids if mask is None else ids.masked_fill(mask == 0, _IGNORED)
        logits, wanted = self(ids, mask)[:, :-1].float(), labels[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=_IGNORED)
        return loss, (wanted != _IGNORED).sum()

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        loss, tokens = self._loss(batch)
        metric = getattr(self, f"{stage}_perplexity")
        metric.update(loss, tokens)
        self.log(f"{stage}/loss", loss, on_epoch=True, on_step=False, batch_size=len(batch["input_ids"]))
        self.log(f"{stage}/perplexity", metric, on_epoch=True, on_step=False, prog_bar=True)
