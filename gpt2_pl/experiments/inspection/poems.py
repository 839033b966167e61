"""Inspection of generated poems, side by side with the true poems."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.inspection.page import Column, Inspection, Pair, Section, Table
from gpt2_pl.experiments.run import Run
from gpt2_pl.text.metrics import chrf, distinct, seq_rep, words

if TYPE_CHECKING:
    from gpt2_pl.text.poems import Poem


class PoemScores(NamedTuple):
    """Scores of a generated poem, of the lines after the prompt.

    Args:
        chrf: chrF against the true lines, from 0 to 100.
        distinct_2: fraction of distinct bigrams of words.
        seq_rep_4: fraction of repeated 4-grams of words.
    """

    chrf: float
    distinct_2: float
    seq_rep_4: float

    @classmethod
    def of(cls, generated: Sequence[str], true: Sequence[str]) -> PoemScores:
        """Score the lines of a poem."""
        text = "\n".join(generated)
        tokens = words(text)
        return cls(chrf([text], ["\n".join(true)]), distinct([tokens], 2), seq_rep(tokens, 4))


def match(generated: Sequence[Poem], true: Sequence[Poem], file: str) -> list[tuple[Poem, Poem]]:
    """Return each generated poem with the true poem of the same number.

    Args:
        generated: the generated poems.
        true: the true poems.
        file: the file of the true poems, for error messages.

    Raises:
        InputError: a true poem is missing.
    """
    by_number = {poem.number: poem for poem in true}
    if missing := [poem.number for poem in generated if poem.number not in by_number]:
        expected = f"the number of every generated poem; poem {missing[0]} is missing"
        raise InputError(f"{file} must have {expected}", key="data", value=file, expected=expected)
    return [(poem, by_number[poem.number]) for poem in generated]


def inspect_poems(
    run: Run, split: str, poems: Sequence[tuple[Poem, Poem]], num_given: int, count: int, created: str
) -> Inspection:
    """Inspect the generated poems of a run; those with the lowest chrF come first.

    Args:
        run: the run.
        split: split of the poems.
        poems: each generated poem with the true poem.
        num_given: number of first lines that were the prompt.
        count: number of poems that are shown.
        created: date of the page.

    Returns:
        The inspection.
    """
    scored = [(PoemScores.of(poem.lines[num_given:], true.lines[num_given:]), poem, true) for poem, true in poems]
    scored.sort(key=lambda item: item[0].chrf)
    means = {name: sum(item[0][i] for item in scored) / len(scored) for i, name in enumerate(PoemScores._fields)}
    about = {"run": str(run.folder), "task": str(run.record.get("task")), "strategy": run.strategy, "split": split}
    shown = {"mean chrF": f"{means['chrf']:.1f}", "mean distinct-2": f"{means['distinct_2']:.2f}",
             "mean seq-rep-4": f"{means['seq_rep_4']:.2f}"}  # fmt: skip
    lines = {**about, "poems": f"{len(scored):,}", "given lines": str(num_given), **shown, "page created": created}
    columns = [Column("", "name"), Column("", "name")]
    inspection = Inspection(f"Inspection of {run.folder}", Table(columns, [list(item) for item in lines.items()]))
    table: list[Sequence[object]] = [["poem", *PoemScores._fields, "generated", "true"]]
    pairs, cells = [], []
    for scores, poem, true in scored[:count]:
        table.append([poem.number, *scores, " / ".join(poem.lines), " / ".join(true.lines)])
        texts = [f"{scores.chrf:.1f}", f"{scores.distinct_2:.2f}", f"{scores.seq_rep_4:.2f}"]
        cells.append([str(poem.number), *texts, str(len(poem.lines)), str(len(true.lines))])
        text = f"chrF {texts[0]}, distinct-2 {texts[1]}, seq-rep-4 {texts[2]}"
        pairs.append(Pair(f"Poem {poem.number}", text, poem.lines, true.lines, num_given))
    inspection.tables["rows.csv"] = table
    headings = ("poem", "chrF", "distinct-2", "seq-rep-4", "lines", "true lines")
    caption = f"{len(cells)} of {len(scored)} poems, the lowest chrF first"
    explanation = (
        f"Scores are those of the lines after the first {num_given}, which were given (in italics). A low distinct-2 "
        "and a high seq-rep-4 mean that a poem repeats itself."
    )
    scores_table = Table([Column(heading) for heading in headings], cells, caption)
    inspection.sections = [
        Section("Scores of the poems", [explanation], tables=[scores_table]),
        Section("Poems", pairs=pairs),
    ]
    summary = [f"  {name} {value}" for name, value in shown.items()]
    if scored:
        worst, poem, _ = scored[0]
        summary.append(f"  lowest chrF: poem {poem.number}, {worst.chrf:.1f}")
    inspection.summary = [str(run.folder), f"  {about['task']}, {run.strategy}, {split}, {len(scored)} poems", *summary]
    return inspection


def inspect_two(
    runs: Sequence[Run],
    split: str,
    poems: Sequence[tuple[Poem, Poem, Poem]],
    losses: Sequence[Mapping[int, float]],
    num_given: int,
    count: int,
    created: str,
) -> Inspection:
    """Inspect the poems of two runs; those whose chrF differs most come first.

    Args:
        runs: the two runs.
        split: split of the poems.
        poems: the poem of each run and the true poem.
        losses: loss per token of the true poems by number, of each run; without those that are not known.
        num_given: number of first lines that were the prompt.
        count: number of poems that are shown.
        created: date of the page.

    Returns:
        The inspection.
    """
    scored = []
    for first, second, true in poems:
        a, b = (PoemScores.of(poem.lines[num_given:], true.lines[num_given:]).chrf for poem in (first, second))
        known = [of_run.get(true.number, math.nan) for of_run in losses]
        scored.append(([a, b, b - a, *known, known[1] - known[0]], first, second, true))
    scored.sort(key=lambda item: -abs(item[0][2]))
    means = [sum(item[0][i] for item in scored) / len(scored) for i in range(6)]
    names = ["chrF (first)", "chrF (second)", "chrF difference", "loss (first)", "loss (second)", "loss difference"]
    facts = [["run", str(runs[0].folder)], ["run (second)", str(runs[1].folder)], ["split", split]]
    facts += [["poems", f"{len(scored):,}"], ["given lines", str(num_given)]]
    facts += [[f"mean {name}", _number(mean)] for name, mean in zip(names, means, strict=True)]
    title = f"Inspection of {runs[0].folder} and {runs[1].folder}"
    columns = [Column("", "name"), Column("", "name")]
    inspection = Inspection(title, Table(columns, [*facts, ["page created", created]]))
    table: list[Sequence[object]] = [["poem", *names, "first", "second", "true"]]
    cells, pairs = [], []
    for values, first, second, true in scored[:count]:
        table.append([true.number, *values, *(" / ".join(poem.lines) for poem in (first, second, true))])
        shown = [_number(value) for value in values]
        cells.append([str(true.number), *shown])
        text = f"chrF {shown[0]} and {shown[1]}, loss per token {shown[3]} and {shown[4]}"
        pairs.append(Pair(f"Poem {true.number}", text, first.lines, true.lines, num_given, second.lines))
    inspection.tables["rows.csv"] = table
    explanation = (
        f"chrF is that of the generated lines after the first {num_given}, which were given (in italics). The loss is "
        "that of the true lines, in nats per token. Differences are second minus first."
    )
    caption = f"{len(cells)} of {len(scored)} poems, the largest difference in chrF first"
    scores_table = Table([Column(heading) for heading in ("poem", *names)], cells, caption)
    inspection.sections = [
        Section("Poems on which the runs differ", [explanation], tables=[scores_table]),
        Section("Poems", pairs=pairs),
    ]
    inspection.summary = [f"{name}: {value}" for name, value in facts]
    worst, _, _, true = scored[0]
    inspection.summary.append(
        f"largest chrF difference: poem {true.number}, {_number(worst[0])} and {_number(worst[1])}"
    )
    return inspection


def _number(value: float) -> str:
    """Return a number with two decimals; an en dash if it is not known."""
    return "\u2013" if math.isnan(value) else f"{value:.2f}"
