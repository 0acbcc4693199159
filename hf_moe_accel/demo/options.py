"""What the demo is asked to do, and the files that it leaves."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoOptions:
    """The options of `hf-moe-accel demo`; None leaves the choice to the machine's preset."""

    output_dir: str = "demo-output"
    steps: int | None = None
    nproc: int | None = None
    seed: int = 0
    lora: bool = False


class OutputFiles:
    """The paths of a run inside its output folder; nothing is created.

    Args:
        folder: the output folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint"
        self.adapter = folder / "adapter"
        self.picture = folder / "demo.png"
        self.page = folder / "report" / "index.html"
        self.wandb = folder / "wandb"
        self.history = folder / "history.json"
        self.reference = folder / "reference_logits.safetensors"

    def clear(self) -> None:
        """Create the folder, and remove what an earlier run left there and nothing else."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self.picture, self.history, self.reference):
            path.unlink(missing_ok=True)
        for path in (self.checkpoint, self.adapter, self.page.parent, self.wandb):
            shutil.rmtree(path, ignore_errors=True)
