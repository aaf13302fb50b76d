"""Answers to questions, as spans of a text."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics.text import SQuAD

from pl_prune.core.types import PruneError
from pl_prune.models.from_transformers import load_network

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def best_spans(start: Tensor, end: Tensor, allowed: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the span of each window whose start and end together have the largest logits.

    Args:
        start: Logits of starts (N, T).
        end: Logits of ends (N, T).
        allowed: Whether a token may be the start or the end of an answer (N, T).
        longest: Most tokens of a span.

    Returns:
        The sums of logits, the first and the last tokens of the spans (N,); of equal spans the first.

    Source:
        Devlin et al., BERT, section 4.2. Divergence: all spans are compared, where their code pairs the 20 best starts
        with the 20 best ends.
    """
    start, end = (logits.float().masked_fill(~allowed, -torch.inf) for logits in (start, end))
    ends = F.pad(end, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)
    score, place = (start.unsqueeze(2) + ends).flatten(1).max(1)
    first = place.div(longest, rounding_mode="floor")
    return score, first, first + place % longest


class QuestionAnswerer(LightningModule):
    """Fine-tune an encoder of transformers to answer questions by spans of a text, and log exact match and F1 in percent.

    It takes batches of `pl_prune.data.SQuAD` and knows nothing of pruning. The optimizer comes from the command line or
    the recipe; in Python, give `configure_optimizers`.

    Args:
        network: Name on the Hugging Face Hub, or a folder with config.json and weights.
        pretrained: Whether to load weights; without, config.json is enough, and weights are drawn anew.
        max_answer_length: Most tokens of an answer.

    Raises:
        PruneError: If there is no such network, or answers may have no token.

    Source:
        Devlin et al., BERT, section 4.2, for the loss and the choice of spans; the metric is that of SQuAD 1.1, by
        torchmetrics.
    """

    def __init__(self, network: str, pretrained: bool = True, max_answer_length: int = 30) -> None:
        super().__init__()
        if max_answer_length < 1:
            raise PruneError(
                f"Expected max_answer_length of 1 or more tokens; found {max_answer_length}. Leave it out for 30."
            )
        self.network = load_network("AutoModelForQuestionAnswering", network, pretrained)
        self.max_answer_length = max_answer_length
        self.val_squad, self.test_squad = SQuAD(), SQuAD()
        self.example_input_array = {"input_ids": torch.arange(8)[None]}  # few tokens are enough to trace groups

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of starts and ends.

        Args:
            input_ids: Tokens (N, T).
            attention_mask: 1 for tokens, 0 for padding (N, T).
            token_type_ids: 0 for the question, 1 for the text (N, T), for networks that want them.

        Returns:
            Two tensors (N, T).
        """
        inputs = zip(_INPUTS, (input_ids, attention_mask, token_type_ids), strict=True)
        out = self.network(**{name: tensor for name, tensor in inputs if tensor is not None})
        return out.start_logits, out.end_logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a training batch.

        Args:
            batch: Windows, with `start_positions` and `end_positions`.
            batch_idx: Its number in the epoch.

        Returns:
            Mean cross-entropy of starts and ends.
        """
        start, end = self._logits(batch)
        loss = F.cross_entropy(start, batch["start_positions"]) + F.cross_entropy(end, batch["end_positions"])
        self.log("train/loss", loss / 2, on_epoch=True, on_step=False, batch_size=len(start))
        return loss / 2

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Compare answers with those of people.

        Args:
            batch: All windows of some questions.
            batch_idx: Its number in the epoch.
        """
        self._compare(batch, self.val_squad)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Compare answers with those of people.

        Args:
            batch: All windows of some questions.
            batch_idx: Its number in the epoch.
        """
        self._compare(batch, self.test_squad)

    def on_validation_epoch_end(self) -> None:
        """Log `val/exact_match` and `val/f1`."""
        self._log("val", self.val_squad)

    def on_test_epoch_end(self) -> None:
        """Log `test/exact_match` and `test/f1`."""
        self._log("test", self.test_squad)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, str]:
        """Answer questions.

        Args:
            batch: All windows of some questions.
            batch_idx: Its number in the epoch.

        Returns:
            Answers by id of the question, as SQuAD's evaluation script reads them.
        """
        start, end = self._logits(batch)
        offsets = batch["offsets"]
        score, first, last = best_spans(start, end, offsets[..., 0] >= 0, self.max_answer_length)
        window = torch.arange(len(score), device=score.device)
        spans = torch.stack([offsets[window, first, 0], offsets[window, last, 1]], 1).tolist()
        best: dict[int, tuple[float, str]] = {}
        for value, question, (begin, stop) in zip(score.tolist(), batch["question"].tolist(), spans, strict=True):
            if question not in best or value > best[question][0]:
                best[question] = value, batch["contexts"][question][begin:stop]
        return {batch["ids"][question]: text for question, (_, text) in best.items()}

    def _logits(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        start, end = self(**{name: batch[name] for name in _INPUTS if name in batch})
        return start.float(), end.float()

    def _compare(self, batch: dict[str, Any], metric: SQuAD) -> None:
        found = self.predict_step(batch, 0)
        metric.update(
            [{"id": key, "prediction_text": text} for key, text in found.items()],
            [
                {"id": key, "answers": {"text": texts, "answer_start": []}}
                for key, texts in zip(batch["ids"], batch["answers"], strict=True)
            ],
        )

    def _log(self, stage: str, metric: SQuAD) -> None:
        for name, value in metric.compute().items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "f1", sync_dist=True)
        metric.reset()
