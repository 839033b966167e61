"""Exports: the model card and its example, class names, templates, pooled heads, and the upload."""

import base64
import functools
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import flags, metrics
from helpers.cards import card, executed
from helpers.refusals import names, refused
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2LMHeadModel

import gpt2_pl
from gpt2_pl.commands import main
from gpt2_pl.commands.export import export_hf, export_peft
from gpt2_pl.commands.support.model_card import ExportedModel
from gpt2_pl.commands.support.model_card import ModelCard as Card
from gpt2_pl.datamodules.prompt_template import Template
from gpt2_pl.errors import InputError
from gpt2_pl.experiments.run import Run
from gpt2_pl.inference.loading import load_checkpoint, load_run_tokenizer
from gpt2_pl.model import GPT2
from gpt2_pl.surgery import LoRA
from gpt2_pl.tasks import SentimentClassifier
from gpt2_pl.text.tokenizer import load_tokenizer

TEXTS = ("It was worth every minute.", "I would see it again.")
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.precision=32-true"]
KINDS = {
    "last": ["--config=task/imdb", "--data.max_length=48"],
    "concat": ["--config=task/imdb", "--config=strategy/ulmfit", "--data.max_length=48"],
    "adapter": ["--config=task/imdb", "--config=strategy/lora", "--data.max_length=48"],
    "verbalizer": [
        "--config=task/quora",
        "--config=strategy/verbalizer",
        "--model.threshold=accuracy",
        "--data.max_length=60",
    ],
    "language model": ["--config=task/text", "--data.column=sentence", "--data.max_length=32"],
}


@pytest.fixture(scope="module")
def done(fitted, base, files, pair_files):
    """Return the run of a kind, which the tests share and do not change."""

    def fit(kind):
        rows = pair_files if kind == "verbalizer" else files
        return fitted("fit", *KINDS[kind], "--model.base", base, *SHORT, *flags(rows))

    return functools.cache(fit)


def export(folder, out, *args):
    main(["export", str(folder), "--out", str(out), *args])
    return out


def task_and_ids(run):
    """Return the task of a run and the token ids that it gives the texts of the example."""
    task = load_checkpoint(run / "checkpoints/best.ckpt").eval()
    template = Template(task.prompt_spec["template"])
    row = dict(zip(template.fields, TEXTS, strict=False))
    tokenizer = load_run_tokenizer(run, task.config.vocab_size)
    return task, template.encode([row], tokenizer, task.prompt_spec["max_length"])[0]


def batch(ids):
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}


@pytest.mark.parametrize("kind", ["last", "concat", "verbalizer"])
def test_card_example_of_classifier_gives_the_probabilities_of_its_task(kind, done, tmp_path):
    out = export(done(kind), tmp_path / "out", "--format=hf")
    task, ids = task_and_ids(done(kind))
    with torch.no_grad():
        expected = task.predict_proba(batch(ids))[0]
    torch.testing.assert_close(executed(out)["probabilities"], expected, atol=1e-6, rtol=1e-5)
    loaded = gpt2_pl.load(out)
    texts = [TEXTS[: len(loaded.prompt.fields)]]
    found = loaded.predict_proba(texts)[0]
    torch.testing.assert_close(torch.tensor(found), expected.double(), atol=1e-5, rtol=1e-4)
    assert loaded.predict(texts) == [loaded.labels[int(task.predict_class(expected.unsqueeze(0)))]]
    config = json.loads((out / "config.json").read_text())
    labels = ["negative", "positive"] if kind in ("last", "concat") else ["not_duplicate", "duplicate"]
    assert list(config["id2label"].values()) == labels
    assert config["prompt"]["template"] == task.prompt_spec["template"]
    assert config["prompt"]["max_length"] == task.prompt_spec["max_length"]
    assert f"```\n{task.prompt_spec['template'].rstrip()}\n```" in card(out)
    assert all(f"| {i} | {label} |" in card(out) for i, label in enumerate(labels))
    if kind == "verbalizer":
        assert config["decision_threshold"] == pytest.approx(float(task.decision_threshold))
        assert f"at least {float(task.decision_threshold):.4g}" in card(out)


def test_card_example_of_peft_adapter_gives_the_probabilities_of_its_task(done, base, tmp_path, capsys):
    out = export(done("adapter"), tmp_path / "out", "--format=peft")
    task, ids = task_and_ids(done("adapter"))
    with torch.no_grad():
        expected = task.predict_proba(batch(ids))[0]
    variables = executed(out)
    torch.testing.assert_close(variables["probabilities"], expected, atol=1e-6, rtol=1e-5)
    assert variables["model"].config.id2label == {0: "negative", 1: "positive"}
    described = json.loads((out / "task.json").read_text())
    assert described["num_labels"] == 2
    assert described["id2label"] == {"0": "negative", "1": "positive"}
    assert described["prompt"]["template"] == task.prompt_spec["template"]
    assert str(base) not in card(out)  # only adapter_config.json has the path of a local base


def test_card_example_of_language_model_samples_as_generate_does(done, tmp_path, capsys):
    out = export(done("language model"), tmp_path / "out", "--format=hf")
    capsys.readouterr()
    variables = executed(out)
    assert capsys.readouterr().out.startswith("It was")
    ids = load_run_tokenizer(done("language model"), 400).encode("It was", add_special_tokens=False).ids
    assert variables["tokens"][0, : len(ids)].tolist() == ids
    positions = variables["model"].config.n_positions
    assert len(ids) < variables["tokens"].shape[1] <= positions
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "do_sample": True}
    assert variables["settings"] == {**sampling, "max_length": positions}
    text = card(out)
    assert "It continues a text; `gpt2-pl generate FOLDER --prompt ...` does this." in text
    assert "probabilities" not in text
    note = metrics(done("language model"))["score_note"]
    assert note.startswith("Perplexity of validation and test:")
    assert note in text
    assert ("95 % interval" in text) == ("The intervals are" in text)


def test_card_has_front_matter_scores_with_intervals_data_digests_and_cost(done, tmp_path):
    folder = done("last")
    record = metrics(folder)
    out = export(folder, tmp_path / "reviews", "--format=hf", "--license=mit")
    front = ModelCard.load(out / "README.md").data
    assert (front.license, front.library_name, front.pipeline_tag) == ("mit", "transformers", "text-classification")
    assert front.base_model is None  # a local folder
    values = {f"{one.dataset_split}/{one.metric_type}": one.metric_value for one in front.eval_results}
    assert values == {name: value for name, value in record["scores"].items() if name.startswith("test/")}
    text = card(out)
    accuracy = 100 * record["scores"]["test/accuracy"]
    assert f"| test/accuracy | {accuracy:.1f} % | " in text
    low, high = text.partition(f"| test/accuracy | {accuracy:.1f} % | ")[2].partition(" %")[0].split(" to ")
    assert float(low) < accuracy < float(high)
    for split, digest in record["data"]["digests"].items():
        assert digest in text, split
    for fact in (
        f"a local GPT-2, SHA-256 {record['base']['digest']}",
        f"{record['parameters']['trainable']:,}",
        "## Cost",
        "## Licence",
        "seed",
    ):
        assert fact in text


def test_card_lists_the_settings_of_its_run(done, tmp_path):
    settings, record = yaml.safe_load((done("last") / "config.yaml").read_text()), metrics(done("last"))
    text = card(export(done("last"), tmp_path / "out", "--format=hf"))
    (rate,) = {rate for layer in record["parameters"]["layers"] for rate in layer["peak_rates"]}
    assert f"| learning rate | {rate:.4g} |" in text
    assert f"| batch size | {settings['data']['init_args']['batch_size']} |" in text
    assert "training rows of each class" not in text


def test_card_of_another_checkpoint_has_no_scores(done, tmp_path):
    last = done("last") / "checkpoints/last.ckpt"
    out = export(done("last"), tmp_path / "out", "--format=hf", f"--ckpt_path={last}")
    assert "## Scores" not in card(out)
    assert ModelCard.load(out / "README.md").data.eval_results is None


def test_card_of_run_without_a_record_is_written(done, tmp_path):
    folder = shutil.copytree(done("last"), tmp_path / "run")
    (folder / "metrics.json").unlink()
    text = card(export(folder, tmp_path / "out", "--format=hf"))
    assert "## Use" in text
    assert "## Scores" not in text


def test_card_text_of_an_untrusted_checkpoint_stays_text(tmp_path):
    hostile = 'x```\n<script>alert(1)</script> {text} "; import os #'
    model = ExportedModel("m", "peft", "T", 1, labels=["a|b", "'] + [print('run')"], template=hostile)
    code = model.example(".")
    loading, _, predicting = code.partition("text = ")
    assert eval(predicting.partition("\n")[0], {"__builtins__": {}}) == hostile.replace("{text}", TEXTS[0])
    classes = eval(loading.partition("classes = ")[2].partition("\n")[0], {"__builtins__": {}})
    assert classes == dict(enumerate(model.labels))


@pytest.mark.parametrize("pooling", ["mean", "max", "mix", "concat"])
def test_pooled_export_equals_the_task_on_padded_rows(pooling, base, tmp_path):
    torch.manual_seed(0)
    task = SentimentClassifier(base=str(base), num_classes=3, pooling=pooling, mean_weight=0.3, dropout=0.0)
    task.configure_model()
    torch.nn.init.normal_(task.eval().head.linear.bias)
    torch.nn.init.normal_(task.head.linear.weight)
    rows = [[5, 6, 7, 8, 9], [11, 12]]
    with torch.no_grad():
        expected = torch.cat([task(batch(ids))[0] for ids in rows])
    export_hf(task, tmp_path, base)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True).eval()
    right = torch.tensor([rows[0], [*rows[1], 0, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    left = torch.tensor([rows[0], [0, 0, 0, *rows[1]]]), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    for ids, mask in (right, left):
        with torch.no_grad():
            result = theirs(ids, attention_mask=mask, labels=torch.tensor([0, 2]))
        torch.testing.assert_close(result.logits, expected, atol=1e-5, rtol=1e-5)
        loss = torch.nn.functional.cross_entropy(expected, torch.tensor([0, 2]))
        torch.testing.assert_close(result.loss, loss, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("good") != []
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=False)


def test_peft_export_of_another_pooling_is_refused(base, tmp_path):
    task = SentimentClassifier(base=str(base), num_classes=3, pooling="mean", surgery=[LoRA()])
    task.configure_model()
    with pytest.raises(InputError, match=r"pooling must be 'last'.*'mean'.*--backbone"):
        export_peft(task, tmp_path)


def test_code_in_an_exported_folder_is_not_run_by_this_library(done, tmp_path):
    out = export(done("concat"), tmp_path / "out", "--format=hf")
    (out / "modeling_gpt2_pooled.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    own = load_checkpoint(done("concat") / "checkpoints/best.ckpt").backbone
    for name, tensor in GPT2.from_pretrained(out).state_dict().items():
        assert torch.equal(tensor, own.state_dict()[name]), name
    SentimentClassifier(base=str(out), num_classes=2).configure_model()
    assert load_tokenizer(out).encode("good").ids
    assert not (tmp_path / "ran").exists()
    with pytest.raises((ImportError, AttributeError), match="PooledGPT2"):  # transformers runs it
        AutoModelForSequenceClassification.from_pretrained(out, trust_remote_code=True)


@pytest.mark.parametrize("kind", ["verbalizer", "last"])
def test_backbone_export_of_classifier_continues_texts_without_its_template(kind, done, tmp_path):
    out = export(done(kind), tmp_path / "out", "--format=hf", "--backbone")
    variables = executed(out)
    assert isinstance(variables["model"], GPT2LMHeadModel)
    assert 'tokenizer("It was"' in card(out).replace("'", '"')
    assert not {"id2label", "prompt"} & json.loads((out / "config.json").read_text()).keys()
    (text,) = gpt2_pl.load(out).generate(["a fine film"], max_new_tokens=3)
    assert text.startswith("a fine film")


@pytest.mark.parametrize(
    ("decoding", "settings"),
    [
        ({"temperature": 0.0, "max_new_tokens": 9}, {"max_new_tokens": 9, "do_sample": False}),
        ({"num_beams": 3, "max_new_tokens": 9}, {"num_beams": 3, "max_new_tokens": 9, "do_sample": False}),
        ({"top_p": None, "max_new_tokens": 99},
         {"temperature": 1.0, "top_k": 0, "do_sample": True, "max_length": 99}),
    ],
)  # fmt: skip
def test_card_example_of_generator_has_the_settings_of_its_decoding(decoding, settings):
    model = ExportedModel("m", "transformers", "T", 1, decoding=decoding, n_positions=99)
    code = model.example(".")
    assert eval(code.partition("settings = ")[2].partition("\n")[0], {"__builtins__": {}}) == settings
    assert "torch" not in code


def test_card_of_scores_without_intervals_does_not_explain_intervals():
    record = {"data": None, "scores": {"val/loss": 0.5}, "monitor": "val/loss"}
    run = Run(Path("none"), record, {})
    text = Card(ExportedModel("m", "transformers", "T", 1), run).render()
    assert "| score | value |\n" in text
    assert "interval" not in text
    assert "Validation scores are optimistic" in text


def test_card_example_of_data_to_text_has_the_template_up_to_its_target():
    model = ExportedModel("m", "transformers", "T", 1, template="Say: {class}\n{target}", target="target")
    prompt = eval(model.example(".").partition("tokenizer(")[2].partition(", add_special")[0], {"__builtins__": {}})
    assert re.fullmatch(r"Say: [^\n]+\n", prompt)


def test_card_of_template_with_keyword_and_without_length_or_data_is_valid():
    model = ExportedModel("m", "transformers", "T", 1, labels=["a", "b"], template="{class}")
    compile(model.example("."), "README.md", "exec")
    described = Card(model, SimpleNamespace(record={"data": None, "scores": {"test/accuracy": 0.5}}))
    assert described.metadata().eval_results[0].dataset_name == "unknown"
    assert "of longer ones" not in Card(model).render()


@pytest.mark.parametrize("hub_id", [None, "gpt2"])
def test_card_names_only_a_base_of_the_hub(hub_id, done, tmp_path):
    folder = shutil.copytree(done("last"), tmp_path / "run")
    record = metrics(folder)
    assert record["base"]["hub_id"] is None
    record["base"] |= {"path": "models/mine", "hub_id": hub_id}
    (folder / "metrics.json").write_text(json.dumps(record))
    out = export(folder, tmp_path / "out", "--format=hf")
    assert ModelCard.load(out / "README.md").data.base_model == hub_id
    assert f"| base | {hub_id or 'a local GPT-2'}" in card(out)


class Hub(BaseHTTPRequestHandler):
    """What the client of the Hugging Face hub asks for when a folder is uploaded."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, self.headers["Authorization"], body))
        if self.server.status != 200:
            return self.answer({"error": "no"}, self.server.status)
        if self.path.endswith("/repos/create"):
            return self.answer({"url": f"{constants.ENDPOINT}/me/reviews"})
        if "/preupload/" in self.path:
            given = json.loads(body)["files"]
            return self.answer({"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                                          for one in given]})  # fmt: skip
        return self.answer(
            {"success": True, "commitOid": "0" * 40, "commitUrl": f"{constants.ENDPOINT}/me/reviews/commit/0"}
        )

    def do_GET(self):
        self.answer({"id": "me/reviews", "sha": "0" * 40, "siblings": []})

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A hub on loopback; its requests are kept."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.status = [], 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


def test_push_to_hub_uploads_every_file_in_one_commit(hub, done, tmp_path, capsys):
    out = export(done("adapter"), tmp_path / "out", "--format=peft", "--push_to_hub=me/reviews", "--private")
    assert {token for _, token, _ in hub.requests} == {"Bearer hf_test"}
    (created,) = (json.loads(body) for path, _, body in hub.requests if path.endswith("/repos/create"))
    assert created["name"] == "reviews"
    assert created["organization"] == "me"
    assert created.get("visibility") == "private" or created.get("private") is True  # of older clients
    ((path, _, commit),) = (one for one in hub.requests if "/commit/" in one[0])
    assert "me/reviews" in path
    operations = [json.loads(line) for line in commit.splitlines()]
    uploaded = {
        one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in operations if one["key"] == "file"
    }
    assert uploaded == {file.name: file.read_bytes() for file in out.iterdir()}
    assert 'name = "me/reviews"' in card(out).replace("'", '"')
    assert "me/reviews" in capsys.readouterr().out


def test_push_to_hub_failure_keeps_the_folder_and_says_how_to_upload_it(hub, done, tmp_path, capsys):
    hub.status = 403
    with pytest.raises(SystemExit) as ended:
        export(done("adapter"), tmp_path / "out", "--format=peft", "--push_to_hub=me/reviews")
    assert ended.value.code == 1
    line = capsys.readouterr().err
    assert f"hf upload me/reviews {tmp_path / 'out'}" in line
    assert (tmp_path / "out" / "README.md").exists()


def test_push_to_hub_bad_arguments_are_refused_before_anything_is_written(
    hub, done, run, tmp_path, capsys, monkeypatch, subtests
):
    for args, key in (
        (["--push_to_hub=reviews"], "push_to_hub"),
        (["--push_to_hub=me/re views"], "push_to_hub"),
        (["--private"], "private"),
        (["--license=two words"], "license"),
    ):
        with subtests.test(args[0]):
            line = refused(run, capsys, "export", done("adapter"), "--out=o", "--format=peft", *args)
            assert names(line, key), line
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    arguments = ["export", done("adapter"), "--out=o", "--format=peft", "--push_to_hub=me/reviews"]
    assert "HF_TOKEN" in refused(run, capsys, *arguments)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(run, capsys, *arguments)
    assert not (tmp_path / "o").exists()
    assert not hub.requests
