"""Counting the choices of the routers."""

from __future__ import annotations

import pytest
import torch

from hf_moe_accel.moe.stats import RoutingStats


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_counts_add_up_by_layer_and_expert(dtype: torch.dtype) -> None:
    stats = RoutingStats(num_layers=3, num_experts=4)
    stats.add(0, torch.tensor([[0, 1], [1, 3]], dtype=dtype))
    stats.add(2, torch.tensor([[3], [3], [3]], dtype=dtype))
    stats.add(0, torch.tensor([[1, 0]], dtype=dtype))
    counts = stats.drain()
    assert counts.tolist() == [[2, 3, 0, 1], [0, 0, 0, 0], [0, 0, 0, 3]]
    assert counts.dtype == torch.int64


def test_drain_begins_anew() -> None:
    stats = RoutingStats(1, 2)
    stats.add(0, torch.tensor([[0, 1]]))
    first = stats.drain()
    stats.add(0, torch.tensor([[1, 1]]))
    assert first.tolist() == [[1, 1]], "what was handed out changes no more"
    assert stats.drain().tolist() == [[0, 2]]
    assert stats.drain().tolist() == [[0, 0]]


def test_nothing_counted_is_zeros() -> None:
    assert RoutingStats(2, 3).drain().tolist() == [[0, 0, 0], [0, 0, 0]]


def test_no_tokens_count_nothing() -> None:
    stats = RoutingStats(1, 2)
    stats.add(0, torch.empty(0, 2, dtype=torch.int64))
    assert stats.drain().tolist() == [[0, 0]]


def test_adding_reads_nothing_back() -> None:
    stats = RoutingStats(1, 4)
    # The meta device holds no values: whatever asked for one would raise.
    stats.add(0, torch.zeros(5, 2, dtype=torch.int64, device="meta"))
    stats.add(0, torch.zeros(5, 2, dtype=torch.int64, device="meta"))
