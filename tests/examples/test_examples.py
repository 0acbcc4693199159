"""Every example runs as it stands, on its small model and made data, alone and under torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.ranks import launch

EXAMPLES = Path(__file__).parents[2] / "examples"
SAVED = {
    "sft": "model.safetensors",
    "sft_lora_experts": "adapter_model.safetensors",
    "dpo": "model.safetensors.index.json",
    "own_trainer": "model.safetensors",
}


def test_no_example_is_left_out() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SAVED, "small"}


@pytest.mark.parametrize("name", SAVED)
def test_example(name: str, tmp_path: Path) -> None:
    world_size = 2 if name in ("sft_lora_experts", "dpo") else 1
    script = str(EXAMPLES / f"{name}.py")
    done = launch(
        [script, "--output", str(tmp_path), "--steps", "10"],
        world_size,
        env={"PYTHONPATH": str(EXAMPLES.parent), "HF_HOME": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'loss'" in done.stdout
    assert ("'perplexity'" in done.stdout) == (name == "own_trainer")
    assert b".experts." in (tmp_path / SAVED[name]).read_bytes()
