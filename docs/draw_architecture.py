"""Draw docs/architecture.svg from LAYERS of tests/test_imports.py: python docs/draw_architecture.py."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTES = {  # of the first part of a row
    "__main__": "python -m gpt2_pl",
    "commands": "one file for each subcommand",
    "inference": "gpt2_pl.load: trained models for single texts",
    "datamodules": "data of a task, and what happens around training",
    "tasks": "LightningModules; comparing finished runs",
    "surgery": "adapters, virtual tokens, selections of parameters",
    "generation": "sampling, beams, Hugging Face folders",
    "decoding": "steps that sampling and beam search share",
    "model": "GPT-2 as in the paper; text without a model",
    "kv_cache": "parts of the model and of training",
    "kernels": "faster PyTorch functions",
    "configs": "the included YAML files, by name",
    "filesystem": "atomic files, schemas, bounded readers",
    "errors": "one-line errors",
}
COLORS = {"datamodules": "#dbe9f6", "surgery": "#d5ecd9", "model": "#fbeec8", "kernels": "#f3e3e3", "configs": "#eee"}
WIDTH, HEIGHT, GAP, MARGIN = 760, 34, 6, 14


def layers() -> list[list[str]]:
    """Return the rows of parts, the highest first."""
    tree = ast.parse((ROOT / "tests" / "test_imports.py").read_text(encoding="utf-8"))
    assignments = (node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name))
    return next(ast.literal_eval(node.value) for node in assignments if node.targets[0].id == "LAYERS")


def draw(rows: list[list[str]]) -> str:
    """Return the drawing, a row of boxes for each layer."""
    height = 2 * MARGIN + len(rows) * (HEIGHT + GAP) - GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
        ' font-size="13">',
        "<title>The parts of gpt2_pl: each row imports only from the rows below it</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="white"/>',
    ]
    color = "#e8eef7"
    for i, row in enumerate(rows):
        x, y, color = MARGIN, MARGIN + i * (HEIGHT + GAP), COLORS.get(row[0], color)
        lines.append("<g>")
        for part in row:
            width = max(76, 8 * len(part) + 22)
            box = f'width="{width}" height="{HEIGHT}" rx="4" fill="{color}" stroke="#9ab"'
            lines.append(f'<rect x="{x}" y="{y}" {box}/>')
            place = f'x="{x + width / 2:g}" y="{y + 22}" text-anchor="middle" fill="#123"'
            lines.append(f'<text class="part" {place}>{part}</text>')
            x += width + 8
        lines += ["</g>", f'<text x="470" y="{y + 22}" fill="#567" font-size="11">{NOTES.get(row[0], "")}</text>']
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    (ROOT / "docs" / "architecture.svg").write_text(draw(layers()), encoding="utf-8")
