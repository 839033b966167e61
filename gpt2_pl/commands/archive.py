"""Archive the records of runs: settings, scores, costs and rows, without weights, logs and images."""

from __future__ import annotations

from pathlib import Path

from gpt2_pl.commands.support.parser import CommandParser
from gpt2_pl.errors import printable, require
from gpt2_pl.experiments.archive import SUFFIX, write_archive
from gpt2_pl.filesystem import require_absent


def main(args: list[str]) -> None:
    """Run ``gpt2-pl archive``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: a folder contains no ended run, or the archive exists or cannot be written.
    """
    parser = CommandParser(prog="gpt2-pl archive", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folders, or folders that contain some")
    out_help = f"the archive, with the extension {SUFFIX}; it must not exist"
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=out_help)
    rows_help = "leave out the validation rows of trials and of runs with test rows; test scores keep their intervals"
    parser.add_argument("--without_validation_rows", action="store_true", help=rows_help)
    options = parser.parse_args(args)
    require(options.out.name.endswith(SUFFIX), "out", str(options.out), f"a file with the extension {SUFFIX}")
    require_absent(options.out)
    num_runs = write_archive(options.runs, options.out, not options.without_validation_rows)
    runs = f"{num_runs} run{'s' * (num_runs > 1)}"
    print(printable(f"{options.out}: {runs}, {options.out.stat().st_size / 1000:,.0f} kB"))
