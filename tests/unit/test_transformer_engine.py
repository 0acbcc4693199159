"""The `transformer_engine` backend equals eager, with a double of the vendor's product; the same grids as of others.

tests/gpu/test_transformer_engine_gpu.py has the vendor itself.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_moe_accel.experts import EXPERT_BACKENDS
from hf_moe_accel.experts.base import ExpertWeights
from hf_moe_accel.moe.forward import forward
from hf_moe_accel.ops import transformer_engine as library
from tests.helpers import transformer_engine_double as double
from tests.helpers.grids import KINDS, ROWS, TRAINED, Case, grid, make_batch, make_spec, make_weights, needed_grads
from tests.helpers.tolerances import assert_close
from tests.unit import test_expert_backends as backend_contract
from tests.unit import test_expert_lora as lora_contract
from tests.unit.test_triton_ops import interpreted

NAME = "transformer_engine"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# In fp32: of bf16, Triton's interpreter cuts digits off.
CASES = grid(
    {
        "rows": ROWS,
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
        "rows": ("ragged", "some experts", "no row"),
        "kind": tuple(KINDS),
        "adapters": lora_contract.WITH_LORA,
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
    backend_contract.check_equals_eager(NAME, case, "cpu")


@interpreted
@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("case", LORA_CASES)
def test_lora_equals_merged_weights(case: Case) -> None:
    lora_contract.check_equals_merged_weights(NAME, case, "cpu")


@interpreted
@pytest.mark.parametrize(
    ("trained", "products"), [("none", 0), ("vectors", 0), ("up", 1), ("down", 1), ("projections", 2)]
)
def test_frozen_weights_cost_no_products(trained: str, products: int, calls: list[double.Call]) -> None:
    case = {"rows": "ragged", "gate": "clamped", "transposed": True, "bias": True, "post_norm": False}
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
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_token_path_takes_it(kind: str) -> None:
    """Counts of rows on the host pass from forward to backward among autograd's saved tensors."""
    found = []
    for backend in (NAME, "eager"):
        spec = make_spec(lora_contract.NUM_EXPERTS, **KINDS[kind])
        plain = make_weights(spec)
        weights = lora_contract.leaves_of(plain, needed_grads("all", plain))
        ((x, ids, routing),) = make_batch("uneven", 1, lora_contract.NUM_EXPERTS, 2, 32)
        x, routing = x.requires_grad_(), routing.requires_grad_()
        out = forward(spec, x, ids, routing, weights, lora_contract.runtime_of(backend), 0)
        out.backward(lora_contract.grad_of(out))
        grads = {str(i): w.grad for i, w in enumerate(weights.flat()) if w is not None}
        found.append({"out": out.detach(), "x": x.grad, "routing": routing.grad} | grads)
    assert_close(*found, "backend")


def test_auto_never_takes_it() -> None:
    names = list(EXPERT_BACKENDS)
    assert names.index(NAME) > names.index("eager"), "eager serves everything"


# ---------------------------------------------------------------------------------------------------------------------
# Why not


@pytest.mark.parametrize(
    ("version", "dtype", "reason"),
    [
        ("2.20.2", torch.bfloat16, None),
        ("2.21", torch.float16, None),
        ("3.0.0.dev0+abc", torch.bfloat16, None),
        ("2.9.1", torch.bfloat16, "TransformerEngine 2.20 or later is needed, and 2.9.1 is installed"),
        ("2.20.2", torch.float32, "and these are float32 (its fp32 products are TF32): load the model in bf16"),
    ],
)
def test_versions_and_dtypes(version: str, dtype: torch.dtype, reason: str | None) -> None:
    with double.installed(version):
        found = library.why_not(dtype, CPU)
    assert found == reason or (reason is not None and found is not None and reason in found)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.why_not(torch.bfloat16, CPU) == "TransformerEngine needs a CUDA device, and this is cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "capability 8.0 or more, and this one has 7.5" in str(library.why_not(torch.bfloat16, CUDA))


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "why_not_device", lambda device: None)
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    double.forget()
    try:
        assert "not installed (pip install --no-build-isolation 'hf_moe" in str(library.why_not(torch.bfloat16, CPU))
    finally:
        double.forget()


def test_half_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            if name.startswith(double.PACKAGE):
                raise OSError("libnccl.so.2: cannot open shared object file")
            return None

    with double.installed():
        monkeypatch.setattr(library, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
        for name in [name for name in sys.modules if name.startswith(double.PACKAGE)]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
        assert library.why_not(torch.bfloat16, CPU) == (
            "TransformerEngine 2.20.2 cannot be imported: OSError: libnccl.so.2: cannot open shared object file"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The double is as strict as the vendor


@pytest.mark.parametrize("counts", [[3, 0, 2, 0], [0, 0], [1]])
def test_products(counts: list[int], calls: list[double.Call]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((sum(counts), 6), (len(counts), 6, 4)))
    expected = torch.cat([rows @ of for rows, of in zip(x.split(counts), weight, strict=True)])
    for stored in (weight, weight.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([weight] * 2, 2)[:, :, :4]):
        assert_close(library.grouped_linear(x, stored, counts), expected, "backend")
    outer = [rows.t() @ of for rows, of in zip(x.split(counts), expected.split(counts), strict=True)]
    for a in (x, torch.cat([x, x], 1)[:, :6]):
        assert_close(library.grouped_outer(a, expected, counts), torch.stack(outer), "backend")
    assert [call.layout for call in calls] == ["NN", "TN", "TN", "NT", "NT"]


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
        double.grouped_gemm(
            [good["a"]], [good["b"]], [good["out"]], [None], torch.float32, m_splits=good["m_splits"]
        )
