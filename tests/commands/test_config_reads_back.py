"""Round trip of config.yaml: its values create the same objects."""

import enum
import functools
import inspect
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from helpers.stops import TINY
from lightning.pytorch import Callback, Trainer, callbacks, loggers, plugins, profilers, strategies

from gpt2_pl.commands.lightning_cli import Parser

REQUIRED = {
    "swa_lrs": 0.1, "monitor": "val/loss", "scheduling": {0: 1, 4: 2}, "pruning_fn": "l1_unstructured",
    "precision": "bf16-mixed", "device": "cpu", "dirpath": "runs", "save_dir": "runs",
}  # fmt: skip
UNUSABLE = {  # abstract, or of packages that are not there
    *("ThroughputMonitor", "LitLogger", "Logger", "ParallelStrategy", "Strategy", "CheckpointIO", "LayerSync"),
    *("BitsandbytesPrecision", "TransformerEnginePrecision", "Profiler"),
}


class Color(enum.Enum):
    RED = 1
    BLUE = 2


def double(x: int) -> int:
    return 2 * x


class Odd:
    """A class that a configuration cannot represent."""


ODD = Odd()


class Everything(Callback):
    """A callback with arguments of every type."""

    def __init__(
        self,
        cls: type = int,
        module: type[torch.nn.Module] = torch.nn.Linear,
        function: Callable = double,
        unnamed: Callable = lambda x: x,
        named_or_function: Callable | str = "l1",
        color: Color = Color.RED,
        path: Path = Path("a"),
        delta: timedelta = timedelta(hours=1),
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        device_or_text: torch.device | str | None = torch.device("cpu"),  # noqa: B008
        odd: Any = ODD,
        odds: Any = (ODD, 1),
        untyped=Color.BLUE,
        limit: float = float("inf"),
        pair: tuple[int, int] = (1, 2),
    ) -> None:
        self.arguments = {key: value for key, value in locals().items() if key not in ("self", "__class__")}


@functools.cache
def parser():
    parser = Parser(exit_on_error=False)
    parser.add_class_arguments(Trainer, "trainer")
    return parser


def read_back(settings):
    """Write and read a configuration; return it before and after, and the text."""
    first = parser().parse_object({"trainer": settings})
    text = parser().dump(first, skip_none=False)
    assert "Unable to serialize" not in text
    assert yaml.safe_load(text)["trainer"].keys() >= settings.keys()
    return first, parser().parse_string(text), text


def classes():
    for key, module in (
        *(("callbacks", callbacks), ("logger", loggers), ("strategy", strategies)),
        *(("plugins", plugins), ("profiler", profilers)),
    ):
        for name in module.__all__:
            if inspect.isclass(getattr(module, name)) and name not in UNUSABLE:
                yield key, getattr(module, name)


def test_parser_dump_of_lightning_class_reads_back_equal():
    for key, cls in classes():
        parameters = inspect.signature(cls.__init__).parameters.values()
        required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        arguments = {name: REQUIRED.get(name, 1) for name in required if name != "self"}
        value = {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": arguments}
        _, second, text = read_back({key: [value] if key == "callbacks" else value})
        assert parser().dump(second, skip_none=False) == text, cls


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        (
            {
                "cls": "builtins.str", "module": "torch.nn.ReLU", "function": "os.path.join", "color": "BLUE",
                "named_or_function": "l2", "path": "b/c", "delta": "2:00:00", "dtype": "torch.bfloat16",
                "device": "cuda:1", "device_or_text": "meta", "pair": [3, 4], "limit": 2,
            },
            {
                "cls": str, "module": torch.nn.ReLU, "color": Color.BLUE, "named_or_function": "l2",
                "path": Path("b/c"), "delta": timedelta(hours=2), "dtype": torch.bfloat16,
                "device": torch.device("cuda:1"), "device_or_text": torch.device("meta"), "pair": (3, 4), "limit": 2,
            },
        ),
    ],
    ids=["defaults", "given"],
)  # fmt: skip
def test_parser_dump_of_every_argument_type_reads_back_equal(given, expected):
    value = {"class_path": f"{__name__}.Everything", "init_args": given}
    first, second, _ = read_back({"callbacks": [value]})
    one, two = (parser().instantiate_classes(config).trainer.callbacks[0].arguments for config in (first, second))
    assert one == two
    assert {key: two[key] for key in expected} == expected


def test_fit_optimizer_and_schedule_by_class_path_are_written_to_config(run):
    model = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.init_args.momentum=0.5"]
    folder = run(*TINY, *model, f"--config={ROOT}/configs/trainer/debug.yaml")
    settings = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]
    assert settings["optimizer"]["class_path"] == "torch.optim.SGD"
    assert settings["optimizer"]["init_args"]["momentum"] == 0.5
    assert settings["schedule"] == {"class_path": "gpt2_pl.optim.ConstantWithWarmup", "init_args": {"warmup": 0.0}}
