"""transformers' loss of a causal language model, a few rows of logits at a time.

With transformers' own, backward holds three fp32 tensors of the logits' size (log-probabilities, their gradient and
that of the logits in fp32), which with a large vocabulary are the largest of a pass. Here they exist for some rows at
a time: probabilities are computed twice, from the logits in their own dtype, and rounded where transformers rounds.
Liger's and TRL's losses, which make no logits, stand where they are asked for: they replace the forward pass that
calls this.

Shape letters: N tokens, n of a chunk, V entries of the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_moe_accel.hf.hooks import are_foreign, hooks_of

# Logits of a chunk: with a CPU they stay in its cache, a GPU is busy for longer than it takes to launch its kernels.
_LOGITS_ON_CPU, _LOGITS_ON_GPU = 2**20, 2**25


def chunk_loss(model: Any) -> None:
    """Let a model of transformers compute its loss in chunks, unless it has another one than the usual one."""
    if model.loss_function is ForCausalLMLoss:
        model.loss_function = causal_lm_loss


@contextmanager
def logits_as_made(model: nn.Module, base: Any) -> Iterator[None]:
    """Within it a forward pass leaves out accelerate's fp32 copy of the outputs, of which only the loss may be read.

    With mixed precision that copy can be a large part of a step's memory: 9.3 GiB for the logits of 16,384 tokens of
    Qwen3. It stays where hooks may read it, and with another loss than `causal_lm_loss`, which is fp32 by itself.

    Args:
        model: as accelerate prepared it.
        base: the model of transformers in it.
    """
    prepared: Any = model.__dict__.get("forward")
    convert = getattr(prepared, "__wrapped__", None)
    is_fp32 = inspect.unwrap(base.loss_function) is causal_lm_loss  # compiled or not
    if not is_fp32 or are_foreign(hooks_of([model])) or not isinstance(convert, ConvertOutputsToFp32):
        yield
        return
    forward = convert.model_forward
    model.forward = MethodType(forward, model) if isinstance(prepared, MethodType) else forward
    try:
        yield
    finally:
        model.forward = prepared


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """`ForCausalLMLoss`, with its arguments: the mean, or the sum over `num_items_in_batch`, in fp32.

    Args:
        logits: [.., V], as the model made them; [*, T, V] where labels are still to be shifted.
        labels: [*, T] the tokens themselves.
        vocab_size: V.
        num_items_in_batch: what to divide the sum by; None: the number of labels that are not ignored.
        ignore_index: a label that does not count.
        shift_labels: [..] the tokens that come next, in place of `labels`.
        kwargs: not read, like there.
    """
    if torch.compiler.is_compiling():
        # A compiler joins the passes by itself, and would write out each chunk.
        compiled: Tensor = ForCausalLMLoss(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
        )
        return compiled
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    labels_N = shift_labels.reshape(-1).to(logits.device)
    total: Tensor = _SummedLoss.apply(  # type: ignore[no-untyped-call]
        logits.reshape(-1, vocab_size), labels_N, ignore_index
    )
    if num_items_in_batch is None:
        num_items_in_batch = (labels_N != ignore_index).sum()
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, ignore_index: int) -> Tensor:
        ctx.save_for_backward(logits_NV, labels_N)
        ctx.ignore_index = ignore_index
        total = torch.zeros((), device=logits_NV.device)
        for rows in _chunks(logits_NV):
            of_rows_nV = F.log_softmax(logits_NV[rows], -1, dtype=torch.float32)
            total += F.nll_loss(of_rows_nV, labels_N[rows], ignore_index=ignore_index, reduction="sum")
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, labels_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        for rows in _chunks(logits_NV):
            counts_n = labels_N[rows] != ctx.ignore_index
            label_n1 = labels_N[rows].where(counts_n, 0)[:, None]
            of_rows_nV = F.softmax(logits_NV[rows], -1, dtype=torch.float32)
            of_rows_nV.scatter_(1, label_n1, of_rows_nV.gather(1, label_n1) - 1)
            torch.mul(of_rows_nV, grad.where(counts_n, 0)[:, None], out=grad_NV[rows])
        return grad_NV, None, None


def _chunks(logits_NV: Tensor) -> Iterator[slice]:
    num_rows, vocab_size = logits_NV.shape
    logits = _LOGITS_ON_CPU if logits_NV.device.type == "cpu" else _LOGITS_ON_GPU
    step = max(1, logits // vocab_size)
    return (slice(first, first + step) for first in range(0, num_rows, step))
