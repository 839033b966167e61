"""Claims that hold, fail or are undecided, and invalid files of claims."""

from bisect import bisect_left

import numpy as np
import pytest
import yaml
from helpers.refusals import refused
from helpers.runs import fake_run

from gpt2_pl.commands import main
from gpt2_pl.experiments.claims import Outcome, judge_claims, read_claims
from gpt2_pl.experiments.comparison import compare
from gpt2_pl.experiments.run import Run

SHARES = {"full": 0.7, "lora": 0.9, "same": 0.7, "bad": 0.4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of four strategies, three seeds each, of which "same" is as good as the baseline."""
    folder, generator = tmp_path_factory.mktemp("claims"), np.random.default_rng(0)
    hard = generator.random(2000)
    for strategy, share in SHARES.items():
        for seed in range(3):
            fake_run(folder / f"{strategy}{seed}", strategy, seed, (hard < share) ^ (generator.random(2000) < 0.01))
    fake_run(folder / "single", "single", 1, hard < 0.9)
    return folder


def judge(folder, tmp_path, *claims):
    file = tmp_path / "claims.yaml"
    file.write_text(yaml.safe_dump({"claims": list(claims)}))
    comparisons = compare([Run.read(file.parent) for file in sorted(folder.glob("*/metrics.json"))])
    return judge_claims(read_claims(file), comparisons, file)


@pytest.mark.parametrize(
    ("arm", "claim", "margin", "expected"),
    [
        ("lora", "better", None, Outcome.HOLDS),
        ("lora", "better", 10, Outcome.HOLDS),
        ("lora", "better", 30, Outcome.FAILS),
        ("lora", "worse", None, Outcome.FAILS),
        ("bad", "worse", 10, Outcome.HOLDS),
        ("bad", "not_worse", 5, Outcome.FAILS),
        ("same", "not_worse", 5, Outcome.HOLDS),
        ("same", "equivalent", 5, Outcome.HOLDS),
        ("lora", "equivalent", 5, Outcome.FAILS),
        ("same", "better", None, Outcome.UNDECIDED),
        ("same", "equivalent", 0.01, Outcome.UNDECIDED),
        ("single", "better", None, Outcome.UNDECIDED),
    ],
)
def test_claim_is_judged_by_the_runs(folder, tmp_path, arm, claim, margin, expected):
    (judged,) = judge(folder, tmp_path, {"arm": arm, "claim": claim, "margin": margin})
    assert judged.outcome is expected
    assert "D = " in judged.figures
    assert ("not assessed: one seed" in judged.figures) == (arm == "single")


def test_claims_about_one_score_are_one_family(folder, tmp_path):
    """A claim that barely holds alone does not hold among many."""
    claim = {"arm": "same", "claim": "not_worse"}
    margins = np.geomspace(0.05, 5, 60)

    def holds(margin):
        return judge(folder, tmp_path, claim | {"margin": float(margin)})[0].outcome is Outcome.HOLDS

    barely = float(margins[bisect_left(margins, True, key=holds)])
    others = [claim | {"margin": 1e-6}] * 20
    among = judge(folder, tmp_path, claim | {"margin": barely}, *others)
    assert {judged.outcome for judged in among} == {Outcome.UNDECIDED}
    assert judge(folder, tmp_path, claim | {"margin": 5}, *others)[0].outcome is Outcome.HOLDS


def test_claim_names_baseline_score_and_sentence(folder, tmp_path):
    claims = (
        {"arm": "full", "baseline": "lora", "claim": "worse", "metric": "val/loss", "task": "ParaphraseDetector"},
        {"arm": "lora", "claim": "better", "sentence": "LoRA wins."},
    )
    by_loss, sentence = judge(folder, tmp_path, *claims)
    assert by_loss.outcome is Outcome.UNDECIDED  # losses of rows are not recorded
    assert by_loss.text == "full is worse than lora in val/loss on ParaphraseDetector."
    assert sentence.text == "LoRA wins."


def test_compare_command_with_a_false_claim_has_status_1(folder, tmp_path, capsys):
    file = tmp_path / "claims.yaml"
    file.write_text("claims:\n- {arm: lora, claim: better}\n- {arm: same, claim: better}\n")
    command = ["compare", str(folder), "--check", str(file)]
    main(command)
    shown = " ".join(capsys.readouterr().out.split())
    assert "holds: lora is better than full in val/accuracy on ParaphraseDetector. [D = +" in shown
    assert shown.endswith("claims: 1 holds, 0 fail, 1 undecided")
    file.write_text("claims:\n- {arm: lora, claim: worse}\n")
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--margin", "1"])
    assert stopped.value.code == 1
    assert "fails: lora is worse" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("claims: []", "claims"),
        ("{}", "claims"),
        ("claims:\n- {arm: lora}", "claims[0].claim"),
        ("claims:\n- {arm: lora, claim: best}", "claims[0].claim"),
        ("claims:\n- {arm: lora, claim: not_worse}", "claims[0].margin"),
        ("claims:\n- {arm: lora, claim: equivalent, margin: 0}", "claims[0].margin"),
        ("claims:\n- {arm: lora, claim: better, margin: '1'}", "claims[0].margin"),
        ("claims:\n- {arm: lora, claim: better, arms: 1}", "claims[0].arms"),
        ("claims:\n- {arm: dora, claim: better}", "claims[0].arm"),
        ("claims:\n- {arm: full, claim: better}", "claims[0].arm"),
        ("claims:\n- {arm: lora, claim: better}\n- {arm: lora, claim: better, baseline: x}", "claims[1].baseline"),
        ("claims:\n- {arm: lora, claim: better, metric: val/f1}", "claims[0].metric"),
        ("claims:\n- {arm: lora, claim: better, task: x}", "claims[0].task"),
    ],
)
def test_invalid_claims_are_refused_by_key(folder, tmp_path, run, capsys, content, key):
    file = tmp_path / "claims.yaml"
    file.write_text(content)
    line = refused(run, capsys, "compare", folder, "--check", file)
    assert line.key == key
    assert str(file) in line
