"""The model card of an exported model: README.md, with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gpt2_pl import __version__
from gpt2_pl.datamodules.prompt_template import Template
from gpt2_pl.errors import InputError
from gpt2_pl.experiments.costs import format_cost, record_cost
from gpt2_pl.experiments.levels import score_interval
from gpt2_pl.experiments.report import markdown_table, markdown_text
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.units import Unit
from gpt2_pl.inference.predictor import MAX_NEW_TOKENS, SAMPLING
from gpt2_pl.inference.prompts import PromptFormat
from gpt2_pl.text.normalization import STEPS, Normalizer
from gpt2_pl.text.poems import N_LINES

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

_TEXTS = ("It was worth every minute.", "I would see it again.")  # of the example's fields
_PROMPT = "It was"  # of the example of a language model
_SOURCE = "The tower is 90 metres high and was built in 1890."  # of the example of a data-to-text model
_LINES = (  # of the example of a model of poems
    "The morning lies upon the quiet lake,",
    "And every hill is silver in the light;",
    "The birds that slept beside the water wake,",
    "And sing away the shadows of the night.",
)
_SETTINGS = {  # of a run that its card lists, by key
    "data.batch_size": "batch size",
    "data.shots": "training rows of each class",
    "model.dropout": "dropout",
}
_LOAD = """\
{torch}from {library} import {model_class}{tokenizer}

name = {name}{place}
{classes}tokenizer = AutoTokenizer.from_pretrained(name)
model = {model_class}.from_pretrained(name{arguments}).eval()
"""
_PREDICT = """\
text = {template}.format(**{values})
with torch.no_grad():
    logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
"""
_CLASSIFY = """\
probabilities = logits.softmax(-1)
print({{model.config.id2label[i]: round(p, 4) for i, p in enumerate(probabilities.tolist())}})
"""
_REGRESS = "print(logits.item())\n"
_GENERATE = """\
batch = tokenizer({text!r}, add_special_tokens=False, return_tensors="pt")
settings = {settings!r}
tokens = model.generate(**batch, **settings, pad_token_id=tokenizer.pad_token_id)
print(tokenizer.decode(tokens[0]{start}, skip_special_tokens=True))
"""


@dataclass(frozen=True)
class ExportedModel:
    """Content of a folder that ``gpt2-pl export`` writes.

    Args:
        name: id on the hub, or name of the folder.
        library: library that loads the folder.
        task: name of the task's class.
        num_parameters: number of parameters, with those of the base.
        labels: class names; empty for a regressor, None for a language model.
        template: prompt template; None without one.
        target: field of the template that the model generates; None for a classifier or regressor.
        normalize: steps that normalize the texts of its fields.
        prompt_lines: number of first lines of a poem that the model completes; None without poems.
        decoding: settings with which the task generates texts.
        n_positions: largest number of tokens of a text that the model generates; None if it is not known.
        max_length: largest number of tokens of a training row; None if it is not known.
        threshold: smallest probability of class 1 that the task classifies as class 1; None without a threshold.
        code: file with the class of the model, which only ``trust_remote_code`` runs; None for a class of the library.
        base: path or hub id of the pretrained base; None for a model that was trained from random weights.
        hub_base: hub id of the base; None for a local base.
    """

    name: str
    library: Literal["transformers", "peft"]
    task: str
    num_parameters: int
    labels: Sequence[str] | None = None
    template: str | None = None
    target: str | None = None
    normalize: Sequence[str] = ()
    prompt_lines: int | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)
    n_positions: int | None = None
    max_length: int | None = None
    threshold: float | None = None
    code: str | None = None
    base: str | None = None
    hub_base: str | None = None

    @property
    def auto_class(self) -> str:
        """Name of the class that loads the folder."""
        task = "CausalLM" if self.labels is None else "SequenceClassification"
        return f"Auto{'Peft' if self.library == 'peft' else ''}ModelFor{task}"

    def example(self, name: str) -> str:
        """Return Python code that loads the model and predicts, or generates a text.

        Args:
            name: path of the folder, or id on the hub.
        """
        is_peft, labels = self.library == "peft", self.labels
        tokenizer = "\nfrom transformers import AutoTokenizer" if is_peft else ", AutoTokenizer"
        arguments, classes = ", trust_remote_code=True" if self.code else "", ""
        if is_peft and labels is not None:
            arguments = ", num_labels=len(classes), id2label=classes" if labels else ", num_labels=1"
            classes = f"classes = {dict(enumerate(labels))!r}\n" if labels else ""
        loading = _LOAD.format(
            torch="" if labels is None else "import torch\n",
            library=self.library,
            model_class=self.auto_class,
            tokenizer=tokenizer,
            name=json.dumps(name),
            place="  # this folder: run the example in it, or give its path" if name == "." else "",
            classes=classes,
            arguments=arguments,
        )
        if labels is None:
            start = "" if self.target is None else '[batch["input_ids"].shape[1] :]'
            text = self._opening()
            return loading + _GENERATE.format(text=text, settings=self._generation(text), start=start)
        fields = Template(self.template or "{text}").fields
        texts = map(Normalizer(self.normalize), _TEXTS)
        values = repr(dict(zip(fields, cycle(texts), strict=False)))
        stored = repr(self.template) if is_peft else 'model.config.prompt["template"]'
        predicting = _PREDICT.format(template=stored if self.template else '"{text}"', values=values)
        return loading + predicting + (_CLASSIFY.format() if labels else _REGRESS)

    def _opening(self) -> str:
        """Return the example's prompt of a generator: first lines of a poem, a source in its template, or words."""
        prompt = self._format()
        if prompt.is_poem:
            lines = [line for line, _ in zip(cycle(_LINES), range(prompt.prompt_lines or 1), strict=False)]
            return prompt.fill(["\n".join(lines)])[0]
        return prompt.fill([[_SOURCE] * len(prompt.fields)] if prompt.template is not None else [_PROMPT])[0]

    def _format(self) -> PromptFormat:
        """Return the format of the prompts of a generator; without a target, it continues texts as they are."""
        template = None if self.target is None else self.template
        return PromptFormat(
            {
                "template": template,
                "target": self.target,
                "normalize": self.normalize,
                "prompt_lines": self.prompt_lines,
            }
        )

    def _generation(self, text: str) -> dict[str, Any]:
        """Return the settings of the task as arguments of transformers' ``generate`` for a prompt."""
        settings = {"max_new_tokens": MAX_NEW_TOKENS, **self.decoding}
        if "num_beams" in settings:
            settings["do_sample"] = False
        else:
            settings = SAMPLING | settings
            settings["do_sample"] = settings["temperature"] != 0
            settings["top_k"] = settings["top_k"] or 0  # transformers samples from 50 tokens by default
        if not settings["do_sample"]:
            settings = {key: value for key, value in settings.items() if key not in SAMPLING}
        is_long = len(text.encode()) + settings["max_new_tokens"] > (self.n_positions or math.inf)  # a token has a byte
        if is_long:
            settings["max_length"] = self.n_positions
            del settings["max_new_tokens"]
        return {key: value for key, value in settings.items() if value is not None}

    def purpose(self, folder: str) -> str:
        """Return what a generator completes, and the command that does it.

        Args:
            folder: path of the folder, or id on the hub.
        """
        prompt = self._format()
        if prompt.is_poem:
            count = prompt.prompt_lines or 0
            first = f"first {count} lines" if count != 1 else "first line"
            text = f"It completes a poem from its {first}, to at most {N_LINES} lines"
            return f"{text}; `gpt2-pl generate {folder} --prompt ...` does this. The example does not count lines."
        if prompt.template is not None:
            text = "It generates a text for a source that is inserted into its template"
            return f"{text}; `gpt2-pl generate {folder} --prompt ...` inserts the source."
        return f"It continues a text; `gpt2-pl generate {folder} --prompt ...` does this."


@dataclass(frozen=True)
class ModelCard:
    """Model card of an exported model.

    Args:
        model: the exported model.
        run: its run; None without a readable record.
        is_best: whether the model is that of the best epoch, which the scores of the run belong to.
        license: identifier of a licence; None leaves it out.
    """

    model: ExportedModel
    run: Run | None = None
    is_best: bool = True
    license: str | None = None

    @property
    def record(self) -> Mapping[str, Any]:
        """Record of the run; empty without one."""
        return {} if self.run is None else self.run.record

    @property
    def scores(self) -> dict[str, float]:
        """Final scores of the model, by name."""
        scores = (self.record.get("scores") or {}) if self.is_best else {}
        return {name: value for name, value in scores.items() if "/" in name}

    def metadata(self) -> ModelCardData:
        """Return the front matter."""
        from huggingface_hub import EvalResult, ModelCardData

        kind = "text-generation" if self.model.labels is None else "text-classification"
        tested = [name for name in self.scores if name.startswith("test/")] or list(self.scores)
        results = [
            EvalResult(
                task_type=kind,
                dataset_type=re.sub(r"[^\w./-]+", "-", self._data_name()),
                dataset_name=self._data_name(),
                dataset_split=name.partition("/")[0],
                metric_type=name.partition("/")[2],
                metric_value=self.scores[name],
            )
            for name in tested
        ]
        return ModelCardData(
            license=self.license,
            library_name=self.model.library,
            pipeline_tag=kind,
            base_model=self.model.hub_base,
            tags=["gpt2", "gpt2_pl"],
            model_name=self.model.name,
            eval_results=results or None,
        )

    def render(self, name: str = ".") -> str:
        """Return the text of README.md.

        Args:
            name: path of the folder for the example, relative to the working directory, or id on the hub.
        """
        sections = [self._introduction(), "## Use\n\n" + self._usage(name)]
        if self.model.labels:
            classes = [[str(i), label] for i, label in enumerate(self.model.labels)]
            sections.append(_section("Classes", (["number", "name"], classes)))
        scores = self._score_rows()
        for title, table, note in (
            ("Training", self._training(), ""),
            ("Scores", scores, self._score_note("95 % interval" in scores[0])),
            ("Cost", self._costs(), "Times and operations include those of a base that gpt2_pl has pretrained."),
        ):
            if table[1]:
                sections.append(_section(title, table, note))
        sections.append("## Licence\n\n" + self._licence())
        return f"---\n{self.metadata()}\n---\n\n" + "\n\n".join(sections) + "\n"

    def _introduction(self) -> str:
        model, kind = self.model, "An adapter of GPT-2" if self.model.library == "peft" else "A GPT-2"
        text = f"{kind} ({model.num_parameters:,} parameters), trained for the task {markdown_text(model.task)}."
        return f"# {markdown_text(model.name)}\n\n{text} Written by gpt2_pl {__version__}, `gpt2-pl export`."

    def _usage(self, name: str) -> str:
        model = self.model
        lines = [model.purpose("FOLDER")] if model.labels is None else []
        lines.append(_fenced(model.example(name), "python"))
        if model.code is not None:
            lines.append(f"`trust_remote_code=True` runs `{model.code}` of this folder; read it first.")
        if model.library == "peft" and model.base != model.hub_base:
            lines.append("`adapter_config.json` names the base by a local path; change it to where the base is.")
        if model.target is not None and model.template is not None and model.labels is None:
            lines += [f"The template, in which `{{{model.target}}}` is generated:", _fenced(model.template)]
        if model.template is not None and model.labels is not None:
            lines += ["The template of every text:", _fenced(model.template)]
            if model.max_length is not None:
                limit = f"Rows had at most {model.max_length} tokens"
                lines.append(f"{limit}; of longer ones, the texts were shortened and the words of the template kept.")
            if model.normalize:
                steps = " and ".join(STEPS[step] for step in model.normalize)
                lines.append(f"Texts are normalized before they are inserted, as in the example: {steps}.")
        if model.threshold is not None and model.labels:
            name = markdown_text(model.labels[1])
            lines.append(f"The prediction is {name} if its probability is at least {model.threshold:.4g}.")
        return "\n\n".join(lines)

    def _data_name(self) -> str:
        data = self.record.get("data") or {}
        files = data.get("files") or {}
        names = files.get("test") or files.get("val") or files.get("train") or data.get("hub_id") or data.get("class")
        names = names if isinstance(names, list) else [names]
        return ", ".join(Path(str(one)).name if files else str(one) for one in names if one is not None) or "unknown"

    def _training(self) -> tuple[list[str], list[list[str]]]:
        """Return a table of the base, the data with their digests, and the settings that results depend on."""
        record, data = self.record, self.record.get("data") or {}
        base = record.get("base") or {}
        start = self.model.hub_base or ("a local GPT-2" if self.model.base else "random weights")
        rows = [["base", f"{start}, SHA-256 {base['digest']}" if base.get("digest") else start]]
        rows_name = "rows" if self.model.prompt_lines is None else "poems"
        for split, digest in (data.get("digests") or {}).items():
            files = (data.get("files") or {}).get(split)
            names = [Path(str(file)).name for file in (files if isinstance(files, list) else [files]) if file]
            count = (data.get("rows") or {}).get(split)
            texts = [*names, *([f"{count:,} {rows_name}"] if isinstance(count, int) else []), f"digest {digest}"]
            rows.append([f"{split} data", ", ".join(texts)])
        names = [Path(str(name)).stem for name in record.get("configs") or ()]
        rows += [["configurations", ", ".join(names)]] if names else []
        layers = (record.get("parameters") or {}).get("layers") or ()
        rates = [rate for layer in layers for rate in layer.get("peak_rates") or ()]
        limits = dict.fromkeys([min(rates), max(rates)]) if rates else {}
        rows += [["learning rate", " to ".join(f"{rate:.4g}" for rate in limits)]] * bool(rates)
        flat = {} if self.run is None else self.run.flat
        rows += [[name, str(flat[key])] for key, name in _SETTINGS.items() if key in flat]
        epochs = len(record.get("epochs") or ())
        best = (record.get("scores") or {}).get("best_epoch")
        rows += [["epochs", f"{epochs}" + (f", the best is {best:.0f}" if best and self.is_best else "")]] * bool(
            epochs
        )
        rows += [[key, str(record[key])] for key in ("seed", "steps", "precision", "device") if key in record]
        return ["", ""], rows if record else []

    def _score_rows(self) -> tuple[list[str], list[list[str]]]:
        cells = []
        for name, value in self.scores.items():
            info = (self.record.get("metrics") or {}).get(name.partition("/")[2]) or {}
            unit = Unit(
                info.get("higher_is_better") is not False, bool(info.get("percent")), name.endswith("perplexity")
            )
            sign, interval = " %" if unit.is_percent else "", None
            with suppress(InputError):  # of a file of rows that cannot be read
                interval = score_interval([self.run], name, unit) if self.run is not None else None
            limits = "" if interval is None else " to ".join(map(unit.format_score, interval)) + sign
            cells.append([name, unit.format_score(value) + sign, limits])
        headings = ["score", "value", "95 % interval"]
        return (headings, cells) if any(row[-1] for row in cells) else (headings[:-1], [row[:-1] for row in cells])

    def _score_note(self, has_intervals: bool) -> str:
        notes = ["The intervals are those of new texts of the same kind, for this model."] if has_intervals else []
        chose = f"because {markdown_text(str(self.record.get('monitor')))} chose the epoch"
        notes.append(f"Validation scores are optimistic, {chose}. Other texts have not been scored.")
        if (note := self.record.get("score_note")) and any(name.endswith("/perplexity") for name in self.scores):
            notes.append(markdown_text(note))
        return " ".join(notes)

    def _costs(self) -> tuple[list[str], list[list[str]]]:
        if self.run is None or not self.record.get("parameters"):
            return ["", ""], []
        headings = {
            "trainable": "trained parameters",
            "seconds": "minutes of training",
            "cpu_seconds": "CPU minutes",
            "gpu_seconds": "GPU minutes",
            "training_flops": "floating-point operations",
            "peak_memory_bytes": "peak memory, GB",
        }
        costs = {name: record_cost(self.record, name) for name in headings}
        rows = [[headings[name], format_cost(cost, name)] for name, cost in costs.items() if cost is not None]
        return ["", ""], rows

    def _licence(self) -> str:
        if self.license is not None:
            return (
                f"The licence is {markdown_text(self.license)}. The licences of the base and of the data apply as well."
            )
        return "None is given. The licences of the base and of the data apply."


def _section(title: str, table: tuple[list[str], list[list[str]]], note: str = "") -> str:
    return "\n".join([f"## {title}", "", *markdown_table(table), *(["", note] if note else [])])


def _fenced(text: str, language: str = "") -> str:
    """Return a text as a block of code; the fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
