"""`hf-moe-accel demo` as a user runs it, with few steps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_moe_accel.callbacks.run_file import read_run

ROOT = Path(__file__).resolve().parents[2]


def run_cli(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    # By module, since a checkout need not be installed.
    command = [sys.executable, "-m", "hf_moe_accel.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "demo.png").write_text("of an earlier run")
    return folder, run_cli("demo", "--steps", "12", "--nproc", "2", "--output-dir", str(folder), timeout=240)


def test_it_succeeds_and_the_loss_falls(demo):
    folder, result = demo
    assert result.returncode == 0, result.stdout + result.stderr
    history = json.loads((folder / "history.json").read_text())
    assert [step for step, _ in history["train_loss"]] == list(range(1, 13))
    assert history["train_loss"][-1][1] < history["train_loss"][0][1]
    steps, losses = zip(*history["held_out_loss"], strict=True)
    assert steps[0] == 0 and steps[-1] == 12
    assert losses[-1] < losses[0]


def test_it_prints_what_happened(demo):
    _, result = demo
    assert "layout      ep 2" in result.stdout + result.stderr
    assert re.search(r"step +12 of 12   loss \d", result.stdout)
    assert re.search(r"speed +[\d,]+ tokens/s", result.stdout)
    assert "reload     by plain transformers: ok" in result.stdout
    assert "no missing, unexpected or mismatched key" in result.stdout
    assert result.stdout.count("    model   ") == result.stdout.count("    truth   ") == 3


def test_it_leaves_checkpoint_picture_and_numbers(demo):
    folder, _ = demo
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint",
        "demo.png",
        "history.json",
        "moe_metrics.jsonl",
        "reference_logits.safetensors",
        "report",
        "wandb",
    ]
    assert {"config.json", "tokenizer.json"} <= {path.name for path in (folder / "checkpoint").iterdir()}
    assert list((folder / "checkpoint").glob("*.safetensors"))
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "report" / "overview.png").read_bytes() == (folder / "demo.png").read_bytes()
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


def test_every_choice_of_every_training_token_is_in_the_expert_load(demo):
    folder, _ = demo
    history = json.loads((folder / "history.json").read_text())
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    loads = [experts["load"] for _, experts in read_run(folder).counted()]
    for load in loads:
        num_choices = [sum(layer) for layer in load]
        assert len(set(num_choices)) == 1 and num_choices[0] % config["num_experts_per_tok"] == 0
    num_routed = sum(sum(load[0]) for load in loads) // config["num_experts_per_tok"]
    # Padding is routed too: batches of similar length hold little of it, and evaluation would double the number.
    assert history["num_tokens"] <= num_routed < 1.5 * history["num_tokens"]


def test_plain_transformers_reads_every_key(demo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = demo
    model, info = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", output_loading_info=True)
    assert not any(info.values()), info
    assert len(AutoTokenizer.from_pretrained(folder / "checkpoint")) == model.config.vocab_size


@pytest.mark.slow
@pytest.mark.parametrize("nproc", ["1", "2"])
def test_with_lora_the_merged_model_and_the_adapter_are_what_was_trained(nproc, tmp_path):
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    result = run_cli("demo", "--lora", "--steps", "2", "--nproc", nproc, "--output-dir", str(tmp_path), timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1.9 M parameters, LoRA trains 0.8 M" in result.stdout
    assert "reload     by plain transformers: ok" in result.stdout
    assert f"{tmp_path / 'adapter'}/\n" in result.stdout
    (_, before), *_, (_, after) = json.loads((tmp_path / "history.json").read_text())["held_out_loss"]
    assert after < before - 0.1

    set_seed(0)  # the random weights that the adapter was trained on
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "checkpoint"))
    reference = load_file(tmp_path / "reference_logits.safetensors")
    logits = reference.pop("logits")
    with torch.no_grad():
        assert (model(**reference).logits - logits).abs().max() > 0.1
        adapted = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        is_text = reference["attention_mask"].bool()
        torch.testing.assert_close(adapted(**reference).logits[is_text], logits[is_text], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_without_lora_the_job_needs_no_peft():
    code = "import sys; sys.modules['peft'] = None; import hf_moe_accel.demo.job"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_one_process_launches_nothing(tmp_path):
    result = run_cli("demo", "--steps", "6", "--nproc", "1", "--output-dir", str(tmp_path), timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Starting" not in result.stdout
    assert "on 1 CPU rank\n" in result.stdout
    assert "reload     by plain transformers: ok" in result.stdout


@pytest.mark.slow
def test_under_torchrun_it_joins_the_ranks(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "hf_moe_accel.cli", "demo", "--steps", "6", "--output-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Starting" not in result.stdout
    assert result.stdout.count("reload     by plain transformers: ok") == 1


@pytest.mark.slow
def test_a_failing_rank_makes_the_command_fail(tmp_path):
    (tmp_path / "checkpoint").write_text("")  # a file where the folder of the checkpoint goes
    result = run_cli("demo", "--steps", "1", "--output-dir", str(tmp_path), timeout=240)
    assert result.returncode == 1
    assert "The training job failed" in result.stderr


def test_help_lists_the_commands_and_teaches_the_demo():
    assert "demo" in run_cli("--help").stdout
    text = run_cli("demo", "--help").stdout
    for word in ("--output-dir", "--steps", "--nproc", "--seed", "--lora", "exit code", "examples", "torchrun"):
        assert word in text


def test_a_command_is_required():
    result = run_cli()
    assert result.returncode == 2
    assert "COMMAND" in result.stderr
