import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.distributed import DistributedConfig

from hf_moe_accel.hf.export import export_checkpoint
from hf_moe_accel.weights import export as export_module
from hf_moe_accel.weights.gather import gather_rows
from hf_moe_accel.weights.ranks import Ranks
from hf_moe_accel.weights.shards import shards_of
from tests.helpers.grids import slow
from tests.helpers.models import ragged_batch_dataset, tiny_model

LAYOUTS = {
    "fsdp of 2": (2, {"fsdp_size": 2}),
    "ep 2 of 2": (2, {"fsdp_size": 2, "ep_size": 2}),
    "fsdp of 4": (4, {"fsdp_size": 4}),
    "ep 4 of 4": (4, {"fsdp_size": 4, "ep_size": 4}),
    "ep 2 of 4": (4, {"fsdp_size": 4, "ep_size": 2}),
    "2 replicas of fsdp 2": (4, {"fsdp_size": 2, "dp_replicate_size": 2}),
    "2 replicas of ep 2": (4, {"fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 2}),
}


# ---------------------------------------------------------------------------------------------------------------------
# What the ranks run


def sharded(model, layout):
    # FSDP2 refuses a parameter of two groups: tied weights are parted before sharding and tied again after it.
    for name in model.all_tied_weights_keys:
        module, _, key = name.rpartition(".")
        setattr(model.get_submodule(module), key, torch.nn.Parameter(model.get_parameter(name).detach().clone()))
    config = DistributedConfig(**layout)
    _, _, mesh = type(model).prepare_distribute_model(config)
    model = type(model).maybe_distribute_model(model, config, mesh)
    model.tie_weights()
    return model


def step(model):
    """One optimizer step, each rank on its own row: afterwards the weights are no longer those that were built."""
    row = ragged_batch_dataset(dist.get_world_size(), 16)[dist.get_rank()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    model(**{key: value[None] for key, value in row.items()}).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def plain_copy(model, name, **overrides):
    """An unsharded model with the values of the sharded one."""
    plain = tiny_model(name, **overrides)
    values = model.state_dict()
    plain.load_state_dict({k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in values.items()})
    return plain


def read(directory):
    """All tensors of a checkpoint, each of which lies in one file."""
    tensors = {}
    for path in Path(directory).glob("*.safetensors"):
        for key, value in load_file(path).items():
            assert key not in tensors, f"{key} was written twice"
            tensors[key] = value
    return tensors


def assert_same(actual, wanted):
    assert set(actual) == set(wanted), set(actual) ^ set(wanted)
    for key, value in wanted.items():
        assert actual[key].dtype == value.dtype and actual[key].shape == value.shape, key
        assert torch.equal(actual[key], value), key


def train_and_export(directory, name, layout, max_shard_size="50GB", **overrides):
    model = sharded(tiny_model(name, **overrides), layout)
    step(model)
    model.eval()(input_ids=torch.ones(1, 4, dtype=torch.int64))  # leaves some parameters gathered

    sent = []
    transfer = dist.batch_isend_irecv
    dist.batch_isend_irecv = lambda ops: sent.extend(op for op in ops if op.op is dist.isend) or transfer(ops)
    try:
        export_checkpoint(model, directory / "ours", max_shard_size=max_shard_size)
    finally:
        dist.batch_isend_irecv = transfer
    plain = plain_copy(model, name, **overrides)
    model.save_pretrained(directory / "sharded stock")
    dist.barrier()
    if dist.get_rank() == 0:
        plain.save_pretrained(directory / "plain stock")
        compare(directory, plain)
    dist.barrier()
    moved = sum(op.tensor.numel() for op in sent)
    experts = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "experts" in n and p.ndim == 3)
    dense = sum(p.numel() * p.element_size() for p in model.parameters()) - experts
    return moved, dense, experts


def compare(directory, plain):
    ours, stock = read(directory / "ours"), read(directory / "plain stock")
    assert_same(ours, stock)
    # Of a sharded model, stock writes both of two tied weights, and does not find the renamings of a class.
    if plain.config.model_type != "nemotron_h":
        with_ties = read(directory / "sharded stock")
        assert_same({key: with_ties[key] for key in stock}, stock)
    for name in ("config.json", "generation_config.json"):
        if (directory / "plain stock" / name).exists():
            assert (directory / "ours" / name).read_text() == (directory / "plain stock" / name).read_text()

    index = directory / "ours" / "model.safetensors.index.json"
    files = {path.name for path in (directory / "ours").glob("*.safetensors")}
    assert len(files) > 1 and index.exists()
    content = json.loads(index.read_text())
    assert set(content["weight_map"].values()) == files
    assert content["metadata"] == {
        "total_parameters": plain.num_parameters(),
        "total_size": sum(value.nbytes for value in stock.values()),
    }
    reloaded, info = AutoModelForCausalLM.from_pretrained(
        directory / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    assert_same(reloaded.state_dict(), plain.state_dict())


def export_of_a_model_whose_class_has_its_own_conversions(directory, layout):
    # The class of a sharded model is a generated one, of which transformers knows no conversions.
    renamings = [WeightRenaming(r"^blocks\.", "model.layers.")]
    register_checkpoint_conversion_mapping("LlamaForCausalLM", renamings, overwrite=True)
    model = sharded(tiny_model("llama"), layout)
    generated = type(model)
    export_checkpoint(model, directory / "ours")
    assert type(model) is generated
    plain = plain_copy(model, "llama")
    if dist.get_rank() == 0:
        plain.save_pretrained(directory / "stock")
        assert_same(read(directory / "ours"), read(directory / "stock"))
        assert any(key.startswith("blocks.") for key in read(directory / "ours"))
    dist.barrier()


def export_of_a_loaded_model(source, directory, layout):
    model = AutoModelForCausalLM.from_pretrained(
        source, distributed_config=DistributedConfig(**layout), attn_implementation="eager"
    )
    export_checkpoint(model, directory)
    if dist.get_rank() == 0:
        assert_same(read(directory), read(source))


def export_of_replicated_weights(directory):
    """Without sharding every rank holds everything; where ranks differ, rank 0's values count, as in stock."""
    model = tiny_model("qwen3_moe", seed=dist.get_rank())
    export_checkpoint(model, directory)
    if dist.get_rank() == 0:
        assert_same(read(directory), read_of_stock(model, directory))


def read_of_stock(model, directory):
    model.save_pretrained(directory / "stock")
    return read(directory / "stock")


def failing_export(directory, layout, failing_rank):
    model = sharded(tiny_model("qwen3_moe", seed=1), layout)
    if dist.get_rank() == failing_rank:
        write, calls = export_module._TensorFile.write, []

        def full(self, tensor, value, first_byte):
            calls.append(tensor)
            if len(calls) > 2:
                raise OSError(28, "No space left on device")
            write(self, tensor, value, first_byte)

        export_module._TensorFile.write = full
    try:
        export_checkpoint(model, directory)
    except RuntimeError as error:
        return f"{error} <- {error.__cause__!r}"
    finally:
        if dist.get_rank() == failing_rank:
            export_module._TensorFile.write = write
    return "no error"


def export_where_ranks_share_no_directory(directory):
    model = sharded(tiny_model("qwen3_moe"), {"fsdp_size": 2})
    try:
        export_checkpoint(model, directory / str(dist.get_rank()))
    except RuntimeError as error:
        return str(error), sorted(os.listdir(directory / str(dist.get_rank())))
    return "no error", []


def export_to_a_file(path):
    try:
        export_checkpoint(sharded(tiny_model("llama"), {"fsdp_size": 2}), path)
    except RuntimeError as error:
        return str(error)
    return "no error"


def gather_each_range(layout, num_experts):
    """Brings every range of rows of an expert and a dense tensor to every rank."""
    model = sharded(tiny_model("qwen3_moe", num_experts=num_experts), layout)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    state = model.state_dict()
    tensors = {name: state[name] for name in ("model.layers.0.mlp.experts.down_proj", "model.norm.weight")}
    count = 0
    for name, shard in shards_of(tensors, world_size).items():
        full = tensors[name].full_tensor()
        for to in range(world_size):
            for start in range(0, len(full), max(1, len(full) // 8)):
                for stop in range(start + 1, len(full) + 1, max(1, len(full) // 4)):
                    rows = gather_rows(shard, (start, stop), to, Ranks())
                    assert (rows is not None) == (rank == to)
                    assert rows is None or torch.equal(rows, full[start:stop])
                    count += 1
    return count


def layout_that_is_not_ours():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    columns = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (2,)), [Shard(1)])
    with pytest.raises(ValueError, match="w lies as"):
        shards_of({"w": columns}, 2)


def outcomes():
    with Ranks().same_outcome("Nothing"):
        pass
    try:
        with Ranks().same_outcome("Counting"):
            if dist.get_rank() == 1:
                raise KeyError("three")
    except RuntimeError as error:
        return str(error)


# ---------------------------------------------------------------------------------------------------------------------
# The tests


@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_a_step_the_export_is_what_stock_writes(ranks, layout, tmp_path):
    world_size, sizes = LAYOUTS[layout]
    results = ranks(train_and_export, world_size, tmp_path, "qwen3_moe", sizes)
    moved, (_, dense, _) = sum(moved for moved, _, _ in results), results[0]
    # No expert moves, and no dense weight twice.
    assert 0 < moved <= dense


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "nemotron_h", "granitemoe", *slow("mixtral", "olmoe")])
def test_architectures(ranks, name, tmp_path):
    world_size, sizes = LAYOUTS["ep 2 of 4"]
    ranks(train_and_export, world_size, tmp_path, name, sizes)


@pytest.mark.parametrize("layout", ["fsdp of 4", "ep 2 of 4", "2 replicas of ep 2"])
def test_sizes_that_the_ranks_do_not_divide(ranks, layout, tmp_path):
    world_size, sizes = LAYOUTS[layout]
    ranks(train_and_export, world_size, tmp_path, "qwen3_moe", sizes, num_experts=6, vocab_size=131, hidden_size=68)


def test_tied_weights_bf16_and_several_files_a_rank(ranks, tmp_path):
    world_size, sizes = LAYOUTS["ep 2 of 2"]
    more = {"tie_word_embeddings": True, "dtype": torch.bfloat16}
    ranks(train_and_export, world_size, tmp_path, "qwen3_moe", sizes, max_shard_size="30KB", **more)


def test_conversions_of_a_class_are_found_after_sharding(ranks, tmp_path):
    ranks(export_of_a_model_whose_class_has_its_own_conversions, 2, tmp_path, {"fsdp_size": 2})


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_was_sharded_while_it_was_read(ranks, tmp_path, tied):
    tiny_model("qwen3_moe", tie_word_embeddings=tied).save_pretrained(tmp_path / "source")
    world_size, sizes = LAYOUTS["ep 2 of 2"]
    ranks(export_of_a_loaded_model, world_size, tmp_path / "source", tmp_path / "ours", sizes)


def test_weights_that_every_rank_holds_are_written_once(ranks, tmp_path):
    ranks(export_of_replicated_weights, 2, tmp_path)


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_an_error_on_one_rank_is_raised_on_all_and_nothing_is_lost(ranks, tmp_path, failing_rank):
    export_checkpoint(tiny_model("qwen3_moe"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    errors = ranks(failing_export, 2, tmp_path, {"fsdp_size": 2, "ep_size": 2}, failing_rank)
    for rank, error in enumerate(errors):
        assert f"failed on rank {failing_rank}: OSError: [Errno 28] No space left on device" in error
        assert error.endswith("<- None") == (rank != failing_rank)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_ranks_must_share_the_directory(ranks, tmp_path):
    for error, names in ranks(export_where_ranks_share_no_directory, 2, tmp_path):
        assert "failed on rank 0" in error and "all ranks share" in error
        assert not [name for name in names if "safetensors" in name]


def test_a_directory_that_cannot_be_made(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    for error in ranks(export_to_a_file, 2, tmp_path / "file"):
        assert f"Saving to {tmp_path / 'file'} failed on rank 0: FileExistsError" in error


@pytest.mark.parametrize("layout", ["fsdp of 4", "ep 2 of 4", "2 replicas of ep 2"])
def test_any_rows_reach_any_rank(ranks, layout):
    world_size, sizes = LAYOUTS[layout]
    counts = ranks(gather_each_range, world_size, sizes, 6)
    assert len(set(counts)) == 1 and counts[0] > 100


def test_other_layouts_are_refused(ranks):
    ranks(layout_that_is_not_ours, 2)


def test_one_ranks_error_is_everyones(ranks):
    assert ranks(outcomes, 2) == ["Counting failed on rank 1: KeyError: 'three'"] * 2
