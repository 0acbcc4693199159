"""`hf-moe-accel demo`: launches the training job on all ranks, then draws, checks and sums up what it left."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_moe_accel.callbacks import pictures
from hf_moe_accel.callbacks.page import write_report
from hf_moe_accel.callbacks.run_file import read_run
from hf_moe_accel.demo.history import History
from hf_moe_accel.demo.options import DemoOptions, OutputFiles
from hf_moe_accel.launch import launch

if TYPE_CHECKING:
    from hf_moe_accel.demo.reload import ReloadCheck, ReloadedCheckpoint

NUM_CPU_RANKS = 2


def check_demo(options: DemoOptions) -> None:
    """Check what can be checked before anything is started.

    Raises:
        ValueError: a package is not installed, or an option does not fit this machine.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the demo draws with matplotlib, which is not installed: pip install 'hf_moe_accel[demo]'")
    if options.lora and importlib.util.find_spec("peft") is None:
        raise ValueError("--lora needs PEFT, which is not installed: pip install 'hf_moe_accel[lora]'")
    folder = Path(options.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir {folder} is a file: name a folder, which is created if there is none")
    num_gpus = torch.cuda.device_count()
    if options.nproc and 0 < num_gpus < options.nproc:
        raise ValueError(
            f"--nproc {options.nproc} is more than this machine's GPUs, {num_gpus}, and each rank takes one: use "
            f"--nproc {num_gpus} or less, or hide the GPUs (CUDA_VISIBLE_DEVICES= in front of the command)"
        )


def run_demo(options: DemoOptions) -> int:
    """Run the whole demo and return the exit code: 0 only if the loss fell and the checkpoint reloads as it was saved.

    Under torchrun it joins the ranks that are there, so all ranks must call; elsewhere it launches its own.
    """
    started = time.monotonic()
    files = OutputFiles(Path(options.output_dir))
    is_under_torchrun = "RANK" in os.environ
    is_main = os.environ.get("RANK", "0") == "0"
    num_ranks = options.nproc or torch.cuda.device_count() or NUM_CPU_RANKS
    if is_main:
        files.clear()
    # One process that sees several GPUs would make Trainer split batches over them (DataParallel).
    if is_under_torchrun or (num_ranks == 1 and torch.cuda.device_count() <= 1):
        from hf_moe_accel.demo.job import train

        train(options)
    elif launch(num_ranks, "hf_moe_accel.demo.job", [json.dumps(dataclasses.asdict(options))]):
        print("The training job failed: the errors of its ranks are above.", file=sys.stderr)
        return 1
    if not is_main:
        return 0

    # Imported late: loading transformers takes seconds, and the ranks need not wait for it.
    from hf_moe_accel.demo.reload import ReloadedCheckpoint

    history = History.load(files.history)
    run = read_run(files.folder)
    files.picture.write_bytes(pictures.overview(run, history.model))
    write_report(run, files.folder, history.model)
    reloaded = ReloadedCheckpoint(files.checkpoint)
    check = reloaded.check(files.reference)
    completions = _completions(history, reloaded)
    print(_summary(history, check, files, time.monotonic() - started))
    print(completions)
    return _verdict(history, check)


def _summary(history: History, check: ReloadCheck, files: OutputFiles, seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    (first_step, first_loss), (last_step, last_loss) = history.train_loss[0], history.train_loss[-1]
    keys = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in check.wrong_keys.items())
    folders = f"\n{' ':13}".join(f"{path}{os.sep}" for path in (files.checkpoint, files.adapter) if path.exists())
    agreement = (
        f"logits differ by at most {check.difference:.1e} at {check.share:.0%} of the positions "
        f"(limit {check.tolerance:.0e})"
    )
    return f"""
{history.model}
  time       {minutes} min {rest:02d} s in all, {history.train_seconds:.0f} s in {history.num_steps} training steps
  speed      {history.num_tokens / history.train_seconds:,.0f} tokens/s
  loss       {first_loss:.2f} at step {first_step}, {last_loss:.2f} at step {last_step}
  held out   {history.held_out_loss[0][1]:.2f} before, {history.held_out_loss[-1][1]:.2f} after
  reload     by plain transformers: {"ok" if check.passed else "FAILED"}
             {agreement}
             {keys or "no missing, unexpected or mismatched key"}
  files      {folders}
             {files.page}
             {files.picture}
             {files.history}
             {files.reference}"""


def _completions(history: History, reloaded: ReloadedCheckpoint) -> str:
    lines = ["", "Held-out signatures, completed by the reloaded checkpoint:"]
    for pair in history.samples:
        lines += [f"  {pair.signature}", f"    model   {reloaded.complete(pair)}", f"    truth   {pair.docstring}"]
    return "\n".join(lines)


def _verdict(history: History, check: ReloadCheck) -> int:
    before, after = history.held_out_loss[0][1], history.held_out_loss[-1][1]
    if not after < before:
        print(f"FAILED: the held-out loss did not fall ({before:.3f} before, {after:.3f} after).", file=sys.stderr)
    if not check.passed:
        print("FAILED: the reloaded checkpoint is not the trained model.", file=sys.stderr)
    return 0 if after < before and check.passed else 1
