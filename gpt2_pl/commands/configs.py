"""List, print and copy the included configuration files."""

from __future__ import annotations

import shlex
import shutil
import textwrap
from pathlib import Path

from gpt2_pl.commands.support.parser import CommandParser
from gpt2_pl.commands.support.process import program
from gpt2_pl.configs import KINDS, config_path, description, packaged_configs
from gpt2_pl.errors import require
from gpt2_pl.filesystem import require_absent

_TITLES = {
    **{"task": "Tasks", "strategy": "Strategies", "trainer": "Trainers", "sweep": "Sweeps"},
    **{"course/cs224n": 'CS224N\'s project "Build GPT-2"', "": "Whole runs"},
}


def main(args: list[str]) -> None:
    """Run ``gpt2-pl configs``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: there is no such file, or the copy cannot be written.
    """
    parser = CommandParser(prog="gpt2-pl configs", description=__doc__)
    actions = parser.add_subparsers(dest="action", metavar="list|show|copy", parser_class=CommandParser)
    list_help = "list all files with a description (default)"
    actions.add_parser("list", help=list_help, description="List all configuration files.")
    show = actions.add_parser("show", help="print a file", description="Print a configuration file.")
    copy_help = "copy a file, in order to edit the copy"
    copy = actions.add_parser("copy", help=copy_help, description="Copy a configuration file.")
    for action in (show, copy):
        action.add_argument("name", metavar="NAME", help="name of the configuration, such as task/sst5")
    folder_help = "destination (default: the working directory)"
    copy.add_argument("folder", metavar="FOLDER", nargs="?", help=folder_help)
    options = parser.parse_args(args)
    if options.action == "show":
        print(config_path(options.name, "NAME").read_text(encoding="utf-8"), end="")
    elif options.action == "copy":
        print(_copy(config_path(options.name, "NAME"), Path(options.folder or ".")))
    else:
        _print_list()


def _copy(file: Path, folder: Path) -> Path:
    """Copy a file into a folder and return the path of the copy.

    Raises:
        InputError: the folder does not exist, or already contains a file of this name.
    """
    require(folder.is_dir(), "FOLDER", str(folder), "an existing folder")
    copy = folder / file.name
    require_absent(copy, "FOLDER")
    return Path(shutil.copyfile(file, copy))


def _print_list() -> None:
    """Print the name and the first sentence of each file, by kind."""
    files = packaged_configs()
    width, columns = max(map(len, files)), max(shutil.get_terminal_size().columns, 60)
    for kind in (*KINDS, ""):
        print(f"{_TITLES[kind]}:")
        for name, file in files.items():
            if name.rpartition("/")[0] == kind:
                text = f"  {name:{width}}  {description(file)}"
                print(textwrap.fill(text, columns, subsequent_indent=" " * (width + 4)))
        print()
    example = "fit --config task/sst5 --config strategy/lora --model.base gpt2"
    print(f"{shlex.join(program())} {example} \\\n    --data.train_file FILE --data.val_file FILE")
