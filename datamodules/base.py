"""Base class of all datamodules: splits, the tokenizer and distributed, resumable batches."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from gpt2_pl.datamodules.batching import EvaluationLoader, TokenDataset, TrainingLoader
from gpt2_pl.datamodules.prompt_template import Truncation
from gpt2_pl.errors import InputError
from gpt2_pl.text.tokenizer import END_OF_TEXT, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLITS = ("train", "val", "test", "predict")
_SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test", "predict": "prediction"}


class TextData(LightningDataModule):
    """Base class of datamodules with tokenized rows; subclasses implement reading and encoding.

    Args:
        files: file or files of each split; None for a split without files.
        hub_id: dataset on the Hugging Face hub; ignored if a train, val or test file is given.
        tokenizer: folder or hub id of the tokenizer.
        max_length: maximum number of tokens in a row; defaults to the context length of the model.
        batch_size: rows per process and step.
        eval_batch_size: rows per process and step in validation, test and prediction.
        val_fraction: fraction of the training data used for validation if there is no validation set, in (0, 1).
        train_fraction: fraction of the remaining training data to use, in (0, 1].
        split_seed: seed of ``val_fraction`` and ``train_fraction``.
        steps_per_epoch: optimizer steps in an epoch; None for those of one pass over the training rows.

    Raises:
        InputError: an argument is out of range.
    """

    HUB_SPLITS: ClassVar[dict[str, str]] = {"train": "train", "val": "validation", "test": "test"}

    def __init__(
        self,
        files: Mapping[str, str | list[str] | None],
        hub_id: str | None,
        tokenizer: str | None,
        max_length: int | None,
        batch_size: int,
        eval_batch_size: int,
        val_fraction: float,
        train_fraction: float = 1.0,
        split_seed: int = 0,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "max_length": max_length}
        sizes["steps_per_epoch"] = steps_per_epoch
        for key, size in sizes.items():
            if size is not None and size < 1:
                raise InputError(key=f"data.{key}", value=size, expected="at least 1")
        if not 0.0 < val_fraction < 1.0:
            raise InputError(key="data.val_fraction", value=val_fraction, expected="in (0, 1)")
        if not 0.0 < train_fraction <= 1.0:
            raise InputError(key="data.train_fraction", value=train_fraction, expected="in (0, 1]")
        self.files = files
        self.hub_id = None if any(files[split] for split in ("train", "val", "test")) else hub_id
        self.tokenizer_source = tokenizer
        self.max_length = max_length
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.val_fraction, self.train_fraction, self.split_seed = val_fraction, train_fraction, split_seed
        self.steps_per_epoch = steps_per_epoch
        self._tokenizer: Tokenizer | None = None
        self.encoded: dict[str, TokenDataset] = {}
        self._noted: set[str] = set()  # what this object has warned of

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        return self._tokenizer

    def _make_tokenizer(self) -> Tokenizer:
        if self.tokenizer_source is None:
            message = (
                "data.tokenizer is missing, and there is no model.base whose tokenizer is used; give a folder or hub id"
            )
            raise InputError(message, key="data.tokenizer")
        return load_tokenizer(self.tokenizer_source, "data.tokenizer")

    @property
    def _end_of_text(self) -> int:
        """Id of the token after every text.

        Raises:
            InputError: the tokenizer does not have it.
        """
        token = self.tokenizer.token_to_id(END_OF_TEXT)
        if token is None:
            message = f"data.tokenizer must have the token {END_OF_TEXT}, which ends a text; it is missing"
            raise InputError(message, key="data.tokenizer")
        return token

    # Reading

    def prepare_data(self) -> None:
        """Check and encode all data of the run in one process; the other processes read the cache.

        Nothing is written to the run folder before this check. If there are test data, a fit is followed by a test,
        so test data are checked before training as well.
        """
        model: Any = getattr(self.trainer, "lightning_module", None)
        if hasattr(model, "check_tokenizer"):
            model.check_tokenizer(self.tokenizer)
        self.setup(None)
        if self.trainer is not None and self.trainer.state.fn == "fit" and self.has_split("test"):
            self.setup("test")
        for split in self.encoded:
            self._check_num_rows(split)
            self._check_limit(split)
        for split in self.encoded:
            self._warn_of_truncation(split)

    def setup(self, stage: str | None = None) -> None:
        """Encode the splits of a stage.

        Args:
            stage: fit, validate, test or predict; None for the trainer's stage or, without a trainer, all splits.
        """
        for split in self._splits(stage):
            if split not in self.encoded:
                self.encoded[split] = self._encode(split)

    @abstractmethod
    def _encode(self, split: str) -> TokenDataset:
        """Read and tokenize a split."""

    def _splits(self, stage: str | None) -> list[str]:
        if stage is None and self.trainer is not None and self.trainer.state.fn is not None:
            stage = self.trainer.state.fn.value
        if stage is None:
            return [split for split in SPLITS if self.has_split(split)]
        stages = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}
        for split in (splits := stages[stage]):
            if not self.has_split(split):
                raise InputError(f"data.{split}_file is missing; {stage} needs it", key=f"data.{split}_file")
        return splits

    def has_split(self, split: str) -> bool:
        """Return whether there are data for a split: train, val, test or predict."""
        if self.hub_id is not None and split != "predict":
            return split in self.HUB_SPLITS or split == "val"
        return self.files[split] is not None or (split == "val" and self.files["train"] is not None)

    def _has_own_val(self) -> bool:
        return "val" in self.HUB_SPLITS if self.hub_id is not None else self.files["val"] is not None

    def _max_length(self) -> int:
        limit = getattr(getattr(self.trainer, "lightning_module", None), "max_length", None)
        if self.max_length is None:
            return limit if limit is not None else 1024
        if limit is not None and self.max_length > limit:
            expected = f"at most {limit}, the number of tokens that fit the model"
            raise InputError(key="data.max_length", value=self.max_length, expected=expected)
        return self.max_length

    def _source_split(self, split: str) -> str:
        """Return the split from whose files a split is read: train for a fraction of it that is used for validation."""
        return "train" if split == "val" and not self._has_own_val() else split

    def _split_indices(self, split: str, n: int) -> NDArray[np.int64]:
        """Return the indices of a split among the ``n`` rows of its source, in ascending order.

        Raises:
            InputError: no row is left for training.
        """
        if self._source_split(split) != "train":
            return np.arange(n)
        order = np.random.default_rng(self.split_seed).permutation(n)
        n_val = 0 if self._has_own_val() else max(1, round(n * self.val_fraction))
        n_train = max(1, round((n - n_val) * self.train_fraction))
        if split == "val":
            return np.sort(order[:n_val])
        if n_val + n_train > n:
            message = f"data.train_file must have enough rows to split, got {n}; give data.val_file"
            raise InputError(message, key="data.train_file")
        return np.sort(order[n_val : n_val + n_train])

    def description(self) -> dict[str, Any]:
        """Return the data section of the run record: class, files, batch size, rows and digest of each split."""
        return {
            "class": type(self).__name__,
            "files": {split: file for split, file in self.files.items() if file is not None},
            "rows": {split: len(rows) for split, rows in self.encoded.items()},
            "digests": {split: rows.digest for split, rows in self.encoded.items()},
            "truncated": self.truncated,
            "batch_size": self.batch_size,
        }

    @property
    def truncated(self) -> dict[str, int]:
        """Number of truncated texts of each split; empty for data without texts of their own length."""
        rows = self.encoded.items()
        return {split: int((one.lost > 0).sum()) for split, one in rows if one.lost is not None}

    def _warn_of_truncation(self, split: str) -> None:
        rows = self.encoded[split]
        if rows.lost is not None and rows.lost.any():
            counts = Truncation.of(rows.lengths, rows.lost)
            self._warn_once(counts.sentence(self._max_length(), f"{_SPLIT_NAMES[split]} texts"))

    def _warn_once(self, message: str) -> None:
        """Warn in the first process, unless this object has done so with the same message."""
        if message not in self._noted:
            self._noted.add(message)
            rank_zero_warn(message)

    # Batches

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _next_batch(self) -> int:
        """Return the index of the next training batch, which the trainer restores from the checkpoint on resume."""
        if self.trainer is None or not self.trainer.training:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return progress.ready

    def _step_batches(self, i: int) -> slice:
        """Return the indices of the batches that share an optimizer step with batch ``i`` of the epoch."""
        if self.trainer is None:
            return slice(i, i + 1)
        first = i - i % self.trainer.accumulate_grad_batches
        end = int(min(first + self.trainer.accumulate_grad_batches, self.trainer.num_training_batches))
        return slice(first, max(end, i + 1))  # outside training, a loader may be iterated beyond num_training_batches

    def _loaded_rows(self) -> TokenDataset:
        return self.encoded["train"]

    def train_dataloader(self) -> TrainingLoader:
        """Return shuffled batches, which depend only on the seed (``seed_everything``) and the epoch."""
        rank, world_size = self._rank_and_world_size()
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        loader = TrainingLoader(
            self._loaded_rows(), self.batch_size, seed, rank, world_size, self._next_batch, self._step_batches
        )
        if self.steps_per_epoch is not None:
            loader.batches_per_epoch = self.steps_per_epoch * getattr(self.trainer, "accumulate_grad_batches", 1)
        loader.reshuffles = not getattr(self.trainer, "overfit_batches", 0)
        return loader

    def evaluation_dataloader(self, split: str) -> EvaluationLoader:
        """Return batches with every row of a split once, on exactly one process.

        If the trainer evaluates only some batches (``limit_val_batches`` and the like), these are a representative
        sample of the rows.

        Args:
            split: train, val, test or predict.
        """
        rank, world_size = self._rank_and_world_size()
        limit = 1.0 if split == "train" else getattr(self.trainer, f"limit_{split}_batches", 1.0)
        return EvaluationLoader(self.encoded[split], self.eval_batch_size, rank, world_size, limit)

    def val_dataloader(self) -> EvaluationLoader:
        """Return the validation rows, each once."""
        return self.evaluation_dataloader("val")

    def test_dataloader(self) -> EvaluationLoader:
        """Return the test rows, each once."""
        return self.evaluation_dataloader("test")

    def predict_dataloader(self) -> EvaluationLoader:
        """Return the rows to predict, each once."""
        return self.evaluation_dataloader("predict")

    def _check_num_rows(self, split: str) -> None:
        n_rows, n_processes = len(self.encoded[split]), self._rank_and_world_size()[1]
        if n_rows < n_processes:
            got = f"{n_rows} rows for {n_processes} processes"
            raise InputError(f"the {split} split must have at least one row per process, got {got}", key="data")

    def _check_limit(self, split: str) -> None:
        """Reject a trainer limit that is a fraction of less than one batch of a split.

        Raises:
            InputError: names the trainer's argument, the fraction and the number of batches.
        """
        trainer: Any = self.trainer
        key, fraction = f"limit_{split}_batches", getattr(trainer, f"limit_{split}_batches", None)
        if getattr(trainer, "overfit_batches", 0) and split in ("train", "val"):
            key, fraction = "overfit_batches", trainer.overfit_batches
        if not isinstance(fraction, float) or not 0 < fraction < 1:
            return
        loader = self.train_dataloader() if split == "train" else self.evaluation_dataloader(split)
        if int(len(loader) * fraction) == 0:
            expected = "a number of batches, or a fraction that is at least one batch"
            got = f"{fraction} of the {len(loader)} batches of {split}"
            raise InputError(f"trainer.{key} must be {expected}, got {got}", key=f"trainer.{key}")
