"""Writes the files of a checkpoint: every rank its own, one tensor at a time.

All ranks compute the same list of jobs from the plan and from where the rows lie, so nothing needs to be agreed on but
the outcome. A job goes to a rank that holds all that it reads, where there is one; what has to be brought together is
spread over the ranks by bytes. Large tensors are brought together and written by row ranges: beyond its shard, a rank
holds a part of a hub tensor at any time.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from tqdm import tqdm

from hf_moe_accel.weights.files import flush_directory, write_json
from hf_moe_accel.weights.gather import gather_rows
from hf_moe_accel.weights.plan import HubTensor, KeyPlan
from hf_moe_accel.weights.ranks import Ranks
from hf_moe_accel.weights.shards import Rows, Shard

INDEX_NAME = "model.safetensors.index.json"
# A file's name until the whole checkpoint is complete: nobody takes a half-written file for a weight file.
PARTIAL = ".partial"
# Tensors are brought together and written in parts of this size, or of a quarter of a file where files are small.
MAX_PART_BYTES = 256 * 2**20
_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.partial)?")
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Convert = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def export_state(
    plan: KeyPlan,
    shards: Mapping[str, Shard],
    directory: str | os.PathLike[str],
    *,
    max_file_bytes: int,
    convert: Convert,
    ranks: Ranks,
) -> None:
    """Write the weight files of a checkpoint, and its index where there are several, in place of older ones.

    All ranks must call, with a directory that they share.

    Args:
        plan: what to write.
        shards: what this rank holds of the tensors, by the names that `sources(plan)` lists.
        directory: an existing directory.
        max_file_bytes: upper limit of a file's tensors; a larger tensor gets a file of its own.
        convert: makes the tensors of a `ConvertedGroup` from all its sources.
        ranks: who writes.

    Raises:
        ValueError: a tensor's dtype cannot be written.
        AllRanksError: a rank could not write its part; the files of an older checkpoint are then as they were. One
            process raises the error itself.
    """
    directory = Path(directory)
    jobs = _assign(plan, shards, ranks.world_size)
    files = _pack(plan, jobs, max_file_bytes)
    mine = [file for file in files if file.writer == ranks.rank]
    task = f"Saving weights to {directory}"
    try:
        with ranks.same_outcome(task):
            _write_jobs(jobs, mine, shards, directory, max_file_bytes, convert, ranks)
        with ranks.same_outcome(task):
            if ranks.rank == 0:
                _commit(directory, files, plan)
    except BaseException:
        for file in mine:
            (directory / (file.name + PARTIAL)).unlink(missing_ok=True)
        raise


def sources(plan: KeyPlan) -> list[str]:
    """The names of the live tensors that a plan reads."""
    views = (view.source for tensor in plan.tensors for view in tensor.views)
    return list(dict.fromkeys([*views, *(source for group in plan.groups for source in group.sources)]))


@dataclass(eq=False)
class _Job:
    """Hub tensors that one rank makes together."""

    tensors: tuple[HubTensor, ...]
    reads: tuple[tuple[str, Rows], ...]  # source, rows
    converted: bool  # a ConvertedGroup, not one HubTensor
    owners: list[int]  # ranks that hold all that it reads; where there is none, rows move
    writer: int = 0
    first_byte: int = 0  # of a part of a tensor, in the tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def parts(self, max_bytes: int) -> Iterator[_Job]:
        """The job in steps that each read and write at most `max_bytes`, where the tensor can be cut."""
        if self.converted:
            yield self
            return
        for first_byte, part in self.tensors[0].parts(max_bytes):
            yield replace(self, tensors=(part,), reads=_reads(part), first_byte=first_byte)


def _reads(tensor: HubTensor) -> tuple[tuple[str, Rows], ...]:
    return tuple((view.source, view.rows) for view in tensor.views)


@dataclass(frozen=True)
class _File:
    """A weight file and the rank that writes it."""

    name: str
    writer: int
    tensors: tuple[HubTensor, ...]


def _assign(plan: KeyPlan, shards: Mapping[str, Shard], world_size: int) -> list[_Job]:
    """All that is to be done, and by whom; the same list on every rank."""

    @cache  # layer upon layer lies alike
    def holders(rows_of: tuple[Rows, ...], wanted: Rows) -> set[int]:
        start, stop = wanted
        return {rank for rank, (first, end) in enumerate(rows_of) if first <= start and stop <= end}

    def job(tensors: tuple[HubTensor, ...], reads: tuple[tuple[str, Rows], ...], converted: bool) -> _Job:
        owners = set.intersection(*(holders(shards[name].held, wanted) for name, wanted in reads))
        return _Job(tensors, reads, converted, sorted(owners))

    jobs = [job((tensor,), _reads(tensor), False) for tensor in plan.tensors]
    for group in plan.groups:
        reads = tuple((name, (0, shards[name].num_rows)) for name in group.sources)
        jobs.append(job(group.tensors, reads, True))

    # Those without a choice first, then the large ones: the rest evens the load out.
    load = [0] * world_size
    for each in sorted(jobs, key=lambda job: (len(job.owners) or world_size, -job.nbytes)):
        each.writer = min(each.owners or range(world_size), key=load.__getitem__)
        load[each.writer] += each.nbytes
    # What moves rows comes first, while all ranks are at the same place; then each goes on alone.
    return sorted(jobs, key=lambda job: bool(job.owners))


def _pack(plan: KeyPlan, jobs: Sequence[_Job], max_file_bytes: int) -> list[_File]:
    """The files of all ranks: rank 0's first, each rank's cut as transformers cuts a whole checkpoint."""
    writer_of = {tensor.key: job.writer for job in jobs for tensor in job.tensors}
    by_writer: dict[int, dict[str, HubTensor]] = {writer: {} for writer in sorted(set(writer_of.values()))}
    for tensor in plan.all_tensors:
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{tensor.key} has dtype {tensor.dtype}; files can hold {list(_DTYPE_NAMES)}.")
        by_writer[writer_of[tensor.key]][tensor.key] = tensor
    shards = []
    for writer, tensors in by_writer.items():
        split = split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="{suffix}",
            max_shard_size=max_file_bytes,
        )
        shards += [(writer, tuple(tensors[key] for key in keys)) for keys in split.filename_to_tensors.values()]
    if len(shards) == 1:
        return [_File("model.safetensors", *shards[0])]
    return [
        _File(f"model-{number:05d}-of-{len(shards):05d}.safetensors", *shard)
        for number, shard in enumerate(shards, start=1)
    ]


def _write_jobs(
    jobs: Sequence[_Job],
    mine: Sequence[_File],
    shards: Mapping[str, Shard],
    directory: Path,
    max_file_bytes: int,
    convert: Convert,
    ranks: Ranks,
) -> None:
    """Do this rank's jobs, and its part in the others'. All ranks must call."""
    part_bytes = max(1, min(MAX_PART_BYTES, max_file_bytes // 4))
    failure: Exception | None = None
    with ExitStack() as stack:
        bar = stack.enter_context(_progress(sum(job.nbytes for job in jobs if job.writer == ranks.rank), ranks))
        files = _Files(directory, mine, stack, bar)
        for job in jobs:
            if not job.owners or job.writer == ranks.rank:
                for part in job.parts(part_bytes):
                    # After an error the other ranks still wait for the rows that this one holds.
                    failure = _write_part(part, shards, files if failure is None else None, convert, ranks) or failure
    if failure is not None:
        raise failure


class _Files:
    """This rank's files, each opened when its first tensor comes."""

    def __init__(self, directory: Path, files: Sequence[_File], stack: ExitStack, bar: Any) -> None:
        self._directory = directory
        self._file_of = {tensor.key: file for file in files for tensor in file.tensors}
        self._stack = stack
        self._bar = bar
        self._opened: dict[str, _TensorFile] = {}

    def write(self, tensor: HubTensor, value: Tensor, first_byte: int) -> None:
        file = self._file_of[tensor.key]
        if file.name not in self._opened:
            path = self._directory / (file.name + PARTIAL)
            self._opened[file.name] = self._stack.enter_context(_TensorFile(path, file.tensors))
        self._opened[file.name].write(tensor, value, first_byte)
        self._bar.update(tensor.nbytes)


def _write_part(
    part: _Job, shards: Mapping[str, Shard], files: _Files | None, convert: Convert, ranks: Ranks
) -> Exception | None:
    """Bring one part together and write it; without files, only help the others. Returns what went wrong.

    A function of its own, so that a part is dropped before the next one is brought together: where both live for a
    moment, malloc cannot reuse the first one's memory, and the heap grows from part to part.
    """
    rows = [gather_rows(shards[name], wanted, part.writer, ranks) for name, wanted in part.reads]
    if part.writer != ranks.rank or files is None:
        return None
    try:
        for tensor, value in _build(part, rows, shards, convert):
            files.write(tensor, value, part.first_byte)
    except Exception as error:
        return error
    return None


def _progress(total: int, ranks: Ranks) -> Any:
    """A bar on rank 0, of its own part, once saving takes longer than a moment."""
    options = {"desc": "Saving weights", "unit": "B", "unit_scale": True, "unit_divisor": 1024, "leave": False}
    return tqdm(total=total, delay=2.0, disable=ranks.rank != 0, **options)


def _build(
    job: _Job, rows: Sequence[Tensor | None], shards: Mapping[str, Shard], convert: Convert
) -> Iterator[tuple[HubTensor, Tensor]]:
    """The values of a job's tensors, from the rows that it reads."""
    read = [part for part in rows if part is not None]
    if not job.converted:
        yield job.tensors[0], job.tensors[0].build(read)
        return
    whole = {name: part.reshape(shards[name].shape) for (name, _), part in zip(job.reads, read, strict=True)}
    made = convert(whole)
    for tensor in job.tensors:
        yield tensor, made[tensor.key]


class _TensorFile(AbstractContextManager["_TensorFile"]):
    """A safetensors file whose tensors are written one at a time, in any order."""

    def __init__(self, path: Path, tensors: Sequence[HubTensor]) -> None:
        """Creates the file and writes its header: a length, then JSON that says where each tensor's bytes go."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._starts = {}
        end = 0
        for tensor in sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.key)):  # keeps all aligned
            self._starts[tensor.key], end = end, end + tensor.nbytes
            header[tensor.key] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": tensor.shape,
                "data_offsets": [end - tensor.nbytes, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._file = open(path, "wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, tensor: HubTensor, value: Tensor, first_byte: int) -> None:
        """Write the values of one tensor, or of a part of it that begins at `first_byte` of its data."""
        assert tensor.shape == value.shape and tensor.dtype == value.dtype, (tensor, value.shape, value.dtype)
        self._file.seek(self._data_start + self._starts[tensor.key] + first_byte)
        self._file.write(value.cpu().contiguous().view(value.numel()).view(torch.uint8).numpy().data)

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._file.flush()
            if kind is None:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def _commit(directory: Path, files: Sequence[_File], plan: KeyPlan) -> None:
    """Give complete files their names, and remove those of an earlier checkpoint."""
    names = [file.name for file in files]
    absent = [file for file in files if not (directory / (file.name + PARTIAL)).exists()]
    if absent:
        raise FileNotFoundError(
            f"{directory} lacks what rank {absent[0].writer} has written there, {absent[0].name}: it must lie on a "
            "file system that all ranks share."
        )
    for name in names:
        os.replace(directory / (name + PARTIAL), directory / name)
    flush_directory(directory)
    index_path = directory / INDEX_NAME
    if len(files) > 1:
        index = {
            "metadata": {
                "total_parameters": plan.num_parameters,
                "total_size": sum(tensor.nbytes for tensor in plan.all_tensors),
            },
            "weight_map": {tensor.key: file.name for file in files for tensor in file.tensors},
        }
        write_json(index_path, index, sort_keys=True)
    else:
        index_path.unlink(missing_ok=True)
    for path in directory.iterdir():
        if _WEIGHT_FILE.fullmatch(path.name) and path.name not in names:
            path.unlink()
