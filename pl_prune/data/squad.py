"""The Stanford Question Answering Dataset, version 1.1."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from pl_prune.core.types import PruneError
from pl_prune.data.shuffle import EpochShuffle
from pl_prune.data.squad_file import Question, read_squad
from pl_prune.data.tokenizer import check_tokens, load_tokenizer
from pl_prune.data.windows import AskedQuestions, TrainingWindows, Windows, collate_questions


class SQuAD(LightningDataModule):
    """87,599 questions for training and 10,570 for validation; the latter serve as test questions, as in the papers.

    `root` is a folder with the authors' train-v1.1.json and dev-v1.1.json. A text that is too long is cut into windows that
    overlap. Training batches hold windows, in any order; the others hold questions with all their windows.

    Args:
        root: Folder of the two files.
        tokenizer: Name on the Hugging Face Hub, or a folder with its files: that of the network.
        batch_size: Windows per training batch, questions per other batch.
        max_length: Tokens of a window.
        doc_stride: Tokens of the text that neighbouring windows share.
        max_query_length: Tokens of a question; further ones are cut off.
        train_samples: Take only the first so many training questions, in a fixed random order; None takes all.
        test_samples: The same of the others.
        seed: Seed of the orders.

    Source:
        Devlin et al., BERT, section 4.2, and its code for the lengths. Divergence: as in transformers, `doc_stride` is
        what windows share, where BERT's code steps by it.
    """

    def __init__(
        self,
        root: str = "data",
        tokenizer: str = "google-bert/bert-base-uncased",
        batch_size: int = 32,
        max_length: int = 384,
        doc_stride: int = 128,
        max_query_length: int = 64,
        train_samples: int | None = None,
        test_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = root
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self.doc_stride = doc_stride
        self.max_query_length = max_query_length
        self.train_samples = train_samples
        self.test_samples = test_samples
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Read and cut into windows; the training questions for a fit only.

        Args:
            stage: fit, validate, test or predict.
        """
        tokenizer = load_tokenizer(self.tokenizer, self.max_length)
        windows = Windows(tokenizer, self.max_length, self.doc_stride, self.max_query_length)
        if stage == "fit":
            asked = self._answered(self._part("train-v1.1.json", self.train_samples))
            self.train_set = TrainingWindows(windows.for_training(asked))
        asked = self._part("dev-v1.1.json", self.test_samples)
        inputs, counts = windows.for_answers(asked)
        check_tokens(inputs["input_ids"], self.trainer)
        self.test_set = AskedQuestions(asked, inputs, counts)

    def train_dataloader(self) -> DataLoader:
        """Return shuffled training batches.

        Returns:
            A loader of dicts of tensors: the network's inputs, `start_positions` and `end_positions`.
        """
        return DataLoader(self.train_set, batch_size=self.batch_size, sampler=EpochShuffle(self.train_set, self.seed))

    def val_dataloader(self) -> DataLoader:
        """Return the questions of dev-v1.1.json.

        Returns:
            A loader of dicts: the network's inputs, `offsets`, `question`, `ids`, `contexts` and `answers`.
        """
        return DataLoader(self.test_set, batch_size=self.batch_size, collate_fn=collate_questions)

    test_dataloader = predict_dataloader = val_dataloader

    def scoring_dataloader(self) -> DataLoader:
        """Return the training windows in their order, for scoring.

        Returns:
            A loader as for training.
        """
        return DataLoader(self.train_set, batch_size=self.batch_size)

    def _part(self, name: str, count: int | None) -> list[Question]:
        questions = read_squad(Path(self.root) / name)
        if count is None:
            return questions
        order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(self.seed))
        return [questions[i] for i in order[:count].tolist()]

    def _answered(self, questions: list[Question]) -> list[Question]:
        """Leave out questions whose answer is not where the file says."""
        good = [q for q in questions if q.answers[0][0].strip() and q.context.startswith(*q.answers[0])]
        if not good:
            raise PruneError(
                f"Expected answers at their answer_start in train-v1.1.json of {self.root!r}; found none, as for "
                f"{questions[0].id!r}. Get the file anew."
            )
        if len(good) < len(questions):
            rank_zero_warn(
                f"Expected every answer at its answer_start; found {len(questions) - len(good):,} of {len(questions):,} "
                f"elsewhere in train-v1.1.json of {self.root!r}. These are left out."
            )
        return good
