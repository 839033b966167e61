"""Inspection of classifiers: worst rows, confusions, calibration, slices, and disagreements of two runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gpt2_pl.experiments.error_analysis import (
    NEGATION,
    NUM_BINS,
    Bin,
    Confusion,
    Predictions,
    Slice,
    confusions,
    disagreements,
    highest_losses,
    slices,
)
from gpt2_pl.experiments.inspection.calibration import Calibration, CalibrationScores, reliability_diagram
from gpt2_pl.experiments.inspection.page import Column, Inspection, Section, Table
from gpt2_pl.experiments.inspection.summary import (
    Agreement,
    Subject,
    class_scores,
    findings,
    macro_f1,
    p_text,
    percent,
    percent_interval,
    summary,
)
from gpt2_pl.experiments.statistics.intervals import wilson_interval

_MAX_CONFUSIONS = 60  # of the page; the CSV table has all
_MAX_SLICES = 400  # of the page, for many classes
_EXTREME = 2.99  # log temperature; the search ends at 3


def facts(subjects: Sequence[Subject], created: str) -> Table:
    """Return what was inspected, and its scores, a column for every run."""
    lines: dict[str, list[str]] = {}
    for subject in subjects:
        scores, n = CalibrationScores.of(subject.rows), len(subject.rows.labels)
        hits = int(subject.rows.hits.sum())
        values = {
            "run": str(subject.run.folder),
            "task": str(subject.run.record.get("task")),
            "strategy": subject.run.strategy,
            "split": subject.split,
            "rows": f"{n:,}",
            "accuracy (95 % interval)": f"{percent(hits / n)} ({percent_interval(wilson_interval(hits, n))})",
            "macro F1": percent(macro_f1(subject.rows)),
            "mean loss": f"{scores.loss:.3f}",
            "page created": created,
        }
        for name, value in values.items():
            lines.setdefault(name, []).append(value)
    headings = ["first run", "second run"] if len(subjects) > 1 else [""]
    columns = [Column("", "name"), *(Column(heading, "name") for heading in headings)]
    return Table(columns, [[name, *values] for name, values in lines.items()])


def inspect_classifier(
    subjects: Sequence[Subject],
    calibration: Calibration,
    count: int,
    columns: Mapping[str, Sequence[Any]],
    patterns: Mapping[str, str],
    created: str,
) -> Inspection:
    """Inspect one run, and its disagreements with a second one.

    Args:
        subjects: the run and, optionally, a second one that was evaluated on the same rows.
        calibration: calibration of the first run.
        count: number of rows that are shown in each list.
        columns: further columns of the rows, by name; each of their values is a slice.
        patterns: regular expressions by name; rows whose text matches are a slice.
        created: date of the page.

    Returns:
        The inspection.

    Raises:
        InputError: a pattern is no regular expression.
    """
    first = subjects[0]
    patterns = {"negation": NEGATION, **patterns}
    pairs = confusions(first.rows)
    found = [slices(subject.rows, columns, patterns) for subject in subjects]
    title = " and ".join(str(subject.run.folder) for subject in subjects)
    inspection = Inspection(f"Inspection of {title}", facts(subjects, created))
    inspection.sections = [
        Section("In short", findings=findings(subjects, calibration.scores, pairs, found[0])),
        _rows_section(first.rows, count, inspection),
        _class_section(first.rows, inspection),
        _confusion_section(pairs, inspection),
        _calibration_section(calibration, first, inspection),
        _slice_section(found, inspection),
    ]
    if len(subjects) > 1:
        inspection.sections.append(_disagreement_section(first.rows, subjects[1].rows, count, inspection))
    inspection.summary = summary(subjects, calibration, pairs, found[0])
    return inspection


def _rows_section(rows: Predictions, count: int, inspection: Inspection) -> Section:
    cells: list[list[str]] = []
    table: list[Sequence[object]] = [["row", "text", "label", "prediction", "p_label", "loss"]]
    losses = rows.losses
    for i in highest_losses(rows, count):
        number, p = rows.row_numbers[i], float(rows.probabilities[i, rows.labels[i]])
        names = [rows.names[rows.labels[i]], rows.names[rows.predictions[i]]]
        cells.append([str(number), rows.texts[i], *names, _probability(p), f"{losses[i]:.2f}"])
        table.append([number, rows.texts[i], *names, p, float(losses[i])])
    inspection.tables["rows.csv"] = table
    columns = [Column("row"), Column("text", "text"), Column("label", "name"), Column("prediction", "name")]
    columns += [Column("p(label)"), Column("loss")]
    explanation = (
        "The loss is the negative log probability of the label. Rows with a high loss are errors of the model, "
        "ambiguous texts or wrong labels; read them before you change the model."
    )
    caption = f"The {len(cells)} rows with the highest loss of {len(rows.labels):,}"
    return Section("Rows with the highest loss", [explanation], tables=[Table(columns, cells, caption)])


def _probability(p: float) -> str:
    """Return a probability of a file of six decimals."""
    return f"{p:.4f}" if p >= 5e-5 else "< 0.0001"


def _class_section(rows: Predictions, inspection: Inspection) -> Section:
    scores, N = class_scores(rows), len(rows.labels)
    header = ["class", "labels", "predictions", "precision", "recall", "f1", "mean_probability"]
    inspection.tables["classes.csv"] = [header, *map(list, scores)]
    cells = [
        [one.name, *(f"{n:,} ({percent(n / N)})" for n in (one.labels, one.predictions)), percent(one.probability),
         percent(one.precision), percent(one.recall), percent(one.f1)]
        for one in scores
    ]  # fmt: skip
    columns = [Column("class", "name"), Column("labels"), Column("predictions"), Column("mean probability")]
    columns += [Column("precision"), Column("recall"), Column("F1")]
    explanation = (
        "A class that is predicted more rarely than its mean probability is often the second most probable class of a "
        "row; other weights of the classes, chosen on validation rows, may raise macro F1."
    )
    return Section("Classes", [explanation], tables=[Table(columns, cells)])


def _confusion_section(pairs: Sequence[Confusion], inspection: Inspection) -> Section:
    inspection.tables["confusions.csv"] = [["label", "prediction", "rows", "fraction_of_label"], *map(list, pairs)]
    if not pairs:
        return Section("Confusions", ["Every row is predicted correctly."])
    total = sum(pair.num_rows for pair in pairs)
    cells = [
        [pair.label, pair.prediction, f"{pair.num_rows:,}", percent(pair.fraction), percent(pair.num_rows / total)]
        for pair in pairs[:_MAX_CONFUSIONS]
    ]
    columns = [Column("label", "name"), Column("predicted as", "name"), Column("rows"), Column("of the label")]
    columns.append(Column("of all errors"))
    caption = f"{len(cells)} of {len(pairs)} confusions, the most frequent first"
    return Section("Confusions", tables=[Table(columns, cells, caption)])


def _calibration_section(calibration: Calibration, subject: Subject, inspection: Inspection) -> Section:
    series = [("as predicted", calibration.scores, calibration.bins)]
    if calibration.scaled_scores is not None:
        series.append(("temperature-scaled", calibration.scaled_scores, calibration.scaled_bins))
    rows = []
    table: list[Sequence[object]] = [
        ["probabilities", "low", "high", "rows", "confidence", "accuracy", "accuracy_low", "accuracy_high"]
    ]
    for name, scores, bins in series:
        cells = [percent(scores.error), f"{scores.brier:.3f}", f"{scores.loss:.3f}", percent(scores.confidence)]
        rows.append([name, *cells, percent(scores.accuracy)])
        table += [
            [name, *map(float, one[:2]), one.num_rows, one.confidence, one.accuracy, *one.interval] for one in bins
        ]
    inspection.tables["calibration.csv"] = table
    columns = [Column("probabilities", "name"), Column("ECE"), Column("Brier score"), Column("mean loss")]
    columns += [Column("mean confidence"), Column("accuracy")]
    paragraphs = [
        "Probabilities are calibrated if, of the rows with a confidence of 70 %, 70 % are predicted correctly. ECE is "
        f"the mean difference of confidence and accuracy over {NUM_BINS} bins of equal width. Bars are 95 % intervals.",
        temperature_text(calibration, subject.split),
    ]
    if (other := int((subject.rows.predictions != subject.rows.probabilities.argmax(1)).sum())) > 0:
        paragraphs.append(
            f"In {other:,} rows the prediction is not the most probable class, as with a tuned threshold. Calibration "
            "refers to the most probable class."
        )
    image_text = "Reliability diagram: accuracy by confidence, and the number of rows by confidence"
    return Section(
        "Calibration",
        paragraphs,
        png=reliability_diagram(calibration),
        image_text=image_text,
        tables=[Table(columns, rows), _bin_table(calibration.bins)],
    )


def _bin_table(bins: Sequence[Bin]) -> Table:
    cells = [
        [f"{one.low:.2f} to {one.high:.2f}", f"{one.num_rows:,}", percent(one.confidence), percent(one.accuracy),
         percent_interval(one.interval)]
        for one in bins
    ]  # fmt: skip
    columns = [Column("confidence in"), Column("rows"), Column("mean confidence"), Column("accuracy")]
    return Table([*columns, Column("95 % interval")], cells, "Bins of the probabilities as predicted")


def temperature_text(calibration: Calibration, split: str) -> str:
    """Return how the temperature was fitted, in sentences."""
    if not calibration.temperatures:
        return "No temperature was fitted: there are too few rows."
    values = " and ".join(f"{temperature:.3g}" for temperature in calibration.temperatures)
    if any(abs(math.log(temperature)) > _EXTREME for temperature in calibration.temperatures):
        values += ", the limit of the search: the confidence says nothing about the errors"
    raised = " It raises the loss of these rows, so do not use it." if calibration.raises_loss else ""
    if not calibration.is_cross_fitted:
        return (
            f"The temperature was fitted on the {calibration.num_fitted:,} validation rows ({values}). Logits are "
            f"divided by it; predictions do not change. A temperature above 1 lowers the confidence.{raised}"
        )
    name = "validation" if split == "val" else split
    text = (
        f"The {name} rows were halved at random, and each half was scaled by the temperature fitted on the other half "
        f"({values}), so that no row is scored with a temperature that was fitted on it.{raised}"
    )
    if calibration.stored is None:
        return f"{text} No temperature is stored with the run: it has no predictions of validation rows."
    fitted = f"{calibration.num_fitted:,} validation rows"
    return f"{text} The temperature of all {fitted}, {calibration.stored:.3g}, is stored with the run for new rows."


def _slice_section(found: Sequence[Sequence[Slice]], inspection: Inspection) -> Section:
    two = len(found) > 1
    header = ["slice", "rows", "accuracy", "low", "high", "mean_loss", "p_holm", "differs"]
    table: list[Sequence[object]] = [[*header, *(["accuracy_second", "mean_loss_second"] if two else [])]]
    cells = []
    for group in zip(*found, strict=True):
        one = group[0]
        differs = "yes" if one.differs else "no"
        others = [value for other in group[1:] for value in (other.accuracy, other.loss)]
        table.append([one.name, one.num_rows, one.accuracy, *one.interval, one.loss, one.p, differs, *others])
        texts = [f"{one.num_rows:,}", percent(one.accuracy), percent_interval(one.interval), f"{one.loss:.3f}"]
        cells.append([one.name, *texts, differs, p_text(one.p), *(percent(other.accuracy) for other in group[1:])])
    inspection.tables["slices.csv"] = table
    columns = [Column("slice", "name"), Column("rows"), Column("accuracy"), Column("95 % interval")]
    columns += [
        Column("mean loss"),
        Column("differs"),
        Column("p (Holm)"),
        *([Column("second run")] if two else []),
    ]
    explanation = (
        "Accuracy of the rows with a property. A slice differs if its accuracy is not that of all other rows by "
        f"Fisher's exact test, with Holm's adjustment for the {len(cells)} slices, at 5 %. A slice that does not "
        "differ may be too small to show it; see its interval."
    )
    shown = cells[:_MAX_SLICES]
    caption = f"{len(shown)} of {len(cells)} slices" if len(shown) < len(cells) else ""
    return Section("Slices", [explanation], tables=[Table(columns, shown, caption)])


def _disagreement_section(first: Predictions, second: Predictions, count: int, inspection: Inspection) -> Section:
    agreement, n = Agreement.of(first, second), len(first.labels)
    names = ("both right", "only the first right", "only the second right", "neither right")
    counts = [[name, f"{value:,}", percent(value / n)] for name, value in zip(names, agreement, strict=True)]
    table: list[Sequence[object]] = [
        ["row", "text", "label", "prediction_first", "prediction_second", "loss_first", "loss_second"]
    ]
    cells = []
    losses = first.losses, second.losses
    for i in disagreements(first, second)[:count]:
        predictions = [one.names[one.predictions[i]] for one in (first, second)]
        label, pair = first.names[first.labels[i]], [float(loss[i]) for loss in losses]
        table.append([first.row_numbers[i], first.texts[i], label, *predictions, *pair])
        row_losses = [f"{loss:.2f}" for loss in pair]
        cells.append([str(first.row_numbers[i]), first.texts[i], label, *predictions, *row_losses])
    inspection.tables["disagreements.csv"] = table
    columns = [Column("row"), Column("text", "text"), Column("label", "name"), Column("first", "name")]
    columns += [Column("second", "name"), Column("loss first"), Column("loss second")]
    explanation = (
        f"McNemar's exact test that both runs are equally often the only correct one: p = {p_text(agreement.p)}. It "
        "refers to these two trained models on new texts, not to their strategies; gpt2-pl compare tests strategies."
    )
    caption = f"{len(cells)} of {agreement.first + agreement.second:,} rows that exactly one run predicts correctly, "
    rows = Table(columns, cells, f"{caption}the largest difference of losses first")
    count_table = Table([Column("prediction", "name"), Column("rows"), Column("of all")], counts)
    return Section("Disagreements of the two runs", [explanation], tables=[count_table, rows])
