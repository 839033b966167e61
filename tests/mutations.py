"""Are the tests awake? Every change of a line below makes the library wrong, and some test must say so.

    python tests/mutations.py [WORD]

Works on a copy of the tracked files; with a word, only on the changes of files whose path contains it. Ends with
status 1 when a change goes unnoticed.
"""

# ruff: noqa: E501
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

MUTATIONS: list[tuple[str, str, str, str]] = [  # file, a line's part, what it becomes, the tests to ask
    # Losses
    ("gpt2_pl/losses.py", "nll = -log_p_target.sum()", "nll = log_p_target.sum()", "language_modeling"),
    ("gpt2_pl/losses.py", "return total + alpha * unlikelihood", "return total + unlikelihood", "unlikelihood"),
    ("gpt2_pl/losses.py", "odds = (alpha * p / (1.0 - p))", "odds = (alpha * p)", "unlikelihood"),
    ("gpt2_pl/losses.py", ".scatter_add_(-1, candidates, odds)", "", "unlikelihood"),
    ("gpt2_pl/losses.py", "grad_weight += (grad.T @ states)[:V]", "grad_weight = (grad.T @ states)[:V]", "language_modeling"),
    ("gpt2_pl/losses.py", "& allowed.unsqueeze(1) & ~is_target", "& allowed.unsqueeze(1)", "unlikelihood"),
    ("gpt2_pl/losses.py", "is_candidate &= j > t - window", "is_candidate &= j >= t - window", "unlikelihood"),
    ("gpt2_pl/losses.py", "& (next_occurrence.unsqueeze(1) > t)", "", "unlikelihood"),
    ("gpt2_pl/losses.py", "again = same.tril(-1)", "again = same", "unlikelihood"),
    ("gpt2_pl/tasks/language_modeling.py", "targets[:, : P - 1] = IGNORE_INDEX", "pass", "unlikelihood"),
    ("gpt2_pl/tasks/language_modeling.py", "self._ignored_tokens(),", "[],", "unlikelihood"),
    ("gpt2_pl/heads.py", "labels.repeat(n)", "labels.repeat_interleave(n)", "heads"),
    ("gpt2_pl/tasks/accumulation.py", "return trainer.world_size *", "return", "accumulation"),
    # Model
    ("gpt2_pl/model.py", "mask = keys <= queries.unsqueeze(-1)", "mask = keys < queries.unsqueeze(-1)", "model"),
    ("gpt2_pl/model.py", "padding_mask.cumsum(-1) - 1", "padding_mask.cumsum(-1)", "model"),
    ("gpt2_pl/model.py", "output_positions = output_positions + n_prompt", "pass", "virtual_tokens"),
    ("gpt2_pl/model.py", "std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual", "std = 0.02 if residual", "model"),
    ("gpt2_pl/kernels/attention.py", "ctx.scale = q.size(-1) ** -0.5", "ctx.scale = q.size(-1) ** -1.0", "attention"),
    ("gpt2_pl/kernels/attention.py", "grad = (grad * ctx.scale).to", "grad = grad.to", "attention"),
    ("gpt2_pl/kernels/attention.py", ".tril(N - Q)", ".tril()", "attention"),
    ("gpt2_pl/kernels/gelu.py", "alpha=3.0 * CUBIC", "alpha=2.0 * CUBIC", "gelu"),
    ("gpt2_pl/kernels/dropout.py", "alpha=ctx.scale)", "alpha=1.0)", "dropout"),
    ("gpt2_pl/kernels/dropout.py", "_apply_mask((grad * ctx.scale).to(x_dtype), mask)", "(grad * ctx.scale).to(x_dtype)", "dropout"),
    # Surgery
    ("gpt2_pl/surgery/lora.py", "self.lora_A) * (scale * self.scaling)", "self.lora_A) * self.scaling", "lora"),
    ("gpt2_pl/surgery/lora.py", "height : (index + 1) * height, i * self.rank", "height : (index + 1) * height, 0 * self.rank", "lora"),
    ("gpt2_pl/surgery/lora.py", "return self.scaling * B @ A", "return B @ A", "lora"),
    ("gpt2_pl/surgery/lora.py", "factors[index] = magnitude / norms[index]", "factors[index] = magnitude", "lora"),
    ("gpt2_pl/surgery/lora.py", "F.linear(low * self.scaling, self.lora_B)", "F.linear(low, self.lora_B)", "lora"),
    ("gpt2_pl/surgery/lora.py", "        freeze_base(model)\n        return model\n\n    @staticmethod", "        return model\n\n    @staticmethod", "lora"),
    ("gpt2_pl/surgery/lora.py", "torch.cat((B, -self._zero_padded(self.initial_B))", "torch.cat((B, self._zero_padded(self.initial_B))", "pissa"),
    ("gpt2_pl/surgery/lora.py", "slices[i] / self.scaling", "slices[i]", "pissa"),
    ("gpt2_pl/surgery/ia3.py", "self.weight * scale.unsqueeze(1), self.bias * scale", "self.weight * scale.unsqueeze(1), self.bias", "ia3"),
    ("gpt2_pl/surgery/bottleneck.py", "return x + self.up(", "return self.up(", "bottleneck"),
    ("gpt2_pl/surgery/selection.py", "        freeze_base(model)\n", "        pass\n", "selection peft_parity"),
    ("gpt2_pl/surgery/virtual_tokens.py", "return table.permute(1, 2, 3, 0, 4)", "return table.permute(1, 2, 3, 0, 4).flip(1)", "virtual_tokens"),
    ("gpt2_pl/surgery/virtual_tokens.py", "prefix.table.copy_(_keys_and_values(model, ids.to(device)))", "pass", "virtual_tokens"),
    ("gpt2_pl/tasks/base.py", "with torch.random.fork_rng(devices=[]):", "if True:", "ranks strategies virtual_tokens"),
    ("callbacks/finetuning.py", "parameter.requires_grad_(i <= stage)", "parameter.requires_grad_(i < stage)", "finetuning strategies"),
    ("callbacks/finetuning.py", "progress = epoch + batch / n_batches", "progress = epoch", "finetuning strategies"),
    # Optimizer, schedules
    ("gpt2_pl/optim.py", "1.0 - lr * group", "1.0 + lr * group", "optim"),
    ("gpt2_pl/optim.py", "(1.0 - beta2**step)", "1.0", "optim"),
    ("gpt2_pl/optim.py", "return max(0.0, 1.0 - step / total)", "return 1.0 - 0.5 * step / total", "optim"),
    ("gpt2_pl/optim.py", 'and not name.endswith("wpe.weight")', "", "optim"),
    # Resuming
    ("callbacks/checkpointing.py", "if trainer.is_last_batch or (every", "if (every", "checkpointing faults"),
    ("callbacks/end_of_training.py", "            trainer.should_stop = True", "            pass", "checkpointing end_of_training"),
    ("callbacks/checkpointing.py", "state[key] = _relocate(state[key], best)", "pass", "checkpointing"),
    ("datamodules/batching.py", "range(self.next_batch(), len(batches))", "range(len(batches))", "accumulation"),
    ("datamodules/batching.py", "rows[self.rank :: self.world_size]", "rows", "processes classification_data"),
    ("gpt2_pl/commands/support/run_dir.py", "self.config.ckpt_path = None", "pass", "checkpointing"),
    # Optimizer steps and frozen bases
    ("gpt2_pl/tasks/accumulation.py", "trainer.world_size * trainer.accumulate_grad_batches / self", "trainer.world_size / self", "accumulation"),
    ("gpt2_pl/tasks/accumulation.py", "self._counts.pop()", "pass", "accumulation"),
    ("gpt2_pl/tasks/optimization.py", "parameter.grad.mul_(factor)", "pass", "accumulation"),
    ("datamodules/base.py", "first = i - i % self.trainer.accumulate_grad_batches", "first = i", "accumulation"),
    ("callbacks/non_finite_loss.py", "parameter.grad.copy_(grad)", "pass", "accumulation"),
    ("callbacks/non_finite_loss.py", 'grad = trainer.strategy.reduce(grad, reduce_op="mean")', "pass", "accumulation"),
    ("callbacks/finetuning.py", "batch_idx - batch_idx % trainer.accumulate_grad_batches", "batch_idx", "accumulation"),
    ("gpt2_pl/tasks/base.py", "self.gpt2.set_dropout(0.0)", "pass", "frozen_base"),
    ("gpt2_pl/tasks/language_modeling.py", ', input_ids=batch["input_ids"]', "", "unlikelihood"),
    ("gpt2_pl/commands/support/resuming.py", "for key in saved.keys() & current.keys():", "for key in ():", "checkpointing"),
    ("callbacks/reproducibility.py", "def on_train_batch_start", "def not_called", "checkpointing checkpoint"),
    ("gpt2_pl/filesystem.py", "            _replace(part, path)", "            path.write_bytes(part.read_bytes())", "faults"),
    ("gpt2_pl/tasks/checkpointed.py", "if digest != self.base_digest:", "if False:", "strategies checkpoint"),
    # Scores and statistics
    ("gpt2_pl/tasks/base.py", "self._logged.clear()", "pass", "sentiment"),
    ("gpt2_pl/experiments/statistics/contrast.py", "max(of_scores, floor) / S", "of_scores / S", "contrast"),
    ("gpt2_pl/experiments/statistics/contrast.py", "max(0.0, text_variance - sum(floors))", "text_variance", "contrast"),
    ("gpt2_pl/experiments/statistics/contrast.py", "2 * min(self.p_above(), self.p_below())", "min(self.p_above(), self.p_below())", "contrast"),
    ("gpt2_pl/experiments/statistics/verdicts.py", "(len(order) - np.arange(len(order)))", "1", "verdicts"),
    ("gpt2_pl/experiments/rows.py", "counts)[..., seen].mean(-1)", "counts).mean(-1)", "rows"),
    ("gpt2_pl/experiments/rows.py", "total[..., 0] / total[..., 1]", "total[..., 0] / len(poems)", "rows"),
    ("gpt2_pl/experiments/differences.py", "unit.sign * contributions", "contributions", "compare differences"),
    ("gpt2_pl/experiments/claims.py", "adjusted = holm([getattr(tested[i], which) for i in members])", "adjusted = [getattr(tested[i], which) for i in members]", "claims"),
    ("gpt2_pl/metrics.py", "scores[upper <= lower] = -1.0", "pass", "paraphrase heads"),
    ("gpt2_pl/text/metrics.py", "return 1.0 - len(set(grams))", "return len(set(grams))", "poem_scores"),
    # Generation
    ("gpt2_pl/generation.py", "probability.cumsum(-1) - probability", "probability.cumsum(-1)", "sampling"),
    ("gpt2_pl/decoding.py", "logits / penalty, logits * penalty", "logits * penalty, logits / penalty", "generation"),
    ("gpt2_pl/kv_cache.py", "buffer.narrow(2, start, new.size(2)).copy_(new)", "buffer.narrow(2, start, new.size(2)).copy_(new.flip(1))", "generation"),
    ("gpt2_pl/decoding.py", "self.position_ids += 1", "pass", "generation"),
    ("gpt2_pl/decoding.py", "self.mask[..., :start] = True", "pass", "generation"),
    ("gpt2_pl/decoding.py", "= prompt_mask.bool()[:, None, None]", "= True", "generation"),
    ("gpt2_pl/beams.py", "max(length, 1) ** self.length_penalty", "length", "beam_search"),
    ("gpt2_pl/beams.py", "finished.add(candidates[:, :K], sums[:, :K].masked_fill(~ended[:, :K]", "finished.add(candidates, sums.masked_fill(~ended", "beam_search"),
    ("gpt2_pl/kv_cache.py", "part.copy_(part[rows])", "pass", "beam_search"),
]  # fmt: skip


def main() -> int:
    """Make every change in turn and ask its tests."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [mutation for mutation in MUTATIONS if word in mutation[0]]
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in files.splitlines():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
        for name, old, new, tests in chosen:
            whole = (copy / name).read_text()
            if whole.count(old) != 1:
                raise SystemExit(f"{name} holds {old!r} {whole.count(old)} times; it must be there once")
            (copy / name).write_text(whole.replace(old, new))
            noticed = any(_fails(copy, str(next(copy.rglob(f"test_{test}.py")))) for test in tests.split())
            (copy / name).write_text(whole)
            unnoticed += not noticed
            print(f"{'noticed' if noticed else 'UNNOTICED':9}  {name}: {old!r} -> {new!r}", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} changes are noticed")
    return 1 if unnoticed else 0


def _fails(copy: Path, test: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", test]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{test} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


if __name__ == "__main__":
    sys.exit(main())
