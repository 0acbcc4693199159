"""The `transformer_engine` backend equals eager, with a double of the vendor's product; the same grids as of others.

tests/gpu/test_transformer_engine_gpu.py has the vendor itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_moe_accel.experts import EXPERT_BACKENDS
from hf_moe_accel.experts.base import ExpertWeights
from hf_moe_accel.experts.fused import FusedBackend
from hf_moe_accel.ops import transformer_engine as library
from tests.helpers import transformer_engine_double as double
from tests.helpers.grids import (
    INTERMEDIATE,
    KINDS,
    ROWS,
    TRAINED,
    TRANSFORMER_ENGINE,
    Case,
    grid,
    make_rows,
    make_spec,
)
from tests.helpers.tolerances import assert_close
from tests.helpers.vendors import why_not_without_it
from tests.unit import test_expert_backends as backend_contract
from tests.unit import test_expert_lora as lora_contract
from tests.unit.test_triton_ops import interpreted

NAME, FP8, FP8_BLOCK = TRANSFORMER_ENGINE
E4M3, E5M2 = double.DType
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# In fp32: of bf16, Triton's interpreter cuts digits off.
CASES = grid(
    {
        "name": TRANSFORMER_ENGINE,
        "rows": tuple(rows for rows in ROWS if rows != "top-1"),
        "gate": backend_contract.GATES,
        "trained": ("all", "none", "projections"),
        "rows_need": ("x and routing", "routing"),
        "transposed": (False, True),
        "bias": (False, True),
        "post_norm": (False, True),
        "dtype": (torch.float32,),
    }
)
LORA_CASES = grid(
    {
        "name": (NAME, FP8),
        "rows": ("ragged", "some experts", "no row"),
        "kind": tuple(KINDS),
        "adapters": ("both", "two"),
        "trained": ("none", "all"),
        "factors": ("ab", "b"),
        "rows_need": ("x and routing",),
        "dtype": (torch.float32,),
    }
)


@pytest.fixture
def calls() -> Iterator[list[double.Call]]:
    with double.installed() as calls:
        yield calls


# ---------------------------------------------------------------------------------------------------------------------
# The backend


@interpreted
@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("case", CASES)
def test_equals_eager(case: Case) -> None:
    backend_contract.check_equals_eager(case["name"], case, "cpu")


@interpreted
@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("case", LORA_CASES)
def test_lora_equals_merged_weights(case: Case) -> None:
    lora_contract.check_equals_merged_weights(case["name"], case, "cpu")


@interpreted
@pytest.mark.parametrize(("trained", "products"), [("vectors", 0), ("up", 1), ("projections", 2)])
def test_frozen_weights_cost_no_products(trained: str, products: int, calls: list[double.Call]) -> None:
    case = {"rows": "one row", "gate": "clamped", "transposed": True, "bias": True, "post_norm": False}
    case |= {"dtype": torch.float32, "trained": trained, "rows_need": "x and routing"}
    found = backend_contract.results(backend_contract.backend_of(NAME), *backend_contract.inputs_of(case, "cpu"), case)
    assert [call.layout for call in calls].count("NT") == products
    trains = TRAINED[trained]._asdict()
    assert all((found[key] is not None) == (trains[key] and key != "post_norm") for key in ExpertWeights._fields[:5])


@interpreted
@pytest.mark.parametrize("transposed", [False, True])
def test_parameters_and_their_gradients_are_not_copied(transposed: bool, calls: list[double.Call]) -> None:
    case = {"rows": "some experts", "gate": "silu", "transposed": transposed, "bias": False, "post_norm": False}
    case |= {"dtype": torch.float32, "trained": "all", "rows_need": "x and routing"}
    spec, weights, rows = backend_contract.inputs_of(case, "cpu")
    found = backend_contract.results(backend_contract.backend_of(NAME), spec, weights, rows, case)
    up, down = weights.up.data_ptr(), weights.down.data_ptr()
    of_rows, of_weights = calls[:4], calls[4:]
    stored = ("NN", "TN") if transposed else ("TN", "NN")
    assert [(call.first, call.layout) for call in of_rows] == [
        (up, stored[0]),
        (down, stored[0]),
        (down, stored[1]),
        (up, stored[1]),
    ]
    assert [call.out for call in of_weights] == [found["up"].data_ptr(), found["down"].data_ptr()]


@interpreted
@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("name", [NAME, FP8])
def test_the_token_path_takes_it(name: str) -> None:
    """Counts of rows on the host pass from forward to backward among autograd's saved tensors."""
    lora_contract.check_token_path(name, "gpt_oss")


def test_auto_never_takes_it() -> None:
    names = list(EXPERT_BACKENDS)
    assert set(names[names.index("eager") + 1 :]) == set(TRANSFORMER_ENGINE), "eager serves everything"


@interpreted
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", [FP8, FP8_BLOCK])
def test_formats(name: str, transposed: bool, calls: list[double.Call]) -> None:
    """Those of TransformerEngine's recipes."""
    case = {"rows": "one row", "gate": "silu", "transposed": transposed, "bias": False, "post_norm": False}
    case |= {"dtype": torch.float32, "trained": "all", "rows_need": "x and routing"}
    backend_contract.results(backend_contract.backend_of(name), *backend_contract.inputs_of(case, "cpu"), case)
    if name == FP8:
        weight, rows, grads = (double.Format(dtype, None) for dtype in (E4M3, E4M3, E5M2))
    else:
        weight, rows, grads = (double.Format(E4M3, dims) for dims in (2, 1, 1))
    of_weights = (grads, rows) if transposed else (rows, grads)
    assert [call.formats for call in calls] == [(weight, rows)] * 2 + [(weight, grads)] * 2 + [of_weights] * 2
    assert [call.split_accumulator for call in calls] == [name == FP8_BLOCK] * 2 + [True] * 4


@interpreted
@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("rows", ROWS)
def test_padded_rows_repeat_the_last_one_and_weigh_nothing(rows: str) -> None:
    given = make_rows(rows, lora_contract.NUM_EXPERTS)
    backend = backend_contract.backend_of(FP8)
    padded, (ends_e, counts_e) = backend._arrange(given)
    assert counts_e.tolist() == [-(-count // 16) * 16 for count in given.counts_e.tolist()]
    assert ends_e.tolist() == counts_e.cumsum(0).tolist() and padded.counts_e.tolist() == counts_e.tolist()
    by_expert = given.counts_e.tolist(), counts_e.tolist()
    of_rows, of_slots = (r.split(n) for r, n in zip((given.row_of_R, padded.row_of_R), by_expert, strict=True))
    weights, of_weights = (r.split(n) for r, n in zip((given.weights_R, padded.weights_R), by_expert, strict=True))
    for i, count in enumerate(given.counts_e.tolist()):
        assert torch.equal(of_slots[i][:count], of_rows[i]) and torch.equal(of_weights[i][:count], weights[i])
        assert (of_slots[i][count:] == of_rows[i][-1:]).all() and not of_weights[i][count:].any()
    assert torch.equal(padded.row_of_R[padded.r_of_P], given.row_of_R[given.r_of_P])


# ---------------------------------------------------------------------------------------------------------------------
# Why not


@pytest.mark.parametrize(
    ("version", "dtype", "reason"),
    [
        ("2.20.2", torch.bfloat16, None),
        ("2.21", torch.float16, None),
        ("3.0.0.dev0+abc", torch.bfloat16, None),
        ("2.20rc1", torch.bfloat16, None),
        ("2.9.1", torch.bfloat16, "TransformerEngine 2.20 or later is needed, and 2.9.1 is installed"),
        ("2.20.2", torch.float32, "and these are float32 (its fp32 products are TF32): load the model in bf16"),
    ],
)
def test_versions_and_dtypes(version: str, dtype: torch.dtype, reason: str | None) -> None:
    with double.installed(version):
        found = library.why_not(dtype, CPU)
    assert found == reason or (reason is not None and found is not None and reason in found)


@pytest.mark.parametrize("name", [FP8, FP8_BLOCK])
def test_fp8(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, spec = EXPERT_BACKENDS.load(name), make_spec(4, **KINDS["gated"])
    monkeypatch.setattr(FusedBackend, "why_not", lambda *args: None)
    with double.installed():
        assert backend.why_not(spec, torch.bfloat16, CPU) is None
        odd = replace(spec, intermediate_size=INTERMEDIATE + 8)
        assert backend.why_not(odd, torch.bfloat16, CPU) == "FP8 products take sizes that are multiples of 16, not 24"
        assert "TF32" in str(backend.why_not(spec, torch.float32, CPU))
    with double.installed(fp8=(False, "Device compute capability 8.9 or higher required for FP8 execution.")):
        reason = f"has no FP8 with {backend.scaling} scaling here: Device compute capability 8.9 or higher required"
        assert reason in str(backend.why_not(spec, torch.bfloat16, CPU))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.why_not(torch.bfloat16, CPU) == "TransformerEngine needs a CUDA device, and this is cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "capability 8.0 or more, and this one has 7.5" in str(library.why_not(torch.bfloat16, CUDA))


def test_not_installed() -> None:
    assert "not installed (pip install --no-build-isolation 'hf_moe" in why_not_without_it(library, double)


def test_half_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            if name.startswith(double.PACKAGE):
                raise OSError("libnccl.so.2: cannot open shared object file")
            return None

    with double.installed():
        for name in [name for name in sys.modules if name.startswith(double.PACKAGE)]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
        assert library.why_not(torch.bfloat16, CPU) == (
            "TransformerEngine cannot be imported: OSError: libnccl.so.2: cannot open shared object file"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The double is as strict as the vendor


@pytest.mark.parametrize("counts", [[3, 0, 2, 0], [0, 0], [1]])
def test_products(counts: list[int], calls: list[double.Call]) -> None:
    check_products(counts, torch.float32, "cpu")
    assert [call.layout for call in calls] == ["NN", "TN", "TN", "NT", "NT"]


def check_products(counts: list[int], dtype: torch.dtype, device: str) -> None:
    """Also of what is no contiguous memory."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((sum(counts), 6), (len(counts), 6, 4), (sum(counts), 4))
    )
    by_expert = list(zip(x.split(counts), weight, grad.split(counts), strict=True))
    expected = torch.cat([rows.float() @ of.float() for rows, of, _ in by_expert]).to(dtype)
    outer = torch.stack([rows.float().t() @ of.float() for rows, _, of in by_expert]).to(dtype)
    x, weight, grad = x.to(device), weight.to(device), grad.to(device)
    for stored in (weight, weight.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([weight] * 2, 2)[:, :, :4]):
        assert_close(library.grouped_linear(x, stored, counts).cpu(), expected, "backend")
    for a in (x, torch.cat([x, x], 1)[:, :6]):
        assert_close(library.grouped_outer(a, grad, counts).cpu(), outer, "backend")


def test_the_double_reads_memory_as_if_contiguous() -> None:
    a, b, out = torch.randn(1, 4, 6)[0].t(), torch.randn(3, 4), torch.empty(3, 6)
    double.grouped_gemm([a], [b], [out], [None], out.dtype, layout="TN")
    assert not torch.allclose(out, b @ a.t())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"b": torch.zeros(3, 5)}, "inner dimensions 5 and 4"),
        ({"b": torch.zeros(3, 4, dtype=torch.float64)}, "one dtype"),
        ({"out": torch.zeros(3, 5)}, "an output of"),
        ({"m_splits": [torch.tensor(3)]}, "numbers of rows on the host"),
    ],
)
def test_the_double_refuses(inputs: dict[str, Any], message: str) -> None:
    good = {"a": torch.zeros(6, 4), "b": torch.zeros(3, 4), "out": torch.zeros(3, 6), "m_splits": [3]} | inputs
    with pytest.raises(RuntimeError, match=message):
        double.grouped_gemm([good["a"]], [good["b"]], [good["out"]], [None], torch.float32, m_splits=good["m_splits"])
