"""The command line: `hf-moe-accel COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

DEMO_DESCRIPTION = """\
Train a small Qwen3-MoE from random weights, with expert parallelism, and prove the result.

The data are (signature, docstring) pairs read from the sources of Python's own standard library; nothing is
downloaded. A byte-level BPE tokenizer is trained first, then the model, on 2 ranks where there is no GPU and on all
GPUs otherwise. The checkpoint is reloaded with plain transformers, which must compute the same logits, and completes
signatures that were held out. On 2 CPU cores this takes 3 to 4 minutes."""

DEMO_EPILOG = """\
what is left in DIR:
  checkpoint/                     the trained model, as save_pretrained of transformers would have written it
  demo.png                        the loss, and the load of the experts over time
  history.json                    the numbers behind the picture
  reference_logits.safetensors    what the trained model computed, and the reloaded one has to
An earlier demo's files in DIR are overwritten; others are left alone.

exit code:
  0  the held-out loss fell and the reloaded checkpoint computes what the trained model did
  1  it did not, or training failed
  2  the options do not fit this machine, or a package is missing

examples:
  hf-moe-accel demo
  hf-moe-accel demo --steps 50 --output-dir /tmp/demo
  CUDA_VISIBLE_DEVICES= hf-moe-accel demo --nproc 4
  torchrun --nproc-per-node 2 -m hf_moe_accel.cli demo"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="hf-moe-accel",
        description="Fine-tune Hugging Face mixture-of-experts models with expert parallelism.",
        epilog="hf-moe-accel COMMAND --help explains a command.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    arguments = parser.parse_args(argv)
    code: int = arguments.run(arguments)
    return code


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

    def run(arguments: argparse.Namespace) -> int:
        # Imported here: torch and transformers take seconds, and --help shall not.
        from hf_moe_accel.demo.command import check_demo, run_demo
        from hf_moe_accel.demo.options import DemoOptions

        options = DemoOptions(arguments.output_dir, arguments.steps, arguments.nproc, arguments.seed)
        try:
            check_demo(options)
        except ValueError as error:
            parser.error(str(error))
        return run_demo(options)

    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
