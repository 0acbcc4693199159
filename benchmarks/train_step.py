"""A training step of a whole model: stock `Trainer` (LoRA: with PEFT) against `AcceleratedMoETrainer`, one process.

    python benchmarks/train_step.py                               # all cells of this device
    python benchmarks/train_step.py --device cpu --repeats 1      # a quick look on a CPU
    python benchmarks/train_step.py --model qwen3-30b-a3b --training lora --tokens 4096 --layers 24
    python benchmarks/train_step.py --best                       # each arm as it is fastest on an H200
    python benchmarks/train_step.py --profile --tokens 16384    # its slowest kernels

Each arm of a cell is a process of its own, and a cell's arms run in turn, on the same random weights, packed data,
optimizer and attention, and with the same activation checkpointing and compiling or, with --best, each as it is
fastest, and LoRA of ours once more with activation checkpointing, which stock needs. Stock runs with each of its
expert implementations that the cell names; its best one counts. LoRA has rank 16 on attention and on all experts. Time
is the mean of the steps on the clock, data loading and optimizer included, from one wait for the device to another;
memory is the peak that is reserved (CPU: resident), and "replayed" says how many passes of ours were CUDA graphs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
from harness import PeakMemory, alternate, machine, medians, profiler, show_profile, write
from peft import LoraConfig, get_peft_model
from tables import best_stock, of_stock
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

ATTENTION = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
# Published configurations, and one that two CPU cores can train.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            **ATTENTION,
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "vocab_size": 151936,
        },
    ),
    "olmoe-1b-7b": (
        "olmoe",
        {
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 50304,
        },
    ),
    "small": (
        "qwen3_moe",
        {
            "hidden_size": 512,
            "moe_intermediate_size": 192,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 4096,
        },
    ),
}
OURS, OURS_LEAN = "ours", "ours in less memory"
GRAPHS = "reduce-overhead"  # the torch_compile_mode that replays CUDA graphs
# Options that every process of a run shares.
OWN = (
    "device",
    "layers",
    "warmup",
    "steps",
    "checkpointing",
    "accumulation",
    "expert_backend",
    "expert_checkpointing",
    "liger",
    "compile",
)
CELLS = {
    "cuda": [
        {"model": "qwen3-30b-a3b", "training": "lora", "tokens": 4096, "length": 4096},
        {"model": "qwen3-30b-a3b", "training": "lora", "tokens": 16384, "length": 4096},
        {"model": "olmoe-1b-7b", "training": "full", "tokens": 16384, "length": 4096},
    ],
    "cpu": [
        {"model": "small", "training": "lora", "tokens": 2048, "length": 256},
        {"model": "small", "training": "full", "tokens": 2048, "length": 256},
    ],
}
# How each arm was fastest on an H200. Stock runs out of its memory with Qwen3-30B-A3B unless it checkpoints, and
# compiled it took longer; 16,384 tokens leave room for all activations of ours but those of the experts.
STOCK_BEST = {"qwen3-30b-a3b": {"checkpointing": "on"}, "olmoe-1b-7b": {"checkpointing": "off"}}
OURS_BEST = {
    ("qwen3-30b-a3b", 4096): {"checkpointing": "off", "compile": GRAPHS},
    ("qwen3-30b-a3b", 16384): {"checkpointing": "off", "compile": GRAPHS, "expert_checkpointing": "full"},
    ("olmoe-1b-7b", 16384): {"checkpointing": "off", "compile": GRAPHS},
}
LEAN = {"checkpointing": "on", "compile": GRAPHS}  # LoRA, in what stock needs
# Eager is a loop over experts: on GPUs far behind (expert_block.py), on CPU the faster one in bf16.
STOCK = {"cuda": ("stock grouped_mm",), "cpu": ("stock grouped_mm", "stock eager")}


class Clock(TrainerCallback):  # type: ignore[misc]
    """The seconds of the steps after the first ones, and the peak of memory of all."""

    def __init__(self, warmup: int, profiled_on: str | None) -> None:
        self.warmup = warmup
        self.ends: list[float] = []
        self.memory = PeakMemory()
        self.profiler = profiler(profiled_on) if profiled_on else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock after the first steps, and stop it after the last one."""
        if state.global_step not in (self.warmup, state.max_steps):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.steps = state.max_steps - self.warmup
        if self.profiler is not None and len(self.ends) == 1:
            self.profiler.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print where the time went."""
        if self.profiler is not None:
            self.profiler.stop()
            show_profile(self.profiler, self.steps)

    def seconds(self) -> float:
        """The mean of the steps on the clock."""
        start, end = self.ends
        return (end - start) / self.steps


def run_arm(options: argparse.Namespace) -> None:
    """One arm of one cell."""
    cpu = options.device == "cpu"
    kind, sizes = MODELS[options.model]
    if options.layers:
        sizes = {**sizes, "num_hidden_layers": options.layers}
    is_ours = options.arm in (OURS, OURS_LEAN)
    implementation = "grouped_mm" if is_ours else options.arm.removeprefix("stock ")
    config = AutoConfig.for_model(
        kind, **sizes, max_position_embeddings=options.length, use_cache=False, router_aux_loss_coef=0.0
    )
    clock = Clock(options.warmup, options.device if options.profile else None)
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation=implementation
        )
    generator = torch.Generator().manual_seed(0)
    steps, batch = options.warmup + options.steps, options.tokens // options.length
    number = steps * options.accumulation * batch
    rows = torch.randint(0, sizes["vocab_size"], (number, options.length), generator=generator)
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            use_cpu=cpu,
            bf16=True,
            max_steps=steps,
            gradient_accumulation_steps=options.accumulation,
            per_device_train_batch_size=batch,
            learning_rate=1e-5,
            optim="adamw_torch_fused",
            gradient_checkpointing=options.checkpointing == "on",
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_liger_kernel=options.liger == "on",
            # As ours does by itself: Liger's experts are no part of the comparison, and PEFT cannot reach into them.
            liger_kernel_config={"swiglu": False},
            torch_compile=options.compile != "off",
            torch_compile_mode=options.compile if options.compile == GRAPHS else None,
            accelerator_config={"non_blocking": True},
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        targets = LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )
        lora = options.training == "lora"
        given = {"args": arguments, "train_dataset": [{"input_ids": row, "labels": row} for row in rows]}
        trainer: Any
        if is_ours:
            from hf_moe_accel import AcceleratedMoETrainer, MoEAccelConfig

            config = MoEAccelConfig(
                expert_backend=options.expert_backend, expert_checkpointing=options.expert_checkpointing
            )
            adapters = targets if lora else None
            trainer = AcceleratedMoETrainer(model=model, peft_config=adapters, moe_config=config, **given)
        else:
            trainer = Trainer(model=get_peft_model(model, targets) if lora else model, **given)
        trainer.add_callback(clock)
        trainer.train()
    seconds = clock.seconds()
    tokens = options.accumulation * options.tokens
    found = {"tokens_per_s": tokens / seconds, "ms": 1e3 * seconds, "peak_mib": clock.memory.mib()}
    if is_ours:
        from hf_moe_accel.hf.cuda_graphs import LayerGraphs
        from hf_moe_accel.hf.discover import base_of

        graphs = LayerGraphs.of(base_of(trainer.model))
        found["replayed"] = 0 if graphs is None else graphs.replayed
    if options.profile:
        print(found)
    else:
        write(options.result, found)


def cells_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Those of the device that agree with the options given."""
    cells = [
        cell
        for cell in CELLS[options.device]
        if all(getattr(options, name) in (None, cell[name]) for name in ("model", "training", "tokens"))
    ]
    if not cells:
        raise SystemExit("no cell has all of these: drop one of --model, --training, --tokens")
    return cells


def best_of(arm: str, cell: dict[str, Any]) -> dict[str, str]:
    """How an arm runs with --best."""
    if arm == OURS_LEAN:
        return LEAN
    return OURS_BEST[cell["model"], cell["tokens"]] if arm == OURS else STOCK_BEST[cell["model"]]


def compare(options: argparse.Namespace) -> None:
    """Run the cells and print their arms side by side."""
    cells = cells_of(options)
    own = {name: getattr(options, name) for name in OWN}
    found: list[dict[str, Any]] = []
    for cell in cells:
        print(cell, flush=True)
        runs: dict[str, list[dict[str, Any]]] = {}
        failed: dict[str, str] = {}
        ours = (OURS, OURS_LEAN) if options.best and cell["training"] == "lora" else (OURS,)
        for arm in (*STOCK[options.device], *ours) * options.repeats:
            settings = {**own, **cell, **(best_of(arm, cell) if options.best else {})}
            flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
            try:
                runs.setdefault(arm, []).extend(alternate(__file__, [arm], 1, 0, flags)[arm])
            except SystemExit as failure:
                # An arm that does not fit into memory says something too, and the others may still run.
                failed[arm] = str(failure).strip().splitlines()[-1][:300]
                print(f"{arm} failed: {failed[arm]}", flush=True)
        done = {arm: rows for arm, rows in runs.items() if rows}
        found.append({"cell": cell, "median": medians(done), "runs": done, "failed": failed})
        if options.best:
            found[-1]["best"] = {arm: best_of(arm, cell) for arm in done}
        show(found[-1])
        write(options.output, {"machine": machine(), **own, "repeats": options.repeats, "results": found})


def show(row: dict[str, Any]) -> None:
    """Print a table of one cell."""
    middle = row["median"]
    best = best_stock(middle)
    print(f"\n{'arm':<18} {'tokens/s':>10} {'of stock':>9} {'ms':>10} {'peak MiB':>10} {'of stock':>9}")
    for arm, values in middle.items():
        speed, memory = (of_stock(values, best, name) for name in ("tokens_per_s", "peak_mib"))
        print(
            f"{arm:<18} {values['tokens_per_s']:>10,.0f} {speed:>9} {values['ms']:>10,.1f} "
            f"{values['peak_mib']:>10,.0f} {memory:>9}"
        )
    print(flush=True)


def main() -> None:
    """Parse and run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=CELLS, default=device)
    parser.add_argument("--repeats", type=int, default=3, help="how often the arms of a cell run in turn (default 3)")
    parser.add_argument("--output", help="default: benchmarks/results/train_step_DEVICE.json")
    # On a GPU ours captures CUDA graphs in the sixth pass.
    warmup = 8 if device == "cuda" else 3
    parser.add_argument("--warmup", type=int, default=warmup, help=f"steps before the clock (default here {warmup})")
    parser.add_argument("--steps", type=int, default=5, help="steps on the clock (default 5)")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the model has")
    parser.add_argument("--checkpointing", choices=("on", "off"), default="on", help="of activations (default on)")
    parser.add_argument("--liger", choices=("on", "off"), default="off", help="norms, rope and loss by liger-kernel")
    parser.add_argument("--accumulation", type=int, default=1, help="passes of so many tokens in a step (default 1)")
    parser.add_argument("--expert-backend", default="auto", help="of ours (default auto)")
    parser.add_argument("--expert-checkpointing", default="activation", help="of ours (default activation)")
    parser.add_argument("--compile", choices=("off", "on", GRAPHS), default="off", help="torch_compile (default off)")
    parser.add_argument("--best", action="store_true", help="each arm as it is fastest on an H200 (see the table)")
    parser.add_argument("--profile", action="store_true", help="print where the time of one arm of one cell goes")
    parser.add_argument("--arm", default=OURS, help="with --profile: ours (default), 'stock grouped_mm', ...")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    cell = parser.add_argument_group("of all cells, only those with")
    cell.add_argument("--model", choices=MODELS)
    cell.add_argument("--training", choices=("lora", "full"))
    cell.add_argument("--tokens", type=int, help="of a pass")
    options = parser.parse_args()
    if options.best and options.device == "cpu":
        raise SystemExit("--best says what is fastest on an H200: leave it out on a CPU")
    options.output = options.output or f"benchmarks/results/train_step_{options.device}.json"
    if options.profile:
        vars(options).update(cells_of(options)[0])
    if options.profile or options.result:
        run_arm(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
