"""What the training job leaves for whoever draws, checks and sums it up: numbers only, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_moe_accel.demo.data import Pair


@dataclass
class History:
    """One training run in numbers. Steps count from 1; 0 is before the first.

    Attributes:
        model: what was trained, on what, in one line.
        num_steps: of the whole training.
        train_loss: (step, mean loss of the steps since the last entry); in nats a token.
        held_out_loss: (step, loss on the held-out pairs).
        num_tokens: tokens trained on, padding aside.
        train_seconds: time spent in training steps; evaluation, loading and saving aside.
        samples: held-out pairs to complete.
    """

    model: str
    num_steps: int
    train_loss: list[tuple[int, float]]
    held_out_loss: list[tuple[int, float]]
    num_tokens: int
    train_seconds: float
    samples: list[Pair]

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> History:
        """Read what `save` wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        # JSON knows no tuples.
        fields["samples"] = [Pair(*sample) for sample in fields["samples"]]
        for name in ("train_loss", "held_out_loss"):
            fields[name] = [(step, loss) for step, loss in fields[name]]
        return cls(**fields)
