"""The `quack` backend equals eager, with a double of the vendor's product; the same grids as of others.

tests/gpu/test_quack_gpu.py has the vendor itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_moe_accel import prepare
from hf_moe_accel.experts import EXPERT_BACKENDS
from hf_moe_accel.experts.fused import FusedBackend
from hf_moe_accel.hf.discover import find_experts
from hf_moe_accel.ops import quack as library
from tests.helpers import quack_double as double
from tests.helpers.grids import KINDS, ROWS, Case, grid, make_spec
from tests.helpers.models import tiny_model
from tests.helpers.tolerances import assert_close
from tests.helpers.vendors import why_not_without_it
from tests.unit import test_expert_backends as backend_contract
from tests.unit import test_expert_lora as lora_contract
from tests.unit.test_triton_ops import interpreted

NAME = "quack"
# Of the rows of experts; the last two are many for rows in order, and for rows through an index.
COUNTS = [[3, 0, 2, 0], [0, 0], [1], [300, 0, 7, 129], [1200, 0], [4301]]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# In fp32: of bf16, Triton's interpreter cuts digits off. The gates are those of `fused`, which has all of them.
CASES = grid(
    {
        "rows": tuple(rows for rows in ROWS if rows != "top-1"),
        "gate": ("silu",),
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
        "kind": ("gated", "gpt_oss"),
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
# The products


def some_rows(counts: list[int], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(rows of a source [9, 16], which of them each row is, the starts of experts)."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(9, 16, generator=generator).to(device, dtype)
    index = torch.randint(9, (sum(counts),), generator=generator, dtype=torch.int32).to(device)
    starts = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    return source, index, starts


def check_products(counts: list[int], device: str, dtype: torch.dtype) -> None:
    """Forward and both layouts of the weight's gradient, of rows and through the index."""
    source, index, starts = some_rows(counts, device, dtype)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(len(counts), 24, 16, generator=generator).to(device, dtype)
    # So that sums over many rows are no larger than their tolerance is meant for.
    grad = (torch.randn(sum(counts), 24, generator=generator) / max(counts + [1]) ** 0.5).to(device, dtype)
    gathered = source[index.long()]
    by_expert = [part.double() for part in gathered.split(counts)], [part.double() for part in grad.split(counts)]
    expected = torch.cat([part @ w.double().t() for part, w in zip(by_expert[0], weight, strict=True)])
    outer = torch.stack([g.t() @ x for x, g in zip(*by_expert, strict=True)])
    for rows in (gathered, library.Through(source, index)):
        assert_close(library.grouped_linear(rows, weight.mT, starts), expected.to(dtype), "backend")
        for pair in ((grad, rows), (rows, grad)):
            for transposed in (False, True):
                found = library.grouped_outer(*pair, starts, transposed=transposed)
                assert found.is_contiguous()
                swapped = (pair[0] is rows) != transposed
                assert_close(found, (outer.mT if swapped else outer).to(dtype), "backend")


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("counts", COUNTS)
def test_products(counts: list[int]) -> None:
    check_products(counts, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("through", "rows", "tiles", "others"),
    [
        (False, 1024, (192, 128, 1), (128, 192, 1)),
        (False, 1023, (128, 192, 1), (192, 128, 1)),
        (True, 8192, (128, 256, 2), (128, 256, 1)),
        (True, 8191, (128, 256, 1), (128, 256, 2)),
    ],
)
def test_tiles(
    through: bool,
    rows: int,
    tiles: tuple[int, int, int],
    others: tuple[int, int, int],
    calls: list[double.Call],
) -> None:
    """Of two experts' rows, first as another number of them is cut, so that a run need not stop to compile for it.

    A weight's gradient is cut without a look at their number.
    """
    x, weight = torch.randn(rows, 16), torch.randn(2, 16, 24)
    starts = torch.tensor([0, 3, rows], dtype=torch.int32)
    taken = library.Through(x, torch.arange(rows, dtype=torch.int32)) if through else x
    library.grouped_linear(taken, weight, starts)
    library.grouped_outer(taken, torch.randn(rows, 24), starts)
    found = [(tiles.tile_m, tiles.tile_n, tiles.cluster_m) for tiles in (call.plan.tiles for call in calls)]
    assert found == [others, tiles, (128, 256, 1)]


def test_how_it_is_launched_is_kept_by_kind_of_operands(calls: list[double.Call]) -> None:
    """Whatever the number of rows; the double refuses what was kept of another kind."""
    for rows in (1100, 9000, 3, 1200, 5):
        source, index, starts = (
            torch.randn(rows, 16),
            torch.arange(rows, dtype=torch.int32),
            torch.tensor([0, 2, rows]),
        )
        for weight in (torch.randn(2, 16, 24), torch.randn(2, 24, 16).mT):
            for x in (source, library.Through(source, index)):
                library.grouped_linear(x, weight, starts.int())
        for transposed in (False, True):
            library.grouped_outer(source, torch.randn(rows, 24), starts.int(), transposed=transposed)
    # Of rows: two layouts of weights, through an index or not, few rows or many. Of weights: two layouts.
    assert len({id(call.plan) for call in calls}) == 2 * 2 * 2 + 2
    assert len(calls) == 5 * 6 + 2 * 2, "once more for each kind of rows, for the other number of them"
    assert len({id(call.plan) for call in calls[: 6 + 4]}) == 2 * 2 * 2 + 2, "none is made after the first pass"


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
@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_is_gathered_or_copied(
    transposed: bool, calls: list[double.Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {"rows": "some experts", "gate": "silu", "transposed": transposed, "bias": False, "post_norm": False}
    case |= {"dtype": torch.float32, "trained": "all", "rows_need": "x and routing"}
    spec, weights, rows = backend_contract.inputs_of(case, "cpu")
    backend = backend_contract.backend_of(NAME)
    monkeypatch.setattr(backend, "_gather", None)
    backend_contract.results(backend, spec, weights, rows, case)
    calls.clear()  # the first time is also for what comes later
    found = backend_contract.results(backend, spec, weights, rows, case)
    up, down = weights.up.data_ptr(), weights.down.data_ptr()
    of_rows, of_weights = calls[:4], calls[4:]
    operands = [(call.second, call.plan.through) for call in of_rows]
    assert operands == [(up, True), (down, False), (down, True), (up, False)]
    assert all(call.plan.of_rows for call in of_rows) and not any(call.plan.of_rows for call in of_weights)
    assert [(call.out, call.plan.through) for call in of_weights] == [
        (found["up"].data_ptr(), True),
        (found["down"].data_ptr(), True),
    ]


@interpreted
@pytest.mark.usefixtures("calls")
def test_the_token_path_takes_it() -> None:
    lora_contract.check_token_path(NAME, "gated")


# ---------------------------------------------------------------------------------------------------------------------
# Why not


@pytest.mark.parametrize(
    ("version", "dtype", "reason"),
    [
        ("0.6.5", torch.bfloat16, None),
        ("0.6.6rc1", torch.float16, None),
        ("0.7", torch.bfloat16, "quack-kernels from 0.6.5 and below 0.7 is needed, and 0.7 is installed"),
        ("0.6.4", torch.bfloat16, "quack-kernels from 0.6.5 and below 0.7 is needed, and 0.6.4 is installed"),
        ("0.6.5", torch.float64, "in bf16 and fp16, and these are float64: load the model in bf16"),
    ],
)
def test_versions_and_dtypes(version: str, dtype: torch.dtype, reason: str | None) -> None:
    with double.installed(version):
        found = library.why_not(dtype, CPU)
    assert found == reason or (reason is not None and found is not None and reason in found)


def test_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, spec = EXPERT_BACKENDS.load(NAME), make_spec(4, **KINDS["gated"])
    monkeypatch.setattr(FusedBackend, "why_not", lambda *args: None)
    with double.installed():
        assert backend.why_not(spec, torch.bfloat16, CPU) is None
        odd = replace(spec, intermediate_size=12)
        assert backend.why_not(odd, torch.bfloat16, CPU) == "quack-kernels takes sizes that are multiples of 8, not 12"


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.why_not(torch.bfloat16, CPU) == "quack-kernels needs a CUDA device, and this is cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert "compute capability 9 and 10, and this one has 8.6" in str(library.why_not(torch.bfloat16, CUDA))


@pytest.mark.parametrize(("capability", "chosen"), [((9, 0), NAME), ((10, 0), "fused")])
def test_auto_takes_it_on_hopper(capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedBackend, "why_not", lambda *args: None)
    monkeypatch.setattr(prepare, "_device", lambda: CUDA)
    found = find_experts(tiny_model("qwen3_moe").to(torch.bfloat16))
    with double.installed():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        name, notes = prepare._choose_backend(found, "auto")
        assert name == chosen
        assert notes == [] if chosen == NAME else "quack: on other GPUs than Hopper" in notes[0]
        assert prepare._choose_backend(found, NAME) == (NAME, [])


def test_not_installed() -> None:
    assert "not installed (pip install 'hf_moe_accel[quack]')" in why_not_without_it(library, double)
