"""Start-up time of the command line: help, a comparison, and a run of one training step.

python benchmarks/startup.py [--record]
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness import Figures, arguments, compare, turns_here

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Measure all commands and print medians."""
    args = arguments(__doc__, [], rounds=5).parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("configs").symlink_to(ROOT / "configs")
        fit = "fit --config configs/quickstart.yaml --trainer.max_epochs=1 --trainer.limit_train_batches=1"
        _call(fit + " --name=compared")
        commands = {
            "--help": "--help",
            "fit --help": "fit --help",
            "compare of a run": "compare lightning_logs/compared --out report",
            "a run of one training step": fit + " --trainer.limit_val_batches=1",
        }

        def timed(command: str) -> Callable[[], Figures]:
            def measure() -> Figures:
                since = time.perf_counter()
                _call(command)
                return {"seconds": time.perf_counter() - since}

            return measure

        found = turns_here({name: timed(command) for name, command in commands.items()}, args.rounds)
    for name, figures in found.items():
        compare(f"start: {name}", {name: figures}, args.record)


def _call(command: str) -> None:
    subprocess.run([sys.executable, ROOT / "cli.py", *command.split()], check=True, capture_output=True)


if __name__ == "__main__":
    main()
