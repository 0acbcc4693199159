import json
import math
import random
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.core_model_loading import Chunk, ConversionOps, Transpose, WeightConverter

from hf_moe_accel.hf.export import export_checkpoint
from hf_moe_accel.hf.keys import compile_key_plan, to_hub_keys
from hf_moe_accel.weights.export import _assign
from hf_moe_accel.weights.plan import HubTensor, View
from hf_moe_accel.weights.shards import Shard
from tests.helpers.models import DENSE, MOE, NUM_EXPERTS, tiny_config, tiny_model

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
# What the tiny models lack: experts beside a vision tower, and experts of two kinds behind one list of hub keys.
MULTIMODAL = {
    "qwen3_vl_moe": {
        "text_config": TEXT | {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 32, "mlp_only_layers": []},
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
        },
    },
    "ernie4_5_vl_moe": {
        "text_config": TEXT
        | {
            "moe_num_experts": NUM_EXPERTS,
            "moe_k": 2,
            "moe_intermediate_size": [32, 16],
            "mlp_layer_types": ["dense", "sparse"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
        },
        "vision_config": {
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
        },
    },
}


def expected(model, path):
    """What stock transformers writes for an unsharded model."""
    model.save_pretrained(path)
    return load_file(path / "model.safetensors")


def built(plan, model):
    """Every hub tensor, made from the live ones as the plan says."""
    state = model.state_dict()

    def rows(view):
        tensor = state[view.source]
        start, stop = view.rows
        return tensor.reshape(-1, *tensor.shape[1:])[start:stop]

    values = {tensor.key: tensor.build([rows(view) for view in tensor.views]) for tensor in plan.tensors}
    for group in plan.groups:
        made = to_hub_keys(model, {name: state[name] for name in group.sources})
        values |= {tensor.key: made[tensor.key] for tensor in group.tensors}
    return values


def assert_same(actual, wanted):
    assert set(actual) == set(wanted)
    for key, value in wanted.items():
        assert actual[key].dtype == value.dtype and actual[key].shape == value.shape, key
        assert torch.equal(actual[key], value), key


def check(model, path):
    plan = compile_key_plan(model)
    wanted = expected(model, path)
    assert_same(built(plan, model), wanted)
    for tensor in plan.all_tensors:
        assert tensor.shape == wanted[tensor.key].shape and tensor.dtype == wanted[tensor.key].dtype
        assert tensor.nbytes == wanted[tensor.key].nbytes
    return plan


@pytest.mark.parametrize("name", [*MOE, *DENSE])
def test_the_plan_gives_what_save_pretrained_writes(name, tmp_path):
    plan = check(tiny_model(name), tmp_path)
    assert not plan.groups


@pytest.mark.parametrize("name", sorted(MULTIMODAL))
def test_the_plan_of_a_model_with_several_towers(name, tmp_path):
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **MULTIMODAL[name]))
    assert any("experts" in tensor.key for tensor in check(model, tmp_path).tensors)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_tied_weights_are_written_once_and_dtypes_kept(name, tmp_path):
    model = tiny_model(name, dtype=torch.bfloat16, tie_word_embeddings=True)
    plan = check(model, tmp_path)
    keys = [tensor.key for tensor in plan.tensors]
    assert "lm_head.weight" not in keys and "model.embed_tokens.weight" in keys


def test_two_parameters_of_the_same_memory_are_tied(tmp_path):
    model = tiny_model("qwen3_moe", tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.data)
    assert "lm_head.weight" not in [tensor.key for tensor in check(model, tmp_path).tensors]


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe", "gpt_oss"])
def test_the_plan_of_a_loaded_model_follows_the_conversions_it_was_loaded_with(name, tmp_path):
    tiny_model(name).save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    assert model._weight_conversions is not None
    wanted = load_file(tmp_path / "source" / "model.safetensors")
    assert_same(built(check(model, tmp_path / "again"), model), wanted)


def test_keys_that_the_model_ignores_are_left_out(tmp_path):
    model = tiny_model("qwen3_moe")
    model._keys_to_ignore_on_save = {"model.norm.weight", "not.there"}
    assert "model.norm.weight" not in [tensor.key for tensor in check(model, tmp_path).tensors]


def test_undeclared_ties_are_refused_as_upstream_does():
    model = tiny_model("llama")
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight
    with pytest.raises(RuntimeError, match="shared tensors"):
        compile_key_plan(model)


def test_an_expert_reads_only_its_row():
    plan = compile_key_plan(tiny_model("qwen3_moe"))
    experts = [tensor for tensor in plan.tensors if ".experts." in tensor.key]
    assert len(experts) == 2 * NUM_EXPERTS * 3
    for tensor in experts:
        expert = int(re.search(r"experts\.(\d+)", tensor.key)[1])
        assert [view.rows for view in tensor.views] == [(expert, expert + 1)]


def test_the_plan_needs_no_numbers():
    with torch.device("meta"):
        on_meta = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
    assert compile_key_plan(on_meta) == compile_key_plan(tiny_model("qwen3_moe"))


# ---------------------------------------------------------------------------------------------------------------------
# Converters that are no views


class Doubled(ConversionOps):
    """Computes; its inverse is not needed here."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        tensor = next(iter(input_dict.values()))
        return {target_patterns[0]: self.change(tensor[0] if isinstance(tensor, list) else tensor)}

    def change(self, tensor):
        return tensor * 2

    @property
    def reverse_op(self):
        return self


class DoubledInPlace(Doubled):
    def change(self, tensor):
        return tensor.mul_(2)


class Constant(Doubled):
    def change(self, tensor):
        return torch.ones(3)


class Dependent(Doubled):
    def change(self, tensor):
        return tensor if tensor.sum() > 0 else tensor * 2


class Half(Doubled):
    def change(self, tensor):
        return tensor.to(torch.float16)


def converted(*operations):
    model = tiny_model("llama")
    model._weight_conversions = [WeightConverter("mlp.down.weight", "mlp.down_proj.weight", list(operations))]
    return model


@pytest.mark.parametrize("operation", [Doubled, Half])
def test_a_converter_that_computes_is_run_on_the_whole_tensor(operation, tmp_path):
    model = converted(operation())
    plan = check(model, tmp_path / "stock")
    assert [group.sources for group in plan.groups] == [(f"model.layers.{i}.mlp.down_proj.weight",) for i in (0, 1)]
    export_checkpoint(model, tmp_path / "ours")
    assert_same(load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "stock/model.safetensors"))


def test_a_concatenation_is_a_view_and_its_transpose_is_run_on_the_whole_tensors(tmp_path):
    model = tiny_model("llama")
    names = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    model._weight_conversions = [WeightConverter("mlp.gate_up.weight", names, [Chunk(dim=0)])]
    plan = check(model, tmp_path)
    assert not plan.groups and max(len(tensor.views) for tensor in plan.tensors) == 2

    model._weight_conversions = [WeightConverter("mlp.gate_up.weight", names, [Transpose(0, 1), Chunk(dim=0)])]
    plan = check(model, tmp_path)
    assert [len(group.sources) for group in plan.groups] == [2, 2]


def test_a_view_behind_a_computation_is_not_taken_for_one_of_the_weights(tmp_path):
    plan = check(converted(Transpose(0, 1), Doubled(), Transpose(0, 1)), tmp_path)
    assert len(plan.groups) == 2


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (DoubledInPlace, "in place"),
        (Constant, "did not make from the model's weights"),
        (Dependent, "not known without the weights' values"),
    ],
)
def test_a_converter_that_cannot_be_followed_is_refused(operation, message):
    with pytest.raises(ValueError, match=message):
        compile_key_plan(converted(operation()))


# ---------------------------------------------------------------------------------------------------------------------
# Views


def random_shape(numel, rng):
    shape = []
    while numel > 1:
        size = rng.choice([n for n in range(2, numel + 1) if numel % n == 0])
        shape.append(size)
        numel //= size
    shape.insert(rng.randint(0, len(shape)), 1)
    return shape


def test_views_walk_as_torch_does():
    changes = sum(check_random_view(random.Random(seed)) for seed in range(300))
    assert changes > 900


def check_random_view(rng):
    shape = rng.choice([(8, 12, 6), (4, 6), (24,), (), (1, 5), (2, 3, 4, 5)])
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    view, actual, known = View.of("x", shape), tensor, 0
    for _ in range(6):
        change = rng.choice(["reshape", "permute", "narrow"])
        if change == "reshape":
            target = random_shape(actual.numel(), rng)
            after, changed = actual.reshape(target), view.reshape(target)
        elif change == "permute":
            dims = rng.sample(range(actual.ndim), actual.ndim)
            after, changed = actual.permute(dims), view.permute(dims)
        elif actual.ndim:
            dim = rng.randrange(actual.ndim)
            start = rng.randrange(actual.shape[dim])
            length = rng.randint(1, actual.shape[dim] - start)
            after, changed = actual.narrow(dim, start, length), view.narrow(dim, start, length)
        else:
            continue
        if changed is None:  # no single walk: nothing is claimed, so this change is not made
            continue
        view, actual, known = changed, after, known + 1
        assert view.shape == actual.shape
        start, stop = view.rows
        assert torch.equal(view.read(tensor.reshape(-1, *shape[1:])[start:stop]), actual)
    return known


def test_the_table_of_the_note_on_views():
    experts, inner, hidden, expert = 4, 3, 5, 2
    stack = torch.arange(experts * 2 * inner * hidden).reshape(experts, 2 * inner, hidden)
    view = View.of("x", stack.shape)
    assert view.axes == (((4, 30),), ((6, 5),), ((5, 1),)) and view.offset == 0 and view.rows == (0, experts)
    up = view.narrow(0, expert, 1).narrow(1, inner, inner)
    assert up.offset == (expert * 2 + 1) * inner * hidden and up.rows == (expert, expert + 1)
    assert torch.equal(up.read(stack[expert : expert + 1]), stack[expert : expert + 1, inner:])
    pairs = view.reshape((4, 2, 3, 5)).permute((0, 2, 1, 3)).reshape((4, 6, 5))
    assert pairs.axes[1] == ((inner, hidden), (2, inner * hidden))
    assert torch.equal(pairs.read(stack)[:, 0::2], stack[:, :inner])


def test_parts_of_a_tensor_are_the_tensor():
    sources = {"a": torch.arange(7 * 6 * 5).float().view(7, 6, 5), "b": torch.arange(3 * 6 * 5).float().view(3, 6, 5)}
    a, b = (View.of(name, source.shape) for name, source in sources.items())
    row = 6 * 5 * 4
    for tensor, cut in (
        (HubTensor("whole", (7, 6, 5), torch.float32, (a,)), True),
        (HubTensor("one after the other", (10, 6, 5), torch.float32, (a, b)), True),
        (HubTensor("each row turned", (7, 5, 6), torch.float32, (a.permute((0, 2, 1)),)), True),
        # A cut of these would read every row of the source each time.
        (HubTensor("rows inside", (6, 7, 5), torch.float32, (a.permute((1, 0, 2)),)), False),
        (HubTensor("side by side", (3, 6, 10), torch.float32, (b, b), dim=2), False),
    ):
        whole = tensor.build([sources[view.source][slice(*view.rows)] for view in tensor.views])
        for max_bytes, num_rows in ((10**6, 10), (2 * row, 2), (row - 1, 1)):
            parts = tensor.parts(max_bytes)
            built = [part.build([sources[v.source][slice(*v.rows)] for v in part.views]) for _, part in parts]
            assert torch.equal(torch.cat(built), whole)
            assert [first for first, _ in parts] == [sum(p.nbytes for p in built[:i]) for i in range(len(built))]
            assert len(parts) == 1 or (cut and max(len(part) for part in built) == num_rows)
            assert len(parts) > 1 or not cut or max_bytes >= tensor.nbytes


# ---------------------------------------------------------------------------------------------------------------------
# Who writes what, and one process


def test_owners_write_their_experts_and_the_rest_is_spread_by_bytes():
    plan = compile_key_plan(tiny_model("qwen3_moe"))
    sources = {view.source: view for tensor in plan.tensors for view in tensor.views}
    world_size, per_rank = 4, NUM_EXPERTS // 4
    experts = tuple((rank * per_rank, (rank + 1) * per_rank) for rank in range(world_size))
    dense = ((0, 3), (3, 6), (6, 9), (9, 128))  # no tensor here lies on one rank
    rows = torch.empty(0)
    shards = {name: Shard((128,), rows, experts if "experts" in name else dense) for name in sources}
    jobs = _assign(plan, shards, world_size)

    moved = [job for job in jobs if not job.owners]
    assert jobs[: len(moved)] == moved and all("experts" not in job.tensors[0].key for job in moved)
    written = [sum(job.nbytes for job in jobs if job.writer == rank) for rank in range(world_size)]
    assert max(written) - min(written) <= max(job.nbytes for job in jobs)
    for job in jobs:
        if match := re.search(r"experts\.(\d+)", job.tensors[0].key):
            assert job.owners == [job.writer] == [int(match[1]) // per_rank]


def test_one_process_writes_the_very_bytes_of_transformers(tmp_path):
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16)  # with tensors that stay in fp32
    model.save_pretrained(tmp_path / "stock")
    export_checkpoint(model, tmp_path / "ours")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes(), name


def test_several_files_and_their_index(tmp_path):
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16)  # with tensors that stay in fp32
    wanted = expected(model, tmp_path / "stock")
    export_checkpoint(model, tmp_path / "ours", max_shard_size="50KB")
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    loaded = {}
    for file in files:
        tensors = load_file(file)
        assert sum(value.nbytes for value in tensors.values()) <= 50_000
        assert {index["weight_map"][key] for key in tensors} == {file.name}
        loaded |= tensors
    assert_same(loaded, wanted)
    assert len(index["weight_map"]) == len(wanted)
    assert index["metadata"] == {
        "total_parameters": model.num_parameters(),
        "total_size": sum(value.nbytes for value in wanted.values()),
    }
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(reloaded.state_dict(), model.state_dict())


def test_a_new_checkpoint_replaces_the_files_of_an_old_one(tmp_path):
    old, new = tiny_model("qwen3_moe", seed=0), tiny_model("qwen3_moe", seed=1)
    wanted = expected(new, tmp_path / "stock")
    for sizes in (("50GB", "100KB"), ("100KB", "50GB"), ("100KB", "200KB")):
        directory = tmp_path / "-".join(sizes)
        export_checkpoint(old, directory, max_shard_size=sizes[0])
        (directory / "model-00001-of-00099.safetensors.partial").write_text("of a save that was killed")
        (directory / "tokenizer.json").write_text("not ours")
        export_checkpoint(new, directory, max_shard_size=sizes[1])
        assert_same({k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}, wanted)
        assert (directory / "tokenizer.json").exists() and not list(directory.glob("*.partial"))
        assert (directory / "model.safetensors.index.json").exists() == (sizes[1] != "50GB")
        assert_same(AutoModelForCausalLM.from_pretrained(directory).state_dict(), new.state_dict())


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old, new = tiny_model("qwen3_moe", seed=0), tiny_model("qwen3_moe", seed=1)
    export_checkpoint(old, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(self, tensor, value, first_byte):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_moe_accel.weights.export._TensorFile.write", full)
    with pytest.raises(OSError, match="No space left"):
        export_checkpoint(new, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got Linear"):
        export_checkpoint(torch.nn.Linear(2, 2), tmp_path)
    model = tiny_model("llama")
    model._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match="PEFT adapters"):
        export_checkpoint(model, tmp_path)
    model = tiny_model("llama")
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="quantized"):
        export_checkpoint(model, tmp_path)
    model = tiny_model("llama")
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="phase has dtype torch.complex64"):
        export_checkpoint(model, tmp_path)
    with pytest.raises(ValueError, match="5 parsecs"):
        export_checkpoint(tiny_model("llama"), tmp_path, max_shard_size="5 parsecs")
    assert not list(tmp_path.glob("*.safetensors*"))
