"""Data of unknown length in a resumed run: back to the place, by the dataset's own means or by reading up to it."""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from hf_moe_accel.log import is_rank_zero, say, warn_once


class StreamPlace:
    """Follows how far a stateful stream has been read, so that a checkpoint can hold a place at or before training's.

    Args:
        loader: accelerate's, which reads one batch ahead of training.
    """

    def __init__(self, loader: Any) -> None:
        """Find the dataset that is read."""
        self._dataset = _stateful(loader)
        self._places: deque[tuple[int, Any]] = deque(maxlen=3)

    def read(self, num_batches: int) -> None:
        """Note the place once training has been given `num_batches` of the epoch."""
        if self._dataset is not None:
            # The loader has read one batch more.
            self._places.append((num_batches + 1, copy.deepcopy(self._dataset.state_dict())))

    def to_json(self, num_batches: int) -> dict[str, Any] | None:
        """The newest place before the last of `num_batches`, or None where there is none to be saved.

        Before the last one, since a loader that finds nothing to read at all may raise.
        """
        place = next((place for place in reversed(self._places) if place[0] < num_batches), None)
        if place is None:
            return None
        num_read, state = place
        try:
            json.dumps(state)
        except TypeError as error:
            warn_once(
                f"hf_moe_accel: the state_dict() of {type(self._dataset).__name__} is not saved, since it is not made "
                f"of JSON's types ({error}): a resumed run will read its data from the start to get to its place."
            )
            return None
        return {"num_batches": num_read, "state": state}

    def restore(self, saved: dict[str, Any] | None) -> int:
        """Put the dataset to a saved place and return the batches up to there; 0 where that is not possible."""
        if self._dataset is None or saved is None:
            return 0
        self._dataset.load_state_dict(copy.deepcopy(saved["state"]))
        self._places.append((saved["num_batches"], saved["state"]))
        return int(saved["num_batches"])


class StartedLoader:
    """A loader whose first batches have been read and dropped.

    Args:
        loader: any.
        skip: batches to drop.
    """

    def __init__(self, loader: Any, skip: int) -> None:
        """Read up to the first batch that is to be trained on."""
        self._loader = loader
        self._batches = iter(loader)
        if skip > 1:
            say(f"hf_moe_accel: reading {skip} batches of the training data again, to go on after them")
        bar = tqdm(range(skip), desc="Skipping batches", delay=2.0, leave=False, disable=not is_rank_zero())
        for _ in bar:
            next(self._batches, None)
        self._first = next(self._batches, None)

    @property
    def is_at_end(self) -> bool:
        """Whether no batch is left."""
        return self._first is None

    def __iter__(self) -> Iterator[Any]:
        """The rest."""
        yield self._first
        yield from self._batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _stateful(loader: Any) -> Any:
    """The dataset below accelerate's wrappers that can say where it is; None where it is read by other processes."""
    dataset = getattr(loader, "dataset", None)
    while dataset is not None and not (hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")):
        dataset = dataset.__dict__.get("dataset")
    return dataset if getattr(loader, "num_workers", 0) == 0 else None
