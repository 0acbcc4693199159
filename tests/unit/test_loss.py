"""The loss in chunks equals transformers', forward and backward, and keeps no more than logits and labels."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_moe_accel import MoEAccelConfig, prepare_moe_model
from hf_moe_accel.hf import loss as library
from hf_moe_accel.hf.loss import causal_lm_loss
from tests.helpers.models import tiny_model
from tests.helpers.tolerances import assert_close

VOCAB = 64
# Of 33 rows, in chunks of 5 and a rest, of one row, and all in one.
CHUNKS = [5 * VOCAB + 3, 1, 2**20]
HOW = {
    "mean": {},
    "sum over a number": {"num_items_in_batch": 20},
    "sum over a tensor": {"num_items_in_batch": torch.tensor(20)},
    "another label does not count": {"ignore_index": 3},
    "shifted": {"shift_labels": True},
}


@pytest.fixture(params=CHUNKS)
def in_chunks(request: pytest.FixtureRequest) -> Iterator[None]:
    with mock.patch.object(library, "_LOGITS_ON_CPU", request.param):
        yield


def inputs(device: str, dtype: torch.dtype, how: str) -> tuple[Tensor, dict[str, Tensor | int | None]]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 11, VOCAB, generator=generator)
    labels = torch.randint(VOCAB, (3, 11), generator=generator)
    labels[0, 2:7] = labels[1, -1] = HOW[how].get("ignore_index", -100)
    labels = labels.to(device)
    given = {"labels": labels, "vocab_size": VOCAB, **HOW[how]}
    if how == "shifted":
        given |= {"labels": None, "shift_labels": labels}
    return logits.to(device, dtype).requires_grad_(), given


def check(device: str, dtype: torch.dtype, how: str) -> None:
    found = []
    for function in (ForCausalLMLoss, causal_lm_loss):
        logits, given = inputs(device, dtype, how)
        loss = function(logits, **given)
        (0.3 * loss).backward()
        assert logits.grad is not None and logits.grad.dtype == dtype
        assert loss.dtype == torch.float32
        found.append([loss.detach(), logits.grad.float()])
    assert_close(found[1][0], found[0][0], "training")
    # One unit in the last place, where both round to the logits' dtype.
    torch.testing.assert_close(found[1][1], found[0][1], rtol=2 * torch.finfo(dtype).eps, atol=1e-8)


@pytest.mark.usefixtures("in_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", HOW)
def test_equals_transformers(how: str, dtype: torch.dtype) -> None:
    check("cpu", dtype, how)


@pytest.mark.parametrize("num_items", [None, 5])
def test_no_label_counts(num_items: int | None) -> None:
    labels = torch.full((1, 4), -100)
    found = []
    for function in (ForCausalLMLoss, causal_lm_loss):
        logits = torch.randn(1, 4, VOCAB, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = function(logits, labels, VOCAB, num_items_in_batch=num_items)
        loss.backward()
        found.append((loss.detach(), logits.grad))
    torch.testing.assert_close(*found, equal_nan=True)


def test_what_is_kept() -> None:
    """Logits in their own dtype: transformers keeps them in fp32."""
    kept: list[Tensor] = []
    for function in (causal_lm_loss, ForCausalLMLoss):
        logits, given = inputs("cpu", torch.bfloat16, "mean")
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda each: each):
            function(logits, **given)
        large = {tensor.dtype for tensor in kept if tensor.numel() == logits.numel()}
        assert large == {torch.bfloat16 if function is causal_lm_loss else torch.float32}


def test_without_gradients() -> None:
    logits, given = inputs("cpu", torch.float32, "mean")
    with torch.no_grad():
        assert not causal_lm_loss(logits, **given).requires_grad


def test_a_compiler_gets_transformers_own() -> None:
    logits, given = inputs("cpu", torch.float32, "mean")
    compiled = torch.compile(causal_lm_loss, backend="eager", fullgraph=True)
    with mock.patch.object(library, "_SummedLoss", None):
        found = compiled(logits, **given)
    torch.testing.assert_close(found, ForCausalLMLoss(logits, **given))


def test_a_model_that_is_prepared_has_it() -> None:
    model = tiny_model("qwen3_moe")
    ids = torch.arange(24).reshape(2, 12)
    expected = model(input_ids=ids, labels=ids).loss
    prepare_moe_model(model, MoEAccelConfig(expert_backend="eager"))
    assert model.loss_function is causal_lm_loss
    assert_close(model(input_ids=ids, labels=ids).loss, expected, "training")


def test_another_loss_stays() -> None:
    def mine(*args: object, **kwargs: object) -> None:
        return None

    model = tiny_model("qwen3_moe")
    model.loss_function = mine
    prepare_moe_model(model)
    assert model.loss_function is mine
