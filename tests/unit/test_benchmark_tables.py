"""The figures in `benchmarks/README.md` are those of the files beside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def check(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(directory / "tables.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_tables_are_as_the_results_say(tmp_path: Path) -> None:
    done = check(BENCHMARKS)
    assert done.returncode == 0, done.stderr
    copied = Path(shutil.copytree(BENCHMARKS, tmp_path / "benchmarks"))
    readme = copied / "README.md"
    before, mark, tables = readme.read_text().partition("<!-- results/train_step")
    assert "| 1.00 |" in tables
    readme.write_text(before + mark + tables.replace("| 1.00 |", "| 1.01 |", 1))
    done = check(copied)
    assert done.returncode == 1 and "run python benchmarks/tables.py" in done.stderr
