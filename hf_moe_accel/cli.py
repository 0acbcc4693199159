"""The command line: `hf-moe-accel COMMAND`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

DEMO_DESCRIPTION = """\
Train a small Qwen3-MoE from random weights, with expert parallelism, and prove the result.

The data are (signature, docstring) pairs read from the sources of Python's own standard library; nothing is
downloaded. A byte-level BPE tokenizer is trained first, then the model, on 2 ranks where there is no GPU and on all
GPUs otherwise. The checkpoint is reloaded with plain transformers, which must compute the same logits, and completes
signatures that were held out. On 2 CPU cores this takes 3 to 4 minutes.

With --lora the same job trains a LoRA adapter on attention and experts instead. Embeddings and output layer are
trained in full even so: the model starts from random weights, which know no token yet. What is reloaded is the model
with the adapter folded in."""

DEMO_EPILOG = """\
what is left in DIR:
  checkpoint/                     the trained model, as save_pretrained of transformers would have written it
  adapter/                        with --lora: what was trained, as PEFT writes it; fits the random weights of --seed
  demo.png                        the loss, and the load of the experts over time
  report/index.html               the page of hf-moe-accel report: that picture, and others
  moe_metrics.jsonl               the numbers behind the pictures
  wandb/                          where wandb is installed: the run, offline
  history.json                    the losses, and what else is summed up at the end
  reference_logits.safetensors    what the trained model computed, and the reloaded one has to
An earlier demo's files in DIR are overwritten; others are left alone.

exit code:
  0  the held-out loss fell and the reloaded checkpoint computes what the trained model did
  1  it did not, or training failed
  2  the options do not fit this machine, or a package is missing

examples:
  hf-moe-accel demo
  hf-moe-accel demo --steps 50 --output-dir /tmp/demo
  hf-moe-accel demo --lora --output-dir /tmp/lora
  CUDA_VISIBLE_DEVICES= hf-moe-accel demo --nproc 4
  torchrun --nproc-per-node 2 -m hf_moe_accel.cli demo"""

CHECKPOINT_DESCRIPTION = """\
Look after the checkpoints of a run, on any machine: no GPU is needed, and no matter how many ranks saved them."""

VERIFY_DESCRIPTION = """\
Say whether a checkpoint is as it was saved: every file is read and compared with the sizes and checksums that
manifest.json holds. Nothing is changed.

Given a run's output_dir, each checkpoint in it is verified, half-written ones are named, and so is the newest intact
one, which is the one to resume from. Files that were not saved with the checkpoint are named and do no harm."""

VERIFY_EPILOG = """\
exit code:
  0  every file is as it was saved
  1  a file is missing, truncated or altered, or the directory holds half-written checkpoints only
  2  DIR does not exist, or there is no checkpoint in it

examples:
  hf-moe-accel checkpoint verify run/checkpoint-20
  hf-moe-accel checkpoint verify run"""

EXPORT_DESCRIPTION = """\
Copy the model out of a training checkpoint: config, weights and tokenizer, or the adapter, as save_pretrained writes
them and plain transformers or PEFT load them. Optimizer and trainer state stay behind.

Each file is verified while it is copied, and OUT appears once all of them are on the disk. Until then the copy lies
beside it, in OUT.partial, and is removed if anything fails. The checkpoint is not changed."""

EXPORT_EPILOG = """\
exit code:
  0  OUT holds the model
  1  a file is missing, truncated or altered, or could not be written; there is no OUT
  2  DIR is no checkpoint, or OUT is a file, not empty, or inside DIR; nothing was touched

examples:
  hf-moe-accel checkpoint export run/checkpoint-20 model
  hf-moe-accel checkpoint verify run && hf-moe-accel checkpoint export run/checkpoint-20 model"""

MERGE_DESCRIPTION = """\
Fold a LoRA adapter that PEFT saved into the checkpoint that it was trained on: on attention, on experts
(target_parameters), and tensors of modules_to_save. OUT is a standard checkpoint with the keys, dtypes and files of
BASE, for plain transformers, vLLM and others; its configuration and tokenizer are BASE's.

No GPU is needed, and no memory for the model: the weights are read and written one tensor at a time. Sums are taken
in fp32 and rounded once to the dtype of BASE; a tensor without an adapter is copied bit for bit. OUT appears once all
of it is on the disk. Until then it lies beside it, in OUT.partial, and is removed if anything fails."""

MERGE_EPILOG = """\
exit code:
  0  OUT holds the merged model
  1  a file could not be read or written; there is no OUT
  2  nothing was written: BASE is not there or quantized, ADAPTER is none of LoRA, of a kind that cannot be folded in
     (DoRA, biases) or of another base, OUT is not empty, or PEFT is missing

examples:
  hf-moe-accel merge Qwen/Qwen3-30B-A3B run/checkpoint-20 merged
  hf-moe-accel merge models/base my-adapter /data/merged"""


# What TRL's parser reads: it knows hundreds of options, and takes seconds to import.
TRAINING = {
    "sft": "supervised fine-tuning on texts, chats, or prompts with completions",
    "dpo": "preference training on pairs of a chosen and a rejected answer",
    "kto": "preference training on answers that are each called good or bad",
    "reward": "train a model that scores answers, on pairs of a chosen and a rejected one",
}

REPORT_DESCRIPTION = """\
Draw what a run has logged, without an account anywhere: the loss, the load of the experts over time, balance, speed
and the parts of a step, from the file moe_metrics.jsonl that a run of our trainers keeps in its output_dir. A run that
is still going on can be looked at as well."""

REPORT_EPILOG = """\
what is left in RUN_DIR/report, in the place of an earlier report:
  index.html      one page with all pictures in it, the newest numbers and what was prepared
  overview.png    the loss, and the load of the experts over time
  balance.png     how evenly experts and ranks are used
  layers.png      the same by layer
  speed.png       tokens a second, and the parts of a step
  ranks.png       tokens sent to each rank (several ranks only)

exit code:
  0  the page is written
  2  RUN_DIR holds no such file or nothing to draw, or matplotlib is missing

examples:
  hf-moe-accel report run
  hf-moe-accel report demo-output"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in TRAINING:
        return _train(argv[0], argv[1:])
    parser = argparse.ArgumentParser(
        prog="hf-moe-accel",
        description="Fine-tune Hugging Face mixture-of-experts models with expert parallelism.",
        epilog="hf-moe-accel COMMAND --help explains a command.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, task in TRAINING.items():
        commands.add_parser(name, help=f"{task}; options and files of `trl {name}`")
    _add_demo(commands)
    _add_checkpoint(commands)
    _add_merge(commands)
    _add_report(commands)
    arguments = parser.parse_args(argv)
    code: int = arguments.run(arguments)
    return code


def _train(kind: str, argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"hf-moe-accel {kind}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE")
    given, options = parser.parse_known_args(argv)
    if importlib.util.find_spec("trl") is None:
        parser.error("it needs TRL, which is not installed: pip install 'hf_moe_accel[trl]'")
    if given.config is not None:
        _checked(parser, _set_environment, given.config)
        options = ["--config", given.config, *options]

    from hf_moe_accel.commands.train import train

    return train(kind, options)


def _set_environment(file: str) -> None:
    """Set the variables of a YAML file's `env:`; libraries read some of them while they are imported.

    Raises:
        ValueError: it is no such file.
    """
    import yaml

    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {file} cannot be read: {' '.join(str(error).split())}") from error
    variables = settings.get("env", {}) if isinstance(settings, dict) else None
    if not isinstance(variables, dict):
        raise ValueError(f"--config {file} must hold `option: value` lines, and under `env:` more of them.")
    os.environ |= {name: str(value) for name, value in variables.items()}


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="train, save, reload and draw a small model; nothing is downloaded",
        description=DEMO_DESCRIPTION,
        epilog=DEMO_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output-dir", default="demo-output", metavar="DIR", help="where the files go (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=_positive, metavar="N", help="training steps (default: as many as take some 3 minutes)"
    )
    parser.add_argument(
        "--nproc",
        type=_positive,
        metavar="N",
        help="ranks to launch (default: one for each GPU, 2 without); 1 launches nothing and trains in this process; "
        "under torchrun its ranks are used instead",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of weights, order and samples (default: %(default)s)"
    )
    parser.add_argument(
        "--lora",
        action="store_true",
        help="train LoRA of rank 16 on attention and experts, and only embeddings and output layer in full; needs the "
        "package peft",
    )

    def run(arguments: argparse.Namespace) -> int:
        # Imported here: torch and transformers take seconds, and --help shall not.
        from hf_moe_accel.demo.command import check_demo, run_demo
        from hf_moe_accel.demo.options import DemoOptions

        options = DemoOptions(arguments.output_dir, arguments.steps, arguments.nproc, arguments.seed, arguments.lora)
        _checked(parser, check_demo, options)
        return run_demo(options)

    parser.set_defaults(run=run)


def _add_checkpoint(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "checkpoint",
        help="verify a checkpoint, or take the standard model out of it",
        description=CHECKPOINT_DESCRIPTION,
        epilog="hf-moe-accel checkpoint COMMAND --help explains a command and its exit codes.",
    )
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    verify = actions.add_parser(
        "verify",
        help="say whether checkpoints are as they were saved",
        description=VERIFY_DESCRIPTION,
        epilog=VERIFY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("directory", metavar="DIR", type=Path, help="a checkpoint, or a run's output_dir")

    def run_verify(arguments: argparse.Namespace) -> int:
        # Imported here: torch takes seconds, and --help shall not.
        from hf_moe_accel.commands import checkpoint

        _checked(verify, checkpoint.check_verify, arguments.directory)
        return checkpoint.verify(arguments.directory)

    verify.set_defaults(run=run_verify)

    export = actions.add_parser(
        "export",
        help="copy the model that transformers or PEFT load out of a checkpoint",
        description=EXPORT_DESCRIPTION,
        epilog=EXPORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("directory", metavar="DIR", type=Path, help="a checkpoint")
    export.add_argument("out", metavar="OUT", type=Path, help="a directory, which is made and must not hold anything")

    def run_export(arguments: argparse.Namespace) -> int:
        from hf_moe_accel.commands import checkpoint

        _checked(export, checkpoint.check_export, arguments.directory, arguments.out)
        return checkpoint.export(arguments.directory, arguments.out)

    export.set_defaults(run=run_export)


def _add_merge(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "merge",
        help="fold a LoRA adapter into its base checkpoint",
        description=MERGE_DESCRIPTION,
        epilog=MERGE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", metavar="BASE", help="a checkpoint: a directory, or a hub id")
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="what PEFT saved: a directory (a run's checkpoint is one), or a hub id"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="a directory, which is made and must not hold anything")
    parser.add_argument(
        "--layout",
        choices=("current", "swapped"),
        help="how the adapter's factors of experts lie: 'current' if PEFT 0.19.1 or later saved them, 'swapped' if an "
        "earlier one did. Seen from their shapes unless an expert has as many inputs as outputs",
    )

    def run(arguments: argparse.Namespace) -> int:
        # Imported here: torch and transformers take seconds, and --help shall not.
        from hf_moe_accel.commands.merge import check_merge, merge

        wanted = (arguments.base, arguments.adapter, arguments.out, arguments.layout)
        return merge(_checked(parser, check_merge, *wanted), arguments.out)

    parser.set_defaults(run=run)


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "report",
        help="draw what a run has logged, as pictures and one page",
        description=REPORT_DESCRIPTION,
        epilog=REPORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="RUN_DIR", type=Path, help="a run's output_dir")

    def run(arguments: argparse.Namespace) -> int:
        # Imported here: torch takes seconds, and --help shall not.
        from hf_moe_accel.commands.report import check_report, report

        return report(_checked(parser, check_report, arguments.directory), arguments.directory)

    parser.set_defaults(run=run)


def _checked(parser: argparse.ArgumentParser, check: Callable[..., T], *arguments: object) -> T:
    """What a check returns; where it raises a `ValueError`, the command ends with it and exit code 2."""
    try:
        return check(*arguments)
    except ValueError as error:
        parser.error(str(error))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
