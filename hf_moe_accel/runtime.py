"""What a prepared model owns while it runs, and gives back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from hf_moe_accel.moe.stats import RoutingStats
from hf_moe_accel.moe.watchdog import Watchdog

if TYPE_CHECKING:
    from torch import nn

    from hf_moe_accel.dispatch.base import TokenDispatcher
    from hf_moe_accel.experts.base import ExpertBackend
    from hf_moe_accel.topology import ExpertTopology

_numbers = itertools.count()


class MoERuntime:
    """One per model: dispatcher, backend, statistics, watchdog.

    Opens by itself at the first forward pass and after `close`. Close it before the process group goes.

    Args:
        topology: how the experts lie on the ranks.
        dispatcher: station 1.
        backend: station 2.
        num_experts: experts of each MoE layer, in order; layers may differ.
        collective_timeout: seconds that one wait may take.
    """

    def __init__(
        self,
        topology: ExpertTopology,
        dispatcher: TokenDispatcher,
        backend: ExpertBackend,
        num_experts: Sequence[int],
        collective_timeout: float,
    ) -> None:
        """Hold the parts; start nothing."""
        self.topology = topology
        self.dispatcher = dispatcher
        self.backend = backend
        self.num_experts = num_experts
        self.collective_timeout = collective_timeout
        self.stats = RoutingStats(len(num_experts), max(num_experts))
        # Models are prepared in the same order on all ranks, so equal numbers mean the same model.
        self._number = next(_numbers)
        self._passes = 0
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
        if self._watchdog is None:
            store = dist.distributed_c10d._get_default_store()
            self._watchdog = Watchdog(
                store, dist.get_rank(), dist.get_world_size(), self.collective_timeout, f"model{self._number}"
            )
        return self._watchdog.waiting(step, layer, direction)

    def close(self) -> None:
        """Stop the watchdog. The next forward pass opens again. Not a collective."""
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None

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
        copied = MoERuntime(self.topology, self.dispatcher, self.backend, self.num_experts, self.collective_timeout)
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
