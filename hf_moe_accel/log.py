"""One logger for what users should see: on rank 0, at INFO, also when the program has set up no logging."""

from __future__ import annotations

import logging
import os
from functools import cache

logger = logging.getLogger("hf_moe_accel")


def is_rank_zero() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str, *, level: int = logging.INFO) -> None:
    """Log once for all ranks. Not a collective: the other ranks stay silent."""
    if not is_rank_zero():
        return
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
    logger.log(level, message)


@cache
def warn_once(message: str) -> None:
    """Warn on rank 0, once a process however often the same is found. Not a collective."""
    say(message, level=logging.WARNING)
