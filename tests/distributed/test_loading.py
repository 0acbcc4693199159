"""A model comes onto the ranks the same whichever way it is loaded, and each rank reads only what it keeps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers.modeling_utils
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM as PlainAutoModel
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_moe_accel import AcceleratedMoETrainer, AutoModelForCausalLM, MoEAccelConfig, prepare_moe_model
from hf_moe_accel.hf.install import NAME
from hf_moe_accel.log import warn_once
from hf_moe_accel.runtime import runtime_of
from tests.helpers.grids import slow
from tests.helpers.loops import load_checkpoint, train_loop
from tests.helpers.models import ragged_batch_dataset, tiny_config, tiny_model
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import assert_close

Ranks = Callable[..., list[Any]]


class CountingFile:
    """A safetensors file that notes how many elements are read from it, by key."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._file = safe_open(*args, **kwargs)
        self.read: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_slice(self, key: str) -> CountingSlice:
        return CountingSlice(self._file.get_slice(key), key, self.read)

    def get_tensor(self, key: str) -> Tensor:
        return self.get_slice(key)[...]


class CountingSlice:
    def __init__(self, values: Any, key: str, read: dict[str, int]) -> None:
        self._slice = values
        self._key = key
        self._read = read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slice, name)

    def __getitem__(self, index: Any) -> Tensor:
        values: Tensor = self._slice[index]
        self._read[self._key] = self._read.get(self._key, 0) + values.numel()
        return values


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shards(model: nn.Module) -> dict[str, Tensor]:
    return {key: local(value) for key, value in model.state_dict().items()}


def loss_of(model: Any) -> float:
    rank = dist.get_rank() if dist.is_initialized() else 0
    row = ragged_batch_dataset(rank + 1, 16, seed=1)[rank]
    return float(model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.detach())


def load_and_shard(name: str, directory: str, choices: dict[str, Any]) -> dict[str, Any]:
    files: list[CountingFile] = []

    def counting(*args: Any, **kwargs: Any) -> CountingFile:
        files.append(CountingFile(*args, **kwargs))
        return files[-1]

    original = transformers.modeling_utils.safe_open
    transformers.modeling_utils.safe_open = counting
    try:
        loaded = AutoModelForCausalLM.from_pretrained(directory, moe_config=MoEAccelConfig(**choices))
    finally:
        transformers.modeling_utils.safe_open = original
    in_place = prepare_moe_model(tiny_model(name).eval(), MoEAccelConfig(**choices))
    parameters = [dict(model.named_parameters()) for model in (loaded, in_place)]
    return {
        "read": sum(sum(file.read.values()) for file in files),
        "kept": sum(tensor.numel() for tensor in shards(loaded).values()),
        "whole": sum(tensor.numel() for tensor in loaded.state_dict().values()),
        "shards": (shards(loaded), shards(in_place)),
        "placements": [{key: str(p.placements) for key, p in of_model.items()} for of_model in parameters],
        "losses": [loss_of(loaded), loss_of(in_place)],
    }


@pytest.mark.parametrize(
    ("name", "world_size", "choices"),
    [
        ("qwen3_moe", 2, {"ep_size": 2}),
        ("qwen3_moe", 2, {"ep_size": 1}),
        ("qwen3_moe", 4, {"ep_size": 2, "dp_replicate_size": 2}),
        *slow(("qwen3_moe", 4, {"ep_size": 2})),
        # Experts that are stored as one tensor; a router's buffer; projections without a gate.
        ("gpt_oss", 4, {"ep_size": 2}),
        ("deepseek_v3", 2, {}),
        ("nemotron_h", 4, {}),
    ],
)
def test_each_rank_reads_what_it_keeps(
    name: str, world_size: int, choices: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    model = tiny_model(name).eval()
    model.save_pretrained(tmp_path)
    results = ranks(load_and_shard, world_size, name, str(tmp_path), choices)
    for rank, result in enumerate(results):
        assert result["read"] == result["kept"]
        assert result["kept"] < 0.7 * result["whole"]
        assert_close(*result["shards"], "exact")
        assert result["placements"][0] == result["placements"][1]
        row = ragged_batch_dataset(rank + 1, 16, seed=1)[rank]
        expected = float(model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.detach())
        assert_close(result["losses"], [expected, expected], "training")


def load_in(dtype: torch.dtype, directory: str, mixed: bool) -> tuple[set[torch.dtype], list[torch.dtype]]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, fsdp_mixed_precision=mixed)
    inside: list[torch.dtype] = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda module, _: inside.append(local(module.down_proj).dtype))
    stored = {p.dtype for p in model.parameters()}
    loss_of(model)
    return stored, inside


@pytest.mark.parametrize(
    ("dtype", "mixed", "computes_in"),
    [
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float32, False, torch.float32),
        (torch.float32, True, torch.bfloat16),
    ],
)
def test_dtypes(dtype: torch.dtype, mixed: bool, computes_in: torch.dtype, ranks: Ranks, tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    for stored, inside in ranks(load_in, 2, dtype, str(tmp_path), mixed):
        assert stored == {dtype}
        assert inside == [computes_in]


def train_tied(how: str, source: str, directory: str, choices: dict[str, Any]) -> list[tuple[float, float]]:
    config = MoEAccelConfig(**choices)
    if how == "plain":
        model = PlainAutoModel.from_pretrained(source)
    elif how == "from_pretrained":
        model = AutoModelForCausalLM.from_pretrained(source, moe_config=config)
    else:
        model = prepare_moe_model(PlainAutoModel.from_pretrained(source), config)
    values = train_loop(model.train(), 4)
    model.save_pretrained(directory)
    return values


@pytest.mark.parametrize("how", ["from_pretrained", "in place"])
@pytest.mark.parametrize(("world_size", "choices"), [(2, {"ep_size": 2}), *slow((4, {"ep_size": 2}))])
def test_tied_embeddings_train_as_on_one_process(
    how: str, world_size: int, choices: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    source, plain, ours = (str(tmp_path / name) for name in ("source", "plain", "ours"))
    tiny_model("qwen3_moe", tie_word_embeddings=True).save_pretrained(source)
    (expected,) = ranks(train_tied, 1, "plain", source, plain, {})
    values = ranks(train_tied, world_size, how, source, ours, choices)
    assert_close(values, [expected] * world_size, "training")
    assert "lm_head.weight" not in load_checkpoint(plain)
    assert_close(load_checkpoint(ours), load_checkpoint(plain), "training")


def embeddings(how: str, source: str) -> list[Tensor]:
    if how == "from_pretrained":
        model = AutoModelForCausalLM.from_pretrained(source)
    else:
        model = prepare_moe_model(PlainAutoModel.from_pretrained(source))
    return [model.model.embed_tokens.weight.full_tensor(), model.lm_head.weight.full_tensor()]


@pytest.mark.parametrize("how", ["from_pretrained", "in place"])
def test_weights_that_a_checkpoint_does_not_tie_stay_apart(how: str, ranks: Ranks, tmp_path: Path) -> None:
    """Its configuration says that they are tied, and it holds both, with different values: transformers warns."""
    model = tiny_model("qwen3_moe", tie_word_embeddings=False)
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert "lm_head.weight" in load_checkpoint(tmp_path)
    for values in ranks(embeddings, 2, how, str(tmp_path)):
        assert_close(values, [model.model.embed_tokens.weight, model.lm_head.weight], "exact")


def arguments(output_dir: str | Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output_dir),
        use_cpu=True,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=3,
        logging_steps=1,
        learning_rate=3e-3,
        adam_epsilon=1e-3,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **more,
    )


def losses_of(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_from(how: str, directory: str, output_dir: str) -> tuple[list[float], bool, bool]:
    data = ragged_batch_dataset(24, 16, seed=4)
    args = arguments(output_dir)
    if how == "plain":
        trainer: Any = Trainer(PlainAutoModel.from_pretrained(directory), args, train_dataset=data)
    elif how == "path":
        trainer = AcceleratedMoETrainer(model=directory, args=args, train_dataset=data)
    elif how == "path object":
        trainer = AcceleratedMoETrainer(Path(directory), args, train_dataset=data)
    elif how == "model_init":
        trainer = AcceleratedMoETrainer(
            args=args, model_init=lambda: PlainAutoModel.from_pretrained(directory), train_dataset=data
        )
    else:
        trainer = AcceleratedMoETrainer(AutoModelForCausalLM.from_pretrained(directory), args, train_dataset=data)
    losses = losses_of(trainer)
    sharded = any(isinstance(p, DTensor) for p in trainer.model.parameters())
    return losses, sharded, runtime_of(trainer.model) is not None


@pytest.mark.parametrize("how", ["path", "our auto class", *slow("path object", "model_init")])
@pytest.mark.parametrize("name", ["qwen3_moe", "llama"])
def test_trainer_takes_every_kind_of_model(name: str, how: str, ranks: Ranks, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path / "model")
    is_moe = name != "llama"
    ((expected, _, _),) = ranks(train_from, 1, "plain", str(tmp_path / "model"), str(tmp_path))
    for world_size in (1, 2):
        results = ranks(train_from, world_size, how, str(tmp_path / "model"), str(tmp_path), init=False)
        for losses, sharded, prepared in results:
            assert_close(losses, expected, "training")
            assert sharded == (is_moe and world_size > 1)
            assert prepared == is_moe


def make_from_config() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(dist.get_rank())
    mine = PlainAutoModel.from_config(tiny_config("qwen3_moe")).state_dict()
    torch.manual_seed(dist.get_rank())
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), moe_config=MoEAccelConfig(ep_size=2))
    full = {key: v.full_tensor() if isinstance(v, DTensor) else v for key, v in model.state_dict().items()}
    return mine, full


def test_random_weights_are_those_of_rank_zero(ranks: Ranks) -> None:
    (first, full), (second, same) = ranks(make_from_config, 2)
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])
    assert_close(full, first, "exact")
    assert_close(same, first, "exact")


def load_dense(directory: str) -> tuple[dict[str, Tensor], bool]:
    warn_once.cache_clear()  # Another case may have warned in this process.
    model = AutoModelForCausalLM.from_pretrained(directory)
    return model.state_dict(), "save_pretrained" in vars(model)


def test_dense_model_is_loaded_as_transformers_does(ranks: Ranks, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    (values, changed), log = ranks(load_dense, 2, str(tmp_path), capture=True)[0]
    assert_close(values, model.state_dict(), "exact")
    assert not changed
    assert log.count("has no mixture-of-experts layers") == 1


def refusals(directory: str) -> dict[str, str]:
    def load(**sizes: Any) -> Any:
        return PlainAutoModel.from_pretrained(directory, distributed_config=DistributedConfig(**sizes))

    def wrapped_by_the_user() -> Any:
        model = PlainAutoModel.from_pretrained(directory)
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    messages = {}
    for case, make, choices in (
        ("stock expert parallelism", lambda: load(fsdp_size=2, ep_size=2), {}),
        ("stock FSDP2", lambda: load(fsdp_size=2), {"ep_size": 1}),
        ("their own fully_shard", wrapped_by_the_user, {}),
        ("tensor parallelism", lambda: load(tp_size=2, ep_size=2), {}),
        ("our slot, other sizes", lambda: load(fsdp_size=2, ep_size=2, ep_implementation=NAME), {"ep_size": 1}),
    ):
        model = make()
        try:
            prepare_moe_model(model, MoEAccelConfig(**choices))
            messages[case] = ""
        except ValueError as error:
            messages[case] = str(error)
        assert runtime_of(model) is None
    ours = load(fsdp_size=2, ep_size=2, ep_implementation=NAME)
    try:
        loss_of(ours)
    except RuntimeError as error:
        messages["not bound"] = str(error)
    prepare_moe_model(ours)
    messages["loss"] = str(loss_of(ours))
    return messages


def test_models_that_somebody_else_has_sharded_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe").eval()
    model.save_pretrained(tmp_path)
    for rank, messages in enumerate(ranks(refusals, 2, str(tmp_path))):
        for case in ("stock expert parallelism", "stock FSDP2", "their own fully_shard", "our slot, other sizes"):
            assert "already sharded by something else" in messages[case], case
            assert "pass it unsharded, or load it with hf_moe_accel.AutoModelForCausalLM" in messages[case]
        assert "loaded with tp_size=2: tp_size does not carry" in messages["tensor parallelism"]
        assert "call hf_moe_accel.prepare_moe_model(model)" in messages["not bound"]
        row = ragged_batch_dataset(rank + 1, 16, seed=1)[rank]
        expected = float(model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.detach())
        assert_close(float(messages["loss"]), expected, "training")


def layers_that_differ() -> Any:
    mixed, small = tiny_model("qwen3_moe"), tiny_model("qwen3_moe", num_experts=6)
    mixed.model.layers[1].mlp = small.model.layers[1].mlp
    return mixed


def loss_with_layers_that_differ() -> tuple[float, list[int]]:
    model = prepare_moe_model(layers_that_differ())
    loss = loss_of(model)
    runtime = runtime_of(model)
    assert runtime is not None
    return loss, runtime.stats.take().choices_LE.sum(1).tolist()


def test_layers_with_different_numbers_of_experts(ranks: Ranks) -> None:
    expected = layers_that_differ()
    for rank, (loss, counts) in enumerate(ranks(loss_with_layers_that_differ, 2)):
        row = ragged_batch_dataset(rank + 1, 16, seed=1)[rank]
        wanted = float(expected(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.detach())
        assert_close(loss, wanted, "training")
        assert counts == [16 * 2, 16 * 2]


def prepare_one_like_another(ep_sizes: tuple[int, int]) -> tuple[int, torch.Tensor]:
    """How many process groups a second model added, and its loss."""
    first = prepare_moe_model(tiny_model("qwen3_moe"), MoEAccelConfig(ep_size=ep_sizes[0]))
    before = len(dist.distributed_c10d._world.pg_map)
    second = prepare_moe_model(tiny_model("mixtral"), MoEAccelConfig(ep_size=ep_sizes[1]), like=first)
    ids = torch.arange(3, 19).view(2, 8)
    loss = second(input_ids=ids, labels=ids).loss
    loss.backward()
    return len(dist.distributed_c10d._world.pg_map) - before, loss.detach()


def test_a_model_can_share_the_process_groups_of_another() -> None:
    ids = torch.arange(3, 19).view(2, 8)
    expected = tiny_model("mixtral")(input_ids=ids, labels=ids).loss.detach()
    for added, loss in run_ranks(prepare_one_like_another, 2, (2, 2)):
        assert added == 0
        assert_close(loss, expected, "training")
    for added, loss in run_ranks(prepare_one_like_another, 2, (2, 1)):
        assert added > 0, "another layout needs groups of its own"
        assert_close(loss, expected, "training")


def train_twice_by_model_init(output_dir: str) -> list[int]:
    """The number of process groups after each training."""
    args = TrainingArguments(
        output_dir=output_dir, use_cpu=True, max_steps=1, save_strategy="no", report_to=[], disable_tqdm=True
    )
    data = ragged_batch_dataset(16, 12)
    trainer = AcceleratedMoETrainer(model_init=lambda: tiny_model("qwen3_moe"), args=args, train_dataset=data)
    groups = []
    for _ in range(2):
        trainer.train()
        groups.append(len(dist.distributed_c10d._world.pg_map))
    return groups


def test_trials_share_process_groups(tmp_path: Path) -> None:
    for first, second in run_ranks(train_twice_by_model_init, 2, str(tmp_path), init=False):
        assert first == second
