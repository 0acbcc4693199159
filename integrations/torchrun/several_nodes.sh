#!/usr/bin/env bash
# Several nodes, one rank for each GPU: tokens travel within a node (expert parallelism), and each node holds a copy of
# the sharded model, whose gradients alone travel between nodes. On every node, from the root of this repository:
#
#   HEAD=node0 integrations/torchrun/several_nodes.sh                        SFT of Qwen3-30B-A3B on 2 nodes of 8 GPUs
#   HEAD=node0 integrations/torchrun/several_nodes.sh --learning_rate 2e-5   with more flags of `hf-moe-accel sft`
#   HEAD=node0 integrations/torchrun/several_nodes.sh examples/dpo.py MODEL  what else torchrun is to run
#
# A model too large for one node: with --dp_replicate_size 1 the nodes shard one copy between them.
#
# Environment: HEAD (a node's name or address, the same on all), PORT, JOB_ID (the same on all, another for each job),
# NNODES, NPROC (ranks of a node), MODEL, DATASET, OUTPUT (on a file system that all nodes share).
set -euo pipefail

NNODES=${NNODES:-2}
NPROC=${NPROC:-8}
if [[ $# -eq 0 || $1 == --* ]]; then
  set -- -m hf_moe_accel.cli sft \
    --model_name_or_path "${MODEL:-Qwen/Qwen3-30B-A3B}" \
    --dataset_name "${DATASET:-trl-lib/Capybara}" \
    --output_dir "${OUTPUT:-sft-output}" \
    --ep_size "$NPROC" \
    --dp_replicate_size "$NNODES" \
    --dtype bfloat16 \
    --max_length 4096 \
    --packing true \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 1 \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --logging_steps 10 \
    --save_steps 200 "$@"
fi
exec torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC" --rdzv-backend c10d \
  --rdzv-endpoint "${HEAD:?is not set: the node that the others meet at}:${PORT:-29500}" \
  --rdzv-id "${JOB_ID:-hf_moe_accel}" "$@"
