"""The package gpt2_pl from an uninstalled checkout and from an unpacked wheel."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain

import pytest
import yaml
from conftest import ROOT
from helpers.refusals import names, refused
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import GPT2ForSequenceClassification

import gpt2_pl
from gpt2_pl.commands import main
from gpt2_pl.commands.support.process import program
from gpt2_pl.configs import config_path, packaged_configs
from gpt2_pl.errors import InputError


def call(library, folder, *args):
    """Run the command line in a folder, from an uninstalled checkout or from an unpacked wheel."""
    if library == ROOT:
        program = [ROOT / "cli.py"]
    else:  # the checkout may be on the path of whoever runs the tests
        path = f"[{str(library)!r}, *(p for p in sys.path if p != {str(ROOT)!r})]"
        program = ["-P", "-c", f"import sys; sys.path = {path}; from gpt2_pl.commands import main; main()"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([sys.executable, *program, *map(str, args)], cwd=folder, env=environment, capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Build the wheel of this checkout and unpack it as an installer does."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True,
                           capture_output=True, check=False).stdout.split("\n")  # fmt: skip
    if not files[0]:
        pytest.skip("not a checkout")
    for name in files:
        if not name.startswith(("tests/", "benchmarks/results/", "lightning_logs/")) and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        folder,
    ]  # a source distribution, and from it a wheel
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}  # it warns
    done = subprocess.run(build, cwd=folder / "source", env=environment, text=True, check=False, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "warning" not in done.stdout.lower(), done.stdout
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_wheel_contains_one_package_with_all_sources_and_configurations(wheel):
    assert {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")} == {"gpt2_pl"}
    own = ROOT / "gpt2_pl"
    expected = {path.relative_to(own) for ext in ("py", "jinja", "css") for path in own.rglob(f"*.{ext}")}
    for folder in ("datamodules", "callbacks", "configs"):
        expected |= {path.relative_to(ROOT) for ext in ("py", "yaml") for path in (ROOT / folder).rglob(f"*.{ext}")}
    found = {path.relative_to(wheel / "gpt2_pl") for path in (wheel / "gpt2_pl").rglob("*.*") if path.is_file()}
    assert found == {*expected, (wheel / "gpt2_pl" / "py.typed").relative_to(wheel / "gpt2_pl")}


@pytest.fixture(params=[pytest.param("checkout", marks=pytest.mark.slow), "wheel"])
def library(request):
    return ROOT if request.param == "checkout" else request.getfixturevalue("wheel")


def test_fit_configuration_by_name_next_to_user_packages_is_found(library, tmp_path):
    """Both the library's and the user's callbacks/ and datamodules/ are found, with and without __init__.py."""
    for name in ("callbacks", "datamodules"):
        (tmp_path / name).mkdir()
    (tmp_path / "callbacks" / "__init__.py").touch()
    own = "from lightning.pytorch import Callback\nclass Own(Callback): ...\n"
    (tmp_path / "callbacks" / "mine.py").write_text(own)
    own = "from gpt2_pl.datamodules import ToySentiment\nclass Own(ToySentiment): ...\n"
    (tmp_path / "datamodules" / "mine.py").write_text(own)
    done = call(library, tmp_path, "fit", "--config", "quickstart", "--config=strategy/ulmfit.yaml",
                "--data=datamodules.mine.Own", "--trainer.callbacks+=callbacks.mine.Own", "--print_config")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("callbacks.mine.Own", "gpt2_pl.callbacks.GradualUnfreezing", "datamodules.mine.Own"):
        assert f"class_path: {name}\n" in done.stdout


def test_configs_list_show_and_copy_give_packaged_files(library, tmp_path):
    listed = call(library, tmp_path, "configs", "list")
    assert listed.returncode == 0, listed.stderr
    assert all(f"\n  {name} " in listed.stdout for name in packaged_configs())
    shown = call(library, tmp_path, "configs", "show", "strategy/lora").stdout
    assert shown == (ROOT / "configs/strategy/lora.yaml").read_text(encoding="utf-8")
    assert call(library, tmp_path, "configs", "copy", "strategy/lora").stdout == "lora.yaml\n"
    assert (tmp_path / "lora.yaml").read_text(encoding="utf-8") == shown
    again = call(library, tmp_path, "configs", "copy", "strategy/lora")
    assert again.returncode == 2
    assert "lora.yaml" in again.stderr
    assert listed.stdout.endswith("--data.val_file FILE\n")
    assert (f"python {ROOT}/cli.py fit" if library == ROOT else "gpt2-pl fit") in listed.stdout.splitlines()[-2]


def test_config_path_prefers_a_file_and_suggests_the_nearest_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("task/sst5", "task/sst5.yaml", "configs/task/sst5.yaml"):
        assert config_path(name) == ROOT / "configs/task/sst5.yaml"
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "sst5.yaml").touch()
    assert config_path("task/sst5.yaml").resolve() == tmp_path / "task/sst5.yaml"
    for name, near in (("strategy/lorra", "strategy/lora"), ("sst", "task/sst5")):
        with pytest.raises(InputError, match=rf"{name}.*{near}\?") as error:
            config_path(name)
        assert names(error.value, "config")


@pytest.mark.slow
def test_wheel_sweep_and_export_work_outside_the_checkout(wheel, tmp_path):
    """The working directory has user packages with the names of the checkout's folders."""
    for name in ("callbacks", "datamodules", "configs", "commands"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not the library')\n")
    (tmp_path / "s.yaml").write_text(
        "name: s\nseeds: [1]\n"
        "overrides: {trainer.max_epochs: 1, data.n_train: 64}\n"
        "tasks:\n  toy:\n    configs: [quickstart]\n    strategies: {full: {}}\n"
    )
    done = call(wheel, tmp_path, "sweep", "s.yaml")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "lightning_logs/s/toy/full/seed_1"
    assert json.loads((folder / "metrics.json").read_text())["configs"][0] == "quickstart"
    done = call(wheel, tmp_path, "export", folder, "--format=hf", "--out=hf")
    assert done.returncode == 0, done.stderr
    GPT2ForSequenceClassification.from_pretrained(tmp_path / "hf")


def test_fit_help_begins_with_introduction_of_at_most_100_columns(capsys):
    main(["fit", "--help"])
    introduction, _, keys = capsys.readouterr().out.partition("usage: ")
    for line in ("gpt2-pl configs ", "gpt2-pl fit --config task/sst5", "--model.surgery.help gpt2_pl.surgery.LoRA"):
        assert line in introduction
    assert all(len(line) <= 100 for line in introduction.splitlines())
    assert "--trainer.max_epochs" in keys


OWN = """
from gpt2_pl.surgery import Surgery, LoRA
class Bare(Surgery):
    \"\"\"Train nothing.\"\"\"
    def apply(self, model, tokenizer=None): ...
class Wide(Surgery):
    \"\"\"Train less.

    Args:
        size: of it.
    \"\"\"
    def __init__(self, size: int = 3): self.size = size
    def apply(self, model, tokenizer=None): ...
"""


def test_fit_surgery_help_shows_class_description_and_valid_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_help.py").write_text(OWN)
    for option, cls, words in (
        ("--model.surgery.help", "gpt2_pl.surgery.LoRA", ["--model.surgery.targets", "--model.surgery.rank RANK"]),
        ("--model.surgery+.help", "gpt2_pl.surgery.LoRA", ["--model.surgery.targets", "rank r of an adapter"]),
        ("--model.surgery+.help", "own_help.Wide", ["Train less", "--model.surgery.size SIZE", "of it.", "default: 3"]),
        ("--model.surgery.help", "own_help.Bare", ["Train nothing", "no arguments"]),
    ):
        main(["fit", option, cls])
        shown = capsys.readouterr().out
        assert f"--model.surgery.help={cls}" in shown
        assert all(word in " ".join(shown.split()) for word in words), shown
        assert "--surgery" not in shown
    monkeypatch.delitem(sys.modules, "own_help", raising=False)


def test_commands_missing_module_class_or_file_is_named(capsys):
    for args, key, words in (
        (["fit", "--model.surgery.help=nope.X"], "model.surgery", ["'nope'"]),
        (["fit", "--model.surgery+=nope.below.X"], "model.surgery", ["'nope.below'"]),
        (["fit", "--model.surgery+=json.Lora"], "model.surgery", ["'json.Lora'"]),
        (["fit", "--config=nope"], "config", ["nope", "gpt2-pl configs"]),
        (["configs", "show", "nope"], "NAME", ["nope", "gpt2-pl configs"]),
    ):
        line = refused(lambda *args: main([*args]), capsys, *args)
        assert names(line, key), line
        assert all(word in line for word in words), line


def test_program_name_follows_how_it_was_started(monkeypatch):
    for started, words in {
        "/bin/gpt2-pl": ["gpt2-pl"],
        "cli.py": ["python", "cli.py"],
        "../lib/cli.py": ["python", "../lib/cli.py"],
        "/site/gpt2_pl/__main__.py": ["python", "-m", "gpt2_pl"],
        "/site/other/__main__.py": ["gpt2-pl"],
    }.items():
        monkeypatch.setattr(sys, "argv", [started, "fit"])
        assert program() == words


def test_configs_list_fits_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert "Hu et al. 2022" in " ".join(" ".join(lines).split())


def test_citation_version_equals_package_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == gpt2_pl.__version__


def test_pyproject_lower_bounds_are_the_minimum_constraints():
    """The tests are run on constraints-min.txt by hand; pyproject.toml must not promise older versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {}
    for text in chain(project["dependencies"], *project["optional-dependencies"].values()):
        requirement = Requirement(text)
        bounds |= {requirement.name.lower(): bound.version for bound in requirement.specifier}
    lines = (ROOT / "constraints-min.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lines if not line.startswith("#"))
    required = {Requirement(text).name.lower() for text in project["dependencies"]}
    assert required <= lowest.keys()
    for name, version in lowest.items():
        assert Version(bounds[name]) == Version(version), name
