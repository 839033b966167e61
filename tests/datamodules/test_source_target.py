"""Pairs of sources and targets: columns, references, templates and invalid rows."""

import json

import numpy as np
from helpers.refusals import refusal

from gpt2_pl.datamodules import SourceTargetPairs, WebNLG
from gpt2_pl.text.tokenizer import END_OF_TEXT, load_tokenizer

TRAIN = [
    {"source": "film : mood : funny", "target": "The film is funny."},
    {"source": "plot : mood : boring", "target": "The plot is boring."},
    {"source": "film : mood : funny", "target": "It is a funny film. "},
    {"source": "camera : mood : cold", "target": "The camera is cold."},
]
DEV = [
    {"source": "film : mood : cold", "seen": True, "references": ["The film is cold.", "It is a cold film."]},
    {"source": "cast : mood : funny", "seen": False, "references": ["The cast is funny."]},
]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def texts(data, split, tokenizer):
    """Return the prompt and the target of every row of a split, decoded from its tokens."""
    rows = data.encoded[split]
    batch, found = rows.batch(np.arange(len(rows))), []
    for ids, mask, targets in zip(batch["input_ids"], batch["attention_mask"], batch["targets"], strict=True):
        n, first = int(mask.sum()), int((targets == -100).int().argmin())
        assert (targets[:first] == -100).all()
        assert (ids[first + 1 : n] == targets[first : n - 1]).all()
        assert (targets[n:] == -100).all()
        found.append([tokenizer.decode(part.tolist(), skip_special_tokens=False)
                      for part in (ids[: first + 1], targets[first:n])])  # fmt: skip
    assert rows.n_targets.tolist() == (batch["targets"] != -100).sum(1).tolist()
    return found


def test_pairs_train_on_every_reference_and_evaluate_one_row_per_source(base, tmp_path):
    files = {"train_file": write(tmp_path / "train.jsonl", TRAIN), "val_file": write(tmp_path / "dev.jsonl", DEV)}
    tokenizer = load_tokenizer(base)
    for references in ("all", "first"):
        data = WebNLG(**files, tokenizer=str(base), train_references=references)
        data.setup()
        kept = [[TRAIN[i] for i in (0, 2, 1, 3)], [TRAIN[i] for i in (0, 1, 3)]][references == "first"]
        expected = [[f"{row['source']}\n", row["target"].strip() + END_OF_TEXT] for row in kept]
        assert texts(data, "train", tokenizer) == expected
        expected = [[f"{row['source']}\n", row["references"][0] + END_OF_TEXT] for row in DEV]
        assert texts(data, "val", tokenizer) == expected
    assert data.references("val") == [tuple(row["references"]) for row in DEV]
    assert data.is_seen("val") == [True, False]
    assert data.is_seen("train") == [None] * 3
    assert [tokenizer.decode(ids) for ids in data.prompts("val")] == [f"{row['source']}\n" for row in DEV]
    assert [data.row_number("train", i) for i in range(3)] == [1, 2, 4]
    assert data.text("train", 2) == "camera : mood : cold"
    assert data.description()["references"] == {"train": 4, "val": 3}


def test_pairs_of_any_columns_fill_the_template(base, tmp_path):
    (tmp_path / "train.csv").write_text("name,price,text\nfilm,cheap,A cheap film\nplot,new,A new plot\n")
    data = SourceTargetPairs(
        train_file=str(tmp_path / "train.csv"), val_file=str(tmp_path / "train.csv"), tokenizer=str(base),
        columns={"about": "text"}, template="{name} is {price}:  {about}",
    )  # fmt: skip
    data.setup()
    expected = [["film is cheap:", f"  A cheap film{END_OF_TEXT}"], ["plot is new:", f"  A new plot{END_OF_TEXT}"]]
    assert texts(data, "train", load_tokenizer(base)) == expected
    assert data.text("train", 1) == "plot | new"


def test_pairs_validation_fraction_takes_whole_sources(base, tmp_path):
    rows = [{"source": f"film {i % 10}", "target": f"It is film {i}."} for i in range(30)]
    data = SourceTargetPairs(train_file=write(tmp_path / "t.jsonl", rows), tokenizer=str(base), val_fraction=0.3)
    data.setup()
    train, val = ({row.texts["source"] for row in data.rows[split]} for split in ("train", "val"))
    assert (len(train), len(val)) == (7, 3)
    assert not train & val
    assert len(data.encoded["train"]) == 21
    assert all(len(row.references) == 3 for row in data.rows["val"])


def test_pairs_prediction_keeps_every_row_and_reads_no_targets(base, tmp_path):
    rows = [{"source": "film : mood : cold"}] * 2
    data = WebNLG(predict_file=write(tmp_path / "new.jsonl", rows), tokenizer=str(base))
    data.setup("predict")
    assert len(data.encoded["predict"]) == 2
    assert data.references("predict") == [(), ()]


def test_pairs_long_target_is_truncated_at_its_end(base, tmp_path):
    rows = [{"source": "film", "target": "a film " * 20}, {"source": "plot", "target": "a plot"}]
    data = SourceTargetPairs(train_file=write(tmp_path / "t.jsonl", rows), tokenizer=str(base), max_length=12,
                             val_file=write(tmp_path / "v.jsonl", rows))  # fmt: skip
    data.setup()
    (_, long), (_, short) = texts(data, "train", load_tokenizer(base))
    assert ("a film " * 20).startswith(long)
    assert short == f"a plot{END_OF_TEXT}"
    assert data.encoded["train"].lengths.max() == 12


def test_pairs_invalid_settings_and_rows_are_refused(base, tmp_path):
    for template in ("{source}", "{target}\n{source} ", "{source}\n", "{target} {source} {target}"):
        assert "data.template must be text with two fields" in str(
            refusal(lambda t=template: SourceTargetPairs(template=t))
        )
    assert "data.train_file" in str(refusal(lambda: SourceTargetPairs(train_file=[])))
    for row, message in (
        ({"source": "a"}, "has no column 'target'"),
        ({"source": "a", "target": " "}, "row 1: 'target' must be a non-empty string or a list of them, got ' '"),
        ({"source": "a", "references": []}, "row 1: 'references' must be a non-empty string or a list of them, got []"),
        ({"source": "a", "references": ["b", 3]}, "row 1: 'references' must be"),
        ({"source": "", "target": "b"}, "row 1: 'source' must be a non-empty string"),
        ({"source": "a", "target": "b", "seen": "perhaps"}, "row 1: 'seen' must be true or false, got 'perhaps'"),
        ({"source": "a film " * 40, "target": "b"}, "row 1: the prompt must have between 1 and 31 tokens"),
    ):
        file = write(tmp_path / "rows.jsonl", [row])
        data = WebNLG(test_file=file, tokenizer=str(base), max_length=32)
        error = refusal(lambda d=data: d.setup("test"), case=message)
        assert message in str(error)
        assert "rows.jsonl" in str(error)
    same = SourceTargetPairs(
        test_file=write(tmp_path / "r.jsonl", TRAIN), tokenizer=str(base), columns={"target": "source"}
    )
    assert "data.columns must be a different column" in str(refusal(lambda: same.setup("test")))
