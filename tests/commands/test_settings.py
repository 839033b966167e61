"""Settings that follow from other settings."""

from helpers.configs import CONFIGS
from jsonargparse import Namespace

from gpt2_pl.commands.support.config_merge import CommandLine
from gpt2_pl.commands.support.settings import _complete_trainer


def test_complete_trainer_integer_number_of_batches_stays_integer():
    for given, expected in (("1", 1), ("1.0", 1.0), ("0.5", 0.5)):
        flag = f"--trainer.limit_train_batches={given}"
        line = CommandLine(["fit", "--config", str(CONFIGS / "quickstart.yaml"), flag])
        parsed = Namespace(limit_train_batches=float(given), precision="32-true", plugins=None, logger=True,
                           use_distributed_sampler=False, overfit_batches=0.0)  # fmt: skip
        _complete_trainer(parsed, line)
        assert parsed.limit_train_batches == expected
        assert type(parsed.limit_train_batches) is type(expected)
