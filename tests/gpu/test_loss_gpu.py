"""The loss in chunks on a GPU: as on the CPU, reproducible, without a wait, with less memory than transformers'."""

from __future__ import annotations

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_moe_accel.hf import loss as library
from hf_moe_accel.hf.loss import causal_lm_loss
from tests.gpu.test_backends_gpu import host_syncs
from tests.unit import test_loss as contract

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("logits_of_a_chunk", [5 * contract.VOCAB, 2**25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", contract.HOW)
def test_equals_transformers(
    how: str, dtype: torch.dtype, logits_of_a_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_LOGITS_ON_GPU", logits_of_a_chunk)
    contract.check("cuda", dtype, how)


def test_a_vocabulary_of_real_size() -> None:
    """Peak memory beside the logits: their gradient, and a chunk."""
    rows, vocab = 4096, 151936
    peaks, grads = {}, {}
    labels = torch.randint(vocab, (1, rows), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    for function in (causal_lm_loss, ForCausalLMLoss):
        torch.manual_seed(0)
        logits = torch.randn(1, rows, vocab, device="cuda", dtype=torch.bfloat16).requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(logits, labels, vocab, num_items_in_batch=1000).backward()
        peaks[function] = (torch.cuda.max_memory_allocated() - before) / logits.numel()
        grads[function] = logits.grad
        del logits
    torch.testing.assert_close(grads[causal_lm_loss], grads[ForCausalLMLoss], rtol=2e-2, atol=1e-8)
    assert peaks[causal_lm_loss] < 4 < peaks[ForCausalLMLoss], peaks  # bytes for each logit


def test_nothing_waits_and_results_are_reproducible() -> None:
    logits, given = contract.inputs("cuda", torch.bfloat16, "sum over a number")
    torch.use_deterministic_algorithms(True)
    try:
        causal_lm_loss(logits, **given).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    with host_syncs() as syncs:
        causal_lm_loss(logits, **given).backward()
    assert [str(sync) for sync in syncs] == []
