"""`hf-moe-accel sft`, `dpo`, `kto` and `reward`: TRL's published commands with the word changed, on tiny models."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import SFTConfig

from hf_moe_accel import AcceleratedMoESFTTrainer, MoEAccelConfig, launch
from hf_moe_accel.cli import TRAINING, main
from hf_moe_accel.commands import train
from tests.distributed.test_training_arguments import log_of
from tests.helpers.ranks import launch as run_program
from tests.helpers.tolerances import assert_close
from tests.helpers.trl_runs import DATA_OF, write_inputs

ROOT = Path(__file__).resolve().parents[2]
# What TRL's commands do not say, since they are for a GPU and for long.
HERE = "--use_cpu --bf16 false --max_steps 3 --logging_steps 1 --report_to none --disable_tqdm true"
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", launch.STARTED)

# From the docstrings of trl/scripts/{sft,dpo,kto}.py and the page "Command Line Interfaces" of TRL's documentation.
# Lines about the hub (--push_to_hub) are left out.
SFT = """trl sft \
    --model_name_or_path Qwen/Qwen2-0.5B \
    --dataset_name trl-lib/Capybara \
    --learning_rate 2.0e-5 \
    --num_train_epochs 1 \
    --packing \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --eos_token '<|im_end|>' \
    --eval_strategy steps \
    --eval_steps 100 \
    --output_dir Qwen2-0.5B-SFT"""
DPO_FILE = """\
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: anthropic/hh-rlhf
num_processes: 4
"""
DPO_LORA = """trl dpo \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --model_name_or_path Qwen/Qwen2-0.5B-Instruct \
    --learning_rate 5.0e-6 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 2 \
    --max_steps 1000 \
    --gradient_accumulation_steps 8 \
    --eval_strategy steps \
    --eval_steps 50 \
    --output_dir Qwen2-0.5B-DPO \
    --no_remove_unused_columns \
    --use_peft \
    --lora_r 32 \
    --lora_alpha 16"""
# The full and the LoRA command of a script differ in these.
WITH_LORA = " --use_peft --lora_r 32 --lora_alpha 16"
SFT_LORA = SFT.replace("2.0e-5", "2.0e-4") + WITH_LORA
DPO = " ".join(DPO_LORA.split()).removesuffix(WITH_LORA).replace("5.0e-6", "5.0e-7")
KTO = """trl kto \
    --dataset_name trl-lib/kto-mix-14k \
    --model_name_or_path=trl-lib/qwen1.5-1.8b-sft \
    --per_device_train_batch_size 16 \
    --num_train_epochs 1 \
    --learning_rate 5e-7 \
    --lr_scheduler_type=cosine \
    --gradient_accumulation_steps 1 \
    --eval_steps 500 \
    --output_dir=kto-aligned-model \
    --warmup_steps 0.1 \
    --logging_first_step"""
REWARD = """trl reward \
  --model_name_or_path Qwen/Qwen2.5-0.5B \
  --dataset_name trl-lib/ultrafeedback_binarized"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`write_inputs`, and for each kind of data a directory with splits, as on the hub."""
    directory = tmp_path_factory.mktemp("cli")
    write_inputs(directory)
    for kind in set(DATA_OF.values()):
        (directory / kind).mkdir()
        rows = (directory / f"{kind}.jsonl").read_text().splitlines(keepends=True)
        (directory / kind / "train.jsonl").write_text("".join(rows[:24]))
        (directory / kind / "test.jsonl").write_text("".join(rows[24:]))
    return directory


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No launcher but the test's, and no cache that outlives it."""
    for name in [*LAUNCHERS, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def changed(published: str, inputs: Path, out: Path, kind: str, more: str = "") -> list[str]:
    """A published command for our models and data. Later options win over earlier ones."""
    words = shlex.split(published)
    assert words[0] == "trl"
    model = inputs / ("judge" if kind == "Reward" else "model")
    ours = f"--model_name_or_path {model} --dataset_name {inputs / DATA_OF[kind]} --output_dir {out}"
    return [*words[1:], *shlex.split(f"{ours} {HERE} {more}")]


def run_cli(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return run_program(["-m", "hf_moe_accel.cli", *arguments], **kwargs)


def log_in(out: Path, step: int = 3) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = json.loads((out / f"checkpoint-{step}/trainer_state.json").read_text())[
        "log_history"
    ]
    return history


def without_times(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if not re.search("runtime|per_second|_time|^moe/", k)} for entry in log]


@pytest.mark.slow
def test_sft_as_published_is_the_trainer_called_directly(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = "--eos_token '<eos>' --eval_steps 3 --max_length 32"
    file = tmp_path / "run.yaml"
    # Read while libraries are imported.
    file.write_text(yaml.safe_dump({"env": {"HF_HOME": str(tmp_path / "home")}}))
    done = run_cli(*changed(SFT, inputs, out, "SFT", more), f"--config={file}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "home" / "datasets").is_dir()
    assert f"saved to {out}" in done.stderr

    trainer = AcceleratedMoESFTTrainer(
        str(inputs / "model"),
        SFTConfig(
            str(tmp_path / "direct"),
            learning_rate=2e-5,
            packing=True,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=8,
            max_length=32,
            eval_strategy="steps",
            eval_steps=3,
            max_steps=3,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=datasets.load_dataset(str(inputs / "texts"), split="train"),
        eval_dataset=datasets.load_dataset(str(inputs / "texts"), split="test"),
    )
    trainer.train()
    expected = log_of(trainer)
    assert [sorted(entry) for entry in expected[:4]] == [sorted(entry) for entry in without_times(log_in(out))]
    assert_close(without_times(log_in(out)), expected[:4], "training")
    saved = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert_close(saved, dict(trainer.model.state_dict()), "training")


@pytest.mark.slow
def test_dpo_file_as_published_starts_its_ranks(inputs: Path, tmp_path: Path) -> None:
    """With an environment, a mixture of two data sets, and LoRA on the experts by TRL's option."""
    settings = yaml.safe_load(DPO_FILE) | {
        "model_name_or_path": str(inputs / "model"),
        "dataset_name": str(inputs / "preferences"),
        "num_processes": 2,
        "env": {"HF_HOME": str(tmp_path / "home")},
        "use_peft": True,
        "lora_target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
        "output_dir": str(tmp_path / "out"),
        "token_dispatcher": "all_to_all",
    }
    file = tmp_path / "dpo_config.yaml"
    file.write_text(yaml.safe_dump(settings))
    done = run_cli("dpo", "--config", str(file), *HERE.split(), "--max_steps", "2", "--learning_rate", "1e-3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Starting 2 ranks" in done.stdout
    assert "ep 2 x efsdp 1" in done.stderr and "all_to_all" in done.stderr
    assert (tmp_path / "home" / "datasets").is_dir()
    first, second, *_ = log_in(tmp_path / "out", 2)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert second["loss"] < first["loss"]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs / "model"), tmp_path / "out")
    (factors,) = {p.abs().sum().item() > 0 for name, p in adapted.named_parameters() if "experts.lora_B" in name}
    assert factors


@pytest.mark.parametrize(
    ("kind", "published", "more"),
    [
        ("SFT", SFT_LORA, "--eos_token '<eos>' --lora_target_modules all-linear --eval_steps 2 --max_length 32"),
        ("DPO", DPO, "--gradient_accumulation_steps 1 --eval_steps 2"),
        ("DPO", DPO_LORA, "--gradient_accumulation_steps 1 --lora_target_modules all-linear --eval_steps 2"),
        ("KTO", KTO, "--expert_backend eager"),
        ("Reward", REWARD, "--check_tokens --dtype bfloat16"),
    ],
)
def test_as_published(
    kind: str, published: str, more: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(changed(published, inputs, out, kind, more)) == 0, capsys.readouterr().err
    losses = [entry["loss"] for entry in log_in(out) if "loss" in entry]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    auto = AutoModelForSequenceClassification if kind == "Reward" else AutoModelForCausalLM
    if kind in ("SFT", "DPO"):
        assert any("eval_loss" in entry for entry in log_in(out))
    if "--use_peft" in published:
        model = PeftModel.from_pretrained(auto.from_pretrained(inputs / "model"), out)
        assert any(".experts." in name and "lora_" in name for name, _ in model.named_parameters())
        assert model.peft_config["default"].r == 32
    else:
        model, info = auto.from_pretrained(out, output_loading_info=True)
        assert model.dtype == (torch.bfloat16 if "bfloat16" in more else torch.float32)
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_it_goes_on_from_the_newest_checkpoint(inputs: Path, tmp_path: Path) -> None:
    """And reads its data as a stream."""
    file, out = tmp_path / "run.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({"resume_from_checkpoint": True}))
    command = changed(
        SFT, inputs, out, "SFT", "--gradient_accumulation_steps 1 --eval_strategy no --eos_token '<eos>'"
    )
    command += ["--dataset_streaming", "--packing", "false", "--save_steps", "2"]
    assert main(command) == 0
    expected = without_times(log_in(out))
    shutil.rmtree(out / "checkpoint-3")
    assert main([*command, "--config", str(file)]) == 0
    assert_close(without_times(log_in(out))[-1]["loss"], expected[-1]["loss"], "training")
    assert [entry["step"] for entry in log_in(out)] == [1, 2, 3]


def test_a_mixture_of_files_and_directories(inputs: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    sources = [
        {"path": str(inputs / "texts.jsonl"), "fraction": 0.75},
        {"path": str(inputs / "texts"), "fraction": 0.25, "split": "test"},
    ]
    file.write_text(yaml.safe_dump({"datasets": sources, "test_split_size": 0.25, "use_cpu": True, "bf16": False}))
    parser = train.make_parser("sft")
    arguments = train.parse(parser, ["--config", str(file), "--model_name_or_path", "any"])
    splits = train.load_data(arguments)
    # 24 of the file and 8 of the directory.
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 24, "test": 8}


@pytest.mark.parametrize("kind", TRAINING)
def test_every_option_of_trl_is_there_with_its_default(kind: str) -> None:
    ours, theirs = train.make_parser(kind), importlib.import_module(f"trl.scripts.{kind}").make_parser()
    for word, action in theirs._option_string_actions.items():
        same = ours._option_string_actions[word]
        assert same.dest == action.dest and same.nargs == action.nargs, word
        assert same.default == action.default, word


@pytest.mark.parametrize("kind", TRAINING)
def test_help_teaches(kind: str) -> None:
    text = train.make_parser(kind).format_help()
    for word in (
        "exit code",
        "examples",
        f"hf-moe-accel {kind} --config",
        "--nproc 8",
        "srun",
        "torchrun",
        "datasets:",
    ):
        assert word in text
    groups = re.split(r"\n(?=\S[^\n]*:\n  -)", text)
    (experts,) = [group for group in groups if group.startswith("experts")]
    for field in fields(MoEAccelConfig):
        assert f"--{field.name} " in experts
    assert sum("--learning_rate " in group and group.startswith("training") for group in groups) == 1
    assert "usage: " in text and len(text.split("\n\n")[0].splitlines()) == 1


def test_what_is_wrong_with_the_file_is_said_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("packing: [")
    blocked = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None"
    code = f"{blocked}; from hf_moe_accel.cli import main; main()"
    for name, problem in (("nowhere.yaml", "No such file"), (str(file), "while parsing a flow node")):
        command = [sys.executable, "-c", code, "sft", "--config", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert f"--config {name} cannot be read" in done.stderr and problem in done.stderr


GOOD = {"model_name_or_path": "MODEL", "dataset_name": "DATA", "use_cpu": True, "bf16": False, "report_to": "none"}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model_name_or_path": None}, "--model_name_or_path is missing"),
    "no data": ({"dataset_name": None}, "--dataset_name is missing.*`datasets:` in the YAML file"),
    "4 bit": ({"load_in_4bit": True}, "--load_in_4bit: quantized models .* are not supported.*QLoRA"),
    "8 bit": ({"load_in_8bit": True}, "--load_in_8bit: quantized models .* are not supported"),
    "a typo": ({"learning_rat": 1}, "--learning_rat is no option of this command: did you mean --learning"),
    "of accelerate": (
        {"num_machines": 2},
        "--num_machines is no option.*`accelerate launch ... -m hf_moe_accel.cli sft",
    ),
    "ours out of range": ({"ep_size": 0}, "ep_size=0 must be 'auto' or a whole number"),
    "theirs out of range": ({"logging_steps": 0}, "requires non-zero --logging_steps"),
    "no ranks": ({"nproc": 0}, "--nproc 0 must be 1 or more"),
    "two numbers": ({"nproc": 2, "num_processes": 3}, "--nproc 2 and --num_processes 3 contradict"),
    "ZeRO": ({"accelerate_config": "zero3"}, "zero3 asks for DEEPSPEED.*start the ranks with --nproc 8"),
    "FSDP": ({"accelerate_config": "fsdp2"}, "fsdp2 asks for FSDP.*start the ranks with --nproc 8"),
    "no such configuration": ({"accelerate_config": "zero9"}, "zero9 is no file and none of TRL's"),
    "for DDP": ({"ignore_bias_buffers": True}, "--ignore_bias_buffers is for DDP.*delete it"),
    "a mixture of what": ({"datasets": [{"pth": "x"}]}, "unexpected keyword argument 'pth'"),
    "a mixture without shares": (
        {"datasets": [{"path": "FILE", "fraction": 0.5}, {"path": "FILE"}]},
        "`fraction` must be set for either all",
    ),
    "a file of what": ({"dataset_name": "MODEL/tokenizer_config.jsonx"}, "jsonx"),
    "no such split": ({"dataset_train_split": "training"}, "--dataset_train_split training: .* but .*test"),
    "no split for evaluation": (
        {"dataset_name": "FILE", "eval_strategy": "steps"},
        "--dataset_test_split test: .*train",
    ),
    "no such model": ({"model_name_or_path": "nowhere/at-all"}, "nowhere/at-all"),
    "the layout": ({"token_dispatcher": "all_to_all"}, "token_dispatcher='all_to_all' needs ep_size > 1"),
    "the arguments": ({"auto_find_batch_size": True}, "auto_find_batch_size=True is not supported"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_bad_input(
    settings: dict[str, Any], message: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"MODEL": inputs / "model", "DATA": inputs / "texts", "FILE": inputs / "texts.jsonl"}
    text = yaml.safe_dump({k: v for k, v in (GOOD | settings).items() if v is not None} | {"output_dir": "OUT"})
    for name, path in (places | {"OUT": tmp_path / "out"}).items():
        text = text.replace(name, str(path))
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["sft", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert re.search(f"hf-moe-accel sft: error: .*{message}", said, re.DOTALL), said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--nproc two", "invalid int value: 'two'"),
        ("--loss_type none", "invalid choice"),
        ("--config", "expected one"),
    ],
)
def test_options_that_cannot_be_read(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sft", *option.split()])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def started(monkeypatch: pytest.MonkeyPatch, inputs: Path, *options: str) -> list[str]:
    """The command that a process becomes."""
    seen: list[Any] = []

    def execve(path: str, command: list[str], environ: dict[str, str]) -> None:
        assert path == sys.executable and environ[launch.STARTED] == "1"
        seen.extend(command)
        raise SystemExit

    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(SystemExit):
        main(["sft", "--model_name_or_path", "any", "--dataset_name", str(inputs / "texts"), *options])
    return seen


def test_what_it_becomes(monkeypatch: pytest.MonkeyPatch, inputs: Path) -> None:
    cpu = ("--use_cpu", "--bf16", "false")
    command = started(monkeypatch, inputs, *cpu, "--nproc", "3")
    assert command[1:6] == ["-m", "hf_moe_accel.launch", "3", "hf_moe_accel.cli", "sft"]
    assert command[-2:] == ["--nproc", "3"]
    command = started(monkeypatch, inputs, *cpu, "--accelerate_config", "multi_gpu", "--num_processes", "2")
    assert command[1:4] == ["-m", "accelerate.commands.launch", "--config_file"]
    assert command[4].endswith("accelerate_configs/multi_gpu.yaml")
    assert command[5:10] == ["--num_processes", "2", "-m", "hf_moe_accel.cli", "sft"]


class OnGPUs:
    use_cpu = False


@pytest.mark.parametrize(
    ("nproc", "num_gpus", "starts"), [(None, 1, False), (1, 1, False), (1, 8, True), (8, 8, True), (2, 0, True)]
)
def test_when_ranks_are_started(
    nproc: int | None, num_gpus: int, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    arguments: Any = train.Arguments(None, None, None, OnGPUs(), MoEAccelConfig(), train.LaunchArguments(nproc))
    assert train.must_start(arguments) == starts


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    arguments: Any = train.Arguments(None, None, None, OnGPUs(), MoEAccelConfig(), train.LaunchArguments(8))
    with pytest.raises(ValueError, match="--nproc 8 is more than this machine's GPUs, 4"):
        train.must_start(arguments)


@pytest.mark.parametrize("option", ["--nproc 2", "--num_processes 2", "--accelerate_config multi_gpu"])
def test_under_a_launcher_no_ranks_are_started(
    option: str, monkeypatch: pytest.MonkeyPatch, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for variables, launcher in (
        ({"RANK": "0"}, "torchrun or accelerate launch (RANK=0)"),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, "srun"),
    ):
        with monkeypatch.context() as environment:
            for name in LAUNCHERS:
                environment.setenv(name, "")
                environment.delenv(name)
            for name, value in variables.items():
                environment.setenv(name, value)
            assert main(["sft", *option.split()]) == 2
        said = capsys.readouterr().err
        assert f"{option} would start ranks, but {launcher}" in said


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "srun", "--accelerate_config"])
def test_it_joins_what_is_there(launcher: str, inputs: Path, tmp_path: Path) -> None:
    arguments = ["-m", "hf_moe_accel.cli", *changed(REWARD, inputs, tmp_path / "out", "Reward")]
    settings = {"distributed_type": "MULTI_GPU", "num_processes": 2, "num_machines": 1, "use_cpu": True}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(settings))
    config = str(tmp_path / "accelerate.yaml")
    if launcher == "torchrun":
        done = run_program(arguments, 2)
    elif launcher == "accelerate":
        done = run_program(["-m", "accelerate.commands.launch", "--config_file", config, *arguments])
    elif launcher == "--accelerate_config":
        done = run_program([*arguments, launcher, config])
    else:
        # As srun would: two processes, told apart by Slurm's variables.
        code = """
import os, subprocess, sys
step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2"}
step |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_NODEID": "0"}
tasks = [
    subprocess.Popen([sys.executable, *sys.argv[1:]], env=os.environ | step | {"SLURM_PROCID": i, "SLURM_LOCALID": i})
    for i in "01"
]
sys.exit(max(task.wait() for task in tasks))
"""
        done = run_program(["-c", code, *arguments])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(2 ranks)" in done.stderr
    assert len(log_in(tmp_path / "out")) >= 3
