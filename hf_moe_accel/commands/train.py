"""`hf-moe-accel sft`, `dpo`, `kto` and `reward`: TRL's scripts, of TRL's own parts, on our trainers."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import trl
import yaml
from datasets import load_dataset

import hf_moe_accel
from hf_moe_accel.config import MoEAccelConfig
from hf_moe_accel.hf.discover import NO_QUANTIZED
from hf_moe_accel.launch import BAD_INPUT, STARTED, join
from hf_moe_accel.log import say

DESCRIPTION = """\
{task}, with the experts spread over the GPUs.
Options, YAML files and mixtures of data sets are those of `trl {kind}`: a command runs with the word changed.

Every option can stand in the YAML file instead, under its name; what is given here wins. The file's section `env:`
holds environment variables. --dataset_name is a hub id, a directory, or a file (.jsonl, .json, .csv or .parquet).

With --nproc the ranks are started on this machine. Without it this process is the only one, or, under torchrun,
accelerate launch or srun, one of those that are there."""

EPILOG = """\
what is left in --output_dir: the model, or with --use_peft the adapter, as transformers and PEFT load them, and the
checkpoints of the run.

exit code:
  0  trained and saved
  1  training failed
  2  an option, the data or the model do not fit; nothing was trained

examples:
  hf-moe-accel {kind} --model_name_or_path Qwen/Qwen3-30B-A3B --dataset_name {data} --nproc 8
  hf-moe-accel {kind} --config run.yaml --nproc 8 --learning_rate 1e-5
  hf-moe-accel {kind} --model_name_or_path models/base --dataset_name train.jsonl --output_dir out --nproc 8 \\
      --use_peft --lora_target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj
  torchrun --nnodes 2 --nproc-per-node 8 ... -m hf_moe_accel.cli {kind} --config run.yaml
  srun --ntasks-per-node 8 hf-moe-accel {kind} --config run.yaml
A mixture of data sets, in the YAML file:
  datasets:
    - path: {data}
      fraction: 0.8
    - path: my/train.jsonl
      fraction: 0.2"""

TASKS = {
    "sft": ("Supervised fine-tuning", "SFT", "trl-lib/Capybara"),
    "dpo": ("Direct preference optimization", "DPO", "trl-lib/ultrafeedback_binarized"),
    "kto": ("Kahneman-Tversky optimization", "KTO", "trl-lib/kto-mix-14k"),
    "reward": ("Training of a reward model", "Reward", "trl-lib/ultrafeedback_binarized"),
}
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class LaunchArguments:
    """Which processes run.

    Raises:
        ValueError: a number below 1.
    """

    nproc: int | None = field(
        default=None, metadata={"help": "Ranks to start on this machine, one a GPU. Not under another launcher."}
    )
    num_processes: int | None = field(default=None, metadata={"help": "What `trl` calls --nproc."})
    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "Start the ranks with `accelerate launch` and this configuration: a file, or 'multi_gpu' or "
            "'single_gpu' of TRL. One that shards (FSDP, DeepSpeed) is refused."
        },
    )

    def __post_init__(self) -> None:
        """Check the numbers by arithmetic alone."""
        for name in ("nproc", "num_processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be 1 or more.")
        if None not in (self.nproc, self.num_processes) and self.nproc != self.num_processes:
            raise ValueError(f"--nproc {self.nproc} and --num_processes {self.num_processes} contradict each other.")

    @property
    def num_ranks(self) -> int | None:
        """How many were asked for."""
        return self.nproc or self.num_processes

    @property
    def given(self) -> str | None:
        """The option that asks for new ranks."""
        names = ("nproc", "num_processes", "accelerate_config")
        return next((f"--{name} {getattr(self, name)}" for name in names if getattr(self, name) is not None), None)


@dataclass
class Arguments:
    """All that a command was told, in the classes of those who read it."""

    script: Any
    mixture: Any
    model: Any
    training: Any
    moe: MoEAccelConfig
    launch: LaunchArguments


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of description and examples as they are."""


def train(kind: str, argv: Sequence[str]) -> int:
    """Run one command and return the exit code. Under a launcher all ranks must call.

    Args:
        kind: "sft", "dpo", "kto" or "reward".
        argv: its options.
    """
    parser = make_parser(kind)
    try:
        check_alone(argv)
        arguments = parse(parser, argv)
        if must_start(arguments):
            start(kind, argv, arguments.launch)
        trainer = make_trainer(kind, arguments)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    run(trainer, arguments)
    return 0


def make_parser(kind: str) -> Any:
    """TRL's parser of a command, with our options in groups of their own."""
    task, name, data = TASKS[kind]
    groups = {
        "processes (of hf_moe_accel)": LaunchArguments,
        "experts (of hf_moe_accel)": MoEAccelConfig,
        "data": trl.ScriptArguments,
        "a mixture of data sets, in the YAML file": trl.DatasetMixtureConfig,
        "model and LoRA": trl.ModelConfig,
        "training": getattr(trl, f"{name}Config"),
    }
    # A class's group is an attribute of it, and most of these are not ours.
    titled = [type(cls.__name__, (cls,), {"_argument_group_name": title}) for title, cls in groups.items()]
    parser = trl.TrlParser(
        titled,
        prog=f"hf-moe-accel {kind}",
        usage="%(prog)s --model_name_or_path MODEL --dataset_name DATA [--config FILE] [--nproc N] [OPTION ...]",
        description=DESCRIPTION.format(kind=kind, task=task),
        epilog=EPILOG.format(kind=kind, data=data),
        formatter_class=_HelpFormatter,
    )
    parser.dataclass_types = list(groups.values())
    return parser


def check_alone(argv: Sequence[str]) -> None:
    """Join the ranks of a launcher, which the options must not ask for as well.

    Before the other options are read: training arguments wait for all ranks, and these may never come.

    Raises:
        ValueError: they do.
    """
    parser = trl.TrlParser([LaunchArguments], add_help=False, allow_abbrev=False)
    launch, _ = parser.parse_args_and_config(argv, return_remaining_strings=True)
    launcher = join()
    if launcher is not None and launch.given is not None and STARTED not in os.environ:
        raise ValueError(
            f"{launch.given} would start ranks, but {launcher} has started this process as one of several already: "
            "delete the option (from the YAML file too), or start the command by itself."
        )


def parse(parser: Any, argv: Sequence[str]) -> Arguments:
    """Read options and YAML file, and check them as far as that needs neither data nor model.

    Raises:
        ValueError: an option is unknown, missing or out of range.
    """
    try:
        *known, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    except TypeError as error:  # an entry of `datasets:` with a name that it does not have
        raise ValueError(str(error)) from error
    launch, moe, script, mixture, model, training = known
    if unknown:
        raise ValueError(_why_unknown(parser, unknown))
    if model.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: a hub id or the directory of a model.")
    if not mixture.datasets and script.dataset_name is None:
        raise ValueError(
            "--dataset_name is missing: a hub id, a directory or a file; or `datasets:` in the YAML file of --config."
        )
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(model, name):
            raise ValueError(f"--{name}: {NO_QUANTIZED}")
    if script.ignore_bias_buffers:
        raise ValueError("--ignore_bias_buffers is for DDP, which shards no experts and is not used here: delete it.")
    return Arguments(script, mixture, model, training, moe, launch)


def _why_unknown(parser: Any, unknown: Sequence[str]) -> str:
    # The values of unknown options are unknown too; of two words that stand alone the first is as good as any.
    name = next((word for word in unknown if word.startswith("--")), unknown[0]).partition("=")[0]
    close = difflib.get_close_matches(name, parser._option_string_actions, n=1)
    hint = f"did you mean {close[0]}?" if close else f"`{parser.prog} --help` lists the options."
    command = parser.prog.split()[-1]
    return (
        f"{name} is no option of this command: {hint} On one machine --nproc starts the ranks; options of accelerate "
        f"go in front: `accelerate launch ... -m hf_moe_accel.cli {command} ...`."
    )


def must_start(arguments: Arguments) -> bool:
    """Whether this process shall start others, and not be one of them.

    Raises:
        ValueError: there are fewer GPUs than ranks.
    """
    launch, num_ranks = arguments.launch, arguments.launch.num_ranks
    if launch.given is None or STARTED in os.environ:
        return False
    num_gpus = 0 if arguments.training.use_cpu else torch.cuda.device_count()
    if num_ranks and 0 < num_gpus < num_ranks:
        raise ValueError(
            f"{launch.given} is more than this machine's GPUs, {num_gpus}, and each rank takes one: use "
            f"--nproc {num_gpus} or less."
        )
    # One process that sees several GPUs would make Trainer split batches over them (DataParallel).
    return launch.accelerate_config is not None or num_ranks != 1 or num_gpus > 1


def start(kind: str, argv: Sequence[str], launch: LaunchArguments) -> NoReturn:
    """Become the launcher of the ranks. What this process has taken of a GPU to check the options is free again.

    Raises:
        ValueError: the configuration of accelerate cannot be used.
    """
    if launch.accelerate_config is not None:
        file = find_accelerate_config(launch.accelerate_config)
        number = [] if launch.num_ranks is None else ["--num_processes", str(launch.num_ranks)]
        launcher = ["accelerate.commands.launch", "--config_file", str(file), *number, "-m"]
    else:
        launcher = ["hf_moe_accel.launch", str(launch.num_ranks)]
    command = [sys.executable, "-m", *launcher, "hf_moe_accel.cli", kind, *argv]
    sys.stdout.flush()
    os.execve(sys.executable, command, os.environ | {STARTED: "1"})


def find_accelerate_config(name: str) -> Path:
    """The file of a configuration of accelerate, which may be one that TRL ships.

    Raises:
        ValueError: there is none, or it wants another way of sharding.
    """
    path = Path(name)
    if not path.is_file():
        path = Path(trl.__file__).parent / "accelerate_configs" / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"--accelerate_config {name} is no file and none of TRL's configurations.")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"--accelerate_config {name} holds no settings.")
    wanted = str(config.get("distributed_type", "NO"))
    if wanted not in ("NO", "MULTI_GPU"):
        raise ValueError(
            f"--accelerate_config {name} asks for {wanted}, but how ranks share the work is chosen here: leave it out "
            f"and start the ranks with --nproc {config.get('num_processes', 8)} (or fewer, one a GPU); --ep_size and "
            "--dp_replicate_size change the layout."
        )
    return path


def load_data(arguments: Arguments) -> Mapping[str, Any]:
    """The splits of the data set or mixture, from the hub or this machine.

    Raises:
        ValueError: a file is of no kind that can be read, or the data cannot be mixed.
        OSError: there is no such data set.
    """
    script, mixture = arguments.script, arguments.mixture
    if mixture.datasets:
        if script.dataset_name is not None:
            say(f"hf_moe_accel: the mixture in the YAML file is used, and not --dataset_name {script.dataset_name}.")
        for entry in mixture.datasets:
            if Path(entry.path).is_file():
                entry.path, entry.data_files = _reader(entry.path), entry.path
        splits: Mapping[str, Any] = trl.get_dataset(mixture)
    else:
        name, options = script.dataset_name, {"name": script.dataset_config, "streaming": script.dataset_streaming}
        if Path(name).is_file():
            splits = load_dataset(_reader(name), data_files=name, **options)
        else:
            splits = load_dataset(name, **options)
    return splits


def _reader(file: str) -> str:
    suffix = Path(file).suffix
    if suffix not in READERS:
        raise ValueError(f"the data set {file} ends in {suffix!r}, which is none of {', '.join(READERS)}.")
    return READERS[suffix]


def _split(splits: Mapping[str, Any], name: str, option: str) -> Any:
    if name not in splits:
        raise ValueError(f"{option} {name}: the data set has no such split, but {', '.join(splits)}.")
    return splits[name]


def make_trainer(kind: str, arguments: Arguments) -> Any:
    """The trainer of a command, with its model. Under a launcher all ranks must call.

    Raises:
        ValueError: data, model and options do not fit each other.
        OSError: there are no such data or no such model.
    """
    model, training, script = arguments.model, arguments.training, arguments.script
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    } | (training.model_init_kwargs or {})
    splits = load_data(arguments)
    evaluation = None
    if training.eval_strategy != "no":
        evaluation = _split(splits, script.dataset_test_split, "--dataset_test_split")
    trainer_class = getattr(hf_moe_accel, f"AcceleratedMoE{TASKS[kind][1]}Trainer")
    options = {
        "train_dataset": _split(splits, script.dataset_train_split, "--dataset_train_split"),
        "eval_dataset": evaluation,
        "peft_config": trl.get_peft_config(model),
        "moe_config": arguments.moe,
    }
    try:
        return trainer_class(model.model_name_or_path, args=training, **options)
    except OSError as error:  # without the network it does not say what could not be read
        raise OSError(f"--model_name_or_path {model.model_name_or_path}: {error}") from error


def run(trainer: Any, arguments: Arguments) -> None:
    """Train, save, and end the process group. Under a launcher all ranks must call."""
    training = arguments.training
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    say(f"hf_moe_accel: saved to {training.output_dir}")
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.script.dataset_name)
    trainer.end()
