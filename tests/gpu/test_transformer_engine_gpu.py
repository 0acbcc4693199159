"""The `transformer_engine` backends with TransformerEngine itself: in bf16 the same grids as of other backends."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from hf_moe_accel.experts import EXPERT_BACKENDS
from hf_moe_accel.moe.forward import forward
from tests.gpu.test_backends_gpu import host_syncs
from tests.helpers.grids import (
    KINDS,
    ROWS,
    TRANSFORMER_ENGINE,
    Case,
    make_batch,
    make_spec,
    make_weights,
    needed_grads,
)
from tests.helpers.tolerances import assert_close
from tests.unit import test_expert_backends as backend_contract
from tests.unit import test_expert_lora as lora_contract
from tests.unit import test_transformer_engine as contract

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("transformer_engine") is None, reason="TransformerEngine is not installed"),
]

NAME, FP8, FP8_BLOCK = TRANSFORMER_ENGINE
Results = dict[str, Tensor | None]


def in_bf16(cases: list) -> list:
    return [case for case in cases if case.values[0]["dtype"] == torch.bfloat16]


@pytest.fixture(params=[FP8, FP8_BLOCK])
def fp8(request: pytest.FixtureRequest) -> str:
    spec = make_spec(4, **KINDS["gated"])
    reason = EXPERT_BACKENDS.load(request.param).why_not(spec, torch.bfloat16, torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", [[3, 0, 2, 0], [0, 0], [1], [300, 0, 7, 129]])
def test_products(counts: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype == torch.float16:
        monkeypatch.setattr(
            contract, "assert_close", lambda a, b, kind: assert_close(a.bfloat16(), b.bfloat16(), kind)
        )
    contract.check_products(counts, dtype, "cuda")


@pytest.mark.parametrize("case", in_bf16(backend_contract.CASES))
def test_equals_eager(case: Case) -> None:
    backend_contract.check_equals_eager(NAME, case, "cuda")


@pytest.mark.parametrize("case", in_bf16(lora_contract.CASES))
def test_lora_equals_merged_weights(case: Case) -> None:
    lora_contract.check_equals_merged_weights(NAME, case, "cuda")


def check_the_host_waits_once(name: str, kind: str) -> None:
    """In the forward pass, for the numbers of rows."""
    case = {"rows": "ragged", "kind": kind, "adapters": "two", "dtype": torch.bfloat16}
    spec, weights, rows = lora_contract.inputs_of(case, "cuda")
    backend, needs = backend_contract.backend_of(name), needed_grads("all", weights)
    backend.forward(spec, weights, rows)[0]()  # what happens once in a process
    with host_syncs() as syncs:
        result, saved = backend.forward(spec, weights, rows)
        out = result()
    assert len(syncs) == 1, [f"{sync.filename}:{sync.lineno}" for sync in syncs]
    grad_ND = torch.randn_like(out)
    with host_syncs() as syncs:
        grads = backend.backward_rows(spec, weights, rows, saved, grad_ND, needs, need_x=True, need_routing=True)
        backend.backward_weights(spec, weights, rows, grads, needs)
    assert [str(sync) for sync in syncs] == []


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_host_waits_once(kind: str) -> None:
    check_the_host_waits_once(NAME, kind)


def test_the_host_waits_once_with_fp8(fp8: str) -> None:
    check_the_host_waits_once(fp8, "gpt_oss")


def of_the_path(name: str, device: str) -> Results:
    spec = make_spec(lora_contract.NUM_EXPERTS, **KINDS["gated"])
    plain = make_weights(spec, torch.bfloat16)
    weights = lora_contract.leaves_of(
        type(plain).of(None if w is None else w.to(device) for w in plain.flat()), needed_grads("all", plain)
    )
    ((x, ids, routing),) = make_batch("uneven", 1, lora_contract.NUM_EXPERTS, 2, spec.hidden_size)
    x, routing = x.bfloat16().to(device).requires_grad_(), routing.to(device).requires_grad_()
    out = forward(spec, x, ids.to(device), routing, weights, lora_contract.runtime_of(name), 0)
    out.backward(lora_contract.grad_of(out.cpu()).to(device))
    found = {
        "out": out,
        "x": x.grad,
        "routing": routing.grad.bfloat16(),
        "up": weights.up.grad,
        "down": weights.down.grad,
    }
    return {key: value.detach().cpu() for key, value in found.items()}


def test_the_token_path_equals_the_cpu() -> None:
    assert_close(of_the_path(NAME, "cuda"), of_the_path("eager", "cpu"), "backend")


def check_near(actual: Results, expected: Results, key: str) -> float:
    """The distance relative to the length: one product of E4M3 is 0.04 off, one with gradients in E5M2 0.06."""
    distance = float((actual[key].float() - expected[key].float()).norm() / expected[key].float().norm())
    assert actual[key].dtype == expected[key].dtype and distance < 0.2, f"{key}: {distance}"
    return distance


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("rows", ROWS)
def test_fp8_is_near_eager(fp8: str, rows: str, kind: str, transposed: bool) -> None:
    case = KINDS[kind] | {"rows": rows, "transposed": transposed, "dtype": torch.bfloat16}
    case |= {"trained": "all", "rows_need": "x and routing"}
    spec, weights, of_rows = backend_contract.inputs_of(case, "cuda")
    actual = backend_contract.results(backend_contract.backend_of(fp8), spec, weights, of_rows, case)
    expected = backend_contract.oracle(spec, weights, of_rows, case)
    for key, value in expected.items():
        assert (value is None) == (actual[key] is None)
        if key == "routing" and of_rows.weights_R.numel() == 1 and value is not None:
            # A sum that may come out near zero: three standard deviations, of terms that are 0.2 off each.
            of_terms = 0.3 * float(expected["out"].float().norm() / of_rows.weights_R)
            assert abs(float(actual[key]) - float(value)) < 3 * 0.2 * of_terms
        elif value is not None and value.any():
            distance = check_near(actual | {"routing": actual["routing"].bfloat16()}, expected, key)
            assert key != "out" or distance > 0.01, "this was not computed in FP8"
        elif value is not None:
            assert actual[key].shape == value.shape and not actual[key].any()
    for key in ("up", "down"):
        assert not actual[key][of_rows.counts_e == 0].any(), "a gradient without rows"


@pytest.mark.parametrize("adapters", lora_contract.WITH_LORA)
def test_fp8_with_lora_is_near_merged_weights(fp8: str, adapters: str) -> None:
    case = {"rows": "ragged", "kind": "gated", "adapters": adapters, "dtype": torch.bfloat16}
    spec, weights, rows = lora_contract.inputs_of(case, "cuda")
    needs = needed_grads("none", weights)
    actual = lora_contract.results(fp8, spec, weights, rows, needs, "x and routing")
    expert_R = torch.arange(lora_contract.NUM_EXPERTS, device="cuda").repeat_interleave(rows.counts_e)
    expected = lora_contract.reference(spec, weights, rows.x_ND, rows.weights_R, expert_R, rows.row_of_R)
    for key in lora_contract.wanted_of(weights, needs, "x and routing"):
        check_near({key: actual[key].double()}, expected, key)
