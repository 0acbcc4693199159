"""Where experts lie on ranks."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.distributed import DistributedConfig
from transformers.distributed.utils import initialize_distributed_mesh

from hf_moe_accel.topology import ExpertTopology

SIZES = [
    # world size, experts, ep, replicas
    (1, 8, 1, 1),
    (8, 8, 2, 2),
    (8, 64, 8, 1),
    (16, 24, 4, 2),
    (6, 60, 3, 1),
]


def test_the_layout_of_the_module_docstring() -> None:
    topology = ExpertTopology(world_size=8, num_experts=8, ep_size=2, dp_replicate_size=2)
    assert (topology.fsdp_size, topology.efsdp_size, topology.num_local_experts) == (4, 2, 4)
    assert [topology.ep_rank(rank) for rank in range(8)] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [topology.owner_of(expert) for expert in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(("world_size", "num_experts", "ep_size", "dp_replicate_size"), SIZES)
def test_every_ep_group_holds_every_expert_once(
    world_size: int, num_experts: int, ep_size: int, dp_replicate_size: int
) -> None:
    topology = ExpertTopology(world_size, num_experts, ep_size, dp_replicate_size)
    owners = [topology.owner_of(expert) for expert in range(num_experts)]
    assert owners == sorted(owners)
    assert [owners.count(rank) for rank in range(ep_size)] == [topology.num_local_experts] * ep_size
    assert topology.ep_size * topology.efsdp_size * topology.dp_replicate_size == world_size


@pytest.mark.parametrize(("world_size", "num_experts", "ep_size", "dp_replicate_size"), SIZES[1:])
def test_ranks_lie_as_on_the_expert_mesh_of_transformers(
    world_size: int, num_experts: int, ep_size: int, dp_replicate_size: int
) -> None:
    topology = ExpertTopology(world_size, num_experts, ep_size, dp_replicate_size)
    config = DistributedConfig(fsdp_size=topology.fsdp_size, dp_replicate_size=dp_replicate_size, ep_size=ep_size)
    for rank in (0, 1, world_size - 1):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            _, mesh = initialize_distributed_mesh(config)
            assert mesh.get_mesh("ep").get_local_rank() == topology.ep_rank(rank)
            assert mesh.get_mesh("ep").size() == topology.ep_size
            assert mesh.get_mesh("efsdp").size() == topology.efsdp_size
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize(
    ("world_size", "ranks_per_node", "num_experts", "dp_replicate_size", "expected"),
    [
        (1, 1, 8, 1, 1),
        (2, 2, 8, 1, 2),
        (8, 8, 8, 1, 8),
        (8, 8, 60, 1, 4),  # 8 does not divide the experts
        (8, 8, 7, 1, 1),
        (16, 8, 128, 1, 8),  # tokens never leave a node
        (16, 8, 128, 2, 8),
        (8, 8, 128, 4, 2),  # an EP group lies within a replica
        (6, 6, 64, 1, 2),
        (12, 4, 8, 1, 4),
    ],
)
def test_auto_is_the_largest_that_fits(
    world_size: int, ranks_per_node: int, num_experts: int, dp_replicate_size: int, expected: int
) -> None:
    topology = ExpertTopology.choose(
        "auto",
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        num_experts=num_experts,
        dp_replicate_size=dp_replicate_size,
    )
    assert topology.ep_size == expected


def test_a_size_that_was_written_is_taken() -> None:
    chosen = ExpertTopology.choose(2, world_size=16, ranks_per_node=8, num_experts=8)
    assert chosen == ExpertTopology(world_size=16, num_experts=8, ep_size=2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((4, 8, 3), r"ep_size=3 does not divide the 8 experts of this model: use 'auto' or one of \[1, 2, 4\]"),
        ((6, 8, 4), r"ep_size=4 does not divide the 6 ranks.*one of \[1, 2\].*--nproc-per-node=4"),
        ((1, 8, 2), r"ep_size=2 does not divide the 1 ranks.*--nproc-per-node=2"),
        ((8, 8, 8, 2), r"ep_size=8 does not divide the 4 ranks of a replica \(8 ranks / dp_replicate_size=2\)"),
        ((8, 8, 1, 3), r"dp_replicate_size=3 does not divide the 8 ranks of this run: use one of \[1, 2, 4, 8\]"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertTopology(*sizes)


def test_auto_reports_replicas_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="dp_replicate_size=3"):
        ExpertTopology.choose("auto", world_size=8, ranks_per_node=8, num_experts=8, dp_replicate_size=3)


def test_describe() -> None:
    assert ExpertTopology(8, 8, 4, 1).describe() == "ep 4 x efsdp 2 x replicas 1 (8 ranks)"
    assert ExpertTopology(1, 8).describe() == "ep 1 x efsdp 1 x replicas 1 (1 rank)"
