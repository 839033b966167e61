"""Files of rows in all formats, and classification data that read them."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq

from gpt2_pl.datamodules import TextClassification

ENDINGS = [".csv", ".tsv", ".txt", ".jsonl", ".json", ".parquet"]


def write(file, rows):
    """Write rows in the format of a file's name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        with file.open("wb") as out:
            pq.write_table(pa.Table.from_pylist(rows), out)
    elif file.suffix.startswith(".json"):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, rows[0], delimiter="," if file.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    return file


def rows_of(*texts):
    return [{"sentence": text, "label": i % 2} for i, text in enumerate(texts)]


def data(base, file, **options):
    return TextClassification(**{"test_file": str(file), "tokenizer": str(base), **options})


def texts(module, split="test"):
    module.setup()
    return [row["sentence"] for row in module.rows[split]]
