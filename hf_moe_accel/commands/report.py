"""`hf-moe-accel report`: the pictures of a run, as PNG and in one page, from the file that the run wrote."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hf_moe_accel.callbacks.page import title_of, write_report
from hf_moe_accel.callbacks.run_file import Run, read_run


def check_report(run_dir: Path) -> Run:
    """Read what the run wrote.

    Raises:
        ValueError: there is nothing to draw, or a package is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("pictures need matplotlib, which is not installed: pip install 'hf_moe_accel[demo]'")
    run = read_run(run_dir)
    if not run.counted() or not run.series("loss"):
        raise ValueError(f"the run in {run_dir} has not logged a loss yet: there is nothing to draw")
    return run


def report(run: Run, run_dir: Path) -> int:
    """Write pictures and page into `run_dir` and return the exit code."""
    page = write_report(run, run_dir, title_of(run))
    print(f"{page}: {len(run.counted())} logs up to step {run.records[-1]['step']}; the pictures lie beside it.")
    return 0
