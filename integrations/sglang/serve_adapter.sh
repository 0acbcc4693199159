#!/usr/bin/env bash
# SGLang serves an adapter beside its base, under the name `tuned`. Adapters of experts must be in the form for each
# expert (per_expert/ beside a saved adapter, `export_adapter`): see integrations/README.md.
#
#   integrations/sglang/serve_adapter.sh BASE ADAPTER [MORE FLAGS OF sglang.launch_server]
#
# Environment: TP (GPUs; default 2), PORT (default 30000).
set -euo pipefail

BASE=${1:?names no base: a directory or hub id}
ADAPTER=${2:?names no adapter: a directory}
shift 2
# Strict: a key of the adapter that SGLang does not know is an error, where it would be left out without a word.
exec python3 -m sglang.launch_server --model-path "$BASE" --tp-size "${TP:-2}" --port "${PORT:-30000}" \
  --enable-lora --lora-paths "tuned=$ADAPTER" --lora-strict-loading "$@"
