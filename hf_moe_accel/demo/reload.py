"""The proof that the demo's checkpoint is an ordinary one: plain transformers loads it and computes the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from hf_moe_accel.demo import data

# What another kernel's order of summation explains: (share of the positions that must agree, difference of a logit).
# In bf16 the last bit decides, at some positions, which of two experts a token goes to, and all logits there differ.
AGREEMENT = {torch.float32: (1.0, 1e-4), torch.bfloat16: (0.5, 0.25)}


@dataclass(frozen=True)
class ReloadCheck:
    """How the reloaded model differs from the trained one.

    Attributes:
        wrong_keys: what transformers called missing, unexpected or mismatched, by that word; empty is right.
        difference: what the largest absolute difference of two logits stays below, at `share` of the positions.
        share: of the positions, 1.0 for all.
        tolerance: the largest difference that is allowed.
    """

    wrong_keys: dict[str, list[str]]
    difference: float
    share: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether every key fitted and the logits agree."""
        return not self.wrong_keys and self.difference <= self.tolerance


class ReloadedCheckpoint:
    """Model and tokenizer as anyone would load them: with plain transformers, on the GPU where there is one.

    Args:
        checkpoint: folder of the checkpoint.
    """

    def __init__(self, checkpoint: Path) -> None:
        disable_progress_bar()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model, self.loading_info = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype="auto", output_loading_info=True
        )
        self.model: Any = model.to(self.device).eval()

    def check(self, reference: Path) -> ReloadCheck:
        """Compare with the logits that the training job saved, at every position but the padding."""
        saved = load_file(reference, device=self.device)
        with torch.no_grad():
            logits = self.model(input_ids=saved["input_ids"], attention_mask=saved["attention_mask"]).logits
        share, tolerance = AGREEMENT[self.model.dtype]
        by_position = (logits.float() - saved["logits"]).abs().amax(-1)[saved["attention_mask"].bool()]
        return ReloadCheck(
            wrong_keys={kind: sorted(map(str, keys)) for kind, keys in self.loading_info.items() if keys},
            difference=by_position.quantile(share).item(),
            share=share,
            tolerance=tolerance,
        )

    def complete(self, pair: data.Pair, max_new_tokens: int = 40) -> str:
        """Write a docstring for a signature, taking the likeliest token each time."""
        inputs = self.tokenizer(data.prompt_of(pair), return_tensors="pt").to(self.device)
        tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        completion: str = self.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return completion
