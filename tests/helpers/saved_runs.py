"""Folders of runs without training: a checkpoint and a tokenizer."""

from gpt2_pl.tasks import Task
from helpers.trainers import trainer


def saved_run(folder, task: Task, data):
    """Evaluate a task once and save its checkpoint and the tokenizer of its data as a run does."""
    done = trainer()
    done.validate(task, data, verbose=False)
    done.save_checkpoint(folder / "checkpoints/best.ckpt", weights_only=True)
    data.tokenizer.save(str(folder / "tokenizer.json"))
    return folder
