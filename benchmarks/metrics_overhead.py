"""What the metrics cost: the time of a training step with `expert_metrics` on and off.

    python benchmarks/metrics_overhead.py                                          # one process
    torchrun --standalone --nproc-per-node 2 benchmarks/metrics_overhead.py        # two ranks

Full fine-tuning of a Qwen3-MoE with `AcceleratedMoETrainer`, logging every tenth step: on a GPU four layers as large
as Qwen3-30B-A3B's in bf16, on a CPU a small one in fp32. Both arms live in one process and run in turn, each with a
model of its own; a run's time is that of 20 steps after five that warm up. It exits with 1 where "on" takes over 1%
longer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from harness import machine, write
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback, TrainingArguments

from hf_moe_accel import AcceleratedMoETrainer, MoEAccelConfig

ARMS = {"off": False, "on": True}
WARM_UP, STEPS, LOGGING_STEPS = 5, 20, 10
MODELS = {
    "cpu": {
        "vocab_size": 4096,
        "num_hidden_layers": 4,
        "hidden_size": 512,
        "moe_intermediate_size": 256,
        "num_experts": 16,
        "top_k": 4,
    },
    "cuda": {
        "vocab_size": 32768,
        "num_hidden_layers": 4,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "top_k": 8,
    },
}
BATCHES = {"cpu": (4, 128), "cuda": (4, 4096)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Stopwatch(TrainerCallback):
    """Seconds of a step, from the beginning of the first measured one to that of the last step, which is not."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (WARM_UP, WARM_UP + STEPS):
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            if state.global_step == WARM_UP:
                self.since = now
            else:
                self.seconds = (now - self.since) / STEPS


def make_trainer(metrics: bool, output_dir: str, layers: int | None) -> tuple[AcceleratedMoETrainer, Stopwatch]:
    sizes = dict(MODELS[DEVICE])
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    config = Qwen3MoeConfig(
        num_attention_heads=sizes["hidden_size"] // 64,
        num_key_value_heads=4,
        head_dim=64,
        num_experts_per_tok=sizes.pop("top_k"),
        dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float32,
        **sizes,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Qwen3MoeForCausalLM(config).to(config.dtype)
    batch, length = BATCHES[DEVICE]
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=batch,
        max_steps=WARM_UP + STEPS + 1,
        logging_steps=LOGGING_STEPS,
        learning_rate=1e-5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=DEVICE == "cpu",
    )
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, config.vocab_size, (64, length), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in rows]
    watch = Stopwatch()
    trainer = AcceleratedMoETrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        callbacks=[watch],
        moe_config=MoEAccelConfig(expert_metrics=metrics),
    )
    return trainer, watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, help="of the model")
    parser.add_argument("--result", help="file for the results as JSON")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {arm: make_trainer(metrics, f"{folder}/{arm}", options.layers) for arm, metrics in ARMS.items()}
        for repeat in range(options.repeats):
            for arm, (trainer, watch) in trainers.items():
                trainer.train()
                seconds[arm].append(watch.seconds)
            if os.environ.get("RANK", "0") == "0":
                shown = ", ".join(f"{arm} {1000 * times[-1]:.2f} ms" for arm, times in seconds.items())
                print(f"repeat {repeat + 1} of {options.repeats}: {shown} a step", flush=True)
    middle = {arm: statistics.median(times) for arm, times in seconds.items()}
    ratio = middle["on"] / middle["off"]
    if os.environ.get("RANK", "0") == "0":
        last = [entry for entry in trainers["on"][0].state.log_history if "loss" in entry][-1]
        print(f"medians: off {1000 * middle['off']:.2f} ms, on {1000 * middle['on']:.2f} ms, on / off {ratio:.4f}")
        print("last log:", {name: value for name, value in last.items() if name.startswith("moe/")})
        if options.result:
            content = {"machine": machine(), "ranks": int(os.environ.get("WORLD_SIZE", "1")), "seconds": seconds}
            write(options.result, content | {"on_over_off": ratio, "last_log": last})
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(ratio > 1.01)


if __name__ == "__main__":
    main()
