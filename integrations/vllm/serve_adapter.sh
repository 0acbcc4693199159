#!/usr/bin/env bash
# vLLM serves an adapter beside its base, under the model name `tuned`. Adapters of experts must be in the form for each
# expert (per_expert/ beside a saved adapter, `export_adapter`): see integrations/README.md.
#
#   integrations/vllm/serve_adapter.sh BASE ADAPTER [MORE FLAGS OF vllm serve]
#
# Environment: TP (GPUs; default 2), PORT (default 8000).
set -euo pipefail

BASE=${1:?names no base: a directory or hub id}
ADAPTER=${2:?names no adapter: a directory}
shift 2
# vLLM takes these ranks only; an adapter of another rank fits the next larger one.
RANK=$(python3 -c '
import json, sys
rank = json.load(open(sys.argv[1] + "/adapter_config.json"))["r"]
print(min(n for n in (1, 8, 16, 32, 64, 128, 256, 320, 512) if n >= rank))' "$ADAPTER")
exec vllm serve "$BASE" --tensor-parallel-size "${TP:-2}" --port "${PORT:-8000}" \
  --enable-lora --max-lora-rank "$RANK" --lora-modules "tuned=$ADAPTER" "$@"
