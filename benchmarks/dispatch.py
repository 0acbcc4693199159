"""The exchange of tokens: stock transformers' all-to-all expert parallelism against ours, and what overlap hides.

    python benchmarks/dispatch.py
    python benchmarks/dispatch.py --repeats 1        # a quick look

A stack of expert layers is trained by itself, on 2 and on 4 gloo ranks; the two arms run in turn, each time in fresh
processes, with the same tokens, routing and weights. Bytes, collectives and host syncs are counted in a step of their
own, at the operators that torch dispatches; bytes are those that leave a rank for another one.

Then the same over a simulated link: what arrives is held back as long as a link would take that serves transfers in
order and keeps no core busy, and that takes as long for a step as the step in one part takes without it. Hidden is the
share of that time by which a step gets no longer, against the step in as many parts without the link; net, against the
step in one part, so that what cutting costs the computation counts as well. Exits with 1 where ours sends more bytes
than stock, or no number of parts hides 70%.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from harness import alternate, machine, medians, write
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig
from transformers.distributed.expert_parallel import AllToAllEP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

sys.path.insert(0, str(Path(__file__).parents[1]))

from hf_moe_accel.dispatch.all_to_all import AllToAllDispatcher
from hf_moe_accel.experts.base import ExpertWeights
from hf_moe_accel.experts.grouped_mm import GroupedMMBackend
from hf_moe_accel.hf.discover import find_experts
from hf_moe_accel.moe.forward import forward
from hf_moe_accel.runtime import MoERuntime
from hf_moe_accel.topology import ExpertTopology
from tests.helpers.links import SimulatedLink

ARMS = ("stock", "ours")
RANKS = (2, 4)
LINK_RANKS = 2
CHUNKS = (1, 2, 4, 8)
GOAL = 0.7
SECONDS_OF_TIMEOUT = 600.0


class Ours:
    """The token path over stock experts, of which this module holds a rank's part."""

    def __init__(self, experts: Any, num_experts: int, dispatcher: Any, chunks: int) -> None:
        ranks = dist.get_world_size()
        (found,) = find_experts(nn.ModuleDict({"experts": experts}))
        self.spec, self.experts = dataclasses.replace(found.spec, num_experts=num_experts), experts
        topology = ExpertTopology(ranks, num_experts, ranks)
        self.runtime = MoERuntime(
            topology, dispatcher, GroupedMMBackend(), [num_experts], SECONDS_OF_TIMEOUT, overlap_chunks=chunks
        )

    def __call__(self, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        weights = ExpertWeights(self.experts.gate_up_proj, self.experts.down_proj)
        return forward(self.spec, x, ids, routing, weights, self.runtime, 0)


class Counts(TorchDispatchMode):
    """Counts collectives, the bytes that they carry to other ranks, and what makes the host wait for the device."""

    SYNCS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal")

    def __init__(self) -> None:
        super().__init__()
        self.collectives = self.syncs = 0
        self.bytes = 0.0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(op)
        if name.startswith("c10d.alltoall_base_"):
            self._count(args[1], args[4])
        elif name.startswith("_c10d_functional.all_to_all_single"):
            self._count(args[0], args[2])
        elif name.startswith(("c10d.", "_c10d_functional.")) and not any(s in name for s in ("wait", "wrap")):
            raise AssertionError(f"a collective that is not counted: {name}")
        self.syncs += name.startswith(self.SYNCS)
        return op(*args, **(kwargs or {}))

    def _count(self, sent: Tensor, sizes: list[int]) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        kept = sizes[rank] / max(1, sum(sizes)) if sizes else 1 / ranks
        self.collectives += 1
        self.bytes += sent.nbytes * (1 - kept)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Also what does not come through the dispatcher on a CPU."""
        tolist = Tensor.tolist

        def counted(tensor: Tensor) -> Any:
            self.syncs += 1
            return tolist(tensor)

        with mock.patch.object(Tensor, "tolist", counted), self:
            yield


class Stack:
    """Layers of experts one after the other, each beside a residual, and a batch for them."""

    def __init__(self, options: argparse.Namespace) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(rank)
        config = Qwen3MoeConfig(
            hidden_size=options.hidden,
            moe_intermediate_size=options.intermediate,
            num_experts=options.experts // ranks,
            experts_implementation="grouped_mm",
        )
        self.modules = [Qwen3MoeExperts(config) for _ in range(options.layers)]
        for module in self.modules:
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.02)
        self.layers: list[Callable[..., Tensor]] = []
        self.x = torch.randn(options.tokens, options.hidden).requires_grad_()
        self.ids = torch.rand(options.tokens, options.experts).topk(options.top_k).indices
        self.routing = torch.rand(options.tokens, options.top_k).softmax(1).requires_grad_()

    def step(self) -> None:
        """A forward and a backward pass."""
        x: Tensor = self.x
        for layer in self.layers:
            x = x + layer(x, self.ids, self.routing)
        x.backward(torch.ones_like(x))
        for tensor in (self.x, self.routing, *(p for module in self.modules for p in module.parameters())):
            tensor.grad = None

    def seconds(self, steps: int) -> float:
        """The fastest step, as the slowest rank sees it: what disturbs a step makes it slower, never faster."""
        self.step()
        found = []
        for _ in range(steps):
            dist.barrier()
            started = time.perf_counter()
            self.step()
            found.append(time.perf_counter() - started)
        return _max_over_ranks(min(found))


def _max_over_ranks(value: float) -> float:
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def run_arm(options: argparse.Namespace) -> None:
    """One arm on this rank."""
    dist.init_process_group("gloo")
    stack = Stack(options)
    found = run_link(stack, options) if options.arm == "link" else run_exchange(stack, options)
    if dist.get_rank() == 0:
        write(options.result, found)
    for layer in stack.layers:
        if isinstance(layer, Ours):
            layer.runtime.close()
    dist.destroy_process_group()


def run_exchange(stack: Stack, options: argparse.Namespace) -> dict[str, float]:
    """Count and time an arm over gloo."""
    if options.arm == "stock":
        mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("ep", "tp"))
        for module in stack.modules:
            module._is_expert_parallel = True  # as transformers marks experts that are split over ranks
        stack.layers = [AllToAllEP(module, mesh["ep"], mesh["tp"]) for module in stack.modules]
    else:
        dispatcher = AllToAllDispatcher(dist.group.WORLD)
        stack.layers = [Ours(module, options.experts, dispatcher, 1) for module in stack.modules]
    stack.step()
    counts = Counts()
    with counts.counting():
        stack.step()
    layers = len(stack.layers)
    return {
        "bytes_per_token": counts.bytes / options.tokens / layers,
        "collectives_per_layer": counts.collectives / layers,
        "host_syncs_per_layer": counts.syncs / layers,
        "ms_per_step": 1e3 * stack.seconds(options.steps),
    }


def run_link(stack: Stack, options: argparse.Namespace) -> dict[str, float]:
    """Time the simulated link, in one to many parts."""

    def use(chunks: int, bytes_per_second: float | None = None) -> SimulatedLink | None:
        for layer in stack.layers:
            layer.runtime.close()  # type: ignore[attr-defined]
        dispatcher: Any = AllToAllDispatcher(dist.group.WORLD)
        if bytes_per_second is not None:
            dispatcher = SimulatedLink(dispatcher, 0.0, bytes_per_second)
        stack.layers = [Ours(module, options.experts, dispatcher, chunks) for module in stack.modules]
        return dispatcher if bytes_per_second is not None else None

    use(1)
    alone = stack.seconds(options.steps)
    ruler = use(1, 1e18)
    stack.step()
    assert ruler is not None
    bandwidth = _max_over_ranks(ruler.busy * 1e18) / alone
    found = {"ms_of_compute": 1e3 * alone, "ms_of_link": 1e3 * alone}
    for chunks in CHUNKS:
        use(chunks)
        cut = stack.seconds(options.steps)
        use(chunks, bandwidth)
        seconds = stack.seconds(options.steps)
        found[f"ms_without_link_{chunks}"] = 1e3 * cut
        found[f"ms_{chunks}"] = 1e3 * seconds
        found[f"hidden_{chunks}"] = 1 - (seconds - cut) / alone
        found[f"net_{chunks}"] = 1 - (seconds - alone) / alone
    return found


def compare(options: argparse.Namespace) -> int:
    """Run all arms and print them side by side."""
    names = ("layers", "experts", "hidden", "intermediate", "top_k", "tokens", "steps")
    model = {name: getattr(options, name) for name in names}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in model.items()]
    found: dict[str, Any] = {}
    for ranks in RANKS:
        print(f"{ranks} ranks: {model}", flush=True)
        runs = alternate(__file__, ARMS, options.repeats, ranks, flags)
        found[f"{ranks} ranks"] = {"median": medians(runs), "runs": runs}
    runs = alternate(__file__, ("link",), options.repeats, LINK_RANKS, flags)
    found[f"simulated link, {LINK_RANKS} ranks"] = {"median": medians(runs), "runs": runs}

    print(f"\nmedian of {options.repeats}, {machine()['device']}; a layer, forward and backward")
    print("ranks  arm      bytes/token  collectives  host syncs    ms a step")
    failed = False
    for ranks in RANKS:
        middle = found[f"{ranks} ranks"]["median"]
        for arm in ARMS:
            row = middle[arm]
            print(
                f"{ranks:<6} {arm:<8} {row['bytes_per_token']:>11,.0f} {row['collectives_per_layer']:>12.1f} "
                f"{row['host_syncs_per_layer']:>11.1f} {row['ms_per_step']:>12.1f}"
            )
        ratios = {key: middle["ours"][key] / middle["stock"][key] for key in ("bytes_per_token", "ms_per_step")}
        print(f"{'':<6} ours / stock: " + ", ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
        failed |= ratios["bytes_per_token"] > 1
    link = found[f"simulated link, {LINK_RANKS} ranks"]["median"]["link"]
    print(f"\nsimulated link, {LINK_RANKS} ranks: computing and sending take {link['ms_of_compute']:.1f} ms each")
    print("parts    ms without link    ms with link    hidden    net")
    for chunks in CHUNKS:
        cut, ms, hidden, net = (link[f"{key}_{chunks}"] for key in ("ms_without_link", "ms", "hidden", "net"))
        print(f"{chunks:<8} {cut:>15.1f} {ms:>15.1f} {hidden:>9.0%} {net:>6.0%}")
    failed |= max(link[f"hidden_{chunks}"] for chunks in CHUNKS) < GOAL
    write(options.output, {"machine": machine(), "model": model, "results": found})
    return int(failed)


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="how often the arms run in turn (default 3)")
    parser.add_argument("--output", default="benchmarks/results/dispatch_cpu.json")
    model = parser.add_argument_group("size of the model")
    model.add_argument("--layers", type=int, default=2)
    model.add_argument("--experts", type=int, default=32)
    model.add_argument("--hidden", type=int, default=512)
    model.add_argument("--intermediate", type=int, default=192)
    model.add_argument("--top-k", type=int, default=8)
    model.add_argument("--tokens", type=int, default=1024, help="of a rank (default 1024)")
    model.add_argument("--steps", type=int, default=3)
    for name in ("--arm", "--result"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        run_arm(options)
        return 0
    return compare(options)


if __name__ == "__main__":
    raise SystemExit(main())
