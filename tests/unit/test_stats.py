"""Counting the choices of the routers, and what experts compute."""

from __future__ import annotations

import pytest
import torch

from hf_moe_accel.moe.stats import RoutingStats
from hf_moe_accel.ops.permutation import Dispatched, order_by_expert


def rows_for(experts: list[int], num_rows: int, num_experts: int) -> Dispatched:
    """Pairs of `num_rows` rows, spread over them in order."""
    rows = torch.arange(len(experts)) * num_rows // max(len(experts), 1)
    starts = torch.searchsorted(rows, torch.arange(num_rows))
    pairs = torch.tensor(experts, dtype=torch.int64)
    return order_by_expert(torch.zeros(num_rows, 3), pairs, rows, torch.ones(len(experts)), starts, num_experts)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_counts_add_up_by_layer_and_expert(dtype: torch.dtype) -> None:
    stats = RoutingStats(num_layers=3, num_experts=4)
    stats.add(0, torch.tensor([[0, 1], [1, 3]], dtype=dtype))
    stats.add(2, torch.tensor([[3], [3], [3]], dtype=dtype))
    stats.add(0, torch.tensor([[1, 0]], dtype=dtype))
    counts = stats.take().choices_LE
    assert counts.tolist() == [[2, 3, 0, 1], [0, 0, 0, 0], [0, 0, 0, 3]]
    assert counts.dtype == torch.int64


def test_taking_begins_anew() -> None:
    stats = RoutingStats(1, 2)
    stats.add(0, torch.tensor([[0, 1]]))
    first = stats.take().choices_LE
    stats.add(0, torch.tensor([[1, 1]]))
    assert first.tolist() == [[1, 1]], "what was handed out changes no more"
    assert stats.take().choices_LE.tolist() == [[0, 2]]
    assert stats.take().choices_LE.tolist() == [[0, 0]]


def test_choices_that_are_counted_already() -> None:
    stats = RoutingStats(2, 4)
    ids = torch.tensor([[0, 1], [1, 2]])
    stats.add(1, ids)
    stats.add(1, ids, torch.tensor([1, 2, 1], dtype=torch.int32))  # a layer of three experts
    taken = stats.take()
    assert taken.choices_LE.tolist() == [[0, 0, 0, 0], [2, 4, 2, 0]] and taken.tokens_L == [0, 4]


def test_repeated_passes_count_on_the_host() -> None:
    stats = RoutingStats(2, 4)
    stats.add(1, torch.tensor([[0, 1], [2, 3], [0, 2]]))
    stats.add_rows(1, [rows_for([0, 1, 1], 2, 2)])
    counted = stats.newest(1)
    stats.add(1, torch.tensor([[0]]))
    stats.take()
    stats.repeat(1, counted)
    stats.repeat(1, counted)
    taken = stats.take()
    assert (taken.tokens_L, taken.received_L, taken.top_k) == ([0, 6], [0, 4], 2)


def test_what_is_uncounted_is_counted_in_the_same_memory() -> None:
    stats = RoutingStats(1, 2)
    ids = torch.tensor([[0, 1], [1, 1]])
    stats.add(0, ids)
    with stats.uncounted():
        stats.add(0, ids)
        stats.add_rows(0, [rows_for([0, 1], 2, 2)])
    taken = stats.take()
    assert taken.choices_LE.tolist() == [[1, 3]] and taken.rows_L.tolist() == [0]
    assert (taken.tokens_L, taken.received_L) == ([2], [0])


def test_nothing_counted_is_zeros() -> None:
    assert RoutingStats(2, 3).take().choices_LE.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_no_tokens_count_nothing() -> None:
    stats = RoutingStats(1, 2)
    stats.add(0, torch.empty(0, 2, dtype=torch.int64))
    assert stats.take().choices_LE.tolist() == [[0, 0]]


def test_adding_reads_nothing_back() -> None:
    stats = RoutingStats(1, 4)
    # The meta device holds no values: whatever asked for one would raise.
    stats.add(0, torch.zeros(5, 2, dtype=torch.int64, device="meta"))
    stats.add(0, torch.zeros(5, 2, dtype=torch.int64, device="meta"))
    taken = stats.take()
    assert taken.choices_LE.is_meta and taken.rows_L.is_meta


def test_rows_and_tokens_add_up_by_layer() -> None:
    stats = RoutingStats(num_layers=2, num_experts=4)
    # This rank has 2 of the 4 experts. Three tokens of its own; four rows reach it, in two chunks.
    stats.add(1, torch.tensor([[0, 1], [2, 3], [0, 2]]))
    stats.add_rows(1, [rows_for([0, 1, 1], 2, 2), rows_for([0, 0], 2, 2)])
    taken = stats.take()
    assert taken.rows_L.tolist() == [0, 5]
    assert (taken.tokens_L, taken.received_L, taken.top_k) == ([0, 3], [0, 4], 2)
    empty = stats.take()
    assert empty.rows_L.tolist() == [0, 0]
    assert (empty.tokens_L, empty.received_L, empty.top_k) == ([0, 0], [0, 0], 0)


def test_experts_without_rows_compute_nothing() -> None:
    stats = RoutingStats(1, 2)
    stats.add(0, torch.tensor([[0, 1]]))
    stats.add_rows(0, [rows_for([], 0, 1)])
    taken = stats.take()
    assert int(taken.choices_LE.sum() - taken.rows_L.sum()) == 2, "what was dropped must show"
