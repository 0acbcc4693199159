"""The contracts of dispatchers, expert backends and the token path, on a GPU: the same bodies as on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_moe_accel.experts.base import ExpertWeights
from hf_moe_accel.ops.permutation import compact
from tests.distributed import test_dispatch_contract as dispatch_contract
from tests.distributed import test_token_path as token_path
from tests.helpers.grids import HIDDEN, KINDS, ROWS, Case, make_batch, needed_grads
from tests.helpers.tolerances import assert_close
from tests.unit import test_expert_backends as backend_contract
from tests.unit import test_expert_lora as lora_contract
from tests.unit import test_permutation as permutation
from tests.unit import test_triton_ops as triton_ops

pytestmark = pytest.mark.gpu


@pytest.fixture
def nccl() -> Iterator[None]:
    """A group of this process alone."""
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def host_syncs() -> Iterator[list[Any]]:
    """Collects a warning for each time that the host waits for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        syncs: list[Any] = []
        try:
            yield syncs
        finally:
            torch.cuda.set_sync_debug_mode("default")
            syncs += [warning for warning in caught if "called a synchronizing" in str(warning.message)]


def test_host_syncs_are_seen() -> None:
    numbers = torch.arange(4, device="cuda")
    with host_syncs() as syncs:
        numbers.tolist()
    assert syncs
    with host_syncs() as syncs:
        numbers.nonzero()
    assert syncs
    with host_syncs() as syncs:
        numbers + 1
    assert not syncs


@pytest.mark.parametrize("case", backend_contract.CASES)
@pytest.mark.parametrize("name", backend_contract.ON_ACCELERATORS)
def test_backend_equals_eager(name: str, case: Case) -> None:
    backend_contract.check_equals_eager(name, case, "cuda")


@pytest.mark.parametrize("case", lora_contract.CASES)
@pytest.mark.parametrize("name", lora_contract.ON_ACCELERATORS)
def test_lora_equals_merged_weights(name: str, case: Case) -> None:
    lora_contract.check_equals_merged_weights(name, case, "cuda")


@pytest.mark.parametrize("adapters", ["none", "two"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", backend_contract.ON_ACCELERATORS)
def test_backends_do_not_sync(name: str, kind: str, adapters: str) -> None:
    backend = backend_contract.backend_of(name)
    case = {"rows": "ragged", "kind": kind, "adapters": adapters, "dtype": torch.bfloat16}
    spec, weights, rows = lora_contract.inputs_of(case, "cuda")
    grad_ND = torch.randn_like(rows.x_ND)
    needs = needed_grads("all", weights)
    with host_syncs() as syncs:
        result, saved = backend.forward(spec, weights, rows)
        result()
        grads = backend.backward_rows(spec, weights, rows, saved, grad_ND, needs, need_x=True, need_routing=True)
        backend.backward_weights(spec, weights, rows, grads, needs)
    assert [str(sync) for sync in syncs] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_sum_segments(rows: str, dtype: torch.dtype) -> None:
    permutation.check_sum_segments(rows, dtype, "cuda")


def test_sum_segments_accumulates_bf16_in_fp32() -> None:
    permutation.check_sum_segments_in_fp32("cuda")


# Each combination is compiled: not all of them.
@pytest.mark.parametrize("dtype", triton_ops.DTYPES)
@pytest.mark.parametrize(("weighted", "biased"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("name", ["silu", "GPT-OSS", "no gate, relu2"])
def test_triton_activation(name: str, weighted: bool, biased: bool, dtype: torch.dtype) -> None:
    triton_ops.check_activation(name, 600, weighted, biased, dtype, "cuda")


@pytest.mark.parametrize("dtype", triton_ops.DTYPES)
@pytest.mark.parametrize("ranks", triton_ops.RANKS)
@pytest.mark.parametrize("name", ["silu", "GPT-OSS"])
def test_triton_activation_with_thin_products(name: str, ranks: tuple[int, int], dtype: torch.dtype) -> None:
    triton_ops.check_activation(name, 600, True, ranks[0] == 16, dtype, "cuda", ranks)


@pytest.mark.parametrize("name", list(triton_ops.KNOWN))
def test_triton_activation_of_any_kind(name: str) -> None:
    triton_ops.check_activation(name, 600, True, True, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", triton_ops.DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [8, 600])
def test_triton_gather(size: int, weighted: bool, dtype: torch.dtype) -> None:
    triton_ops.check_gather(size, weighted, dtype, "cuda")


@pytest.mark.parametrize("dtype", triton_ops.DTYPES)
@pytest.mark.parametrize("what", triton_ops.SUMS)
@pytest.mark.parametrize("rows", ROWS)
def test_triton_sum_segments(rows: str, what: str, dtype: torch.dtype) -> None:
    triton_ops.check_sum(rows, what, 2880, dtype, "cuda")


@pytest.mark.parametrize("dtype", triton_ops.DTYPES)
def test_triton_sum_of_long_segments(dtype: torch.dtype) -> None:
    triton_ops.check_sum_of_long_segments(dtype, "cuda")


def test_triton_sums_of_bf16_are_in_fp32() -> None:
    triton_ops.check_sum_in_fp32("cuda")


def test_compact_over_many_blocks() -> None:
    mask = torch.rand(100_000, device="cuda") < 0.3
    expected = mask.nonzero()[:, 0]
    assert torch.equal(compact(mask, expected.numel()), expected)


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("case", dispatch_contract.CASES)
@pytest.mark.parametrize("name", ["all_to_all", "local"])
def test_dispatch_and_combine_are_the_weighted_sum(name: str, case: Case) -> None:
    dispatch_contract.check(name, 1, case, [dispatch_contract.exchange(name, case, "cuda")])


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(("name", "reads"), [("local", 0), ("all_to_all", 1)])
def test_the_plan_syncs_once_and_nothing_else_does(name: str, reads: int, chunks: int) -> None:
    dispatcher = dispatch_contract.make_dispatcher(name)
    ((x, ids, weights),) = make_batch("uneven", 1, 16, 2, HIDDEN)
    x, ids, weights = x.cuda(), ids.cuda(), weights.cuda()
    dispatcher.plan(ids, 16, chunks)  # NCCL sets itself up at its first collective
    with host_syncs() as syncs:
        plan = dispatcher.plan(ids, 16, chunks)
    assert len(syncs) == reads
    with host_syncs() as syncs:
        for i in range(chunks):
            rows = dispatcher.dispatch(x, weights, plan, i).wait()
            dispatcher.combine(rows.x_ND, plan, i).wait()
            grad_ND = dispatcher.combine_backward(x, plan, i).wait()
            dispatcher.dispatch_backward(grad_ND, rows.weights_R, plan, i, rows).wait()
    assert [str(sync) for sync in syncs] == []


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("backend", ["eager", *backend_contract.ON_ACCELERATORS])
def test_token_path_equals_the_cpu(backend: str, kind: str) -> None:
    results = {}
    for device in ("cpu", "cuda"):
        spec, weights, inputs = token_path.simple_call(kind)
        weights = ExpertWeights.of(
            None if w is None else w.detach().to(device).requires_grad_() for w in weights.flat()
        )
        inputs = tuple(tensor.to(device) for tensor in inputs)
        grad = token_path.draw(inputs[0].shape, torch.float32, 1).to(device)
        runtime = token_path.make_runtime("eager" if device == "cpu" else backend)
        results[device] = token_path.run_path(spec, weights, runtime, inputs, grad)
    present = {key: value for key, value in results["cpu"].items() if value is not None}
    assert_close({key: results["cuda"][key] for key in present}, present, "backend")


@pytest.mark.parametrize("kind", list(KINDS))
def test_autocast_with_fp32_masters_computes_in_bf16(kind: str) -> None:
    spec, weights, inputs = token_path.simple_call(kind)
    weights = ExpertWeights.of(None if w is None else w.detach().cuda().requires_grad_() for w in weights.flat())
    inputs = tuple(tensor.cuda() for tensor in inputs)
    spy = token_path.Spy()
    with torch.autocast("cuda", torch.bfloat16):
        result = token_path.run_path(spec, weights, token_path.make_runtime(spy), inputs, torch.ones_like(inputs[0]))
    assert spy.seen == {torch.bfloat16}
    assert result["out"].dtype == result["d up"].dtype == torch.float32
