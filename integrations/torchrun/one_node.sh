#!/usr/bin/env bash
# One node, one rank for each GPU. From the root of this repository:
#
#   integrations/torchrun/one_node.sh                          SFT of Qwen3-30B-A3B, expert parallelism over 8 GPUs
#   integrations/torchrun/one_node.sh --learning_rate 2e-5     with more flags of `hf-moe-accel sft`; the last one wins
#   integrations/torchrun/one_node.sh examples/dpo.py MODEL    what else torchrun is to run, with its arguments
#
# Environment: NPROC (ranks), MODEL, DATASET, OUTPUT.
set -euo pipefail

NPROC=${NPROC:-8}
if [[ $# -eq 0 || $1 == --* ]]; then
  set -- -m hf_moe_accel.cli sft \
    --model_name_or_path "${MODEL:-Qwen/Qwen3-30B-A3B}" \
    --dataset_name "${DATASET:-trl-lib/Capybara}" \
    --output_dir "${OUTPUT:-sft-output}" \
    --ep_size "$NPROC" \
    --dtype bfloat16 \
    --max_length 4096 \
    --packing true \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 2 \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --logging_steps 10 \
    --save_steps 200 "$@"
fi
exec torchrun --standalone --nproc-per-node "$NPROC" "$@"
