"""The loss in chunks equals transformers', forward and backward, and keeps no more than logits and labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_moe_accel import AcceleratedMoETrainer, MoEAccelConfig, prepare_moe_model
from hf_moe_accel.hf import loss as library
from hf_moe_accel.hf.compiling import compile_loss
from hf_moe_accel.hf.discover import base_of
from hf_moe_accel.hf.loss import causal_lm_loss, logits_as_made
from tests.distributed.test_training_arguments import log_of, make_trainer
from tests.helpers.adapters import Adapted
from tests.helpers.models import VOCAB_SIZE, tiny_model
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


class CopiesOfLogits(TorchDispatchMode):
    """Counts the conversions to fp32 of what is as wide as the vocabulary."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.float32:
            self.found += out.ndim == 3 and out.shape[-1] == VOCAB_SIZE
        return out


class ReadsOutputs(AcceleratedMoETrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        assert outputs.logits.dtype == torch.float32
        return (loss, outputs) if return_outputs else loss


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    assert outputs.logits.dtype == torch.float32
    return ForCausalLMLoss(outputs.logits, labels, VOCAB_SIZE, num_items_in_batch)


READERS = [None, "a hook", "compute_loss_func", "label smoothing", "a subclass", "another loss"]


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapters"])
@pytest.mark.parametrize("reader", READERS, ids=str)
def test_a_copy_of_the_logits_is_made_for_who_reads_it(reader: str | None, adapted: bool, tmp_path: Path) -> None:
    make = Adapted("qwen3_moe", torch.bfloat16) if adapted else lambda: tiny_model("qwen3_moe", dtype=torch.bfloat16)
    trainer_class = ReadsOutputs if reader == "a subclass" else AcceleratedMoETrainer
    arguments: dict[str, Any] = {"bf16": True, "label_smoothing_factor": 0.1 if reader == "label smoothing" else 0.0}
    options = {"compute_loss_func": own_loss} if reader == "compute_loss_func" else {}
    trainer = make_trainer(trainer_class, str(tmp_path), model=make, arguments=arguments, options=options)
    read: list[torch.dtype] = []
    if reader == "a hook":
        trainer.model.register_forward_hook(lambda model, args, outputs: read.append(outputs.logits.dtype))
    elif reader == "another loss":
        model = trainer.model.get_base_model() if adapted else trainer.model
        model.loss_function = lambda *args, **kwargs: ForCausalLMLoss(*args, **kwargs)
    with CopiesOfLogits() as copies:
        trainer.train()
    assert (copies.found > 0) == (reader is not None)
    assert set(read) == ({torch.float32} if reader == "a hook" else set())
    assert trainer.predict(trainer.eval_dataset).predictions.dtype == "float32"


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapters"])
def test_without_the_copy_losses_are_the_same(adapted: bool, tmp_path: Path) -> None:
    make = Adapted("qwen3_moe", torch.bfloat16) if adapted else lambda: tiny_model("qwen3_moe", dtype=torch.bfloat16)
    losses = []
    for trainer_class in (AcceleratedMoETrainer, ReadsOutputs):
        trainer = make_trainer(trainer_class, str(tmp_path), model=make, arguments={"bf16": True})
        trainer.train()
        losses.append([entry["loss"] for entry in log_of(trainer) if "loss" in entry])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapters"])
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_logits_as_made(compiled: bool, adapted: bool, tmp_path: Path) -> None:
    make = Adapted("qwen3_moe", torch.bfloat16) if adapted else lambda: tiny_model("qwen3_moe", dtype=torch.bfloat16)
    trainer = make_trainer(AcceleratedMoETrainer, str(tmp_path), model=make, arguments={"bf16": True})
    model = trainer.accelerator.prepare_model(trainer.model)
    base = base_of(model)
    if compiled:
        compile_loss(base, backend="eager")
    ids = torch.arange(24).reshape(2, 12)
    dtypes = []
    with pytest.raises(KeyError), logits_as_made(model, base):
        dtypes.append(model(input_ids=ids, labels=ids).logits.dtype)
        raise KeyError
    dtypes.append(model(input_ids=ids, labels=ids).logits.dtype)
    assert dtypes == [torch.bfloat16, torch.float32]
