"""Errors that name the remedy: the other command, the option that was meant, the values that were found."""

import pytest
from conftest import ROOT
from helpers.refusals import names, refusal, refused
from helpers.row_files import data, rows_of, write
from helpers.saved_runs import saved_run

import gpt2_pl
from gpt2_pl import GPT2, GPT2Config
from gpt2_pl.commands import main
from gpt2_pl.datamodules import TextCorpus
from gpt2_pl.filesystem import require_file
from gpt2_pl.surgery import peft_format
from gpt2_pl.tasks import LanguageModel, SentimentClassifier
from gpt2_pl.text.tokenizer import load_tokenizer

IMDB = ["fit", "--config", ROOT / "configs/task/imdb.yaml"]


@pytest.fixture(scope="module")
def language_model(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    (folder / "text.txt").write_text("the film was fine " * 50)
    corpus = TextCorpus(val_file=str(folder / "text.txt"), tokenizer=str(base), max_length=16)
    return saved_run(folder, LanguageModel(base=str(base)), corpus)


@pytest.fixture(scope="module")
def classifier(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    file = write(folder / "rows.csv", rows_of("a film", "the plot"))
    return saved_run(folder, SentimentClassifier(base=str(base), num_classes=2), data(base, file, val_file=str(file)))


def test_classify_and_generate_of_the_other_kind_of_run_name_the_other_command(language_model, classifier, capsys):
    line = refused(lambda *args: main([*map(str, args)]), capsys, "classify", language_model, "--text", "a")
    assert "LanguageModel generates texts and does not classify; use gpt2-pl generate" in line
    line = refused(lambda *args: main([*map(str, args)]), capsys, "generate", classifier, "--prompt", "a")
    assert "SentimentClassifier predicts classes and generates no texts; use gpt2-pl classify" in line


def test_generate_blank_prompt_is_refused_unless_as_is(language_model):
    model = gpt2_pl.load(language_model)
    for prompt in ("", "   ", " \n"):
        assert "prompt 1 must be a text that is not blank" in str(refusal(model.generate, [prompt]))
    (text,) = model.generate(["   "], as_is=True, max_new_tokens=2)
    assert text.startswith("   ")


def test_commands_without_a_text_name_both_options(classifier, language_model, capsys):
    def run(*args):
        main([*map(str, args)])

    assert "--input or --text is missing" in refused(run, capsys, "classify", classifier)
    assert "--prompt or --prompt_file is missing" in refused(run, capsys, "generate", language_model)
    line = refused(run, capsys, "classify", classifier, "--text", "a", "--input", "b.csv")
    assert "--input and --text are both given" in line


def test_labels_that_are_no_classes_name_data_labels_and_the_values_of_the_file(base, tmp_path):
    rows = [{"sentence": "a film", "label": label} for label in ("good", "bad", "fair", "good")]
    module = data(base, write(tmp_path / "rows.csv", rows))
    error = refusal(module.setup)
    assert names(error, "data.labels")
    assert "rows.csv, row 1" in str(error)
    assert "data.labels must name the classes" in str(error)
    assert "values are 'bad', 'fair', 'good'" in str(error)


def test_empty_files_are_called_empty(base, tmp_path):
    for name in ("rows.csv", "rows.jsonl", "rows.parquet"):
        (tmp_path / name).touch()
        assert f"{name} is empty" in str(refusal(data(base, tmp_path / name).setup))


def test_missing_file_names_a_near_neighbour_in_its_folder(tmp_path):
    (tmp_path / "train.csv").touch()
    (tmp_path / "trains").mkdir()
    assert str(refusal(require_file, tmp_path / "trian.csv", "x")).endswith(f"; did you mean {tmp_path / 'train.csv'}?")
    for name in ("something_else.txt", "nowhere/train.csv"):
        assert "did you mean" not in str(refusal(require_file, tmp_path / name, "x"))


def test_misspelled_keys_name_the_nearest_key(run, capsys):
    for option, meant in (
        ("--model.optimiser.lr=1", "--model.optimizer.lr?"),
        ("--data.trainfile=a.csv", "train_file?"),
        ("--model.optimizer.lrr=1", "lr?"),
    ):
        assert f"did you mean {meant}" in refused(run, capsys, *IMDB, option)


def test_missing_tokenizer_of_a_random_start_is_named_with_its_vocabulary(base, tmp_path):
    file = write(tmp_path / "rows.csv", rows_of("a film", "the plot"))
    error = refusal(data(None, file, tokenizer=None).setup)
    assert "data.tokenizer is missing, and there is no model.base" in str(error)
    task = SentimentClassifier(config=GPT2Config(vocab_size=99, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    error = refusal(task.check_tokenizer, load_tokenizer(base))
    assert "vocab_size 99: increase model.config.vocab_size" in str(error)


def test_peft_format_of_a_model_without_adapter_names_its_kinds_and_the_other_format(base, tmp_path):
    model = GPT2.from_pretrained(base).requires_grad_(False)
    error = str(refusal(peft_format.save, model, tmp_path, str(base)))
    assert "has no adapter; peft's format has LoRA" in error
    assert "export the whole model with --format hf" in error
