"""The optimizer's state on its way to a checkpoint and back, onto any number of ranks.

Tensors go through torch's distributed checkpointing (DCP), which cuts them anew for the ranks that read them, into
safetensors files; DCP's own format would be unpickled. Numbers and options go into JSON. Everything is kept by the
name of its parameter, since groups and shards differ between layouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from hf_moe_accel.weights.files import flush_directory, read_json, write_json
from hf_moe_accel.weights.ranks import AllRanksError, Ranks
from hf_moe_accel.weights.shards import Shard, shards_of

INDEX_NAME = "optimizer.json"
TENSORS_NAME = "optimizer"
# DCP builds a file in memory before it writes it.
_MAX_FILE_BYTES = 2**30
_ADVICE = "Use another optimizer, or save_only_model=True, which saves nothing to resume from."


@dataclass(frozen=True)
class OptimizerSave:
    """An optimizer's state on its way to `directory`.

    Attributes:
        index: JSON: the groups, and for each parameter's state the number itself or the name of its tensor.
        shards: the tensors, by name.
        directory: of the training state.
    """

    index: Mapping[str, Any]
    shards: Mapping[str, Shard]
    directory: Path

    @classmethod
    def of(
        cls, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], directory: Path, ranks: Ranks
    ) -> OptimizerSave:
        """What is to be saved of an optimizer, still in its own memory. Not a collective.

        Raises:
            ValueError: the optimizer keeps something that cannot be saved, or not for another number of ranks.
        """
        name_of = {id(parameter): name for name, parameter in parameters.items()}
        kind = type(optimizer).__name__
        if any(id(parameter) not in name_of for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError(f"{kind} trains parameters that are not the model's, and cannot be saved. {_ADVICE}")
        states: dict[str, dict[str, Any]] = {}
        tensors: dict[str, Tensor] = {}
        for parameter, state in optimizer.state.items():
            name = name_of[id(parameter)]
            states[name] = {}
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim:
                    _check_tensor(value, parameter, f"{kind} keeps {key!r} of {name}")
                    states[name][key] = {"tensor": f"{name}.{key}"}
                    tensors[f"{name}.{key}"] = value
                else:
                    states[name][key] = _encoded(value, f"{kind} keeps {key!r} of {name}")
        groups = [
            {
                "parameters": [name_of[id(parameter)] for parameter in group["params"]],
                "options": {
                    key: _encoded(value, f"{kind} has the option {key!r}")
                    for key, value in group.items()
                    if key != "params"
                },
            }
            for group in optimizer.param_groups
        ]
        index = {"optimizer": kind, "groups": groups, "state": states}
        return cls(index, shards_of(tensors, ranks.world_size), directory)

    def copy(self) -> OptimizerSave:
        """The same from a copy of the tensors in host memory."""
        return replace(self, shards={name: shard.copy() for name, shard in self.shards.items()})

    def write(self, ranks: Ranks) -> None:
        """Write the files. All ranks must call.

        Raises:
            AllRanksError: a rank could not write. One process raises the error itself.
        """
        task = f"Saving the optimizer to {self.directory}"
        with ranks.same_outcome(task):
            if ranks.rank == 0:
                (self.directory / TENSORS_NAME).mkdir(parents=True)
                write_json(self.directory / INDEX_NAME, self.index)
        if not self.shards:
            return
        writer = HuggingFaceStorageWriter(
            str(self.directory / TENSORS_NAME),
            fqn_to_index_mapping=_spread(self.shards, ranks.world_size),
            save_distributed=True,
        )
        with _dcp_errors(task, ranks):
            state_dict_saver.save(
                {},
                storage_writer=writer,
                planner=_SavePlanner(self.shards, ranks.rank),
                process_group=ranks.group,
                no_dist=ranks.world_size == 1,
            )
        with ranks.same_outcome(task):
            if ranks.rank == 0:
                flush_directory(self.directory / TENSORS_NAME)


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], directory: Path, ranks: Ranks
) -> list[int]:
    """Put a saved state back into an optimizer, whatever the layout that it was saved on. All ranks must call.

    Args:
        optimizer: new, over some of `parameters`.
        parameters: the live model's, by name.
        directory: of the training state.
        ranks: who reads.

    Returns:
        For each of the optimizer's groups, the number of the saved group that its options come from.

    Raises:
        ValueError: the saved state is another optimizer's, or of other parameters; names them.
    """
    index = read_json(directory / INDEX_NAME)
    kind = type(optimizer).__name__
    if index["optimizer"] != kind:
        raise ValueError(
            f"{directory} holds the state of {index['optimizer']}, but this run trains with {kind}: resume with the "
            "same optim=, or load the checkpoint as the model and train without resume_from_checkpoint."
        )
    origins = _restore_groups(optimizer, parameters, index["groups"], directory)
    tensors: dict[str, Tensor] = {}
    reader = HuggingFaceStorageReader(str(directory / TENSORS_NAME))
    saved = reader.read_metadata().state_dict_metadata
    with torch.no_grad():
        for name, state in index["state"].items():
            parameter = parameters[name]
            restored = optimizer.state[parameter] = {}
            for key, value in state.items():
                if isinstance(value, dict) and "tensor" in value:
                    stored = saved[value["tensor"]]
                    assert isinstance(stored, TensorStorageMetadata)
                    restored[key] = _empty(parameter, tuple(stored.size), stored.properties.dtype)
                    tensors[value["tensor"]] = restored[key]
                else:
                    restored[key] = _decoded(value, parameter)
        shards = shards_of(tensors, ranks.world_size)
        if tensors:
            with _dcp_errors(f"Reading the optimizer from {directory}", ranks):
                state_dict_loader.load(
                    {},
                    storage_reader=reader,
                    planner=_LoadPlanner(
                        shards,
                        ranks.rank,
                        replicated={name for name, tensor in tensors.items() if not isinstance(tensor, DTensor)},
                    ),
                    process_group=ranks.group,
                    no_dist=ranks.world_size == 1,
                )
    return origins


def _restore_groups(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    saved: Sequence[Mapping[str, Any]],
    directory: Path,
) -> list[int]:
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    group_of = {name: number for number, group in enumerate(saved) for name in group["parameters"]}
    live = {name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]}
    if live != set(group_of):
        raise ValueError(
            f"{directory} holds the optimizer of another set of parameters. Trained there only: "
            f"{_some(set(group_of) - live)}; trained here only: {_some(live - set(group_of))}. Resume with the same "
            "model, adapters and frozen parameters."
        )
    origins = []
    for group in optimizer.param_groups:
        numbers = sorted({group_of[name_of[id(parameter)]] for parameter in group["params"]})
        options = [saved[number]["options"] for number in numbers]
        if any(each != options[0] for each in options):
            raise ValueError(
                f"{directory} trained parameters with different options that this run puts into one group, that of "
                f"{name_of[id(group['params'][0])]}. Make the optimizer's groups as they were."
            )
        for key, value in options[0].items() if options else ():
            group[key] = _decoded(value, group["params"][0])
        origins.append(numbers[0] if numbers else 0)
    return origins


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "") or "none"


def _check_tensor(value: Tensor, parameter: Tensor, what: str) -> None:
    local = value.to_local() if isinstance(value, DTensor) else value
    if isinstance(value, DTensor) != isinstance(parameter, DTensor) or type(local) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"{what} as a {type(local).__name__}, which cannot be cut for other ranks and so not be saved. {_ADVICE}"
        )


def _encoded(value: Any, what: str) -> Any:
    """A number, or a sequence of such, as JSON, with what JSON does not tell beside it."""
    if isinstance(value, Tensor) and value.numel() == 1:
        local = value.full_tensor() if isinstance(value, DTensor) else value
        dtype = str(local.dtype).removeprefix("torch.")
        return {"number": local.item(), "dtype": dtype, "on_host": local.device.type == "cpu"}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(each, what) for each in value]}
    if isinstance(value, list):
        return [_encoded(each, what) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{what} as a {type(value).__name__}, which cannot be saved. {_ADVICE}")


def _decoded(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, list):
        return [_decoded(each, parameter) for each in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_decoded(each, parameter) for each in value["tuple"])
    device = torch.device("cpu") if value["on_host"] else parameter.device
    return torch.tensor(value["number"], dtype=getattr(torch, value["dtype"]), device=device)


def _empty(parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a state of this shape, which lies as its parameter does."""
    if tuple(parameter.shape) == shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return torch.empty(shape, dtype=dtype, device=local.device)


def _spread(shards: Mapping[str, Shard], world_size: int) -> dict[str, int]:
    """The number of the file that each tensor goes to, so that no rank's file gets large; alike on every rank."""
    number, size, spread = 1, 0, {}
    for name, shard in shards.items():
        held = max(end - first for first, end in shard.held) * shard.row_bytes
        if size and size + held > _MAX_FILE_BYTES:
            number, size = number + 1, 0
        size += held
        spread[name] = number
    return spread


class _dcp_errors:
    """DCP raises on every rank what happened on any; this says it in one line."""

    def __init__(self, task: str, ranks: Ranks) -> None:
        self._task = task
        self._ranks = ranks

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, CheckpointException):
            rank, (first, _) = next(iter(error.failures.items()))
            if self._ranks.world_size == 1:
                raise first from None
            raise AllRanksError(f"{self._task} failed on rank {rank}: {type(first).__name__}: {first}") from first
        if isinstance(error, RuntimeError) and self._ranks.world_size > 1:
            raise AllRanksError(
                f"{self._task} failed on rank {self._ranks.rank}, which can no longer reach the others (has a rank "
                f"died?): {str(error).splitlines()[0]}"
            ) from error


def _chunk(shard: Shard, rank: int, *, whole: bool = False) -> list[ChunkStorageMetadata]:
    """The part of the tensor that a rank holds, in DCP's words; none where it holds nothing."""
    first, end = (0, shard.num_rows) if whole else shard.held[rank]
    if first == end and shard.num_rows:
        return []
    others = shard.shape[1:]
    return [ChunkStorageMetadata(torch.Size((first, *(0 for _ in others))), torch.Size((end - first, *others)))]


class _SavePlanner(DefaultSavePlanner):
    """Tells DCP which rows of which tensors this rank writes; of equal rows on several ranks, DCP picks one."""

    def __init__(self, shards: Mapping[str, Shard], rank: int) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards
        self._rank = rank

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=shard.local.dtype), torch.Size(shard.shape)),
            )
            for name, shard in self._shards.items()
            for chunk in _chunk(shard, self._rank)
        ]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._shards[index.fqn].local


class _LoadPlanner(DefaultLoadPlanner):
    """Tells DCP which rows of which tensors this rank reads, and where to."""

    def __init__(self, shards: Mapping[str, Shard], rank: int, replicated: set[str]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards
        self._rank = rank
        self._replicated = replicated

    def create_local_plan(self) -> LoadPlan:
        assert isinstance(self.metadata, Metadata)
        items = []
        for name, shard in self._shards.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            chunks = _chunk(shard, self._rank, whole=name in self._replicated)
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._shards[index.fqn].local
