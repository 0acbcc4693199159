#!/usr/bin/env bash
# vLLM serves a standard checkpoint: what trainers save, merged/ beside an adapter, or what `hf-moe-accel merge` writes.
#
#   integrations/vllm/serve_merged.sh MODEL [MORE FLAGS OF vllm serve]
#
# Environment: TP (GPUs; default 2), PORT (default 8000).
set -euo pipefail

MODEL=${1:?names no model: a directory or hub id}
shift
exec vllm serve "$MODEL" --tensor-parallel-size "${TP:-2}" --enable-expert-parallel --port "${PORT:-8000}" "$@"
