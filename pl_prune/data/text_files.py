"""Plain text, for language models."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pl_prune.core.types import PruneError
from pl_prune.data.shuffle import EpochShuffle
from pl_prune.data.tokenizer import check_tokens, load_tokenizer


class TextFiles(LightningDataModule):
    """Text files in UTF-8, cut into blocks of equal length by a network's tokenizer.

    Each of train, val and test is one file (train.txt) or a folder of them (train/**/*.txt, in the order of their
    names). Tokens of all files are joined, with the tokenizer's end of text between files; what is left
    after the last whole block is dropped. Without test, val serves for it too.

    Args:
        root: The folder that holds train and val.
        tokenizer: Name on the Hugging Face Hub, or a folder with its files: that of the network.
        block_size: Tokens of a sample.
        batch_size: Samples per batch.
        seed: Seed of the order of training batches.

    Raises:
        PruneError: If blocks have fewer than 2 tokens: the first is not predicted.
    """

    def __init__(
        self,
        root: str = "data",
        tokenizer: str = "openai-community/gpt2",
        block_size: int = 1024,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if block_size < 2:
            raise PruneError(f"Expected blocks of 2 tokens or more; found block_size={block_size}. Use 1024, say.")
        self.root = root
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Read and cut.

        Args:
            stage: fit, validate, test or predict.
        """
        if stage == "fit":
            self.train_set = self._blocks("train")
        has_test = any((Path(self.root) / name).exists() for name in ("test", "test.txt"))
        if stage in ("fit", "validate") or not has_test:
            self.val_set = self.test_set = self._blocks("val")
        if has_test:
            self.test_set = self._blocks("test")

    def train_dataloader(self) -> DataLoader:
        """Return shuffled training batches.

        Returns:
            A loader of {"input_ids": (N, block_size)}.
        """
        return DataLoader(self.train_set, batch_size=self.batch_size, sampler=EpochShuffle(self.train_set, self.seed))

    def val_dataloader(self) -> DataLoader:
        """Return validation batches.

        Returns:
            A loader of {"input_ids": (N, block_size)}.
        """
        return DataLoader(self.val_set, batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """Return test batches.

        Returns:
            A loader of {"input_ids": (N, block_size)}.
        """
        return DataLoader(self.test_set, batch_size=self.batch_size)

    predict_dataloader = test_dataloader

    def scoring_dataloader(self) -> DataLoader:
        """Return the training blocks in their order, for scoring.

        Returns:
            A loader of {"input_ids": (N, block_size)}.
        """
        return DataLoader(self.train_set, batch_size=self.batch_size)

    def _blocks(self, part: str) -> Dataset[dict[str, Tensor]]:
        tokenizer = load_tokenizer(self.tokenizer, self.block_size)
        found = tokenizer(self._read(part), add_special_tokens=False, return_attention_mask=False, verbose=False)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = torch.cat([torch.tensor(text + end, dtype=torch.int32) for text in found["input_ids"]])
        count = len(ids) // self.block_size
        if not count:
            raise PruneError(
                f"Expected a block of {self.block_size} tokens or more in {part} of {self.root!r}; found {len(ids)} tokens. "
                "Add text, or lower data.init_args.block_size."
            )
        check_tokens(ids, self.trainer)
        return _Blocks(ids[: count * self.block_size].view(count, self.block_size))

    def _read(self, part: str) -> list[str]:
        root = Path(self.root)
        file = root / f"{part}.txt"
        files = [file] if file.is_file() else sorted((root / part).rglob("*.txt"))
        if not files:
            raise PruneError(
                f"Expected {part}.txt or a folder {part} of .txt files in {self.root!r}; found neither. "
                "Set data.init_args.root to the folder that holds them."
            )
        try:
            return [path.read_text(encoding="utf-8") for path in files]
        except UnicodeDecodeError as error:
            raise PruneError(
                f"Expected text in UTF-8 in {part} of {self.root!r}; found other bytes ({error}). Convert the file."
            ) from error


class _Blocks(Dataset[dict[str, Tensor]]):
    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index].long()}
