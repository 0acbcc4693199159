"""Training throughput and peak memory: stock transformers with FSDP2, stock expert parallelism, and ours.

    python benchmarks/ep_vs_fsdp.py                    # 2 ranks on CPU, or every GPU
    python benchmarks/ep_vs_fsdp.py --repeats 1        # a quick look
    python benchmarks/ep_vs_fsdp.py --chunks 1 2 4     # ours as well with layers' tokens in so many parts

The arms run in turn, each time in fresh processes, on the same model, data and optimizer, full fine-tuning. Exits
with 1 when ours is below 0.97 of stock expert parallelism.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from harness import PeakMemory, alternate, machine, medians, write
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.distributed import DistributedConfig

STOCK = ("stock fsdp", "stock ep")
OURS = "ours"
FLOOR = 0.97


def config_of(options: argparse.Namespace) -> Any:
    """A Qwen3-MoE of the given size."""
    return Qwen3MoeConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 3,
        moe_intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 256),
        head_dim=64,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        mlp_only_layers=[],
        max_position_embeddings=options.length,
        tie_word_embeddings=False,
    )


def run_arm(options: argparse.Namespace) -> None:
    """One arm on this rank."""
    from hf_moe_accel import AutoModelForCausalLM as Ours
    from hf_moe_accel import MoEAccelConfig, clip_grad_norm_, parameter_groups

    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    memory = PeakMemory()
    if options.arm.startswith(OURS):
        _, _, chunks = options.arm.partition(", ")
        moe_config = MoEAccelConfig(ep_size=world_size, overlap_chunks=chunks.removesuffix(" parts") or "auto")
        model = Ours.from_pretrained(options.model, dtype=dtype, moe_config=moe_config)
    else:
        ep_size = world_size if options.arm == "stock ep" else 1
        layout = DistributedConfig(fsdp_size=world_size, ep_size=ep_size)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, distributed_config=layout)
    model.train()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-4)
    generator = torch.Generator().manual_seed(rank)
    batches = [
        torch.randint(0, options.vocab, (options.batch, options.length), generator=generator).to(device)
        for _ in range(options.warmup + options.steps)
    ]
    for step, batch in enumerate(batches):
        if step == options.warmup:
            _synchronize()
            started = time.perf_counter()
        model(input_ids=batch, labels=batch).loss.backward()
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    _synchronize()
    seconds = time.perf_counter() - started
    peak = torch.tensor(memory.mib(), device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    if rank == 0:
        tokens = options.steps * options.batch * options.length * world_size
        write(options.result, {"tokens_per_s": tokens / seconds, "peak_mib_per_rank": float(peak)})
    dist.destroy_process_group()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def main() -> int:
    """Parse, run, compare."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() if cuda else 2)
    parser.add_argument("--repeats", type=int, default=7, help="how often the arms run in turn (default 7)")
    parser.add_argument("--output", default=f"benchmarks/results/ep_vs_fsdp_{'cuda' if cuda else 'cpu'}.json")
    size = parser.add_argument_group("size of the model and of a step")
    size.add_argument("--hidden", type=int, default=2048 if cuda else 512)
    size.add_argument("--intermediate", type=int, default=768 if cuda else 256)
    size.add_argument("--layers", type=int, default=12 if cuda else 4)
    size.add_argument("--experts", type=int, default=128 if cuda else 32)
    size.add_argument("--top-k", type=int, default=8 if cuda else 4)
    size.add_argument("--vocab", type=int, default=32768 if cuda else 4096)
    size.add_argument("--batch", type=int, default=4, help="sequences a rank and step")
    size.add_argument("--length", type=int, default=4096 if cuda else 256)
    size.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    size.add_argument("--steps", type=int, default=10 if cuda else 5, help="steps on the clock")
    size.add_argument("--chunks", type=int, nargs="*", default=[], help="arms of ours with so many parts, beside auto")
    for name in ("--arm", "--result", "--model"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        run_arm(options)
        return 0
    return compare(options)


def compare(options: argparse.Namespace) -> int:
    """Run all arms and print them side by side."""
    own = ("arm", "result", "model", "ranks", "repeats", "output", "chunks")
    sizes = {name: value for name, value in vars(options).items() if name not in own}
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config_of(options), dtype=torch.bfloat16)
        model.save_pretrained(directory)
        print(f"{model.num_parameters() / 1e6:.0f}M parameters, {options.ranks} ranks, {machine()['device']}")
        del model
        torch.cuda.empty_cache()
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
        arms = (*STOCK, OURS, *(f"{OURS}, {parts} parts" for parts in options.chunks))
        results = alternate(__file__, arms, options.repeats, options.ranks, [*arguments, f"--model={directory}"])
    middle = medians(results)
    print(f"\nmedian of {options.repeats}      tokens/s    of stock fsdp    of stock ep    peak MiB a rank")
    for arm, row in middle.items():
        ratios = [row["tokens_per_s"] / middle[other]["tokens_per_s"] for other in STOCK]
        print(
            f"{arm:<13} {row['tokens_per_s']:>12,.0f} {ratios[0]:>16.2f} {ratios[1]:>14.2f} "
            f"{row['peak_mib_per_rank']:>18,.0f}"
        )
    write(
        options.output,
        {"machine": machine(), "ranks": options.ranks, "size": sizes, "median": middle, "runs": results},
    )
    ratio = middle[OURS]["tokens_per_s"] / middle["stock ep"]["tokens_per_s"]
    if ratio < FLOOR:
        print(f"ours reaches {ratio:.2f} of stock expert parallelism, below {FLOOR}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
