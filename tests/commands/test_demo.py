"""demo: answers equal to those of classify and generate, what the server lets pass, many requests, and the Space."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep
from urllib.parse import urlsplit

import psutil
import pytest
import torch
from conftest import ROOT
from helpers.demo_pages import ask, get, plain, served
from helpers.demo_runs import GIVEN, demo_runs
from helpers.refusals import names, refused

import gpt2_pl
from gpt2_pl.commands import demo, main
from gpt2_pl.commands.support.demo_answers import MAX_CHARACTERS, DemoRun, Worker
from gpt2_pl.commands.support.demo_server import is_loopback, listen
from gpt2_pl.commands.support.space import requirements
from gpt2_pl.errors import InputError, printable
from gpt2_pl.tasks import LanguageModel

TEXT = 'a "fine" <b>film</b> & {{value}} ${1 + 1}'
KINDS = ("reviews", "pairs", "numbers", "poems", "language", "targets")


@pytest.fixture(scope="module")
def runs(base, files, pair_files, poem_files, tmp_path_factory):
    """A run of each kind."""
    return demo_runs(tmp_path_factory.mktemp("runs"), base, files, pair_files, poem_files)


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()


def loaded(folder):
    return DemoRun(folder, gpt2_pl.load(folder))


def last(run, texts, worker, **settings):
    """Return the text of the last answer of a run."""
    *_, answer = run.answers(texts, GIVEN | settings if run.is_generator else {}, worker)
    return plain(answer)


def output(capsys, *args):
    """Run a command and return its standard output."""
    capsys.readouterr()
    main([*map(str, args)])
    return capsys.readouterr().out


# Answers


@pytest.mark.parametrize("kind", ["reviews", "pairs"])
def test_answer_of_classifier_equals_classify(kind, runs, worker, capsys):
    texts = [TEXT, "the plot"] if kind == "pairs" else [TEXT]
    out = output(capsys, "classify", runs[kind], "--precision=32-true", "--json", "--text", *texts)
    row, run = json.loads(out), loaded(runs[kind])
    lines = [line.strip() for line in last(run, texts, worker).splitlines() if line.strip()]
    assert lines[0] == row["prediction"]
    for label in run.predictor.labels:
        assert lines[lines.index(label, 1) + 1] == f"{row[f'p({label})']:.4f}"
    assert [line for line in lines if line in texts] == texts  # with its words marked, escaped once


def test_answer_of_regressor_equals_classify(runs, worker, capsys):
    out = output(capsys, "classify", runs["numbers"], "--precision=32-true", "--json", "--text", "a fine film")
    first, *_, answer = loaded(runs["numbers"]).answers(["a fine film"], {}, worker)
    assert plain(answer).split()[0] == plain(first).split()[0] == f"{json.loads(out)['prediction']:g}"


@pytest.mark.parametrize("kind", ["poems", "language", "targets"])
def test_answer_of_generator_equals_generate(kind, runs, worker, capsys):
    prompt = "the  first line\n and the second" if kind == "poems" else TEXT
    for settings in ({}, {"seed": 3}, {"temperature": 0.5, "max_new_tokens": 4}):
        args = [f"--{key}={value}" for key, value in settings.items()]
        line = output(capsys, "generate", runs[kind], "--json", *args, "--prompt", prompt)
        expected = printable(json.loads(line)["text"], keep="\n\t")
        answer = last(loaded(runs[kind]), [prompt], worker, **settings)
        if kind == "poems":
            found = [line.strip() for line in answer.splitlines() if line.strip()]
            assert found[:-1] == expected.splitlines()
        elif expected.strip():
            assert expected.strip() in answer


def typing(ids, pause, seen):
    """Return a stand-in for the generation of a task that writes tokens with a pause before each."""

    def continue_prompts(self, tokenizer, prompts, seeds, limit, *, stopping_criteria, **settings):
        for n in range(len(ids) + 1):
            sleep(pause)
            stopping_criteria(torch.tensor([[*prompts[0], *ids[:n]]]), None)
            seen.append(n)
        return [ids]

    return continue_prompts


def test_answer_is_streamed_and_escapes_control_characters(runs, worker, monkeypatch):
    run = loaded(runs["language"])
    ids = run.predictor.tokenizer.encode("a \u202e\x07 b").ids
    monkeypatch.setattr(LanguageModel, "continue_prompts", typing(ids, 0.15, []))
    answers = [*run.answers(["the"], GIVEN, worker)]
    assert len(answers) > 2
    assert 'data-state="running"' in answers[0]
    assert 'data-state="done"' in answers[-1]
    assert r"a \u202e\x07 b" in plain(answers[-1])


def test_generation_that_nobody_waits_for_is_stopped(runs, worker, monkeypatch):
    seen = []
    monkeypatch.setattr(LanguageModel, "continue_prompts", typing([5] * 1000, 0.02, seen))
    answers = loaded(runs["language"]).answers(["the"], GIVEN, worker)
    next(answers)
    answers.close()
    assert len(seen) < 500
    assert worker.run(lambda: 7) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_invalid_texts_are_answered_by_a_sentence(kind, runs, worker):
    run = loaded(runs[kind])
    n = len(run.inputs)
    for texts, words in (
        ([" \n"] * n, f"{run.inputs[0]} must not be empty"),
        (["a"] * (n - 1) + [None], "must not be empty"),
        (["a"] * (n - 1) + ["x" * 10_000], f"at most {MAX_CHARACTERS:,} characters, got 10,000"),
    ):
        assert words in last(run, texts, worker)
    if run.is_generator:
        assert "room for one new token" in last(run, ["so long " * 100], worker)
        assert "max_new_tokens must be" in last(run, ["a"], worker, max_new_tokens=0)
    else:
        assert "UTF-8" in last(run, ["a \udce9"] * n, worker)


def test_answer_names_the_strongest_words_and_the_cut(runs, worker):
    run = loaded(runs["reviews"])
    answer = last(run, ["so long a film " * 100], worker)
    assert f"reads only {run.predictor.prompt.max_length} tokens" in answer
    assert "neighbouring words are taken together" in answer
    assert "occlusion" in answer
    answer = last(run, ["film"], worker)
    assert "No word alone changes the answer." in answer


# Arguments


def test_demo_bad_arguments_are_refused_in_one_line(runs, run, capsys, monkeypatch, tmp_path):
    reviews, language = runs["reviews"], runs["language"]
    for args, key, words in (
        ([reviews, reviews, reviews], "RUN", "one or two runs"),
        ([tmp_path / "nothing"], "RUN", "there is no folder"),
        ([tmp_path], "RUN", "no checkpoints/best.ckpt"),
        ([reviews, runs["pairs"]], "RUN", "reads sentence1, sentence2"),
        ([reviews, "--port=70000"], "port", "[0, 65535]"),
        ([reviews, "--host=no.such.host.invalid"], "host", "an address of this machine"),
        ([reviews, "--temperature=1"], "temperature", "generates texts"),
        ([language, "--temperature=-1"], "temperature", "0 or in"),
        ([reviews, "--example", "a", "b"], "example", "1 texts: sentence"),
        ([reviews, reviews, "--ckpt_path=x"], "ckpt_path", "one run"),
        ([reviews, "--export", tmp_path], "export", "exists already"),
        ([reviews, "--export", tmp_path / "x", "--port=1"], "port", "without --export"),
    ):
        line = refused(run, capsys, "demo", *args)
        assert names(line, key), line
        assert words in line
    with pytest.raises(InputError, match="cannot listen"), listen("127.0.0.1", 0) as used:
        listen("127.0.0.1", used.getsockname()[1])
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert 'pip install "gpt2_pl[demo]"' in refused(run, capsys, "demo", reviews)


def test_demo_import_and_help_need_no_gradio_and_no_torch():
    code = "import sys; sys.modules['gradio'] = None; from gpt2_pl.commands import main; main(['demo', '--help'])"
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], cwd=ROOT, check=False,
                          stdout=subprocess.DEVNULL)  # fmt: skip
    assert done.returncode == 0


def test_is_loopback_of_addresses_and_names():
    assert all(map(is_loopback, ("127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "example.org")))


# Server


@pytest.fixture(scope="module")
def page(runs):
    """Page of two runs, one of which has no model."""
    problem = "RUN: other has no checkpoints/best.ckpt"
    with served([loaded(runs["reviews"]), DemoRun("other", problem=problem)], GIVEN, [["a film"]]) as url:
        yield url


def test_server_passes_only_what_the_page_requests(page):
    headers = {"Content-Type": "application/json"}
    status, html = get(page)
    assert status == 200
    addresses = set(re.findall(r"(?:src|href)=\"(?:https?:)?//([^/\"]+)", html.decode()))
    assert addresses == set()
    assert b"googleapis" not in html
    for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/proxy=http://127.0.0.1/", "/docs", "/openapi.json", "/x",
                 "/gradio_api/upload_progress?upload_id=1", "/monitoring", "/gradio_api/runs", "/static/../config",
                 "/gradio_api/stream/a/1/2/list.m3u8", "/login", "/gradio_api/deep_link?session_hash=a"):  # fmt: skip
        assert get(page + path) == (404, b"there is no such page"), path
    for path in ("/gradio_api/upload", "/gradio_api/run/answer", "/gradio_api/call/answer", "/gradio_api/vibe-edit"):
        assert get(page + path, b"{}", headers)[0] == 404, path
    assert get(page, None, {"Host": "evil.example"}) == (403, b"this server has another name")
    connection = http.client.HTTPConnection(urlsplit(page).netloc, timeout=30)
    connection.request("POST", "/gradio_api/queue/join", headers={"Content-Length": str(5 << 20)})
    assert connection.getresponse().status == 413
    config = json.loads(get(f"{page}/config")[1])
    assert config["analytics_enabled"] is False
    assert config["footer_links"] == []
    info = json.loads(get(f"{page}/gradio_api/info")[1])
    assert info["named_endpoints"] == info["unnamed_endpoints"] == {}


def test_page_shows_the_reason_of_a_run_without_a_model(page, runs):
    (answer, other), kinds = ask(page, "a film")
    assert kinds.count("process_generating") >= 2
    (expected,) = gpt2_pl.load(runs["reviews"]).predict(["a film"])
    assert plain(answer).split()[:2] == ["reviews", expected]
    assert other == ""
    assert "other has no checkpoints/best.ckpt" in get(page)[1].decode()


@pytest.mark.parametrize("num", [16, pytest.param(200, marks=pytest.mark.slow)])
def test_command_answers_many_requests_eight_at_a_time_and_ends_with_ctrl_c(num, runs):
    """None is lost, each gets its own answer, and the memory of the process does not grow with them."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "cli.py", "demo", runs["reviews"], "--port=0"], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": f"{ROOT}"},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        url = re.match(r"(http://127\.0\.0\.1:\d+) shows reviews; Ctrl-C ends it\n", line)[1]
        model = gpt2_pl.load(runs["reviews"])
        texts = [f"a film of {i} hours and the plot" for i in range(num)]
        expected = [f"{p:.4f}" for p in model.predict_proba(texts)[:, 1]]
        memory, found = [], []
        with ThreadPoolExecutor(8) as clients:
            for part in (texts[: num * 3 // 10], texts[num * 3 // 10 :]):
                found += clients.map(lambda text: ask(url, text)[0][0], part)
                memory.append(psutil.Process(process.pid).memory_info().rss / 2**20)
        assert len(found) == num
        wrong = [i for i in range(num) if expected[i] not in plain(found[i]) or texts[i] not in plain(found[i])]
        assert wrong == []
        assert memory[1] - memory[0] < 30, memory  # MiB
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=30)[1]
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.communicate()


# Space


@pytest.mark.slow
def test_export_writes_a_space_that_answers_as_the_runs(runs, tmp_path, capsys):
    space = tmp_path / "space"
    args = ["--title", 'Two "poets" 😀', "--example", "a day", "--export", space]
    shown = output(capsys, "demo", runs["poems"], runs["language"], *args)
    assert shown == f"{space}: .gitattributes, README.md, app.py, gpt2_pl, models, requirements.txt\n"
    suffixes = {file.suffix for file in space.rglob("*") if file.is_file()}
    assert suffixes <= {".py", ".md", ".txt", ".json", ".safetensors", ".yaml", ".jinja", ".css", "", ".typed"}
    front = (space / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert "sdk: gradio\n" in front
    assert "app_file: app.py\n" in front
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"GRADIO_SERVER_PORT": "0", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen([sys.executable, space / "app.py"], text=True, cwd=tmp_path, env=environment,
                               stdout=subprocess.PIPE)  # fmt: skip
    try:
        url = process.stdout.readline().split()[0]
        answers, _ = ask(url, "a day\na night", 30, 1.2, 4)
        for kind, answer in zip(("poems", "language"), answers, strict=True):
            (expected,) = gpt2_pl.load(runs[kind]).generate(["a day\na night"], seed=4)
            assert "".join(printable(expected, keep="\n\t").split()) in "".join(plain(answer).split()), kind
        mapped = [line for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines() if str(ROOT) in line]
        assert mapped == []
    finally:
        process.terminate()
        process.communicate()


@pytest.mark.parametrize("form", ["hf", *(pytest.param(form, marks=pytest.mark.slow) for form in ("peft", "base"))])
def test_export_of_exported_and_pretrained_folders_keeps_their_answers(form, runs, base, tmp_path, capsys):
    source = base
    if form != "base":
        source = tmp_path / form
        main(["export", str(runs["reviews"]), f"--format={form}", f"--out={source}"])
    if form == "peft":
        (source / "tokenizer.json").unlink()  # that of its base
    main(["demo", str(source), "--export", str(tmp_path / "space")])
    model, found = gpt2_pl.load(source), gpt2_pl.load(tmp_path / "space" / "models" / source.name)
    if form == "base":
        assert found.generate(["a film"], seed=2) == model.generate(["a film"], seed=2)
    else:
        assert found.predict_proba(["a film"])[0] == pytest.approx(model.predict_proba(["a film"])[0], abs=1e-5)


def test_export_of_a_prefix_names_the_reason(runs, run, capsys, tmp_path):
    line = refused(run, capsys, "demo", runs["prefix"], "--export", tmp_path / "space")
    assert "a prefix or soft prompt cannot be merged into the weights" in line
    assert "--format" not in line
    assert not (tmp_path / "space").exists()


def test_requirements_of_a_space_are_pinned_and_complete():
    lines = requirements()
    assert all(re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.]+", line) for line in lines)
    assert {"torch", "lightning", "gradio"} <= {line.partition("==")[0] for line in lines}
