"""Settings as pairs of names and values for loggers."""

from torch.utils.tensorboard.summary import hparams

from gpt2_pl.callbacks.hyperparameters import flatten_dict


def test_flatten_dict_nested_settings_have_dotted_names_and_values_that_tensorboard_takes():
    settings = {
        "model": {"class_path": "mine.Task", "init_args": {"compile": True, "n": 10**5000, "layers": [1, 2]}},
        "seed_everything": 3,
        "name": None,
    }
    values = dict(flatten_dict(settings))
    assert {name: values[name] for name in ("model", "model.compile", "model.layers", "seed_everything", "name")} == {
        "model": "mine.Task",
        "model.compile": True,
        "model.layers": "[1, 2]",
        "seed_everything": 3,
        "name": None,
    }
    assert values["model.n"] == "a number of 16,610 bits"
    hparams({name: value for name, value in values.items() if value is not None}, {})
