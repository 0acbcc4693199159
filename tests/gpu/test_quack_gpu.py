"""The `quack` backend with quack-kernels itself: in bf16 the same grids as of other backends."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.test_backends_gpu import host_syncs
from tests.helpers.grids import KINDS, Case, needed_grads
from tests.helpers.vendors import needs_quack
from tests.unit import test_expert_backends as backend_contract
from tests.unit import test_expert_lora as lora_contract
from tests.unit import test_quack as contract

pytestmark = [pytest.mark.gpu, needs_quack]

NAME = contract.NAME


def in_bf16(cases: list) -> list:
    return [case for case in cases if case.values[0]["dtype"] == torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", contract.COUNTS)
def test_products(counts: list[int], dtype: torch.dtype) -> None:
    contract.check_products(counts, "cuda", dtype)


@pytest.mark.parametrize("case", in_bf16(backend_contract.CASES))
def test_equals_eager(case: Case) -> None:
    backend_contract.check_equals_eager(NAME, case, "cuda")


@pytest.mark.parametrize("case", in_bf16(lora_contract.CASES))
def test_lora_equals_merged_weights(case: Case) -> None:
    lora_contract.check_equals_merged_weights(NAME, case, "cuda")


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_host_never_waits(kind: str) -> None:
    case = {"rows": "ragged", "kind": kind, "adapters": "two", "dtype": torch.bfloat16}
    spec, weights, rows = lora_contract.inputs_of(case, "cuda")
    backend, needs = backend_contract.backend_of(NAME), needed_grads("all", weights)

    def run() -> None:
        result, saved = backend.forward(spec, weights, rows)
        out = result()
        grads = backend.backward_rows(
            spec, weights, rows, saved, torch.ones_like(out), needs, need_x=True, need_routing=True
        )
        backend.backward_weights(spec, weights, rows, grads, needs)

    run()  # what happens once in a process
    with host_syncs() as syncs:
        run()
    assert [str(sync) for sync in syncs] == []
