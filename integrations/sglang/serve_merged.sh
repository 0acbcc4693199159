#!/usr/bin/env bash
# SGLang serves a standard checkpoint: what trainers save, merged/ beside an adapter, or what `hf-moe-accel merge`
# writes.
#
#   integrations/sglang/serve_merged.sh MODEL [MORE FLAGS OF sglang.launch_server]
#
# Environment: TP (GPUs; default 2), PORT (default 30000).
set -euo pipefail

MODEL=${1:?names no model: a directory or hub id}
shift
TP=${TP:-2}
exec python3 -m sglang.launch_server --model-path "$MODEL" --tp-size "$TP" --ep-size "$TP" --port "${PORT:-30000}" "$@"
