"""LoRA on experts equals experts whose weights are `W + scaling * B A`, and costs no more than its thin products."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_moe_accel.dispatch.local import LocalDispatcher
from hf_moe_accel.experts import EXPERT_BACKENDS, grouped_mm
from hf_moe_accel.experts.base import ExpertsSpec, ExpertWeights, Factors, LoraPair, NeededGrads
from hf_moe_accel.moe.forward import forward
from hf_moe_accel.ops.permutation import Dispatched
from hf_moe_accel.runtime import MoERuntime
from hf_moe_accel.topology import ExpertTopology
from tests.helpers.grids import (
    ADAPTERS,
    CPU_BACKENDS,
    HIDDEN,
    KINDS,
    ROWS,
    VENDORS,
    Case,
    add_adapters,
    comparable_on_cpu,
    grid,
    make_batch,
    make_rows,
    make_spec,
    make_weights,
    names_of,
    needed_grads,
    slow,
)
from tests.helpers.tolerances import assert_close

NUM_EXPERTS = 5
ON_ACCELERATORS = [name for name in EXPERT_BACKENDS if name not in ("eager", "padded_bmm", *VENDORS)]
Results = dict[str, Tensor | None]
WITH_LORA = tuple(name for name in ADAPTERS if name != "none")


def comparable(case: Case) -> bool:
    """Rounding to bf16 carries values over the edges of the clamp, where its gradient jumps."""
    return case["kind"] != "gpt_oss" or case["dtype"] in (torch.float32, "fp32")


def grad_of(x: Tensor) -> Tensor:
    """Of the output, small enough for gradients that are sums over rows to be of the order of one."""
    return (0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).to(x)


def merged(weight: Tensor, lora: tuple[LoraPair, ...], is_transposed: bool) -> Tensor:
    """[e, out, in] with the adapters in it."""
    weight = weight.transpose(1, 2) if is_transposed else weight
    return weight + sum(pair.scaling * pair.b @ pair.a for pair in lora)


def reference(
    spec: ExpertsSpec, weights: ExpertWeights, x_ND: Tensor, weights_P: Tensor, expert_P: Tensor, row_P: Tensor
) -> Results:
    """Output and all gradients in fp64, over (row, expert) pairs in any order."""
    leaves = [None if w is None else w.detach().double().requires_grad_() for w in (*weights.flat(), x_ND, weights_P)]
    w, x, routing = ExpertWeights.of(leaves[:-2], weights.scalings), leaves[-2], leaves[-1]
    up, down = (merged(*of, spec.is_transposed) for of in ((w.up, w.up_lora), (w.down, w.down_lora)))
    h = torch.einsum("pk,pmk->pm", x[row_P], up[expert_P])
    y = torch.einsum("pk,pmk->pm", spec.gate(h if w.up_bias is None else h + w.up_bias[expert_P]), down[expert_P])
    y = y if w.down_bias is None else y + w.down_bias[expert_P]
    y = y if spec.post_norm is None else spec.post_norm(y, w.post_norm)
    out = torch.zeros_like(x).index_add(0, row_P, y * routing[:, None])
    names = [*names_of(weights), "x", "routing"]
    present = [(name, leaf) for name, leaf in zip(names, leaves, strict=True) if leaf is not None]
    grads = torch.autograd.grad(out, [leaf for _, leaf in present], grad_of(x_ND).double())
    return {"out": out.detach()} | {name: grad for (name, _), grad in zip(present, grads, strict=True)}


def check(actual: Results, expected: Results, wanted: set[str], rounded_to: torch.dtype) -> None:
    """Exactly the wanted results are there, and equal but for the rounding of products in a dtype."""
    assert {key for key, value in actual.items() if value is not None} == wanted
    for key in wanted:
        found, right = actual[key], expected[key]
        # Sums may cancel, but their rounding errors do not: those are relative to the largest value.
        largest = max(1.0, float(right.abs().max())) if right.numel() else 1.0
        assert_close((found / largest).to(rounded_to), (right / largest).to(rounded_to), "backend", key)


# ---------------------------------------------------------------------------------------------------------------------
# The backends

CASES = grid(
    {
        "rows": ROWS,
        "kind": tuple(KINDS),
        "adapters": WITH_LORA,
        "trained": ("none", "all"),
        "factors": ("ab", "a", "b"),
        "rows_need": ("x and routing", "x", "routing"),
        "dtype": (torch.float32, torch.bfloat16),
    },
    valid=comparable,
)


def inputs_of(case: Case, device: str = "cpu") -> tuple[ExpertsSpec, ExpertWeights, Dispatched]:
    spec = make_spec(NUM_EXPERTS, **KINDS[case["kind"]])
    weights = add_adapters(make_weights(spec, case["dtype"]), spec, case["adapters"], case["dtype"])
    flat = (None if weight is None else weight.to(device) for weight in weights.flat())
    rows = Dispatched(*(tensor.to(device) for tensor in make_rows(case["rows"], NUM_EXPERTS, case["dtype"])))
    return spec, ExpertWeights.of(flat, weights.scalings), rows


def results(
    name: str, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched, needs: NeededGrads, rows_need: str
) -> Results:
    backend = EXPERT_BACKENDS.load(name)()
    result, saved = backend.forward(spec, weights, rows)
    out = result()
    need_x, need_routing = "x" in rows_need, "routing" in rows_need
    grads = backend.backward_rows(
        spec, weights, rows, saved, grad_of(out), needs, need_x=need_x, need_routing=need_routing
    )
    of_weights = backend.backward_weights(spec, weights, rows, grads, needs)
    flat = zip(names_of(weights), of_weights.flat(), strict=True)
    return {"out": out, "x": grads.x_ND, "routing": grads.weights_R} | dict(flat)


def wanted_of(weights: ExpertWeights, needs: NeededGrads, rows_need: str) -> set[str]:
    flat = zip(names_of(weights), needs.flat(), strict=True)
    return {"out", *rows_need.split(" and "), *(name for name, need in flat if need)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_equals_merged_weights(name: str, case: Case) -> None:
    if not comparable_on_cpu(name, case["dtype"]):
        case = case | {"dtype": torch.float32}
    check_equals_merged_weights(name, case, "cpu")


def check_equals_merged_weights(name: str, case: Case, device: str) -> None:
    spec, weights, rows = inputs_of(case, device)
    needs = needed_grads(case["trained"], weights, case["factors"])
    actual = results(name, spec, weights, rows, needs, case["rows_need"])
    expert_R = torch.arange(NUM_EXPERTS, device=device).repeat_interleave(rows.counts_e)
    expected = reference(spec, weights, rows.x_ND, rows.weights_R, expert_R, rows.row_of_R)
    check(actual, expected, wanted_of(weights, needs, case["rows_need"]), case["dtype"])
    for key, weight in zip(names_of(weights), weights.flat(), strict=True):
        if actual[key] is not None:
            assert actual[key].dtype == weight.dtype
            assert key == "post_norm" or not actual[key][rows.counts_e == 0].any(), "a gradient without rows"


@pytest.mark.parametrize("adapters", WITH_LORA)
def test_clamped_gates_equal_eager_in_bf16(adapters: str) -> None:
    spec, weights, rows = inputs_of(
        {"rows": "ragged", "kind": "gpt_oss", "adapters": adapters, "dtype": torch.bfloat16}
    )
    needs = needed_grads("none", weights)
    actual, expected = (results(name, spec, weights, rows, needs, "x and routing") for name in ("grouped_mm", "eager"))
    check(actual, expected, wanted_of(weights, needs, "x and routing"), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.bfloat16)])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_adapters_that_are_zero_change_nothing(name: str, kind: str, dtype: torch.dtype) -> None:
    found = []
    for adapters in ("none", "two"):
        spec, weights, rows = inputs_of({"rows": "ragged", "kind": kind, "adapters": adapters, "dtype": dtype})
        for pair in (*weights.up_lora, *weights.down_lora):
            pair.b.zero_()
        found.append(results(name, spec, weights, rows, needed_grads("all", weights), "x and routing"))
    without, with_adapters = found
    present = {key: value for key, value in without.items() if value is not None}
    assert_close({key: with_adapters[key] for key in present}, present, "exact")


@pytest.mark.parametrize("name", [name for name in ON_ACCELERATORS if name != "fused"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_nothing_is_read_back(name: str, kind: str) -> None:
    case = {"rows": "ragged", "kind": kind, "adapters": "two", "dtype": torch.bfloat16}
    # The meta device holds no values: whatever asked for one would raise.
    spec, weights, rows = inputs_of(case, "meta")
    results(name, spec, weights, rows, needed_grads("all", weights), "x and routing")


@pytest.mark.parametrize("adapters", WITH_LORA)
@pytest.mark.parametrize("factors", ["", "a", "b", "ab"])
def test_frozen_parameters_cost_no_products(factors: str, adapters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    outer = grouped_mm.grouped_outer

    def spy(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        shapes.append((a.size(1), b.size(1)))
        return outer(a, b, ends)

    monkeypatch.setattr(grouped_mm, "grouped_outer", spy)
    spec, weights, rows = inputs_of({"rows": "ragged", "kind": "gated", "adapters": adapters, "dtype": torch.float32})
    results("grouped_mm", spec, weights, rows, needed_grads("none", weights, factors), "x and routing")
    assert len(shapes) == len(factors) * len((*weights.up_lora, *weights.down_lora))
    largest_rank = 16
    assert all(min(shape) <= largest_rank for shape in shapes)


def tanh_gate(h: Tensor) -> Tensor:
    """No formula of `ops/gates`."""
    gate, up = h.chunk(2, dim=-1)
    return torch.tanh(gate) * up


@pytest.mark.parametrize("name", [name for name in CPU_BACKENDS if name != "eager"])
@pytest.mark.parametrize(("gate", "ranks"), [(None, (48, 16)), (None, (16, 48)), (tanh_gate, (16, 16))])
def test_what_fused_kernels_do_not_take(name: str, gate: Any, ranks: tuple[int, int]) -> None:
    """Products of a high rank, and gates that they do not know."""
    spec, weights, rows = inputs_of({"rows": "ragged", "kind": "gated", "adapters": "both", "dtype": torch.float32})
    spec = spec if gate is None else replace(spec, gate=gate)
    generator = torch.Generator().manual_seed(5)

    def pair(rank: int, into: int, out: int) -> tuple[LoraPair]:
        a, b = (
            (into * rank) ** -0.25 * torch.randn(NUM_EXPERTS, *shape, generator=generator)
            for shape in ((rank, into), (out, rank))
        )
        return (LoraPair(a, b, 0.5),)

    weights = weights._replace(
        up_lora=pair(ranks[0], spec.hidden_size, spec.pre_activation_size),
        down_lora=pair(ranks[1], spec.intermediate_size, spec.hidden_size),
    )
    needs = needed_grads("none", weights)
    actual = results(name, spec, weights, rows, needs, "x and routing")
    expert_R = torch.arange(NUM_EXPERTS).repeat_interleave(rows.counts_e)
    expected = reference(spec, weights, rows.x_ND, rows.weights_R, expert_R, rows.row_of_R)
    check(actual, expected, wanted_of(weights, needs, "x and routing"), torch.float32)


def test_one_adapter_of_two_trains() -> None:
    spec, weights, rows = inputs_of({"rows": "ragged", "kind": "gated", "adapters": "two", "dtype": torch.float32})
    needs = needed_grads("none", weights)
    frozen = Factors(False, False)
    first = needs._replace(up_lora=(needs.up_lora[0], frozen), down_lora=(needs.down_lora[0], frozen))
    found, both = (results("grouped_mm", spec, weights, rows, n, "x and routing") for n in (first, needs))
    wanted = wanted_of(weights, first, "x and routing")
    assert {key for key in wanted if ".1." in key} == set()
    check(found, both, wanted, torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# The token path

DTYPES = {  # of the base weights, of the factors, of the products
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp32 factors on bf16": (torch.bfloat16, torch.float32, torch.bfloat16),
    "fp32 under autocast": (torch.float32, torch.float32, torch.bfloat16),
}
PATH_CASES = grid(
    {
        "tokens": ("uneven", "one on a rank", "none at all", "twice"),
        "top_k": (1, 3),
        "kind": tuple(KINDS),
        "adapters": WITH_LORA,
        "trained": ("none", "all"),
        "factors": ("ab", "b"),
        "backend": CPU_BACKENDS,
        "dtype": tuple(DTYPES),
    },
    valid=lambda case: comparable(case) and comparable_on_cpu(case["backend"], case["dtype"]),
)


def leaves_of(weights: ExpertWeights, needs: NeededGrads) -> ExpertWeights:
    flat = zip(weights.flat(), needs.flat(), strict=True)
    return ExpertWeights.of(
        (None if w is None else w.detach().clone().requires_grad_(need) for w, need in flat), weights.scalings
    )


def check_token_path(name: str, kind: str) -> None:
    """The token path with a backend equals the one with eager, forward and backward."""
    found = []
    for backend in (name, "eager"):
        spec = make_spec(NUM_EXPERTS, **KINDS[kind])
        plain = make_weights(spec)
        weights = leaves_of(plain, needed_grads("all", plain))
        ((x, ids, routing),) = make_batch("uneven", 1, NUM_EXPERTS, 2, HIDDEN)
        x, routing = x.requires_grad_(), routing.requires_grad_()
        out = forward(spec, x, ids, routing, weights, runtime_of(backend), 0)
        out.backward(grad_of(out))
        grads = {str(i): w.grad for i, w in enumerate(weights.flat()) if w is not None}
        found.append({"out": out.detach(), "x": x.grad, "routing": routing.grad} | grads)
    assert_close(*found, "backend")


def runtime_of(backend: str) -> Any:
    topology = ExpertTopology(1, NUM_EXPERTS)
    return MoERuntime(topology, LocalDispatcher(), EXPERT_BACKENDS.load(backend)(), [NUM_EXPERTS], 60.0)


@pytest.mark.parametrize("case", PATH_CASES)
def test_the_token_path_equals_merged_weights(case: Case) -> None:
    stored, of_factors, computed = DTYPES[case["dtype"]]
    spec = make_spec(NUM_EXPERTS, **KINDS[case["kind"]])
    weights = add_adapters(make_weights(spec, stored), spec, case["adapters"], of_factors)
    needs = needed_grads(case["trained"], weights, case["factors"])
    weights = leaves_of(weights, needs)
    ((x, ids, routing),) = make_batch(case["tokens"], 1, NUM_EXPERTS, case["top_k"], HIDDEN)
    ids[ids == 1] = 0  # an expert without rows
    x, routing = x.to(stored).requires_grad_(), routing.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in case["dtype"]):
        out = forward(spec, x, ids, routing, weights, runtime_of(case["backend"]), 0)
    out.backward(grad_of(out))
    names = names_of(weights)
    of_weights = {key: None if w is None else w.grad for key, w in zip(names, weights.flat(), strict=True)}
    assert out.dtype == stored
    assert all(of_weights[key] is None or not of_weights[key][1].any() for key in names if key != "post_norm")
    row_P = torch.arange(ids.size(0)).repeat_interleave(ids.size(1))
    expected = reference(spec, weights, x, routing.reshape(-1), ids.reshape(-1), row_P)
    actual = {"out": out.detach(), "x": x.grad, "routing": routing.grad.reshape(-1)} | of_weights
    check(actual, expected, wanted_of(weights, needs, "x and routing"), computed)


def bytes_kept(adapters: str) -> int:
    """For the backward pass, each storage once, without the parameters."""
    spec = make_spec(NUM_EXPERTS, **KINDS["gated"])
    weights = add_adapters(make_weights(spec, torch.bfloat16), spec, adapters)
    weights = leaves_of(weights, needed_grads("none", weights))
    ((x, ids, routing),) = make_batch("even", 1, NUM_EXPERTS, 3, HIDDEN)
    x.requires_grad_()
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward(spec, x.bfloat16(), ids, routing, weights, runtime_of("grouped_mm"), 0)
    own = {w.untyped_storage().data_ptr() for w in weights.flat() if w is not None}
    assert own <= storages.keys() and out.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.mark.parametrize(("adapters", "ranks"), [("up", 8), ("down", 16), ("both", 16 + 8), ("two", 24 + 24)])
def test_only_the_thin_products_are_kept_as_well(adapters: str, ranks: int) -> None:
    """`ranks`: in all, padded to rows of a multiple of 16 bytes."""
    num_pairs, bytes_of_bf16 = 6 * 3, 2
    assert bytes_kept(adapters) - bytes_kept("none") == num_pairs * ranks * bytes_of_bf16
