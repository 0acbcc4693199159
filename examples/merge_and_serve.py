"""A LoRA adapter on its way to a server: folded into the model, and expert by expert, with the commands to serve each.

python examples/merge_and_serve.py                        # a small random model and adapter, here
torchrun --nproc-per-node 8 examples/merge_and_serve.py Qwen/Qwen3-30B-A3B my-adapter --output served

`hf-moe-accel merge BASE ADAPTER OUT` writes the same merged model in one process, one tensor at a time.
What the commands choose, and what is known of the engines: integrations/README.md.
"""

import argparse
import json
from pathlib import Path

import torch.distributed as dist
from small import small_adapter, small_model
from transformers import AutoTokenizer

from hf_moe_accel import AutoModelForCausalLM, PeftModel, export_adapter, export_checkpoint

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="hub id or path of the base")
    parser.add_argument("adapter", nargs="?", help="hub id or path of the adapter")
    parser.add_argument("--output", default="example-output")
    cli = parser.parse_args()
    base = cli.model or small_model()
    merged, per_expert = Path(cli.output, "merged"), Path(cli.output, "per_expert")

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), cli.adapter or small_adapter(base))
    export_checkpoint(model, merged)  # on all ranks: each writes what it owns
    export_adapter(model, per_expert)  # on all ranks
    if not dist.is_initialized() or dist.get_rank() == 0:
        AutoTokenizer.from_pretrained(base).save_pretrained(merged)
        rank = json.loads((per_expert / "adapter_config.json").read_text())["r"]
        max_rank = min(n for n in (1, 8, 16, 32, 64, 128, 256, 320, 512) if n >= rank)  # those that vLLM takes
        tuned = f"tuned={per_expert}"
        print(f"""\
The merged model:
  vllm serve {merged} --tensor-parallel-size 2 --enable-expert-parallel
  python -m sglang.launch_server --model-path {merged} --tp-size 2 --ep-size 2
Its base, and the adapter beside it:
  vllm serve {base} --tensor-parallel-size 2 --enable-lora --max-lora-rank {max_rank} --lora-modules {tuned}
  python -m sglang.launch_server --model-path {base} --tp-size 2 --lora-paths {tuned} --lora-strict-loading""")
    if dist.is_initialized():
        dist.destroy_process_group()
