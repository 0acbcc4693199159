"""Folds a saved LoRA adapter into a checkpoint on disk, without a model in memory.

The files of the result are the base's own, byte for byte, but for the bytes of the tensors that the adapter changes:
shapes and dtypes stay, so every header and every offset does. Which rows of which parameter a tensor of the files is
made of says the key plan of the base, compiled on the meta device.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_moe_accel.hf.keys import compile_key_plan
from hf_moe_accel.hf.loading import meta_model, weight_files
from hf_moe_accel.weights.export import INDEX_NAME, MAX_PART_BYTES
from hf_moe_accel.weights.files import flush_file, read_json
from hf_moe_accel.weights.manifest import MANIFEST_NAME
from hf_moe_accel.weights.plan import HubTensor, KeyPlan, View
from hf_moe_accel.weights.shards import LowRank

if TYPE_CHECKING:
    from hf_moe_accel.hf.peft_bridge.older_files import Layout

# By a parameter's name, what happens to it, one after the other: a tensor takes its place, factors are folded in.
_Changes = Callable[[str], Sequence[LowRank | Tensor]]

_CONFIG = "config.json"
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILE = "adapter_model.safetensors"
# What makes a model beside its weights: configurations, tokenizer and processor, code, and the terms of its use.
_BESIDE_WEIGHTS = (
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# Of a training run, or of weights in another format.
_LEFT_BEHIND = (MANIFEST_NAME, "trainer_state.json", "pytorch_model.bin.index.json", _ADAPTER_CONFIG)
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Options of an adapter that more than adds products of factors to the weights as they are, and what they mean.
_NOT_FOLDED = {
    "use_dora": "DoRA",
    "lora_bias": "biases of its own",
    "trainable_token_indices": "rows of an embedding",
    "layer_replication": "layers that the base has not",
    "use_qalora": "QALoRA",
}
# First values for which PEFT changes the base weights too.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def find_base(source: str) -> Path:
    """The directory of a checkpoint: itself, or the hub's files of an id, from the cache where they are there.

    Raises:
        ValueError: there is neither.
    """
    return _find(source, "BASE", ("*.safetensors", *_BESIDE_WEIGHTS))


def find_adapter(source: str) -> Path:
    """The directory of an adapter, as `find_base` finds a checkpoint.

    Raises:
        ValueError: there is neither.
    """
    return _find(source, "ADAPTER", (_ADAPTER_FILE, _ADAPTER_CONFIG))


def plan_merge(base: Path, adapter: Path, layout: Layout | None = None) -> Merge:
    """What is to be done to fold an adapter into a checkpoint; all checks, and no weight is read.

    Args:
        base: a checkpoint's directory.
        adapter: an adapter's.
        layout: of the adapter's factors of experts: "current", "swapped" or None (look).

    Raises:
        ValueError: it cannot be done; names the reason and the way out.
    """
    from hf_moe_accel.hf.peft_bridge import saved_adapter  # PEFT need not be installed for others

    _check_adapter(adapter)
    files = _base_files(base)
    try:
        model = meta_model(AutoModelForCausalLM, base, None)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"BASE {base} is no causal language model of transformers: {_one_line(error)}") from error
    plan = compile_key_plan(model)
    tied = {**model.all_tied_weights_keys, **{b: a for a, b in model.all_tied_weights_keys.items()}}
    try:
        changes = saved_adapter(model, adapter, layout)
    except (ValueError, SafetensorError) as error:
        raise ValueError(
            f"ADAPTER {adapter} does not fit BASE {base}: {_one_line(error)}. Give the base that it was trained on"
        ) from error
    if both := sorted(changes.keys() & tied.keys()):
        raise ValueError(
            f"ADAPTER {adapter} changes {both[0]!r}, which BASE {base} ties to {tied[both[0]]!r}: merge it with PEFT, "
            "and save the model untied"
        )
    merged = _merged_tensors(plan, changes, {key: each for file in files for key, each in file.tensors.items()}, base)
    return Merge(base, tuple(files), merged, changes)


@dataclass(frozen=True)
class Merge:
    """An adapter on its way into a checkpoint.

    Attributes:
        base: the checkpoint's directory.
        files: its weight files.
        merged: the tensors that change, by their keys, in the dtypes of the files.
        changes: by the names of the model's parameters, reads what happens to them.
    """

    base: Path
    files: tuple[WeightFile, ...]
    merged: Mapping[str, HubTensor]
    changes: Mapping[str, Sequence[Callable[[], LowRank | Tensor]]]

    @cached_property
    def others(self) -> tuple[str, ...]:
        """The files beside the weights, which are copied."""
        found = {str(path.relative_to(self.base)) for each in _BESIDE_WEIGHTS for path in self.base.glob(each)}
        return tuple(sorted(name for name in found - {*_LEFT_BEHIND} if (self.base / name).is_file()))

    @property
    def nbytes(self) -> int:
        """The size of all files together."""
        return sum((self.base / name).stat().st_size for name in self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """All files of the result."""
        return (*self.others, *(file.name for file in self.files))

    def write(self, directory: Path, advance: Callable[[int], object]) -> None:
        """Write the merged checkpoint, flushed.

        Args:
            directory: exists and is empty.
            advance: is told the number of bytes that have been written since the last time.
        """
        for name in self.others:
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.base / name, directory / name)
            flush_file(directory / name)
            advance((directory / name).stat().st_size)
        # The files go through the experts of a layer one by one, each with its part of two stacked parameters.
        change_of = lru_cache(maxsize=2)(lambda name: [read() for read in self.changes.get(name, ())])
        for file in self.files:
            with open(self.base / file.name, "rb") as reader, open(directory / file.name, "wb") as writer:
                for block in self._blocks(file, reader, change_of):
                    writer.write(block)
                    advance(len(block))
                writer.flush()
                os.fsync(writer.fileno())

    def _blocks(self, file: WeightFile, reader: BinaryIO, change_of: _Changes) -> Iterator[bytearray | memoryview]:
        for start, end, key in file.places:
            yield from _read(reader, start - reader.tell())
            if key not in self.merged:
                yield from _read(reader, end - start)
                continue
            for _, part in self.merged[key].parts(MAX_PART_BYTES):
                (block,) = _read(reader, part.nbytes, max_bytes=part.nbytes)
                value = torch.frombuffer(block, dtype=part.dtype).reshape(part.shape)
                yield _bytes_of(_merge(part, value, change_of))


@dataclass(frozen=True)
class WeightFile:
    """The header of a safetensors file.

    Attributes:
        name: in its directory.
        tensors: (dtype, shape) by the keys, the dtype in the file's words.
        places: (first byte, end, key) of each in the file, in order.
    """

    name: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    places: tuple[tuple[int, int, str], ...]

    @classmethod
    def of(cls, path: Path) -> WeightFile:
        """Read a file's header.

        Raises:
            SafetensorError: it is damaged, or the file is not as long as it says.
        """
        with safe_open(path, framework="pt"):
            pass  # checks the header and the file's length
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        places = []
        for key, each in header.items():
            first, end = each["data_offsets"]
            places.append((8 + length + first, 8 + length + end, key))
        tensors = {key: (each["dtype"], tuple(each["shape"])) for key, each in header.items()}
        return cls(path.name, tensors, tuple(sorted(places)))


def _find(source: str, what: str, patterns: tuple[str, ...]) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{what} {source} is a file: give its directory, or a hub id")
    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{what} {source} is no directory, and the hub's cache and the hub do not give it either: give a "
            f"directory or a hub id ({type(error).__name__}: {_one_line(error)})"
        ) from error


def _check_adapter(adapter: Path) -> None:
    if not (adapter / _ADAPTER_CONFIG).is_file():
        raise ValueError(f"ADAPTER {adapter} holds no {_ADAPTER_CONFIG}: give the directory that PEFT saved")
    options = read_json(adapter / _ADAPTER_CONFIG)
    kind = options.get("peft_type") if isinstance(options, dict) else None
    elsewhere = "load it with peft.PeftModel on the base, and merge it there"
    if kind != "LORA":
        raise ValueError(f"ADAPTER {adapter} has peft_type={kind!r}, and only 'LORA' is folded in: {elsewhere}")
    if not (adapter / _ADAPTER_FILE).is_file():
        raise ValueError(f"ADAPTER {adapter} holds no {_ADAPTER_FILE}: save it again, with safetensors")
    for option, meaning in _NOT_FOLDED.items():
        if options.get(option):
            raise ValueError(f"ADAPTER {adapter} has {option}={options[option]!r} ({meaning}): {elsewhere}")
    if options.get("bias", "none") != "none":
        raise ValueError(f"ADAPTER {adapter} has bias={options['bias']!r}, and only 'none' is merged: {elsewhere}")
    first_values = options.get("init_lora_weights")
    if isinstance(first_values, str) and first_values.lower().startswith(_CHANGE_THE_BASE):
        raise ValueError(
            f"ADAPTER {adapter} has init_lora_weights={first_values!r}, for which PEFT changes the base too: convert "
            "it to plain LoRA first (path_initial_model_for_weight_conversion of PEFT's save_pretrained)"
        )


def _base_files(base: Path) -> list[WeightFile]:
    if not (base / _CONFIG).is_file():
        raise ValueError(f"BASE {base} holds no {_CONFIG}: give the directory of a saved model")
    config = read_json(base / _CONFIG)
    parts = [config, *(each for each in config.values() if isinstance(each, dict))]
    if any(part.get("quantization_config") or part.get("compression_config") for part in parts):
        raise ValueError(f"BASE {base} is quantized (quantization_config in {_CONFIG}): give its unquantized weights")
    files = []
    for path in map(Path, weight_files(base)):
        if path.parent != base:
            raise ValueError(f"BASE {base} has {path} in its {INDEX_NAME}, and weight files lie beside it: move them")
        try:
            files.append(WeightFile.of(path))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"BASE {base} is damaged: {path.name} {_one_line(error)}. Download it again") from error
    return files


def _merged_tensors(
    plan: KeyPlan, changed: Mapping[str, object], stored: Mapping[str, tuple[str, tuple[int, ...]]], base: Path
) -> dict[str, HubTensor]:
    """The tensors of the files that change, in the dtypes of the files."""
    for group in plan.groups:
        if hit := sorted(changed.keys() & set(group.sources)):
            raise ValueError(
                f"{hit[0]!r} is converted when BASE {base} is saved ({group.tensors[0].key!r}), and nothing can be "
                "folded into it tensor by tensor: load the adapter with peft.PeftModel, and merge it there"
            )
    merged = {}
    unread = set(changed)
    for tensor in plan.tensors:
        sources = {view.source for view in tensor.views}
        if not sources & changed.keys():
            continue
        unread -= sources
        if tensor.key not in stored:
            raise ValueError(
                f"BASE {base} lacks {tensor.key!r}, which the adapter changes: load it with transformers and save it "
                "again, in the layout of the hub"
            )
        dtype, shape = stored[tensor.key]
        if shape != tensor.shape:
            raise ValueError(
                f"BASE {base} has {tensor.key!r} as {list(shape)}, where its {_CONFIG} makes it {list(tensor.shape)}: "
                "give weights and a configuration of one model"
            )
        if dtype not in _FLOATS:
            raise ValueError(
                f"BASE {base} has {tensor.key!r} as {dtype}, and an adapter is folded into {', '.join(_FLOATS)}: give "
                "its unquantized weights"
            )
        merged[tensor.key] = replace(tensor, dtype=_FLOATS[dtype])
    if unread:
        raise ValueError(f"BASE {base} saves no {sorted(unread)[0]!r}, which the adapter changes: merge it with PEFT")
    return merged


def _merge(tensor: HubTensor, value: Tensor, change_of: _Changes) -> Tensor:
    """A tensor, or a part of one, with what the adapter does to it."""
    if len(tensor.views) == 1:
        return _merge_view(tensor.views[0], value, change_of)
    pieces = value.split([view.shape[tensor.dim] for view in tensor.views], tensor.dim)
    merged = [_merge_view(view, piece, change_of) for view, piece in zip(tensor.views, pieces, strict=True)]
    return torch.cat(merged, tensor.dim)


def _merge_view(view: View, value: Tensor, change_of: _Changes) -> Tensor:
    start, end = view.rows
    merged = value
    for change in change_of(view.source):
        if isinstance(change, LowRank):
            wide = torch.promote_types(merged.dtype, torch.float32)
            merged = merged.to(wide) + view.read(change.rows(start, end))
        else:
            merged = view.read(change[start:end] if change.ndim else change.reshape(1))
    return merged.to(value.dtype)


def _read(reader: BinaryIO, num_bytes: int, max_bytes: int = 2**22) -> Iterator[bytearray]:
    """The next bytes of a file, in blocks."""
    while num_bytes:
        block = bytearray(min(num_bytes, max_bytes))
        if reader.readinto(block) != len(block):  # type: ignore[attr-defined]
            raise OSError(f"{reader.name} became shorter while it was read")
        num_bytes -= len(block)
        yield block


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).removesuffix(".")
