"""Ordering pairs by expert, summing by row, and finding true entries."""

from __future__ import annotations

import pytest
import torch

from hf_moe_accel.ops.permutation import Dispatched, compact, order_by_expert, sum_segments
from tests.helpers.grids import ROWS, make_rows
from tests.helpers.tolerances import assert_close


def order(expert_of_P: list[int], row_of_P: list[int], start_of_N: list[int], num_experts: int) -> Dispatched:
    """Pairs whose routing weight is their place."""
    weights = torch.arange(len(expert_of_P), dtype=torch.float32)
    return order_by_expert(
        torch.zeros(len(start_of_N), 1),
        torch.tensor(expert_of_P, dtype=torch.int64),
        torch.tensor(row_of_P, dtype=torch.int64),
        weights,
        torch.tensor(start_of_N, dtype=torch.int64),
        num_experts,
    )


def test_an_example_by_hand() -> None:
    # row 0 wants experts 2 and 0, row 1 wants 2, row 2 wants 0 and 3; nobody wants 1.
    rows = order([2, 0, 2, 0, 3], [0, 0, 1, 2, 2], [0, 2, 3], 4)
    assert rows.counts_e.tolist() == [2, 0, 2, 1]
    assert rows.counts_e.dtype == torch.int32
    assert rows.row_of_R.tolist() == [0, 2, 0, 1, 2]
    assert rows.weights_R.tolist() == [1, 3, 0, 2, 4]
    assert rows.r_of_P.tolist() == [2, 0, 3, 1, 4]
    assert rows.start_of_N.tolist() == [0, 2, 3]


@pytest.mark.parametrize("num_experts", [7, 256, 257, 40_000])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_pair_stands_with_its_expert_once(dtype: torch.dtype, num_experts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    num_rows, top_k = 50, 3
    expert_of_P = torch.randint(num_experts, (num_rows * top_k,), generator=generator)
    row_of_P = torch.arange(num_rows).repeat_interleave(top_k)
    weights_P = torch.rand(num_rows * top_k, generator=generator)
    rows = order_by_expert(
        torch.randn(num_rows, 2), expert_of_P.to(dtype), row_of_P, weights_P, torch.arange(0, 150, 3), num_experts
    )
    assert rows.counts_e.tolist() == torch.bincount(expert_of_P, minlength=num_experts).tolist()
    assert sorted(rows.r_of_P.tolist()) == list(range(num_rows * top_k))
    expert_of_R = torch.arange(num_experts).repeat_interleave(rows.counts_e)
    assert torch.equal(expert_of_R[rows.r_of_P], expert_of_P)
    assert torch.equal(rows.row_of_R[rows.r_of_P], row_of_P)
    assert torch.equal(rows.weights_R[rows.r_of_P], weights_P)
    for of_expert in rows.row_of_R.split(rows.counts_e.tolist()):
        assert of_expert.tolist() == sorted(of_expert.tolist())


def test_equal_experts_of_a_row_stay_in_order() -> None:
    assert order([1, 1, 1], [0, 0, 0], [0], 2).weights_R.tolist() == [0, 1, 2]


def test_nothing_to_order() -> None:
    rows = order([], [], [], 3)
    assert rows.counts_e.tolist() == [0, 0, 0]
    assert [t.numel() for t in (rows.row_of_R, rows.weights_R, rows.r_of_P)] == [0, 0, 0]


def check_sum_segments(rows: str, dtype: torch.dtype, device: str) -> None:
    dispatched = Dispatched(*(t.to(device) for t in make_rows(rows, 5)))
    values_RD = torch.randn(dispatched.row_of_R.numel(), 32, generator=torch.Generator().manual_seed(1))
    values_RD = values_RD.to(device, dtype)
    expected_ND = torch.zeros(dispatched.x_ND.shape, dtype=torch.float64, device=device)
    expected_ND.index_add_(0, dispatched.row_of_R, values_RD.double())
    actual_ND = sum_segments(values_RD, dispatched.r_of_P, dispatched.start_of_N)
    assert_close(actual_ND, expected_ND.to(dtype), "dispatch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_sum_segments(rows: str, dtype: torch.dtype) -> None:
    check_sum_segments(rows, dtype, "cpu")


def check_sum_segments_in_fp32(device: str) -> None:
    # In bf16, 256 + 1 is 256.
    ones = torch.ones(1000, 2, dtype=torch.bfloat16, device=device)
    index, start = torch.arange(1000, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    assert sum_segments(ones, index, start).tolist() == [[1000, 1000]]


def test_sum_segments_accumulates_bf16_in_fp32() -> None:
    check_sum_segments_in_fp32("cpu")


@pytest.mark.parametrize("starts", [[0, 0, 2], [0, 2, 2], [0, 2, 5]], ids=["first", "middle", "last"])
def test_an_empty_segment_sums_to_zero(starts: list[int]) -> None:
    values = torch.arange(1.0, 6.0)[:, None]
    ends = [*starts[1:], 5]
    expected = [[float(values[start:end].sum())] for start, end in zip(starts, ends, strict=True)]
    assert 0.0 in sum(expected, [])
    assert sum_segments(values, torch.arange(5), torch.tensor(starts)).tolist() == expected


def test_the_same_value_may_be_summed_twice() -> None:
    values = torch.tensor([[1.0], [10.0]])
    assert sum_segments(values, torch.tensor([1, 1, 0]), torch.tensor([0, 2])).tolist() == [[20.0], [1.0]]


@pytest.mark.parametrize(
    "mask",
    [[True, False, False, True, True, False], [False] * 3, [True] * 3, [False, True], [True, False], []],
    ids=str,
)
def test_compact_is_nonzero_without_a_sync(mask: list[bool]) -> None:
    mask_M = torch.tensor(mask, dtype=torch.bool)
    assert torch.equal(compact(mask_M, sum(mask)), mask_M.nonzero()[:, 0])
