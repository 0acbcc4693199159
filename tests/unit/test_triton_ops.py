"""Triton's kernels against torch, in its interpreter, and the formulas that the gate's kernel knows."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_moe_accel.ops.gates import GateFormula, find_formula
from tests.helpers.grids import ROWS, clamped_gate, make_rows, relu2, silu_gate, slow
from tests.helpers.tolerances import assert_close

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles for the GPU here: see tests/gpu"
)
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Formulas


def glu(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def gate(h: Tensor) -> Tensor:
        g, u = h.chunk(2, dim=-1)
        return act(g) * u

    return gate


def in_fp32(h: Tensor) -> Tensor:
    g, u = h.chunk(2, dim=-1)
    return (nn.functional.silu(g.float()) * u.float()).to(h.dtype)


def limited(h: Tensor) -> Tensor:
    g, u = h.chunk(2, dim=-1)
    return nn.functional.silu(g.clamp(max=10)) * u.clamp(-10, 10)


def clamped_later(h: Tensor) -> Tensor:
    g, u = h.chunk(2, dim=-1)
    return nn.functional.silu(g).clamp(max=7) * u.clamp(-7, 7)


def up_first(h: Tensor) -> Tensor:
    u, g = h.chunk(2, dim=-1)
    return nn.functional.silu(g) * u


KNOWN: dict[str, tuple[Callable[[Tensor], Tensor], GateFormula]] = {
    "silu": (silu_gate, GateFormula("swish", True)),
    "silu in fp32": (in_fp32, GateFormula("swish", True)),
    "silu, limited": (limited, GateFormula("swish", True, limit=10.0)),
    "gelu": (glu(nn.GELU()), GateFormula("gelu", True)),
    "gelu, tanh": (glu(nn.GELU(approximate="tanh")), GateFormula("gelu_tanh", True)),
    "relu": (glu(nn.ReLU()), GateFormula("relu", True)),
    "GPT-OSS": (clamped_gate, GateFormula("swish", True, True, alpha=1.702, limit=1.5, shift=1.0)),
    "no gate, relu2": (relu2, GateFormula("relu2", False)),
    "no gate, silu": (nn.SiLU(), GateFormula("swish", False)),
    "no gate, gelu": (nn.GELU(), GateFormula("gelu", False)),
    "no gate, gelu, tanh": (nn.GELU(approximate="tanh"), GateFormula("gelu_tanh", False)),
}


@pytest.mark.parametrize("name", list(KNOWN))
def test_a_known_gate_is_found(name: str) -> None:
    gate, formula = KNOWN[name]
    found = find_formula(gate, 32 if formula.gated else 16, 16)
    assert found is not None
    # Of an activation without alpha, whatever alpha "swish" would have.
    assert found == (formula if formula.act == "swish" else formula._replace(alpha=found.alpha))


@pytest.mark.parametrize(
    "gate", [clamped_later, up_first, glu(torch.tanh), glu(nn.Mish()), lambda h: h[..., :16] * 0], ids=str
)
def test_any_other_gate_is_not(gate: Callable[[Tensor], Tensor]) -> None:
    assert find_formula(gate, 32, 16) is None


def test_a_gate_that_does_not_run_on_a_cpu_is_not_known() -> None:
    def gate(h: Tensor) -> Tensor:
        raise RuntimeError("Expected all tensors to be on the same device")

    assert find_formula(gate, 32, 16) is None


# ---------------------------------------------------------------------------------------------------------------------
# The gate's kernels


# A tile of rows more than one expert has, an expert without rows, one with a few rows and one with several tiles.
COUNTS = (41, 0, 3, 77)


def check_activation(
    name: str,
    size: int,
    weighted: bool,
    biased: bool,
    dtype: torch.dtype,
    device: str,
    ranks: tuple[int, int] = (0, 0),
) -> None:
    """`ranks`: of the products that are added to the pre-activation and to the gradient of the result."""
    from hf_moe_accel.ops.triton.activation import activate, activate_backward

    formula = KNOWN[name][1]
    num, num_experts, width = sum(COUNTS), len(COUNTS), 2 * size if formula.gated else size
    expert = torch.arange(num_experts).repeat_interleave(torch.tensor(COUNTS)).to(device)
    ends = torch.tensor(COUNTS).cumsum(0).to(device, torch.int32)
    h, grad = draw(num, width, scale=2).to(device, dtype), draw(num, size, seed=1).to(device, dtype)
    weights = torch.rand(num, generator=torch.Generator().manual_seed(2)).to(device) if weighted else None
    bias = draw(num_experts, width, seed=3).to(device, dtype) if biased else None
    products = [
        (draw(num, rank, seed=4 + i).to(device, dtype), draw(num_experts, *shape, scale=rank**-0.5).to(device, dtype))
        if rank
        else None
        for i, (rank, shape) in enumerate(zip(ranks, ((width, ranks[0]), (ranks[1], size)), strict=True))
    ]
    # As they come: of `up` a view of factors that are stored [e, out, r], of the gradient [e, r, in].
    product = None if products[0] is None else (products[0][0], products[0][1].transpose(1, 2))
    out = activate(formula, h, weights, ends, bias_eM=bias, product=product)
    grad_h, grad_weights, again = activate_backward(
        formula, h, weights, ends, grad, bias_eM=bias, product=product, grad_product=products[1]
    )

    def added(rows: Tensor, of: tuple[Tensor, Tensor] | None) -> Tensor:
        if of is None:
            return rows.double()
        return rows.double() + torch.einsum("pr,prm->pm", of[0].double(), of[1].double()[expert])

    # In the dtype's own rounding, for the clamp's edges are sharp, then in fp64.
    full_h = added(h, product)
    full_h = (full_h if bias is None else (full_h.float() + bias.float()[expert]).to(dtype).double()).requires_grad_()
    leaves = [full_h, torch.ones(num, device=device, dtype=torch.float64) if weights is None else weights.double()]
    leaves[1].requires_grad_()
    expected = KNOWN[name][0](leaves[0]) * leaves[1][:, None]
    of_h, of_weights = torch.autograd.grad(expected, leaves, added(grad, products[1]))
    actual = {"out": out, "again": again, "grad h": grad_h}
    right = {"out": expected, "again": expected, "grad h": of_h}
    assert_close(actual, {key: value.to(dtype) for key, value in right.items()}, "backend")
    assert (grad_weights is None) == (weights is None)
    if grad_weights is not None:
        largest = of_weights.abs().max()
        assert_close((grad_weights / largest).to(dtype), (of_weights / largest).to(dtype), "backend")


@interpreted
@pytest.mark.parametrize(("weighted", "biased"), [(True, True), (False, False), *slow((True, False), (False, True))])
@pytest.mark.parametrize("name", list(KNOWN))
def test_activation(name: str, weighted: bool, biased: bool) -> None:
    check_activation(name, 24, weighted, biased, torch.float32, "cpu")


@interpreted
@pytest.mark.parametrize("name", ["silu", "GPT-OSS", "no gate, relu2"])
def test_activation_of_several_tiles(name: str) -> None:
    check_activation(name, 600, True, False, torch.float32, "cpu")


# None, few, what `tl.dot` takes at least, no power of two, and the most.
RANKS = [(4, 0), (0, 8), (16, 20), (32, 32)]


@interpreted
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["silu", "GPT-OSS", "no gate, relu2"])
def test_activation_with_thin_products(name: str, ranks: tuple[int, int]) -> None:
    check_activation(name, 72, True, ranks[0] == 16, torch.float32, "cpu", ranks)


@interpreted
def test_kernels_are_compiled_once_whatever_the_number_of_rows() -> None:
    """Triton tells numbers that are 1 or multiples of 16 apart, unless it is told not to."""
    from hf_moe_accel.ops.triton import activation, rows

    kernels = (activation._forward_kernel, activation._backward_kernel, rows._gather_kernel, rows._sum_kernel)
    for kernel in kernels:
        numbers = {"num_rows", "num_pairs", "num_segments"}.intersection(kernel.arg_names)
        assert numbers and set(kernel.kwargs["do_not_specialize"]) == numbers, kernel


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def check_gather(size: int, weighted: bool, dtype: torch.dtype, device: str) -> None:
    from hf_moe_accel.ops.triton.rows import gather

    x = draw(size, 10).to(device, dtype).t()  # not contiguous
    index = torch.tensor([9, 0, 3, 3, 1, 8, 2], device=device)
    weights = torch.rand(7, generator=torch.Generator().manual_seed(2)).to(device) if weighted else None
    expected = x[index].double() * (1 if weights is None else weights.double()[:, None])
    assert_close(gather(x, index, weights), expected.to(dtype), "dispatch" if weighted else "exact")
    assert gather(x, index[:0]).shape == (0, size)


@interpreted
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [8, 600])
def test_gather(size: int, weighted: bool) -> None:
    check_gather(size, weighted, torch.float32, "cpu")


SUMS = ("alone", "other", "weighted", "bias", "bias and other")


def check_sum(rows: str, what: str, size: int, dtype: torch.dtype, device: str) -> None:
    from hf_moe_accel.ops.triton.rows import sum_segments

    dispatched = make_rows(rows, 5)
    num = dispatched.row_of_R.numel()
    values, other = draw(num, size).to(dtype), draw(num, size, seed=1).to(dtype)
    bias, expert = draw(5, size, seed=2).to(dtype), torch.arange(5).repeat_interleave(dispatched.counts_e)
    weights = dispatched.weights_R
    total = values.double()
    arguments: dict[str, Any] = {}
    if "other" in what:
        arguments["other_RD"], total = other.to(device), total + other.double()
    if "bias" in what:
        arguments["bias"], arguments["weights_R"] = (bias.to(device), expert.to(device)), weights.to(device)
        total = total + weights.double()[:, None] * bias.double()[expert]
    if what == "weighted":
        arguments["weights_R"], total = weights.to(device), total * weights.double()[:, None]
    expected = torch.zeros(dispatched.x_ND.size(0), size, dtype=torch.float64)
    expected.index_add_(0, dispatched.row_of_R, total)
    index, start = dispatched.r_of_P.to(device), dispatched.start_of_N.to(device)
    assert_close(sum_segments(values.to(device), index, start, **arguments).cpu(), expected.to(dtype), "dispatch")
    # A view with a stride, as the local dispatcher hands it over.
    strided = torch.stack([start, start + 1000], 1)[:, 0]
    assert_close(sum_segments(values.to(device), index, strided, **arguments).cpu(), expected.to(dtype), "dispatch")


@interpreted
@pytest.mark.parametrize("what", SUMS)
@pytest.mark.parametrize("rows", ROWS)
def test_sum_segments(rows: str, what: str) -> None:
    check_sum(rows, what, 24, torch.float32, "cpu")


def check_sum_of_long_segments(dtype: torch.dtype, device: str) -> None:
    from hf_moe_accel.ops.triton.rows import sum_segments

    values, counts = draw(500, 200, scale=0.1).to(device, dtype), [0, 333, 1, 166, 0]
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0)[:-1]], device=device)
    weights = torch.rand(500, generator=torch.Generator().manual_seed(2)).to(device)
    for by in (None, weights):
        weighted = values.double() if by is None else values.double() * by.double()[:, None]
        expected = torch.stack([part.sum(0) for part in weighted.split(counts)])
        found = sum_segments(values, None, starts, weights_R=by)
        # 333 rows in fp32: their rounding errors are relative to the largest values on the way.
        assert_close((found / 10).to(dtype), (expected / 10).to(dtype), "backend")


@interpreted
def test_sum_of_long_segments() -> None:
    check_sum_of_long_segments(torch.float32, "cpu")


def check_sum_in_fp32(device: str) -> None:
    from hf_moe_accel.ops.triton.rows import sum_segments

    # In bf16, 256 + 1 is 256; and 1000 is one of its values.
    ones = torch.ones(1000, 2, dtype=torch.bfloat16, device=device)
    index, start = torch.arange(1000, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    assert sum_segments(ones, index, start).tolist() == [[1000, 1000]]


@interpreted
def test_sums_of_bf16_are_in_fp32() -> None:
    check_sum_in_fp32("cpu")
