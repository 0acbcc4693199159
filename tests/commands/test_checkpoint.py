"""`hf-moe-accel checkpoint verify` and `export`, on checkpoints that two ranks have saved."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_moe_accel import AcceleratedMoETrainer
from hf_moe_accel.cli import main
from hf_moe_accel.commands import checkpoint as commands
from hf_moe_accel.log import warn_once
from tests.helpers.models import ragged_batch_dataset, tiny_model, toy_tokenizer
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "model-00001-of-00002.safetensors"
STATE = ["trainer_state.json", "training_args.bin", "training_state", "manifest.json"]


def train(output_dir: str, *, adapter: bool = False) -> None:
    warn_once.cache_clear()  # other cases have run in this process
    model = tiny_model("qwen3_moe")
    if adapter:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(model, config)
        model.peft_config["default"].base_model_name_or_path = "some/base"
    arguments = TrainingArguments(
        output_dir=output_dir,
        use_cpu=True,
        per_device_train_batch_size=2,
        max_steps=4,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
    )
    AcceleratedMoETrainer(
        model=model, args=arguments, train_dataset=ragged_batch_dataset(16, 16), processing_class=toy_tokenizer()
    ).train()


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "run"
    run_ranks(train, 2, str(directory), init=False)
    return directory


@pytest.fixture
def run(saved_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_run, tmp_path / "run"))


@pytest.fixture
def checkpoint(run: Path) -> Path:
    return run / "checkpoint-4"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process; returns its exit code, stdout and stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(["checkpoint", *map(str, arguments)])
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def contents(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in directory.rglob("*")
    }


def last_line(text: str) -> str:
    return text.rstrip().splitlines()[-1]


# --- verify ---


def test_an_intact_checkpoint(checkpoint: Path, cli) -> None:
    before = contents(checkpoint)
    code, out, err = cli("verify", checkpoint)
    assert (code, err) == (0, "")
    num_files = sum(path.is_file() for path in checkpoint.rglob("*")) - 1  # all but the manifest
    assert f"{num_files} files, 1." in out
    assert last_line(out) == f"INTACT: every file of {checkpoint} is as it was saved."
    assert contents(checkpoint) == before


def remove(path: Path) -> None:
    path.unlink()


def damage_the_manifest(path: Path) -> None:
    path.write_text(path.read_text()[:-50])


def lose_a_checksum(path: Path) -> None:
    path.write_text(path.read_text().replace('"sha256"', '"sha156"', 1))


def point_outside(path: Path) -> None:
    path.write_text(path.read_text().replace('"config.json"', '"../config.json"', 1))


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        (WEIGHTS, flip_a_byte, "is altered: its checksum is another"),
        ("training_state/state.json", flip_a_byte, "is altered: its checksum is another"),
        (WEIGHTS, truncate, "is truncated: 284780 bytes instead of 284880"),
        ("tokenizer.json", remove, "is missing"),
        (
            "manifest.json",
            remove,
            "is missing: it was not saved by this library's trainers, or its saving never ended",
        ),
        ("manifest.json", damage_the_manifest, "is damaged: "),
        ("manifest.json", lose_a_checksum, "is damaged: it says of 'chat_template.jinja'"),
        ("manifest.json", point_outside, "is damaged: it says of '../config.json'"),
    ],
)
def test_a_damaged_checkpoint(name: str, damage: Callable[[Path], None], says: str, checkpoint: Path, cli) -> None:
    damage(checkpoint / name)
    code, out, _ = cli("verify", checkpoint)
    assert code == 1
    problems = [line.strip() for line in out.splitlines() if says in line]
    assert len(problems) == 1 and problems[0].startswith(f"{name} {says}")
    assert last_line(out) == f"DAMAGED: 1 problem in {checkpoint}."


def test_a_file_that_cannot_be_read(checkpoint: Path, cli) -> None:
    with mock.patch("hf_moe_accel.weights.manifest._blocks", side_effect=OSError(5, "Input/output error")):
        code, out, _ = cli("verify", checkpoint)
    assert code == 1
    assert "cannot be read: Input/output error" in out


def test_a_foreign_file_is_a_note(checkpoint: Path, cli) -> None:
    (checkpoint / "notes.txt").write_text("")
    code, out, _ = cli("verify", checkpoint)
    assert code == 0
    assert "  note: notes.txt was not saved with the checkpoint and is ignored\n" in out


def test_a_model_without_training_state_is_a_note(checkpoint: Path, cli) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    shutil.rmtree(checkpoint / "training_state")
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if "training_state" not in name}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    code, out, _ = cli("verify", checkpoint)
    assert code == 0
    assert "note: holds a model and no training state" in out


def test_a_run(run: Path, cli) -> None:
    flip_a_byte(run / "checkpoint-4" / WEIGHTS)
    half_written = run / "_partial" / "checkpoint-6"
    half_written.mkdir(parents=True)
    shutil.copytree(run / "checkpoint-2", run / "_replaced" / "checkpoint-2")  # superseded
    shutil.copytree(run / "checkpoint-2", run / "_replaced" / "checkpoint-10")  # gets its name back
    code, out, _ = cli("verify", run)
    assert code == 1
    lines = out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        str(run / "checkpoint-2"),
        str(run / "checkpoint-4"),
        str(run / "_replaced" / "checkpoint-10"),
        str(half_written),
        f"DAMAGED: 1 of 3 checkpoints. The newest intact one is {run / 'checkpoint-2'}.",
    ]
    assert f"  {WEIGHTS} is altered: its checksum is another" in lines
    assert lines[-2].startswith("  note: half-written")


def test_a_run_whose_newest_checkpoint_is_intact(run: Path, cli) -> None:
    code, out, _ = cli("verify", run)
    assert code == 0
    assert last_line(out) == f"INTACT: 2 checkpoints. The newest intact one is {run / 'checkpoint-4'}."


def test_a_run_with_no_intact_checkpoint(run: Path, cli) -> None:
    for name in ("checkpoint-2", "checkpoint-4"):
        (run / name / WEIGHTS).unlink()
    code, out, _ = cli("verify", run)
    assert code == 1
    assert last_line(out) == "DAMAGED: 2 of 2 checkpoints. None is intact."


def test_a_run_that_died_in_its_first_save(tmp_path: Path, cli) -> None:
    (tmp_path / "_partial" / "checkpoint-2").mkdir(parents=True)
    code, out, _ = cli("verify", tmp_path)
    assert code == 1
    assert "half-written" in out
    assert last_line(out) == f"DAMAGED: {tmp_path} holds no complete checkpoint."


def test_nothing_to_verify(tmp_path: Path, cli) -> None:
    code, _, err = cli("verify", tmp_path / "absent")
    assert code == 2 and "absent does not exist: give the directory of a checkpoint" in last_line(err)
    code, _, err = cli("verify", tmp_path)
    assert code == 2 and "holds no checkpoint: give a checkpoint (run/checkpoint-20)" in last_line(err)


# --- export ---


def test_an_exported_model_is_the_saved_one(checkpoint: Path, tmp_path: Path, cli) -> None:
    (checkpoint / "notes.txt").write_text("")
    before = contents(checkpoint)
    out = tmp_path / "new" / "model"
    code, text, err = cli("export", checkpoint, out)
    assert (code, err) == (0, "")
    assert "note: notes.txt was not saved with the checkpoint and is ignored" in text
    assert f"{out}: 8 files, 567kB, verified while they were copied" in text
    assert last_line(text).strip() == f"AutoModelForCausalLM.from_pretrained('{out}')"
    assert contents(checkpoint) == before
    assert {"config.json", "tokenizer.json", WEIGHTS} <= contents(out).keys() <= before.keys()
    assert not set(STATE) & contents(out).keys()
    assert [path.name for path in out.parent.iterdir()] == ["model"]

    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    expected = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    start = tiny_model("qwen3_moe").state_dict()
    assert not all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(out)) == model.config.vocab_size


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_exported_adapter_is_the_saved_one(tmp_path: Path, cli) -> None:
    run_ranks(train, 2, str(tmp_path / "run"), adapter=True, init=False)
    checkpoint, out = tmp_path / "run" / "checkpoint-4", tmp_path / "adapter"
    code, text, _ = cli("export", checkpoint, out)
    assert code == 0
    base = "AutoModelForCausalLM.from_pretrained('some/base')"
    assert last_line(text).strip() == f"PeftModel.from_pretrained({base}, '{out}')"
    assert not set(STATE) & contents(out).keys()
    loaded = PeftModel.from_pretrained(tiny_model("qwen3_moe"), out).state_dict()
    for name, value in load_file(checkpoint / "adapter_model.safetensors").items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], value), name


def test_an_empty_directory_is_filled(checkpoint: Path, tmp_path: Path, cli) -> None:
    (tmp_path / "model").mkdir()
    code, _, _ = cli("export", checkpoint, tmp_path / "model")
    assert code == 0
    assert (tmp_path / "model" / "config.json").exists()


def test_what_is_there_is_left_alone(run: Path, checkpoint: Path, tmp_path: Path, cli) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    (tmp_path / "busy.partial").mkdir()
    before = contents(tmp_path)
    for directory, out, says in (
        (checkpoint, full, "is not empty, and nothing in it is overwritten"),
        (checkpoint, full / "mine", "is a file"),
        (checkpoint, checkpoint / "model", "lies in the checkpoint"),
        (checkpoint, tmp_path / "busy", "busy.partial exists: a command that died has left it"),
        (checkpoint, "/proc", "is not empty"),
        (run, tmp_path / "model", f"is no checkpoint: give one, for example {checkpoint}"),
        (tmp_path / "absent", tmp_path / "model", "does not exist"),
    ):
        code, _, err = cli("export", directory, out)
        assert code == 2 and says in last_line(err), err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "damage"), [(WEIGHTS, flip_a_byte), (WEIGHTS, truncate), (WEIGHTS, remove), ("manifest.json", remove)]
)
def test_a_damaged_checkpoint_is_not_exported(
    name: str, damage: Callable[[Path], None], checkpoint: Path, tmp_path: Path, cli
) -> None:
    damage(checkpoint / name)
    before = contents(tmp_path)
    code, out, err = cli("export", checkpoint, tmp_path / "model")
    assert (code, out) == (1, "")
    assert err.startswith(f"FAILED: nothing was exported from {checkpoint}: {name} is ")
    assert contents(tmp_path) == before


def test_damaged_training_state_does_not_matter_to_the_model(checkpoint: Path, tmp_path: Path, cli) -> None:
    shutil.rmtree(checkpoint / "training_state")
    code, _, _ = cli("export", checkpoint, tmp_path / "model")
    assert code == 0


def test_what_cannot_be_written_is_removed(checkpoint: Path, tmp_path: Path, cli) -> None:
    before = contents(tmp_path)
    with mock.patch.object(commands.os, "fsync", side_effect=OSError(28, "No space left on device")):
        code, _, err = cli("export", checkpoint, tmp_path / "model")
    assert code == 1
    assert "chat_template.jinja could not be copied: No space left on device" in err
    assert contents(tmp_path) == before


# --- The command line ---


@pytest.mark.slow
def test_as_a_program(checkpoint: Path, tmp_path: Path) -> None:
    # By module, since a checkout need not be installed.
    command = [sys.executable, "-m", "hf_moe_accel.cli", "checkpoint"]
    truncate(checkpoint / WEIGHTS)
    for arguments in (["verify", str(checkpoint)], ["export", str(checkpoint), str(tmp_path / "model")]):
        result = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert result.returncode == 1, result.stderr
        assert f"{WEIGHTS} is truncated" in result.stdout + result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "--help"], ["export", "--help"]])
def test_help_teaches(arguments: list[str], cli) -> None:
    code, out, _ = cli(*arguments)
    assert code == 0
    assert "exit code" in out
    assert len(arguments) == 1 or "examples:\n  hf-moe-accel checkpoint" in out


def test_help_waits_for_no_import() -> None:
    script = (
        "import sys; from hf_moe_accel.cli import main\n"
        "try: main(['checkpoint', 'verify', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert last_line(result.stdout) == "False"
