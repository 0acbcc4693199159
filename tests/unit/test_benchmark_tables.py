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
    text = readme.read_text()
    assert "| 16,841 | 4.18 |" in text
    readme.write_text(text.replace("| 16,841 | 4.18 |", "| 16,841 | 5.18 |"))
    done = check(copied)
    assert done.returncode == 1 and "run python benchmarks/tables.py" in done.stderr
