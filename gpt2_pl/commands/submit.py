"""Write the files that a course asks for: predictions, or completed poems, of its development and test files."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.commands.support.parser import CommandParser
from gpt2_pl.errors import InputError, printable, require
from gpt2_pl.filesystem import atomic_write, require_absent

if TYPE_CHECKING:
    from gpt2_pl.inference.predictor import Prediction, Predictor

_DATASETS = {  # of CS224N's project "Build GPT-2", by the class of the data
    "gpt2_pl.datamodules.SST5": "sst",
    "gpt2_pl.datamodules.IMDB": "cfimdb",
    "gpt2_pl.datamodules.QuoraPairs": "quora",
    "gpt2_pl.datamodules.Sonnets": "sonnets",
}
_MODES = ("last-linear-layer", "full-model")
_TOKEN_IDS = ("3919", "8505")  # of "no" and "yes" in GPT-2's vocabulary, the labels of paraphrases
_SPLITS = {"dev": ("val_file",), "test": ("predict_file", "test_file")}  # keys of the data of a run, the first wins


def main(args: list[str]) -> None:
    """Run ``gpt2-pl submit``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: an argument, the run or a file of its data is invalid, or an output file exists.
    """
    options = _parse_arguments(args)

    from gpt2_pl.commands.support.trained_model import load_predictor
    from gpt2_pl.inference.loading import best_checkpoint

    if options.ckpt_path is None:
        best_checkpoint(options.run)  # not an exported folder, which has no data
    data = _data_settings(options)
    dataset = options.dataset or _DATASETS.get(str(data.get("class_path")))
    if dataset is None:
        message = f"the data of {options.run} are not those of the course; give --dataset"
        raise InputError(message, key="dataset", value=data.get("class_path"))
    is_poems = dataset == "sonnets"
    predictor = load_predictor(options)
    mode = options.mode or _MODES[bool(predictor.task.trained_names)]
    inputs = {split: _input_file(options, data, split) for split in options.splits}
    outputs = {split: options.out / _file_name(dataset, mode, split) for split in options.splits}
    for out in outputs.values():
        require_absent(out)
    skip = (data.get("init_args") or {}).get("on_invalid_row") == "skip"
    contents = {
        split: _poems(predictor, file, split, options)
        if is_poems
        else _table(_predictions(predictor, file, split, dataset, skip), dataset, options.paraphrase_labels)
        for split, file in inputs.items()
    }
    for split, out in outputs.items():
        with atomic_write(out) as file:
            file.write(contents[split])
        print(printable(f"{out}: {inputs[split]}"))


def _parse_arguments(args: list[str]) -> Namespace:
    parser = CommandParser(prog="gpt2-pl submit", description=__doc__)
    add = parser.add_argument
    parser.add_run()
    add("--format", choices=("cs224n",), required=True, help='files of the project "Build GPT-2" of CS224N')
    out_help = "output folder; files in it are not overwritten"
    add("--out", type=Path, default=Path("predictions"), metavar="FOLDER", help=out_help)
    parser.add_checkpoint()
    add("--dev", metavar="FILE", help="development file (default: data.val_file of the run)")
    test_help = "test file without labels, or with the first lines of poems (default: data.predict_file of the run, or "
    add("--test", metavar="FILE", help=f"{test_help}data.test_file)")
    add("--splits", nargs="+", choices=tuple(_SPLITS), help="files to predict (default: both)")
    datasets = tuple(_DATASETS.values())
    add("--dataset", choices=datasets, help="dataset, part of the names of files (default: by the data of the run)")
    mode_help = "mode of a sentiment classifier, part of the names of files (default: by what the run trained)"
    add("--mode", choices=_MODES, help=mode_help)
    labels_help = 'labels of paraphrases: the ids of the tokens "yes" and "no" of GPT-2, or 1 and 0'
    add("--paraphrase_labels", choices=("token_ids", "numbers"), default="token_ids", help=labels_help)
    add("--seed", type=int, default=0, help="seed of poems")
    options = parser.parse_args(args)
    options.splits = options.splits or list(_SPLITS)
    return options


def _data_settings(options: Namespace) -> dict[str, Any]:
    """Return the settings of the data of a run.

    Raises:
        InputError: config.yaml cannot be read.
    """
    from gpt2_pl.utils.yaml_json import read_yaml

    file = options.run / "config.yaml"
    settings = read_yaml(file)
    data = settings.get("data") if isinstance(settings, dict) else None
    is_valid = isinstance(data, dict) and isinstance(data.get("init_args"), dict | None)
    require(is_valid, "data", data, "a class with init_args", file)
    return data or {}


def _input_file(options: Namespace, data: dict[str, Any], split: str) -> str:
    """Return the file of a split: the option's, or that of the run's data.

    Raises:
        InputError: neither the option nor the run names a file of the split.
    """
    given = getattr(options, split)
    own = [(data.get("init_args") or {}).get(key) for key in _SPLITS[split]]
    file = given or next((name for name in own if isinstance(name, str)), None)
    if file is None:
        others = [other for other in _SPLITS if other != split]
        message = (
            f"--{split} is required, because the run has no data.{_SPLITS[split][0]}; or give --splits {others[0]}"
        )
        raise InputError(message, key=split)
    return file


def _file_name(dataset: str, mode: str, split: str) -> str:
    if dataset == "quora":
        return f"para-{split}-output.csv"
    if dataset == "sonnets":
        return "generated_sonnets.txt" if split == "test" else "generated_sonnets_dev.txt"
    return f"{mode}-{dataset}-{split}-out.csv"


def _predictions(predictor: Predictor, file: str, split: str, dataset: str, skip: bool) -> list[tuple[str, Prediction]]:
    """Return the id of every row of a file with its prediction.

    Raises:
        InputError: a row of ``file`` has no id, or is invalid and not skipped; or the number of classes is not that of
            the dataset.
    """
    from gpt2_pl.datamodules.readers import read_file
    from gpt2_pl.inference.input_rows import read_rows, select_columns

    predictor.require_prediction()
    n_classes = 5 if dataset == "sst" else 2
    require(len(predictor.labels) == n_classes, "the number of classes", len(predictor.labels), f"{n_classes}")
    source = read_file(file, split, predictor.prompt.quoting)
    require("id" in source.columns, split, file, "a file with the column id")
    columns = select_columns(source, predictor.prompt.columns)
    rows = [row for row in read_rows(source, columns, skip, ["id"]) if row is not None]
    ids, truncation = predictor.prompt.encode([row.texts for row in rows], predictor.tokenizer)
    predictor.prompt.warn_of_truncation(truncation)
    known = [(row, row_ids) for row, row_ids in zip(rows, ids, strict=True) if row_ids or not skip]
    for row, row_ids in known:
        where = f"{source.name}, row {row.number}"
        if not row_ids:
            raise InputError(predictor.prompt.no_token(row.texts), source=where)
        has_id = row.kept[0] is not None and bool(str(row.kept[0]).strip())
        require(has_id, "id", row.kept[0], "a text or number", where)
    predictions = predictor.predict_ids([row_ids for _, row_ids in known], 64)
    names = [str(row.kept[0]).strip().lower() for row, _ in known]
    return list(zip(names, predictions, strict=True))


def _table(predictions: Sequence[tuple[str, Prediction]], dataset: str, paraphrase_labels: str) -> str:
    """Return ids with their predictions in the form of CS224N's files, with their blanks at the ends of lines."""
    if dataset != "quora":
        header, labels, line = "id \t Predicted_Sentiment \n", None, "{}, {} \n"
    elif paraphrase_labels == "token_ids":
        header, labels, line = "id \t Predicted_Is_Paraphrase \n", _TOKEN_IDS, "{}, {} \n"
    else:
        header, labels, line = "id\tPredicted_Is_Paraphrase\n", None, "{},{}\n"
    indices = ((name, int(prediction.class_index or 0)) for name, prediction in predictions)
    return header + "".join(line.format(name, index if labels is None else labels[index]) for name, index in indices)


def _poems(predictor: Predictor, file: str, split: str, options: Namespace) -> str:
    """Return the content of a file of completed poems, each after its place in the input file, from 0.

    Raises:
        InputError: ``file`` is not a file of numbered poems, or the model does not complete poems.
    """
    from gpt2_pl.datamodules.sonnets import read_poems

    n_lines = predictor.prompt.prompt_lines
    require(n_lines is not None, "RUN", str(options.run), "a run that completes poems")
    openings = [poem.opening(n_lines or 0) for poem in read_poems(file, split)]
    poems = predictor.generate(openings, seed=options.seed)
    numbered = (f"\n{place}\n{poem.rstrip()}\n\n" for place, poem in enumerate(poems))
    return "--Generated Sonnets-- \n\n" + "".join(numbered)
