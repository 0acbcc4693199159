"""What a prepared model owns while it runs, and gives back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hf_moe_accel.moe.overlap import ChunkChoice
from hf_moe_accel.moe.stats import RoutingStats
from hf_moe_accel.moe.timing import PartTimer
from hf_moe_accel.moe.watchdog import Watchdog

if TYPE_CHECKING:
    from torch import nn

    from hf_moe_accel.dispatch.base import TokenDispatcher
    from hf_moe_accel.experts.base import ExpertBackend
    from hf_moe_accel.topology import ExpertTopology
    from hf_moe_accel.weights.checkpoint import CheckpointSave


class MoERuntime:
    """One per model: dispatcher, backend, statistics, watchdog.

    Opens by itself at the first forward pass and after `close`. Close it before the process group goes.

    Args:
        topology: how the experts lie on the ranks.
        dispatcher: station 1.
        backend: station 2.
        num_experts: experts of each MoE layer, in order; layers may differ.
        collective_timeout: seconds that a rank may come no further within a forward or backward pass.
        overlap_chunks: parts that a layer's tokens are sent in, or "auto".
        expert_checkpointing: what the experts compute again in the backward pass: "activation", "up" or "full".
        check_tokens: whether tokens are looked at before they are sent.
        expert_metrics: whether it is counted where tokens go.
        within_node: whether the ranks of an EP group are on one node.
    """

    def __init__(
        self,
        topology: ExpertTopology,
        dispatcher: TokenDispatcher,
        backend: ExpertBackend,
        num_experts: Sequence[int],
        collective_timeout: float,
        overlap_chunks: int | str = "auto",
        expert_checkpointing: str = "activation",
        check_tokens: bool = False,
        expert_metrics: bool = True,
        within_node: bool = False,
    ) -> None:
        """Hold the parts; start nothing."""
        self.topology = topology
        self.dispatcher = dispatcher
        self.backend = backend
        self.num_experts = num_experts
        self.collective_timeout = collective_timeout
        self.chunks = ChunkChoice(overlap_chunks, within_node=within_node)
        self.expert_checkpointing = expert_checkpointing
        self.check_tokens = check_tokens
        self.saving: CheckpointSave | None = None  # where the model's weights go while a trainer saves a checkpoint
        self.stats = RoutingStats(len(num_experts), max(num_experts)) if expert_metrics else None
        self.timer = PartTimer()
        self.report = ""  # what was prepared, for people
        self.settings: dict[str, Any] = {}  # the configuration that it was prepared with
        self._passes = 0
        self._name = _name_of_a_model() if topology.ep_size > 1 else ""
        self._in_backward = False
        self._watchdog: Watchdog | None = None

    def step_of(self, layer: int, *, again: bool) -> int:
        """The number of the running forward pass: the first MoE layer begins a new one, unless it runs `again`."""
        if layer == 0 and not again:
            self._passes += 1
        return self._passes

    def waiting(self, step: int, layer: int, direction: str) -> AbstractContextManager[None]:
        """Mark a wait for other ranks, for the watchdog."""
        if self.topology.ep_size == 1:
            return nullcontext()
        return self._open().waiting(step, layer, direction)

    def follow(self, model: nn.Module) -> None:
        """Let the watchdog know when a pass of the model begins and ends: FSDP2 waits for other ranks as well."""
        if self.topology.ep_size > 1:
            # Ahead of the hooks of FSDP2, which gather weights.
            model.register_forward_pre_hook(torch.compiler.disable(self._enter_forward), prepend=True)
            model.register_forward_hook(torch.compiler.disable(self._leave_forward), prepend=True, always_call=True)

    def close(self) -> None:
        """Stop the watchdog and free the dispatcher's buffers. The next forward pass opens again.

        All ranks must call, unless this one fails: DeepEP frees its buffers together.
        """
        self.dispatcher.close()
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None

    def _open(self) -> Watchdog:
        if self._watchdog is None:
            store = dist.distributed_c10d._get_default_store()
            self._watchdog = Watchdog(
                store, dist.get_rank(), dist.get_world_size(), self.collective_timeout, self._name
            )
        return self._watchdog

    def _enter_forward(self, *_: Any) -> None:
        self._in_backward = False
        self._open().enter(f"the beginning of step {self._passes + 1}, forward")

    def _leave_forward(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        self._open().leave()
        if torch.is_grad_enabled():
            for output in tree_leaves(outputs):
                if isinstance(output, Tensor) and output.requires_grad:
                    output.register_hook(self._enter_backward)

    def _enter_backward(self, _: Tensor) -> None:
        if self._in_backward:
            return
        self._in_backward = True
        self._open().enter(f"the beginning of step {self._passes}, backward")
        # A callback of a callback comes last: after FSDP2's, which waits for the reduction of gradients.
        call_at_the_end = torch.autograd.Variable._execution_engine.queue_callback
        call_at_the_end(lambda: call_at_the_end(self._leave_backward))

    def _leave_backward(self) -> None:
        self._in_backward = False
        self._open().leave()

    def __deepcopy__(self, memo: dict[int, Any]) -> MoERuntime:
        """A runtime of its own for a copied model.

        Raises:
            ValueError: the model is expert-parallel; its copy would share the experts of the original.
        """
        if self.topology.ep_size > 1:
            raise ValueError(
                "copy.deepcopy of an expert-parallel model is not supported: the copy would share its experts with "
                "the original. Load the second model with from_pretrained, or copy before the model is prepared."
            )
        copied = MoERuntime(
            self.topology,
            self.dispatcher,
            self.backend,
            self.num_experts,
            self.collective_timeout,
            self.chunks.wanted,
            self.expert_checkpointing,
            self.check_tokens,
            self.stats is not None,
        )
        copied.report, copied.settings = self.report, self.settings
        memo[id(self)] = copied
        return copied


def runtime_of(model: nn.Module) -> MoERuntime | None:
    """The runtime of a prepared model (through PEFT's, DDP's or torch.compile's wrappers), or None."""
    for module in model.modules():
        found = module.__dict__.get("moe_runtime")
        if found is not None:
            assert isinstance(found, MoERuntime)
            return found
    return None


def _name_of_a_model() -> str:
    """Models are prepared in the same order on all ranks, so that equal numbers mean the same model."""
    store = dist.distributed_c10d._get_default_store()
    return f"model{store.add(f'hf_moe_accel/models/{dist.get_rank()}', 1)}"
