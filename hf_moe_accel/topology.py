"""Which rank owns which experts: plain integers, no process group.

ranks are laid out as transformers' expert mesh does: (replica, efsdp, ep), ep innermost. 8 ranks, ep 2, 2 replicas:

    rank       0  1  2  3 | 4  5  6  7
    replica    0  0  0  0 | 1  1  1  1
    efsdp      0  0  1  1 | 0  0  1  1      ranks with the same ep and replica shard the same experts (FSDP)
    ep         0  1  0  1 | 0  1  0  1      each EP group (0 1), (2 3), ... holds all experts together
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertTopology:
    """How `num_experts` experts lie on `world_size` ranks.

    Raises:
        ValueError: the sizes do not divide each other; names the values and the valid choices.
    """

    world_size: int
    num_experts: int
    ep_size: int = 1
    dp_replicate_size: int = 1

    def __post_init__(self) -> None:
        """Check that the sizes divide each other."""
        if self.world_size % self.dp_replicate_size:
            raise ValueError(
                f"dp_replicate_size={self.dp_replicate_size} does not divide the {self.world_size} ranks of this run: "
                f"use one of {_divisors(self.world_size)}."
            )
        valid = _divisors(math.gcd(self.num_experts, self.fsdp_size))
        if self.num_experts % self.ep_size:
            raise ValueError(
                f"ep_size={self.ep_size} does not divide the {self.num_experts} experts of this model: use 'auto' or "
                f"one of {valid}."
            )
        if self.fsdp_size % self.ep_size:
            ranks = f"{self.world_size} ranks"
            if self.dp_replicate_size > 1:
                ranks = f"{self.fsdp_size} ranks of a replica ({ranks} / dp_replicate_size={self.dp_replicate_size})"
            raise ValueError(
                f"ep_size={self.ep_size} does not divide the {ranks}: use 'auto' or one of {valid}, or start "
                f"torchrun with --nproc-per-node={self.ep_size}."
            )

    @classmethod
    def choose(
        cls, ep_size: int | str, *, world_size: int, ranks_per_node: int, num_experts: int, dp_replicate_size: int = 1
    ) -> ExpertTopology:
        """The topology for an `ep_size` that the user wrote, or the best one for "auto".

        "auto" is the largest size that divides the experts, the ranks of a replica and the ranks of a node, so that
        tokens never leave a node.
        """
        if ep_size == "auto":
            replica = world_size // dp_replicate_size if world_size % dp_replicate_size == 0 else world_size
            ep_size = math.gcd(num_experts, math.gcd(replica, ranks_per_node))
        return cls(world_size, num_experts, int(ep_size), dp_replicate_size)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(ranks, EP ranks, replicas): models that agree in them can share process groups, whatever their experts."""
        return self.world_size, self.ep_size, self.dp_replicate_size

    @property
    def fsdp_size(self) -> int:
        """Ranks that shard one copy of the dense weights."""
        return self.world_size // self.dp_replicate_size

    @property
    def efsdp_size(self) -> int:
        """Ranks that shard the same experts between each other."""
        return self.fsdp_size // self.ep_size

    @property
    def num_local_experts(self) -> int:
        """Experts that one EP rank owns."""
        return self.num_experts // self.ep_size

    def ep_rank(self, rank: int) -> int:
        """The place of global `rank` in its EP group."""
        return rank % self.ep_size

    def owner_of(self, expert: int) -> int:
        """The EP rank that owns global `expert`."""
        return expert // self.num_local_experts

    def describe(self) -> str:
        """One line for the report: "ep 4 x efsdp 2 x replicas 1 (8 ranks)"."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return f"ep {self.ep_size} x efsdp {self.efsdp_size} x replicas {self.dp_replicate_size} ({ranks})"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
