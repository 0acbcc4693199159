"""`hf-moe-accel merge`: folds a saved LoRA adapter into its base, without a GPU and without a model in memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hf_moe_accel.commands.output import check_out, count, how_to_load, in_bytes, progress, whole_directory
from hf_moe_accel.hf.merge import Merge, find_adapter, find_base, plan_merge

if TYPE_CHECKING:
    from hf_moe_accel.hf.peft_bridge.older_files import Layout


def check_merge(base: str, adapter: str, out: Path, layout: Layout | None = None) -> Merge:
    """Check the arguments of `merge`, and all else that can be checked before anything is written.

    Args:
        base: a directory or hub id.
        adapter: a directory or hub id.
        out: a new directory.
        layout: of an older adapter's factors: "current", "swapped" or None (look).

    Raises:
        ValueError: an argument is not what it should be, or they do not fit each other.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("adapters need PEFT, which is not installed: pip install 'hf_moe_accel[lora]'")
    check_out(out)  # before anything is downloaded
    found = find_base(base), find_adapter(adapter)
    for source in found:
        if out.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"OUT {out} lies in {source}, which is not changed: name a directory elsewhere")
    return plan_merge(*found, layout)


def merge(plan: Merge, out: Path) -> int:
    """Write the merged checkpoint and return the exit code. `out` is there whole or not at all."""
    try:
        with whole_directory(out) as copy, progress("Merging", plan.nbytes) as bar:
            plan.write(copy, bar.update)
    except (OSError, ValueError) as error:
        print(f"FAILED: nothing was merged: {error}", file=sys.stderr)
        return 1
    num_tensors = sum(len(file.tensors) for file in plan.files)
    print(f"{out}: {count(len(plan.names), 'file')}, {in_bytes(plan.nbytes)}.", end=" ")
    print(f"The adapter is folded into {len(plan.merged)} of {count(num_tensors, 'tensor')}. Load it with")
    print(f"  {how_to_load(out)}")
    return 0
