"""Content of checkpoints."""

STORED = {"base": None, "config": {"vocab_size": 400, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2,
                                   "dropout": 0.1}, "surgery": [], "train_base": True}  # fmt: skip


def content(**changes):
    return {"task": "gpt2_pl.tasks.SentimentClassifier", "hyper_parameters": dict(STORED), "state_dict": {},
            "callbacks": {}, "base": {"path": None, "digest": None, "complete": True}, "surgery": [],
            "pytorch-lightning_version": "2.6.6", **changes}  # fmt: skip
