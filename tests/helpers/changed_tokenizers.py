"""Changed tokenizers."""

import json


def add_token(folder, token_id=450):
    """Add a token to the tokenizer of a folder, by default one beyond the vocabulary of the model."""
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["model"]["vocab"]["beyond"] = token_id
    file.write_text(json.dumps(settings))


def change_tokenizer(folder, **changes):
    """Change top-level values of the tokenizer.json of a folder."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
