"""Every example runs as it stands, on its small model and made data, alone and on two ranks."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.helpers.grids import slow
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import assert_close

EXAMPLES = Path(__file__).parents[2] / "examples"
# The number of ranks in every run of the tests, and what is saved then; the other number is slow. On two ranks
# tests/integrations launches the swapped ones.
SAVED = {
    "sft": (1, "model.safetensors"),
    "sft_lora_experts": (2, "adapter_model.safetensors"),
    "dpo": (2, "model.safetensors.index.json"),
    "own_trainer": (1, "model.safetensors"),
    "swap_trainer": (1, "model.safetensors"),
    "swap_import": (1, "model.safetensors"),
}
OWN_TESTS = {"resume", "merge_and_serve"}


def test_no_example_is_left_out() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SAVED, *OWN_TESTS, "small"}


def other_ranks(name: str) -> Any:
    ranks, saved = SAVED[name]
    if saved.startswith("model."):
        saved = "model.safetensors" if ranks == 2 else "model.safetensors.index.json"
    return pytest.param(name, 3 - ranks, saved, marks=pytest.mark.slow)


def run_example(name: str, *arguments: str) -> None:
    sys.path.insert(0, str(EXAMPLES))
    sys.argv = [name, *arguments]
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "world_size", "saved"),
    [*((name, *expected) for name, expected in SAVED.items()), *map(other_ranks, SAVED)],
)
def test_example(name: str, world_size: int, saved: str, tmp_path: Path) -> None:
    (_, output), *_ = run_ranks(
        run_example, world_size, name, "--output", str(tmp_path), "--steps", "10", init=False, capture=True
    )
    assert "'loss'" in output
    assert ("'perplexity'" in output) == (name == "own_trainer")
    assert b".experts." in (tmp_path / saved).read_bytes()


def test_resume_goes_on_with_more_steps_on_another_number_of_ranks(tmp_path: Path) -> None:
    steps, written = [], []
    for world_size, last in ((2, 5), (1, 10)):
        run_ranks(run_example, world_size, "resume", "--output", str(tmp_path), "--steps", str(last), init=False)
        state = json.loads((tmp_path / f"checkpoint-{last}/trainer_state.json").read_text())
        steps.append([entry["step"] for entry in state["log_history"] if "loss" in entry])
        written.append((tmp_path / "checkpoint-5/manifest.json").stat().st_mtime_ns)
    assert steps == [[5], [5, 10]]
    assert written[0] == written[1], "the second run has begun anew"
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("world_size", [2, *slow(1)])
def test_merge_and_serve(world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from small import small_adapter, small_model

    base = small_model()
    adapter = small_adapter(base)
    (_, output), *_ = run_ranks(
        run_example, world_size, "merge_and_serve", base, adapter, "--output", str(tmp_path), init=False, capture=True
    )
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(ours.state_dict(), merged.state_dict(), "training")
    assert (tmp_path / "merged/tokenizer.json").exists()
    assert b".experts.7.down_proj.lora_A" in (tmp_path / "per_expert/adapter_model.safetensors").read_bytes()
    commands = [line.split() for line in output.splitlines() if line.startswith("  ") and str(tmp_path) in line]
    assert [command[:3] for command in commands] == [
        ["vllm", "serve", str(tmp_path / "merged")],
        ["python", "-m", "sglang.launch_server"],
        ["vllm", "serve", base],
        ["python", "-m", "sglang.launch_server"],
    ]
