"""Every dispatcher brings each row once to each rank that needs it, and back; its backward is the exact transpose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_moe_accel.dispatch import DISPATCHERS
from hf_moe_accel.dispatch.base import Pending, TokenDispatcher, Traffic
from hf_moe_accel.ops.permutation import Dispatched, sum_segments
from tests.helpers import deep_ep_double
from tests.helpers.grids import TOKENS, Case, grid, make_batch
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import assert_close

NUM_EXPERTS = 16
# DeepEP is tried as either of its generations, over the double.
NAMES = [name for name in DISPATCHERS if name != "deepep"] + [f"deepep {v}" for v in deep_ep_double.VERSIONS]
# Numbers of ranks that a dispatcher is tried on; the largest runs always.
WORLD_SIZES = {name: (1,) if name == "local" else (2, 4) for name in NAMES}
DISPATCHERS_AND_SIZES = [(name, size) for name in NAMES for size in WORLD_SIZES[name]]
# The least that each generation takes; the others take any. A package of V2 serves narrow rows by V1.
HIDDEN = {"deepep v1": 16, "deepep v2": 256, "deepep": 256, "deepep narrow": 16}
AXES = {
    "tokens": TOKENS,
    "top_k": (1, 2, 4),
    "chunks": (1, 2, 3),
    # Sums of small integers and powers of two are exact in both dtypes; those of random numbers are not.
    "values": ("exact fp32", "exact bf16", "random fp32"),
    "ids": (torch.int64, torch.int32),
}
CASES = grid(AXES)
BF16_CASES = grid(AXES | {"values": ("exact bf16",)})


def cases_of(name: str) -> list[Any]:
    return BF16_CASES if name.startswith("deepep") else CASES


def make_dispatcher(name: str) -> TokenDispatcher:
    make: Any = DISPATCHERS.load(name.split()[0])
    traffic = Traffic(
        hidden=HIDDEN.get(name, 8),
        num_experts=NUM_EXPERTS,
        top_k=None,
        dtype=torch.bfloat16,
        ep_size=dist.get_world_size() if dist.is_initialized() else 1,
        ranks_per_node=8,
        device=torch.device("cpu"),
    )
    return make.create(dist.group.WORLD if dist.is_initialized() else None, traffic)


@contextmanager
def opened(name: str) -> Iterator[TokenDispatcher]:
    """The dispatcher of a name: "deepep v1" and "deepep v2" stand on the double, other names on what is installed."""
    _, _, version = name.partition(" ")
    if version not in deep_ep_double.VERSIONS:
        dispatcher = make_dispatcher(name)
        yield dispatcher
        dispatcher.close()
        return
    with deep_ep_double.installed(version):
        dispatcher = make_dispatcher(name)
        yield dispatcher
        dispatcher.close()


def factor_of_expert() -> Tensor:
    """[E] what expert e multiplies its rows by: experts that are 1, 2, 4 or 8 apart have different ones."""
    expert = torch.arange(NUM_EXPERTS)
    return ((expert + expert // 4) % 4 + 1).float()


def batch_of(name: str, case: Case, world_size: int, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    exact, hidden = case["values"].startswith("exact"), HIDDEN.get(name, 8)
    return make_batch(case["tokens"], world_size, NUM_EXPERTS, case["top_k"], hidden, exact=exact, seed=seed)


def compute(rows: Dispatched, factor_e: Tensor) -> Tensor:
    """Experts that multiply by a number, as a backend would: gather, weight, sum by row."""
    factor_R = rows.weights_R * factor_e.to(rows.weights_R.device).repeat_interleave(rows.counts_e)
    y_RD = rows.x_ND.index_select(0, rows.row_of_R) * factor_R[:, None].to(rows.x_ND.dtype)
    return sum_segments(y_RD, rows.r_of_P, rows.start_of_N)


def compute_backward(rows: Dispatched, factor_e: Tensor, grad_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `compute` by x_ND and by weights_R."""
    grad_RD = grad_ND.index_select(0, rows.row_of_R)
    x_RD = rows.x_ND.index_select(0, rows.row_of_R)
    factor_R = factor_e.to(grad_ND.device).repeat_interleave(rows.counts_e)
    grad_x_RD = grad_RD * (rows.weights_R * factor_R)[:, None].to(grad_RD.dtype)
    grad_weights_R = (grad_RD.float() * x_RD.float()).sum(1) * factor_R
    return sum_segments(grad_x_RD, rows.r_of_P, rows.start_of_N), grad_weights_R


def inner(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def check_rows(rows: Dispatched, batch: list[Any], chunks: int, chunk: int, rank: int, local: int) -> None:
    """`rows` are all that the experts of this rank need of a chunk, once, and nothing else."""
    needed, pairs = 0, [[] for _ in range(local)]
    for x_TD, ids_TK, weights_TK in batch:
        parts = (tensor.tensor_split(chunks)[chunk].tolist() for tensor in (x_TD, ids_TK, weights_TK))
        for x, ids, weights in zip(*parts, strict=True):
            mine = [(expert % local, w) for expert, w in zip(ids, weights, strict=True) if expert // local == rank]
            needed += bool(mine)
            for expert, weight in mine:
                pairs[expert].append((*x, weight))
    assert rows.x_ND.size(0) == needed, "a row comes once to a rank, whatever the number of its experts there"
    assert rows.counts_e.tolist() == [len(of_expert) for of_expert in pairs]
    assert rows.weights_R.dtype == torch.float32
    found_RD = torch.cat([rows.x_ND[rows.row_of_R].float(), rows.weights_R[:, None]], dim=1)
    for expert, found in enumerate(found_RD.split(rows.counts_e.tolist())):
        assert sorted(map(tuple, found.tolist())) == sorted(pairs[expert])
    for row in rows.row_of_R.split(rows.counts_e.tolist()):
        assert row.tolist() == sorted(row.tolist())
    assert rows.row_of_R[rows.r_of_P].tolist() == sorted(rows.row_of_R.tolist())
    starts = torch.searchsorted(rows.row_of_R[rows.r_of_P].contiguous(), torch.arange(needed, device=rows.x_ND.device))
    assert torch.equal(rows.start_of_N, starts)


def exchange(name: str, case: Case, device: str = "cpu") -> dict[str, Any]:
    """What this rank gets back, forward and backward, and inner products for the test of the transposes."""
    with opened(name) as dispatcher:
        return exchange_with(dispatcher, name, case, device)


def exchange_with(dispatcher: TokenDispatcher, name: str, case: Case, device: str) -> dict[str, Any]:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    dtype = torch.bfloat16 if case["values"] == "exact bf16" else torch.float32
    local, chunks = NUM_EXPERTS // world_size, case["chunks"]
    batch = batch_of(name, case, world_size)
    x, ids, weights = (tensor.to(device) for tensor in batch[rank])
    x, weights = x.to(dtype), weights.to(dtype)
    grad = gradient_of(x)
    factor_e = factor_of_expert()[rank * local : (rank + 1) * local]

    def each_chunk(launch: Any) -> list[Any]:
        if chunks == 2:
            return [launch(i).wait() for i in range(chunks)]
        return [pending.wait() for pending in [launch(i) for i in range(chunks)]]  # all under way at once

    plan = dispatcher.plan(ids.to(case["ids"]), NUM_EXPERTS, chunks)
    rows = each_chunk(lambda i: dispatcher.dispatch(x, weights, plan, i))
    for i in range(chunks):
        assert rows[i].x_ND.dtype == dtype
        check_rows(rows[i], batch, chunks, i, rank, local)
    y = [compute(rows[i], factor_e) for i in range(chunks)]
    out = each_chunk(lambda i: dispatcher.combine(y[i], plan, i))
    grad_y = each_chunk(lambda i: dispatcher.combine_backward(grad, plan, i))
    grads = [compute_backward(rows[i], factor_e, grad_y[i]) for i in range(chunks)]
    back = each_chunk(lambda i: dispatcher.dispatch_backward(*grads[i], plan, i, rows[i]))
    out_TD, grad_x, grad_weights = torch.cat(out), *(torch.cat(parts) for parts in zip(*back, strict=True))
    assert grad_weights.dtype == torch.float32

    # Any cotangents, not only those that these experts make.
    any_x = [gradient_of(rows[i].x_ND, seed=2 + rank) for i in range(chunks)]
    any_weights = [gradient_of(rows[i].weights_R, seed=3 + rank) for i in range(chunks)]
    back = each_chunk(lambda i: dispatcher.dispatch_backward(any_x[i], any_weights[i], plan, i, rows[i]))
    any_grad_x, any_grad_weights = (torch.cat(parts) for parts in zip(*back, strict=True))
    transposes = {
        "x": (sum(inner(rows[i].x_ND, any_x[i]) for i in range(chunks)), inner(x, any_grad_x)),
        "weights": (
            sum(inner(rows[i].weights_R, any_weights[i]) for i in range(chunks)),
            inner(weights, any_grad_weights),
        ),
        "out": (inner(out_TD, grad), sum(inner(y[i], grad_y[i]) for i in range(chunks))),
    }
    only_x = each_chunk(lambda i: dispatcher.dispatch_backward(any_x[i], None, plan, i, rows[i]))
    only_weights = each_chunk(lambda i: dispatcher.dispatch_backward(None, any_weights[i], plan, i, rows[i]))
    neither = each_chunk(lambda i: dispatcher.dispatch_backward(None, None, plan, i, rows[i]))
    assert all(w is None for _, w in only_x) and torch.equal(torch.cat([x for x, _ in only_x]), any_grad_x)
    assert all(x is None for x, _ in only_weights)
    assert torch.equal(torch.cat([w for _, w in only_weights]), any_grad_weights)
    assert neither == [(None, None)] * chunks
    return {"out": out_TD, "grad_x": grad_x, "grad_weights": grad_weights, "transposes": transposes}


def gradient_of(tensor: Tensor, seed: int = 1) -> Tensor:
    """Small integers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, tensor.shape, generator=generator).to(tensor)


def check(name: str, world_size: int, case: Case, results: list[dict[str, Any]]) -> None:
    """Compare what the ranks got with the weighted sum over a token's experts, differentiated in fp64."""
    kind = "dispatch" if case["values"] == "random fp32" else "exact"
    for (x, ids, weights), result in zip(batch_of(name, case, world_size), results, strict=True):
        dtype = result["out"].dtype
        x, weights = x.double().requires_grad_(), weights.double().requires_grad_()
        out = x * (weights * factor_of_expert().double()[ids]).sum(1, keepdim=True)
        grad_x, grad_weights = torch.autograd.grad(out, (x, weights), gradient_of(x.detach()))
        expected = {"out": out.to(dtype), "grad_x": grad_x.to(dtype), "grad_weights": grad_weights.float()}
        assert_close({key: result[key] for key in expected}, expected, kind)
    for key in results[0]["transposes"]:
        left, right = (sum(result["transposes"][key][side] for result in results) for side in (0, 1))
        assert left == right if kind == "exact" else abs(left - right) < 1e-4, key


@pytest.mark.parametrize(
    ("name", "world_size", "case"),
    [
        pytest.param(name, size, *case.values, id=f"{name}-{size}-{case.id}", marks=case.marks or marks)
        for name, size in DISPATCHERS_AND_SIZES
        for marks in [() if size == max(WORLD_SIZES[name]) else pytest.mark.slow]
        for case in cases_of(name)
    ],
)
def test_dispatch_and_combine_are_the_weighted_sum(name: str, world_size: int, case: Case) -> None:
    check(name, world_size, case, run_ranks(exchange, world_size, name, case))


def sum_over_ranks(name: str, expanded: bool) -> Tensor:
    rank = dist.get_rank() if dist.is_initialized() else 0
    # Autograd gives such a gradient to a parameter that it knows through its sum alone.
    gradient = torch.tensor(1.0 + rank).expand(100) if expanded else torch.arange(100.0) + rank
    with opened(name) as dispatcher:
        return dispatcher.sum_over_ep(gradient)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize(("name", "world_size"), DISPATCHERS_AND_SIZES)
def test_sum_over_ep(name: str, world_size: int, expanded: bool) -> None:
    one = torch.ones(100) if expanded else torch.arange(100.0)
    expected = world_size * one + sum(range(world_size))
    assert_close(run_ranks(sum_over_ranks, world_size, name, expanded), [expected] * world_size, "exact")


@pytest.mark.parametrize("chunks", [1, 3])
# DeepEP does not read a tensor back: its host waits in the vendor's calls, which the double records.
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("deepep")])
def test_the_plan_reads_back_once_and_nothing_else_does(
    name: str, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ep_size = 1 if name == "local" else 4
    reads = []

    def tolist(tensor: Tensor) -> Any:
        reads.append(tensor)
        ones: Any = 1
        for size in reversed(tensor.shape):
            ones = [ones] * size
        return ones

    # The meta device holds no values: whatever asked for one would raise, but for this.
    monkeypatch.setattr(Tensor, "tolist", tolist)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ep_size)
    try:
        dispatcher = make_dispatcher(name)
        x, weights = (torch.empty(9, size, device="meta") for size in (8, 2))
        plan = dispatcher.plan(torch.empty(9, 2, dtype=torch.int64, device="meta"), NUM_EXPERTS, chunks)
        assert len(reads) == (0 if name == "local" else 1)
        for i in range(chunks):
            rows = dispatcher.dispatch(x, weights, plan, i).wait()
            dispatcher.combine(rows.x_ND, plan, i).wait()
            grad_ND = dispatcher.combine_backward(x, plan, i).wait()
            dispatcher.dispatch_backward(grad_ND, rows.weights_R, plan, i, rows).wait()
        assert len(reads) == (0 if name == "local" else 1)
    finally:
        dist.destroy_process_group()


def test_a_result_is_waited_for_once() -> None:
    finished = []
    pending = Pending(lambda: finished.append(1) or "result")
    assert finished == [], "launch is never wait"
    assert pending.wait() == "result"
    with pytest.raises(AssertionError, match="waited for twice"):
        pending.wait()
    assert Pending.done(3).wait() == 3
