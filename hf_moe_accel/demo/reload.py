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

# What another kernel's order of summation explains, by dtype of the checkpoint.
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}


@dataclass(frozen=True)
class ReloadCheck:
    """How the reloaded model differs from the trained one.

    Attributes:
        wrong_keys: what transformers called missing, unexpected or mismatched, by that word; empty is right.
        max_difference: largest absolute difference of two logits.
        tolerance: the largest that is allowed.
    """

    wrong_keys: dict[str, list[str]]
    max_difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether every key fitted and the logits agree."""
        return not self.wrong_keys and self.max_difference <= self.tolerance


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
        difference = (logits.float() - saved["logits"]).abs()[saved["attention_mask"].bool()]
        return ReloadCheck(
            wrong_keys={kind: sorted(map(str, keys)) for kind, keys in self.loading_info.items() if keys},
            max_difference=difference.max().item(),
            tolerance=LOGIT_TOLERANCE[self.model.dtype],
        )

    def complete(self, pair: data.Pair, max_new_tokens: int = 40) -> str:
        """Write a docstring for a signature, taking the likeliest token each time."""
        inputs = self.tokenizer(data.prompt_of(pair), return_tensors="pt").to(self.device)
        tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        completion: str = self.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return completion
