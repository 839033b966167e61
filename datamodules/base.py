"""What all data have in common: splits, a tokenizer, and batches that know their process and where training stands."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch import LightningDataModule

from gpt2_pl.datamodules.batching import EvaluationLoader, TokenDataset, TrainingLoader
from gpt2_pl.errors import InputError
from gpt2_pl.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLITS = ("train", "val", "test", "predict")


class TextData(LightningDataModule):
    """Splits of tokenised rows. Subclasses read and encode them.

    Args:
        files: split -> its file or files; None where there is none.
        hub_id: dataset on the Hugging Face hub, read when none of train, val and test file is given.
        tokenizer: folder or hub id.
        max_length: tokens in a row; by default what the model has room for.
        batch_size: rows per process and step.
        eval_batch_size: rows per process in validation, test and prediction.
        val_fraction: share of the training data to validate on where there is no validation set.
    """

    HUB_SPLITS: ClassVar[dict[str, str]] = {"train": "train", "val": "validation", "test": "test"}

    def __init__(
        self,
        files: dict[str, Any],
        hub_id: str | None,
        tokenizer: str | None,
        max_length: int | None,
        batch_size: int,
        eval_batch_size: int,
        val_fraction: float,
    ) -> None:
        super().__init__()
        for key, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise InputError(f"data.{key} is {value}; it must be at least 1")
        if not 0.0 < val_fraction < 1.0:
            raise InputError(f"data.val_fraction is {val_fraction}; it must be between 0 and 1")
        if max_length is not None and max_length < 1:
            raise InputError(f"data.max_length is {max_length}; it must be at least 1")
        self.files = files
        self.hub_id = None if any(files[split] for split in ("train", "val", "test")) else hub_id
        self.tokenizer_source = tokenizer
        self.max_length = max_length
        self.batch_size, self.eval_batch_size, self.val_fraction = batch_size, eval_batch_size, val_fraction
        self._tokenizer: Tokenizer | None = None
        self.encoded: dict[str, TokenDataset] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded when first used."""
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        return self._tokenizer

    def _make_tokenizer(self) -> Tokenizer:
        if self.tokenizer_source is None:
            raise InputError("data.tokenizer is not given; it is a folder or hub id, usually the base's own")
        return load_tokenizer(self.tokenizer_source, "data.tokenizer")

    # Reading

    def prepare_data(self) -> None:
        """Check and encode all data of the run in one process, before anything is written; the others read the cache.

        A fit is followed by a test where there are test data, so they are checked before training as well.
        """
        model: Any = getattr(self.trainer, "lightning_module", None)
        if hasattr(model, "check_tokenizer"):
            model.check_tokenizer(self.tokenizer)
        self.setup(None)
        if self.trainer is not None and self.trainer.state.fn == "fit" and self.has_split("test"):
            self.setup("test")
        for split in self.encoded:
            self._check_enough(split, self._process()[1])
            self._check_limit(split)

    def setup(self, stage: str | None = None) -> None:
        """Encode the splits of ``stage`` (fit, validate, test, predict; None: all there are)."""
        for split in self._splits(stage):
            if split not in self.encoded:
                self.encoded[split] = self._encode(split)

    @abstractmethod
    def _encode(self, split: str) -> TokenDataset:
        """Read and tokenise a split."""

    def _splits(self, stage: str | None) -> list[str]:
        if stage is None and self.trainer is not None and self.trainer.state.fn is not None:
            stage = self.trainer.state.fn.value
        wanted = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}
        if stage is None:
            return [split for split in SPLITS if self.has_split(split)]
        for split in (splits := wanted[stage]):
            if not self.has_split(split):
                raise InputError(f"data.{split}_file is not given, and {stage} needs one")
        return splits

    def has_split(self, split: str) -> bool:
        """Whether there is data for the split: train, val, test or predict."""
        if self.hub_id is not None and split != "predict":
            return split in self.HUB_SPLITS or split == "val"
        return self.files[split] is not None or (split == "val" and self.files["train"] is not None)

    def _has_own_val(self) -> bool:
        return "val" in self.HUB_SPLITS if self.hub_id is not None else self.files["val"] is not None

    def _max_length(self) -> int:
        room = getattr(getattr(self.trainer, "lightning_module", None), "max_length", None)
        if self.max_length is None:
            return room if room is not None else 1024
        if room is not None and self.max_length > room:
            raise InputError(f"data.max_length is {self.max_length}; the model has room for {room} tokens")
        return self.max_length

    # Batches

    def _process(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _next_batch(self) -> int:
        """The number of the batch that the trainer asks for next; it knows it from the checkpoint when it resumes."""
        if self.trainer is None or not self.trainer.training:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return progress.ready

    def _step_batches(self, i: int) -> slice:
        """The numbers of the batches that share an optimizer step with batch ``i`` of the epoch."""
        if self.trainer is None:
            return slice(i, i + 1)
        first = i - i % self.trainer.accumulate_grad_batches
        behind = int(min(first + self.trainer.accumulate_grad_batches, self.trainer.num_training_batches))
        return slice(first, max(behind, i + 1))  # whoever goes through a loader outside training may go further

    def train_dataloader(self) -> TrainingLoader:
        """Shuffled batches, a function of the seed (``seed_everything``) and the epoch."""
        rank, world_size = self._process()
        self._check_enough("train", world_size)
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        place = (self._next_batch, self._step_batches)
        loader = TrainingLoader(self.encoded["train"], self.batch_size, seed, rank, world_size, *place)
        loader.reshuffles = not getattr(self.trainer, "overfit_batches", 0)
        return loader

    def evaluation_dataloader(self, split: str) -> EvaluationLoader:
        """Every row of a split once, on exactly one process.

        The first batches stand for all of them where the trainer evaluates a part (``limit_val_batches`` and the like).
        """
        rank, world_size = self._process()
        self._check_enough(split, world_size)
        limit = 1.0 if split == "train" else getattr(self.trainer, f"limit_{split}_batches", 1.0)
        return EvaluationLoader(self.encoded[split], self.eval_batch_size, rank, world_size, limit)

    def val_dataloader(self) -> EvaluationLoader:
        """The validation rows, each once."""
        return self.evaluation_dataloader("val")

    def test_dataloader(self) -> EvaluationLoader:
        """The test rows, each once."""
        return self.evaluation_dataloader("test")

    def predict_dataloader(self) -> EvaluationLoader:
        """The rows to predict, each once."""
        return self.evaluation_dataloader("predict")

    def _check_enough(self, split: str, world_size: int) -> None:
        if len(self.encoded[split]) < world_size:
            raise InputError(
                f"the {split} split has {len(self.encoded[split])} rows for {world_size} processes; each needs one"
            )

    def _check_limit(self, split: str) -> None:
        """Refuse a share of the batches of a split that is less than one batch.

        Raises:
            InputError: naming the trainer's setting, the share and the number of batches.
        """
        trainer: Any = self.trainer
        key, share = f"limit_{split}_batches", getattr(trainer, f"limit_{split}_batches", None)
        if getattr(trainer, "overfit_batches", 0) and split in ("train", "val"):
            key, share = "overfit_batches", trainer.overfit_batches
        if not isinstance(share, float) or not 0 < share < 1:
            return
        loader = self.train_dataloader() if split == "train" else self.evaluation_dataloader(split)
        if int(len(loader) * share) == 0:
            raise InputError(
                f"trainer.{key} must be a number of batches, or a share of them that is at least one batch, got "
                f"{share} of the {len(loader)} batches of {split}"
            )
