"""Questions and texts as windows of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pl_prune.core.types import PruneError
from pl_prune.data.squad_file import Question

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_AT_ONCE = 1000


class Windows:
    """Cut questions and their texts into windows of equal length.

    Args:
        tokenizer: A fast tokenizer.
        max_length: Tokens of a window.
        doc_stride: Tokens of the text that two neighbours share.
        max_query_length: Tokens of the question; further ones are cut off.

    Raises:
        PruneError: If a window holds no more of the text than neighbours share, or the tokenizer cannot pad.
    """

    def __init__(self, tokenizer: Any, max_length: int, doc_stride: int, max_query_length: int) -> None:
        room = max_length - max_query_length - tokenizer.num_special_tokens_to_add(pair=True)
        if not 0 <= doc_stride < room:
            raise PruneError(
                f"Expected doc_stride of 0 or more, and below the {room} tokens that max_length={max_length} leaves for the text "
                f"beside a question of {max_query_length}; found {doc_stride}. Raise max_length, or lower the others."
            )
        if tokenizer.pad_token is None:
            raise PruneError(
                f"Expected a tokenizer that can pad; found {type(tokenizer).__name__} without a padding token. "
                "Choose an encoder, such as BERT."
            )
        self.tokenizer = tokenizer
        self.max_query_length = max_query_length
        self.form: dict[str, Any] = {
            "truncation": "only_second",
            "max_length": max_length,
            "stride": doc_stride,
            "padding": "max_length",
            "return_overflowing_tokens": True,
            "return_offsets_mapping": True,
        }

    def for_training(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Cut, and mark the first answer of each question; where a window lacks it, its first token is marked.

        Args:
            questions: The questions.

        Returns:
            The network's inputs (windows, max_length), `start_positions` and `end_positions` (windows,).
        """
        parts = []
        for some, encoded, inputs in self._encoded(questions):
            spans = []
            for window, question in enumerate(encoded["overflow_to_sample_mapping"]):
                text, start = some[question].answers[0]
                start += len(text) - len(text.lstrip())
                stop = start + len(text.strip()) - 1
                span = [encoded.char_to_token(window, place, sequence_index=1) for place in (start, stop)]
                if None in span:
                    ids = encoded["input_ids"][window]
                    span = [ids.index(self.tokenizer.cls_token_id) if self.tokenizer.cls_token_id in ids else 0] * 2
                spans.append(span)
            start_end = torch.tensor(spans, dtype=torch.int32)
            parts.append({**inputs, "start_positions": start_end[:, 0], "end_positions": start_end[:, 1]})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def for_answers(self, questions: Sequence[Question]) -> tuple[dict[str, Tensor], list[int]]:
        """Cut, and note where in the text each token is.

        Args:
            questions: The questions.

        Returns:
            The network's inputs (windows, max_length) and `offsets` (windows, max_length, 2), the characters of the text
            that a token spans, -1 for tokens of no text; and how many windows each question has.
        """
        parts, counts = [], []
        for some, encoded, inputs in self._encoded(questions):
            offsets = torch.tensor(encoded["offset_mapping"], dtype=torch.int32)
            text = [[part == 1 for part in encoded.sequence_ids(i)] for i in range(len(offsets))]
            parts.append({**inputs, "offsets": offsets.masked_fill(~torch.tensor(text).unsqueeze(2), -1)})
            counts += torch.bincount(torch.tensor(encoded["overflow_to_sample_mapping"]), minlength=len(some)).tolist()
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, counts

    def _encoded(self, questions: Sequence[Question]) -> Iterator[tuple[Sequence[Question], Any, dict[str, Tensor]]]:
        for place in range(0, len(questions), _AT_ONCE):
            some = questions[place : place + _AT_ONCE]
            encoded = self.tokenizer(self._asked(some), [question.context for question in some], **self.form)
            names = [name for name in _INPUTS if name in encoded]
            yield some, encoded, {name: torch.tensor(encoded[name], dtype=torch.int32) for name in names}

    def _asked(self, questions: Sequence[Question]) -> list[str]:
        """Cut questions to their length."""
        asked = self.tokenizer(
            [question.text for question in questions],
            add_special_tokens=False,
            truncation=True,
            max_length=self.max_query_length,
            return_offsets_mapping=True,
        )["offset_mapping"]
        return [
            question.text[: places[-1][1] if places else 0] for question, places in zip(questions, asked, strict=True)
        ]


class TrainingWindows(Dataset[dict[str, Tensor]]):
    """Windows one by one.

    Args:
        tensors: What `Windows.for_training` returns.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index].long() for name, tensor in self.tensors.items()}


class AskedQuestions(Dataset[tuple[Question, dict[str, Tensor]]]):
    """Questions one by one, each with all its windows, so that a batch can be answered by itself.

    Args:
        questions: The questions.
        tensors: What `Windows.for_answers` returns.
        counts: The windows of each question.
    """

    def __init__(self, questions: Sequence[Question], tensors: dict[str, Tensor], counts: list[int]) -> None:
        self.questions = questions
        parts = {name: tensor.split(counts) for name, tensor in tensors.items()}
        self.windows = [{name: part[i] for name, part in parts.items()} for i in range(len(counts))]

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> tuple[Question, dict[str, Tensor]]:
        return self.questions[index], self.windows[index]


def collate_questions(items: Sequence[tuple[Question, dict[str, Tensor]]]) -> dict[str, Any]:
    """Join questions to a batch.

    Args:
        items: Questions with their windows.

    Returns:
        The network's inputs and `offsets` of all windows; `question` (windows,), the place of each one's question in the lists
        `ids`, `contexts` and `answers`.
    """
    windows = [window for _, window in items]
    lengths = torch.tensor([len(window["input_ids"]) for window in windows])
    return {
        **{name: torch.cat([window[name] for window in windows]).long() for name in windows[0]},
        "question": torch.arange(len(items)).repeat_interleave(lengths),
        "ids": [question.id for question, _ in items],
        "contexts": [question.context for question, _ in items],
        "answers": [[text for text, _ in question.answers] for question, _ in items],
    }
