"""The page about the metrics."""

from __future__ import annotations

import re
from pathlib import Path

from hf_moe_accel.callbacks.run_file import METRICS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def test_the_page_lists_every_number_and_its_meaning() -> None:
    rows = re.findall(r"^\| `(moe/.*)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert dict(rows) == METRICS and len(rows) == len(METRICS)
