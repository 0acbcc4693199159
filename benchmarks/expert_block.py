"""The experts of one layer: forward, gradients of the rows, gradients of the weights; time, FLOP/s and peak memory.

    python benchmarks/expert_block.py --quick                           # 4k and 16k tokens, full and LoRA
    python benchmarks/expert_block.py                                   # all cells
    python benchmarks/expert_block.py --profile --arm fused --training lora --tokens 16384   # its slowest operations

Shapes of Qwen3-30B-A3B unless told otherwise, random weights, a fixed routing whose weights need a gradient. Each arm
of a cell is a process of its own, and a cell's arms run in turn: stock transformers with `grouped_mm` (with LoRA:
PEFT's `target_parameters`) and, up to 4k tokens, `eager`; ours with `grouped_mm`, `fused` and, where they are
installed, `quack` and `transformer_engine` (with --fp8 also in FP8). What trains is nothing (the backward pass is dx
alone), LoRA of rank 16 on both projections, or all weights (dW is what that takes longer). With 16 experts each takes
as many rows as on a rank of eight under expert parallelism.

FLOP/s count the base weights' products only. The floor is their time at the matrix peak measured on an H200 (790
TFLOP/s); for Qwen3-30B's full training at 4k tokens reading the weights adds to it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from harness import PeakHostMemory, PeakMemory, alternate, machine, medians, profiler, show_profile, write
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

STOCK = {"stock grouped_mm": "grouped_mm", "stock eager": "eager"}
FP8 = ("transformer_engine_fp8", "transformer_engine_fp8_block")
OURS = ("grouped_mm", "fused", "quack", "transformer_engine", *FP8)
EAGER_TOKENS = 4096  # above, it takes too long to be worth the wait
TRAINING = ("none", "lora", "full")
PROJECTIONS = ("gate_up_proj", "down_proj")
PEAK = 790e12
# Of full training with 128 experts on an H200, where more than the peak counts: tokens -> ms.
FLOORS = {4096: 1.23, 16384: 4.70, 65536: 18.8}
SKEW = 1.0  # the exponent of Zipf's law; the 16 most wanted of 128 experts get 62 % of a token's first choices
WARM_UP, SECONDS, LEAST = 3, 1.0, 5

QUICK = [
    {"training": training, "tokens": tokens, "experts": 128, "routing": "balanced"}
    for tokens in (4096, 16384)
    for training in ("lora", "full")
]
CELLS = [
    {"training": training, "tokens": tokens, "experts": experts, "routing": routing}
    for tokens, experts, routing in (
        *((tokens, 128, "balanced") for tokens in (1024, 4096, 16384, 65536)),
        (16384, 128, "skewed"),
        (16384, 16, "balanced"),
        (16384, 16, "skewed"),
    )
    for training in TRAINING
]


class Ours(nn.Module):
    """The token path on the parameters of stock experts, with adapters of the given rank or, at 0, without."""

    def __init__(self, experts: Any, backend: str, rank: int) -> None:
        from hf_moe_accel.dispatch.local import LocalDispatcher
        from hf_moe_accel.experts import EXPERT_BACKENDS
        from hf_moe_accel.hf.discover import find_experts
        from hf_moe_accel.runtime import MoERuntime
        from hf_moe_accel.topology import ExpertTopology

        super().__init__()
        (found,) = find_experts(nn.ModuleDict({"experts": experts}))
        self.spec, self.experts, self.rank = found.spec, experts, rank
        num, device = found.spec.num_experts, experts.down_proj.device
        served_by = EXPERT_BACKENDS.load(backend)
        reason = served_by.why_not(found.spec, experts.down_proj.dtype, device)
        if reason is not None:
            raise SystemExit(f"{backend}: {reason}")
        self.runtime = MoERuntime(ExpertTopology(1, num), LocalDispatcher(), served_by(), [num], 60.0)
        self.factors = nn.ParameterList()
        for name in PROJECTIONS if rank else ():
            _, out, into = getattr(experts, name).shape
            for shape in ((num, rank, into), (num, out, rank)):
                # PEFT keeps adapters of bf16 models in fp32.
                self.factors.append(0.05 * torch.randn(shape, dtype=torch.float32, device=device))

    def forward(self, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        from hf_moe_accel.experts.base import ExpertWeights, LoraPair
        from hf_moe_accel.moe.forward import forward

        weights = ExpertWeights(self.experts.gate_up_proj, self.experts.down_proj)
        if self.rank:
            up_a, up_b, down_a, down_b = self.factors
            weights = weights._replace(
                up_lora=(LoraPair(up_a, up_b, 2.0),), down_lora=(LoraPair(down_a, down_b, 2.0),)
            )
        return forward(self.spec, x, ids, routing, weights, self.runtime, 0)


class Layer(nn.Module):
    """Stock experts under the name that PEFT's targets have in a model."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        out: Tensor = self.experts(x, ids, routing)
        return out


def layer_of(options: argparse.Namespace, device: str) -> Any:
    """The layer of an arm."""
    dtype = getattr(torch, options.dtype)
    config = Qwen3MoeConfig(
        hidden_size=options.hidden,
        moe_intermediate_size=options.intermediate,
        num_experts=options.experts,
        experts_implementation=STOCK.get(options.arm, "grouped_mm"),
    )
    with torch.device(device):
        experts: Any = Qwen3MoeExperts(config).to(dtype).requires_grad_(options.training == "full")
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    lora = options.training == "lora"
    if options.arm in OURS:
        return Ours(experts, options.arm, options.rank if lora else 0)
    if not lora:
        return Layer(experts)
    targets = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in PROJECTIONS],
        init_lora_weights=False,
    )
    layer = get_peft_model(Layer(experts), targets)
    assert sum(p.requires_grad for p in layer.parameters()) == 2 * len(PROJECTIONS)
    return layer


def route(options: argparse.Namespace, device: str) -> Tensor:
    """[T, K] experts of each token, all different."""
    wanted = torch.zeros(options.experts, device=device)
    if options.routing == "skewed":
        places = torch.arange(1, options.experts + 1, device=device)
        wanted = -SKEW * places.log()[torch.randperm(options.experts, device=device)]
    # The largest of these are drawn without replacement, with probabilities of exp(wanted).
    gumbel = -torch.empty(options.tokens, options.experts, device=device).exponential_().log()
    return (wanted + gumbel).topk(options.top_k).indices


def run_arm(options: argparse.Namespace) -> None:
    """One arm of one cell."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = layer_of(options, device)
    dtype = getattr(torch, options.dtype)
    x = torch.randn(options.tokens, options.hidden, device=device, dtype=dtype).requires_grad_()
    ids = route(options, device)
    routing = torch.rand(options.tokens, options.top_k, device=device, dtype=dtype).requires_grad_()
    grad = torch.randn(options.tokens, options.hidden, device=device, dtype=dtype)

    def forward() -> Tensor:
        out: Tensor = layer(x, ids, routing)
        return out

    def step() -> None:
        forward().backward(grad)
        layer.zero_grad()
        x.grad = routing.grad = None

    if options.profile:
        profile(step, device)
        return
    forward_ms, step_ms = _ms(forward, device), _ms(step, device)
    memory = PeakMemory() if device == "cuda" else PeakHostMemory()
    step()
    peak_mib = memory.mib()
    passes = 3 if options.training == "full" else 2
    flop = 6 * options.tokens * options.top_k * options.hidden * options.intermediate * passes
    floor = 1e3 * flop / PEAK
    if options.training == "full" and options.experts == 128:
        floor = FLOORS.get(options.tokens, floor)
    write(
        options.result,
        {
            "forward_ms": forward_ms,
            "backward_ms": step_ms - forward_ms,
            "ms": step_ms,
            "tflops": flop / step_ms / 1e9,
            "of_floor": floor / step_ms,
            "peak_mib": peak_mib,
        },
    )


def _ms(run: Callable[[], object], device: str) -> float:
    """The median of at least so many runs."""
    for _ in range(WARM_UP):
        run()
    times: list[float] = []
    until = time.perf_counter() + SECONDS
    while len(times) < LEAST or time.perf_counter() < until:
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            started = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def profile(step: Callable[[], None], device: str) -> None:
    """Print the operations and kernels that take most of a step."""
    steps = 5
    for _ in range(WARM_UP):
        step()
    with profiler(device) as profiled:
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    show_profile(profiled, steps)


def arms_of(cell: dict[str, Any], fp8: bool) -> list[str]:
    """Those that are worth the wait."""
    eager = cell["training"] != "lora" and cell["tokens"] <= EAGER_TOKENS
    stock = [name for name in STOCK if eager or name != "stock eager"]
    left_out = set() if fp8 else set(FP8)
    if find_spec("transformer_engine") is None:
        left_out |= {"transformer_engine", *FP8}
    if find_spec("quack") is None:
        left_out.add("quack")
    if not torch.cuda.is_available():
        left_out |= set(OURS) - {"grouped_mm"}
    return [*stock, *(name for name in OURS if name not in left_out)]


def compare(options: argparse.Namespace) -> None:
    """Run all cells and print their arms side by side."""
    names = ("hidden", "intermediate", "top_k", "rank", "dtype")
    model = {name: getattr(options, name) for name in names}
    found: list[dict[str, Any]] = []
    for cell in cells_of(options):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**model, **cell}.items()]
        print(f"{cell}", flush=True)
        row: dict[str, Any] = {"cell": cell}
        try:
            runs = alternate(__file__, arms_of(cell, options.fp8), options.repeats, 0, flags)
        except SystemExit as failure:
            # The other cells may still run, and a machine with a GPU is not had every day.
            print(failure, flush=True)
            row["failed"] = str(failure)
        else:
            row |= {"median": medians(runs), "runs": runs}
        found.append(row)
        write(options.output, {"machine": machine(), "model": model, "repeats": options.repeats, "results": found})
    show(found)


def cells_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Those of the set that agree with the options given."""
    cells = QUICK if options.quick else CELLS
    for name in ("training", "tokens", "experts", "routing"):
        wanted = getattr(options, name)
        if wanted is not None:
            cells = [cell for cell in cells if cell[name] == wanted]
    if not cells:
        raise SystemExit("no cell has all of these: drop one of --training, --tokens, --experts, --routing")
    return cells


def show(found: list[dict[str, Any]]) -> None:
    """Print a table, with dW as what training all weights takes longer than training none."""
    by_cell = {tuple(row["cell"].values()): row["median"] for row in found if "median" in row}
    print(f"\nmedians on {machine()['device']}")
    print(
        "trains    tokens experts routing   arm                           forward  backward     of it dW        ms"
        "  TFLOP/s  of floor  peak MiB"
    )
    for (training, *where), medians_of_arms in by_cell.items():
        frozen = by_cell.get(("none", *where), {})
        for arm, row in medians_of_arms.items():
            d_w = f"{row['ms'] - frozen[arm]['ms']:.2f}" if training == "full" and arm in frozen else ""
            tokens, experts, routing = where
            print(
                f"{training:<6} {tokens:>9} {experts:>7} {routing:<9} {arm:<29} {row['forward_ms']:>7.2f} "
                f"{row['backward_ms']:>9.2f} {d_w:>12} {row['ms']:>9.2f} {row['tflops']:>8.0f} "
                f"{row['of_floor']:>9.2f} {row['peak_mib']:>9.0f}"
            )


def main() -> None:
    """Parse and run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cells")
    parser.add_argument("--fp8", action="store_true", help="with arms in FP8, where TransformerEngine is installed")
    parser.add_argument("--repeats", type=int, default=1, help="how often the arms of a cell run in turn (default 1)")
    parser.add_argument("--output", default=f"benchmarks/results/expert_block_{device}.json")
    parser.add_argument("--profile", action="store_true", help="print where the time of one arm of one cell goes")
    parser.add_argument("--arm", choices=[*STOCK, *OURS], help="with --profile")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    cell = parser.add_argument_group("of all cells, only those with")
    cell.add_argument("--training", choices=TRAINING)
    cell.add_argument("--tokens", type=int)
    cell.add_argument("--experts", type=int)
    cell.add_argument("--routing", choices=("balanced", "skewed"))
    model = parser.add_argument_group("size of the model")
    model.add_argument("--hidden", type=int, default=2048)
    model.add_argument("--intermediate", type=int, default=768)
    model.add_argument("--top-k", type=int, default=8)
    model.add_argument("--rank", type=int, default=16)
    model.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    if options.profile:
        whole = {"arm": "fused", "training": "full", "tokens": 16384, "experts": 128, "routing": "balanced"}
        for name, value in whole.items():
            if getattr(options, name) is None:
                setattr(options, name, value)
    if options.profile or options.result:
        run_arm(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
