"""LoRA on experts: step time, peak memory and what is kept for backward, of stock PEFT and of ours.

    python benchmarks/expert_lora.py                   # every size of the device
    python benchmarks/expert_lora.py --repeats 1       # a quick look

A stack of Qwen3-MoE experts alone, whose input needs a gradient, with frozen weights and a fixed routing: on a GPU two
layers of Qwen3-30B-A3B in bf16, on a CPU smaller ones in fp32 and bf16. The arms run in turn, each time in fresh
processes: without adapters, with ours, and with PEFT's `target_parameters` on stock transformers. The time is that of
an arm's fastest step, the peak memory that of a step of its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import PeakHostMemory, PeakMemory, alternate, machine, medians, write
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

ARMS = ("frozen", "ours", "stock peft")
SIZES = {
    "cpu": {"small": {"tokens": 256, "steps": 20}, "mid": {"tokens": 2048, "steps": 6}},
    "cuda": {"4k": {"tokens": 4096, "steps": 10}, "16k": {"tokens": 16384, "steps": 10}},
}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
MODELS = {
    "cpu": {"layers": 2, "experts": 64, "hidden": 512, "intermediate": 192, "top_k": 8, "rank": 16},
    "cuda": {"layers": 2, "experts": 128, "hidden": 2048, "intermediate": 768, "top_k": 8, "rank": 16},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROJECTIONS = ("gate_up_proj", "down_proj")


class Stack(nn.Module):
    """Experts one after the other, each beside a residual."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": layer}) for layer in layers)

    def forward(self, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["experts"](x, ids, routing)
        return x


class Ours(nn.Module):
    """The token path on the parameters of stock experts, with adapters of the given rank or, at 0, without."""

    def __init__(self, experts: Any, rank: int, factor_dtype: torch.dtype) -> None:
        from hf_moe_accel.dispatch.local import LocalDispatcher
        from hf_moe_accel.experts import EXPERT_BACKENDS
        from hf_moe_accel.hf.discover import find_experts
        from hf_moe_accel.runtime import MoERuntime
        from hf_moe_accel.topology import ExpertTopology

        super().__init__()
        (found,) = find_experts(nn.ModuleDict({"experts": experts}))
        self.spec, self.experts, self.rank = found.spec, experts, rank
        num, weight = found.spec.num_experts, experts.down_proj
        # As `expert_backend="auto"` chooses: the first that can serve.
        backend = next(
            cls()
            for cls in map(EXPERT_BACKENDS.load, EXPERT_BACKENDS)
            if cls.why_not(found.spec, weight.dtype, weight.device) is None
        )
        self.runtime = MoERuntime(ExpertTopology(1, num), LocalDispatcher(), backend, [num], 60.0)
        self.factors = nn.ParameterList()
        for name in PROJECTIONS if rank else ():
            _, out, into = getattr(experts, name).shape
            for shape in ((num, rank, into), (num, out, rank)):
                self.factors.append(0.05 * torch.randn(shape, dtype=factor_dtype, device=experts.down_proj.device))

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


def model_of(options: argparse.Namespace, device: str) -> Any:
    """The stack of an arm: frozen experts, adapters that train."""
    dtype = getattr(torch, options.dtype)
    config = Qwen3MoeConfig(
        hidden_size=options.hidden,
        moe_intermediate_size=options.intermediate,
        num_experts=options.experts,
        experts_implementation="grouped_mm",
    )
    layers: list[Any] = []
    for _ in range(options.layers):
        experts = Qwen3MoeExperts(config).to(device, dtype).requires_grad_(False)
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.02)
        layers.append(experts)
    if options.arm == "stock peft":
        targets = [f"experts.{name}" for name in PROJECTIONS]
        lora = LoraConfig(
            r=options.rank,
            lora_alpha=2 * options.rank,
            target_modules=[],
            target_parameters=targets,
            init_lora_weights=False,
        )
        model = get_peft_model(Stack(layers), lora)
        assert sum(p.requires_grad for p in model.parameters()) == 2 * len(PROJECTIONS) * options.layers
        return model
    # PEFT keeps adapters of bf16 models in fp32.
    rank = options.rank if options.arm == "ours" else 0
    return Stack([Ours(experts, rank, torch.float32) for experts in layers])


def run_arm(options: argparse.Namespace) -> None:
    """One arm."""
    torch.manual_seed(0)
    model = model_of(options, DEVICE)
    x = torch.randn(options.tokens, options.hidden, device=DEVICE, dtype=getattr(torch, options.dtype))
    ids = torch.rand(options.tokens, options.experts, device=DEVICE).topk(options.top_k).indices
    routing = torch.rand(options.tokens, options.top_k, device=DEVICE, dtype=x.dtype)
    x.requires_grad_()

    def forward() -> Tensor:
        out: Tensor = model(x, ids, routing)
        return out

    def step() -> None:
        out = forward()
        out.backward(torch.ones_like(out))
        model.zero_grad()
        x.grad = None

    step()
    kept = kept_mib(forward, [x, ids, routing, *model.parameters()])
    # What disturbs a step makes it slower, never faster.
    seconds = min(_timed(step) for _ in range(options.steps))
    memory = PeakMemory() if DEVICE == "cuda" else PeakHostMemory()
    step()
    write(options.result, {"ms_per_step": 1e3 * seconds, "peak_mib": memory.mib(), "kept_mib": kept})


def _timed(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def kept_mib(forward: Callable[[], Tensor], own: list[Tensor]) -> float:
    """What the graph of a forward pass keeps beside inputs and parameters, each storage once."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    for tensor in own:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    assert out.requires_grad
    return sum(storages.values()) / 2**20


def compare(options: argparse.Namespace) -> None:
    """Run all arms at every size and print them side by side."""
    model = {name: getattr(options, name) for name in MODELS[DEVICE]}
    found: dict[str, Any] = {}
    for size, numbers in SIZES[DEVICE].items():
        for dtype in DTYPES[DEVICE]:
            arguments = {**model, **numbers, "dtype": dtype}
            flags = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
            print(f"{size}, {dtype}: {arguments}", flush=True)
            runs = alternate(__file__, ARMS, options.repeats, 1, flags)
            found[f"{size}, {dtype}"] = {"median": medians(runs), "runs": runs}
    print(f"\nmedian of {options.repeats}, {machine()['device']}")
    print("size and dtype      arm              ms    of frozen    peak MiB    kept MiB")
    for name, row in found.items():
        middle = row["median"]
        for arm in ARMS:
            ms, peak, kept = (middle[arm][key] for key in ("ms_per_step", "peak_mib", "kept_mib"))
            print(
                f"{name:<18}  {arm:<10} {ms:>8.1f} {ms / middle['frozen']['ms_per_step']:>12.2f} "
                f"{peak:>11.0f} {kept:>11.1f}"
            )
        ratios = {
            key: middle["ours"][key] / middle["stock peft"][key] for key in ("ms_per_step", "peak_mib", "kept_mib")
        }
        print(f"{'':<18}  ours / stock: " + ", ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
    write(options.output, {"machine": machine(), "model": model, "sizes": SIZES[DEVICE], "results": found})


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="how often the arms run in turn (default 5)")
    parser.add_argument("--output", default=f"benchmarks/results/expert_lora_{DEVICE}.json")
    model = parser.add_argument_group("size of the model")
    for name, default in MODELS[DEVICE].items():
        model.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    for name, kind in (("--arm", str), ("--result", str), ("--dtype", str), ("--tokens", int), ("--steps", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        run_arm(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
