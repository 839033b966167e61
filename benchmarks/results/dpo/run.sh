#!/usr/bin/env bash
# Low-rank adapters on sonnets, then direct preference optimization (DPO) of the same adapters against their own samples;
# five seeds; about 45 minutes of CPU time. GPT2_PL_SHARED names a folder with base/gpt2-tiny-reviews and data/.
set -euo pipefail
shared=$GPT2_PL_SHARED
data=(--config task/sonnets --trainer.accelerator cpu --model.base "$shared/base/gpt2-tiny-reviews"
    --data.train_file "$shared/data/sonnets.txt" --model.num_val_samples 0 --data.eval_batch_size 20)
test=(--data.test_file "$shared/data/TRUE_sonnets_held_out_dev.txt" --model.num_test_samples 20)
lora=(--config strategy/lora --trainer.max_epochs 6)
dpo=(--config strategy/dpo --trainer.max_epochs 3
    --model.surgery+ gpt2_pl.surgery.PeftAdapter --model.surgery.init_args.folder adapter)

# The rates: the lowest val/loss of LoRA is that of 3e-3, and the lowest val/dpo_loss that of 1e-3.
for lr in 1e-3 3e-3 1e-2; do
    gpt2-pl fit "${data[@]}" "${lora[@]}" --lr $lr --seed_everything 1 --name trial_lora_$lr
done
for seed in 1 2 3 4 5; do
    gpt2-pl fit "${data[@]}" "${test[@]}" "${lora[@]}" --lr 3e-3 --seed_everything $seed --name lora --version seed_$seed
    rm -rf adapter
    gpt2-pl export lightning_logs/lora/seed_$seed --format peft --out adapter
    if [ $seed = 1 ]; then
        for lr in 5e-5 1e-4 2e-4 5e-4 1e-3 2e-3; do
            gpt2-pl fit "${data[@]}" "${dpo[@]}" --lr $lr --seed_everything 1 --name trial_dpo_$lr
        done
    fi
    gpt2-pl fit "${data[@]}" "${test[@]}" "${dpo[@]}" --lr 1e-3 --seed_everything $seed --name lora_dpo --version seed_$seed
done
gpt2-pl compare lightning_logs/lora lightning_logs/lora_dpo --baseline lora --out report
