"""`hf-moe-accel merge`: what stock PEFT merges in memory, tensor by tensor on disk."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft import get_peft_model as stock_get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe_accel.cli import main
from hf_moe_accel.hf import merge as merging
from hf_moe_accel.weights.plan import ConvertedGroup, HubTensor, KeyPlan, View
from hf_moe_accel.weights.shards import LowRank
from tests.distributed.test_expert_adapters import MODELS, Adapted, config, draw_factors
from tests.helpers.models import tiny_model, toy_tokenizer

ADAPTER_FILE = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"


def save_base(name: str, directory: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    tiny_model(name, dtype=dtype, **overrides).save_pretrained(directory, max_shard_size="100KB")
    toy_tokenizer().save_pretrained(directory)
    return directory


def save_adapter(name: str, directory: Path, **more: Any) -> Path:
    Adapted(name, **more)().save_pretrained(directory)
    return directory


def stock_merge(name: str, adapter: Path, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Of the adapter as it lies on the disk."""
    model = PeftModel.from_pretrained(tiny_model(name, dtype=dtype), adapter).merge_and_unload()
    model.save_pretrained(directory, max_shard_size="100KB")
    return directory


def tensors(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def weight_files(directory: Path) -> dict[str, list[str]]:
    """The keys of each weight file."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found[path.name] = sorted(file.keys())
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process; returns its exit code, stdout and stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(["merge", *map(str, arguments)])
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter, which no test may change."""
    directory = tmp_path_factory.mktemp("saved")
    save_base("qwen3_moe", directory / "base")
    save_adapter("qwen3_moe", directory / "adapter")
    return directory


@pytest.fixture
def pair(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(saved, tmp_path / "pair"))


# --- what is merged ---


@pytest.mark.parametrize("name", MODELS)
def test_as_stock_peft_merges(name: str, tmp_path: Path, cli) -> None:
    base, adapter, out = save_base(name, tmp_path / "base"), save_adapter(name, tmp_path / "adapter"), tmp_path / "out"
    stock = stock_merge(name, adapter, tmp_path / "stock")
    code, text, err = cli(base, adapter, out)
    assert code == 0, err
    assert text.splitlines()[-1] == f"  AutoModelForCausalLM.from_pretrained({str(out)!r})"

    before, merged, expected = tensors(base), tensors(out), tensors(stock)
    assert merged.keys() == before.keys() == expected.keys()
    changed = {key for key in merged if not same_bits(merged[key], before[key])}
    assert changed == {key for key in merged if not same_bits(expected[key], before[key])}
    assert f"The adapter is folded into {len(changed)} of {len(merged)} tensors." in text
    assert any("experts" in key for key in changed) and any("o_proj" in key for key in changed)
    for key, value in merged.items():
        assert value.dtype == before[key].dtype
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)

    assert len(weight_files(base)) > 1 and weight_files(out) == weight_files(base)
    assert (out / INDEX).read_bytes() == (base / INDEX).read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in base.iterdir()}
    assert not (tmp_path / "out.partial").exists()


def test_it_loads(saved: Path, tmp_path: Path, cli) -> None:
    assert cli(saved / "base", saved / "adapter", tmp_path / "out")[0] == 0
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    adapted = Adapted("qwen3_moe")().eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w7 w30", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens).logits, adapted(input_ids=tokens).logits)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_rounded_once(name: str, tmp_path: Path, cli) -> None:
    base = save_base(name, tmp_path / "base", torch.bfloat16)
    adapter = save_adapter(name, tmp_path / "adapter", dtype=torch.bfloat16)
    assert load_file(adapter / ADAPTER_FILE).popitem()[1].dtype == torch.float32
    assert cli(base, adapter, tmp_path / "out")[0] == 0
    # The same weights in fp32, merged by stock PEFT in fp32.
    model = tiny_model(name, dtype=torch.bfloat16).float()
    model.config.dtype = torch.float32
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(tmp_path / "stock")
    before, merged, expected = tensors(base), tensors(tmp_path / "out"), tensors(tmp_path / "stock")
    num_other = total = 0
    for key, value in merged.items():
        assert value.dtype == before[key].dtype
        num_other += int((value != expected[key].to(value.dtype)).sum())
        total += value.numel()
        # One unit in the last place, where the order of the sum decides which way a tie goes.
        torch.testing.assert_close(value.float(), expected[key].float(), rtol=2**-8, atol=1e-6)
    assert num_other <= 1e-4 * total


@pytest.mark.parametrize(
    "more",
    [
        {"target_parameters": ["experts.down_proj"], "target_modules": []},
        {"target_parameters": None},
        {"rank_pattern": {r".*experts\.down_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
        {"target_parameters": None, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head", "input_layernorm", "gate"]},
        {"layers_to_transform": [1], "target_parameters": None},
    ],
    ids=str,
)
def test_spellings(more: dict[str, Any], saved: Path, tmp_path: Path, cli) -> None:
    model = stock_get_peft_model(tiny_model("qwen3_moe"), config(**more))
    draw_factors(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(1.0)
    model.save_pretrained(tmp_path / "adapter")
    assert cli(saved / "base", tmp_path / "adapter", tmp_path / "out")[0] == 0
    expected = tensors(stock_merge("qwen3_moe", tmp_path / "adapter", tmp_path / "stock"))
    merged, before = tensors(tmp_path / "out"), tensors(saved / "base")
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)
    untouched = [key for key in expected if same_bits(expected[key], before[key])]
    assert len(untouched) < len(before) and all(same_bits(merged[key], before[key]) for key in untouched)


def test_dropout_does_not_matter(pair: Path, tmp_path: Path, cli) -> None:
    """PEFT's wrappers of experts refuse it, and adapters that this library has trained with it tell of it."""
    edit(pair / "adapter/adapter_config.json", lora_dropout=0.25)
    assert cli(pair / "base", pair / "adapter", tmp_path / "out")[0] == 0
    edit(pair / "adapter/adapter_config.json", lora_dropout=0.0)
    assert cli(pair / "base", pair / "adapter", tmp_path / "without")[0] == 0
    merged = tensors(tmp_path / "out")
    assert all(same_bits(merged[key], value) for key, value in tensors(tmp_path / "without").items())


def test_an_adapter_of_transformers_v4(saved: Path, tmp_path: Path, cli) -> None:
    """One pair of factors for each expert."""
    generator = torch.Generator().manual_seed(0)
    names = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    state = {}
    for layer, expert in itertools.product(range(2), range(8)):
        for name, (rows, columns) in names.items():
            key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
            state[f"{key}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.2
            state[f"{key}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.05
    old = tmp_path / "v4"
    config(target_modules=list(names), target_parameters=None).save_pretrained(old)
    save_file(state, old / ADAPTER_FILE)
    code, _, err = cli(saved / "base", old, tmp_path / "out")
    assert code == 0, err
    merged, before = tensors(tmp_path / "out"), tensors(saved / "base")
    for layer, expert in itertools.product(range(2), range(8)):
        for name in names:
            key = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
            a, b = (state[f"base_model.model.{key}.lora_{kind}.weight"] for kind in "AB")
            expected = before[f"{key}.weight"] + 2 * b @ a
            torch.testing.assert_close(merged[f"{key}.weight"], expected, rtol=1e-5, atol=1e-6)


def test_modules_to_save_with_buffers(tmp_path: Path, cli) -> None:
    """DeepSeek's router holds a buffer, which stock PEFT saves beside its weight."""
    base = save_base("deepseek_v3", tmp_path / "base")
    model = stock_get_peft_model(tiny_model("deepseek_v3"), config(modules_to_save=["gate"]))
    draw_factors(model)
    model.get_base_model().model.layers[1].mlp.gate.modules_to_save["default"].e_score_correction_bias.fill_(5.0)
    model.save_pretrained(tmp_path / "adapter")
    assert cli(base, tmp_path / "adapter", tmp_path / "out")[0] == 0
    merged = tensors(tmp_path / "out")
    assert (merged["model.layers.1.mlp.gate.e_score_correction_bias"] == 5.0).all()
    expected = tensors(stock_merge("deepseek_v3", tmp_path / "adapter", tmp_path / "stock"))
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)


def test_large_tensors_go_in_parts(tmp_path: Path, cli) -> None:
    base, adapter = save_base("gpt_oss", tmp_path / "base"), save_adapter("gpt_oss", tmp_path / "adapter")
    assert cli(base, adapter, tmp_path / "whole")[0] == 0
    with mock.patch.object(merging, "MAX_PART_BYTES", 10_000):
        assert cli(base, adapter, tmp_path / "parts")[0] == 0
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-7)


def test_a_tensor_made_of_several_parameters() -> None:
    """None of today's models saves one that an adapter changes."""
    views = tuple(View.of(name, (2, 3)) for name in ("left", "right", "third"))
    tensor = HubTensor("all", (2, 9), torch.bfloat16, views, dim=1)
    low_rank = LowRank(torch.ones(1, 3), torch.tensor([[1.0], [2.0]]), 0.5)
    changes: dict[str, list[Any]] = {"left": [low_rank], "third": [torch.full((2, 3), 7.0), low_rank]}
    merged = merging._merge(tensor, torch.ones(2, 9, dtype=torch.bfloat16), lambda name: changes.get(name, []))
    expected = torch.tensor([[1.5] * 3 + [1.0] * 3 + [7.5] * 3, [2.0] * 3 + [1.0] * 3 + [8.0] * 3])
    assert merged.dtype == torch.bfloat16 and torch.equal(merged.float(), expected)


def test_a_converted_tensor_is_refused() -> None:
    group = ConvertedGroup(("w",), (HubTensor("hub.w", (2, 3), torch.float32, ()),))
    with pytest.raises(ValueError, match="'w' is converted when BASE base is saved .'hub.w'., and nothing can be"):
        merging._merged_tensors(KeyPlan((), (group,), 6), {"w": []}, {}, Path("base"))


def test_what_the_model_does_not_know_is_copied(pair: Path, tmp_path: Path, cli) -> None:
    """A key, a dtype that no model has, and the file's own words; all in one file without an index."""
    shutil.rmtree(pair / "base")
    tiny_model("qwen3_moe").save_pretrained(pair / "base")
    path = pair / "base/model.safetensors"
    foreign = {
        "mtp.weight": torch.arange(7, dtype=torch.int16),
        "mtp.scale": torch.tensor(0.5).to(torch.float8_e4m3fn),
    }
    save_file(load_file(path) | foreign, path, metadata={"format": "pt", "made_by": "me"})
    assert cli(pair / "base", pair / "adapter", tmp_path / "out")[0] == 0
    merged = tensors(tmp_path / "out")
    assert all(same_bits(merged[key], value) for key, value in foreign.items())
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "made_by": "me"}


def test_what_a_training_run_left_is_not_copied(pair: Path, tmp_path: Path, cli) -> None:
    for name in ("manifest.json", "trainer_state.json", "pytorch_model.bin", "notes.md"):
        (pair / "base" / name).write_text("{}")
    (pair / "base/LICENSE").write_text("free")
    (pair / "base/additional_chat_templates").mkdir()
    (pair / "base/additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    (tmp_path / "out").mkdir()  # empty
    assert cli(pair / "base", pair / "adapter", tmp_path / "out")[0] == 0
    left = {str(path.relative_to(pair / "base")) for path in (pair / "base").rglob("*")}
    left -= {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    assert left == {"manifest.json", "trainer_state.json", "pytorch_model.bin", "notes.md"}
    assert (tmp_path / "out/additional_chat_templates/tools.jinja").read_text() == "{{ tools }}"


def test_a_hub_id(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli) -> None:
    repo = tmp_path / "hub/models--some--base"
    shutil.copytree(saved / "base", repo / "blobs")
    (repo / "snapshots/abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("abc")
    for path in (repo / "blobs").iterdir():
        os.symlink(path, repo / "snapshots/abc" / path.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    code, _, err = cli("some/base", saved / "adapter", tmp_path / "out")
    assert code == 0, err
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert cli(saved / "base", saved / "adapter", tmp_path / "expected")[0] == 0
    assert all(
        same_bits(value, tensors(tmp_path / "out")[key]) for key, value in tensors(tmp_path / "expected").items()
    )


# --- what is refused ---


def quantized(pair: Path) -> None:
    edit(pair / "base/config.json", quantization_config={"quant_method": "mxfp4"})


def fp8(pair: Path) -> None:
    for path in (pair / "base").glob("*.safetensors"):
        low = {k: v.to(torch.float8_e4m3fn) if "q_proj" in k else v for k, v in load_file(path).items()}
        save_file(low, path, metadata={"format": "pt"})


def truncated(pair: Path) -> None:
    path = sorted((pair / "base").glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])


def a_file_less(pair: Path) -> None:
    sorted((pair / "base").glob("*.safetensors"))[1].unlink()


def other_base(pair: Path) -> None:
    shutil.rmtree(pair / "base")
    save_base("nemotron_h", pair / "base")


def smaller_base(pair: Path) -> None:
    shutil.rmtree(pair / "base")
    save_base("qwen3_moe", pair / "base", hidden_size=32)


def shallower_base(pair: Path) -> None:
    shutil.rmtree(pair / "base")
    save_base("qwen3_moe", pair / "base", num_hidden_layers=1)


def other_config(pair: Path) -> None:
    edit(pair / "base/config.json", moe_intermediate_size=16)


def internal_layout(pair: Path) -> None:
    shutil.rmtree(pair / "base")
    model = tiny_model("qwen3_moe")
    model.save_pretrained(pair / "base", save_original_format=False)


def no_config(pair: Path) -> None:
    (pair / "base/config.json").unlink()


def unknown_model(pair: Path) -> None:
    edit(pair / "base/config.json", model_type="none_such")


def pickled(pair: Path) -> None:
    (pair / "adapter" / ADAPTER_FILE).rename(pair / "adapter/adapter_model.bin")


def no_adapter(pair: Path) -> None:
    (pair / "adapter/adapter_config.json").unlink()


def option(**values: Any) -> Callable[[Path], None]:
    def change(pair: Path) -> None:
        edit(pair / "adapter/adapter_config.json", **values)

    return change


def adapter_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(pair: Path) -> None:
        state = load_file(pair / "adapter" / ADAPTER_FILE)
        change(state)
        save_file(state, pair / "adapter" / ADAPTER_FILE)

    return damage


def an_embedding(pair: Path) -> None:
    save_adapter("qwen3_moe", pair / "adapter", target_modules=["q_proj", "embed_tokens"])


def tied(pair: Path) -> None:
    shutil.rmtree(pair / "base")
    save_base("qwen3_moe", pair / "base", tie_word_embeddings=True)
    save_adapter("qwen3_moe", pair / "adapter", target_modules=["q_proj", "lm_head"])


def a_real(use: str, **more: Any) -> Callable[[Path], None]:
    def save(pair: Path) -> None:
        kind: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
        model = stock_get_peft_model(tiny_model("qwen3_moe"), LoraConfig(**(kind | {use: True} | more)))
        model.save_pretrained(pair / "adapter")

    return save


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (no_adapter, "holds no adapter_config.json: give the directory that PEFT saved"),
        (pickled, "holds no adapter_model.safetensors: save it again, with safetensors"),
        (option(peft_type="IA3"), "has peft_type='IA3', and only 'LORA' is folded in: load it with peft.PeftModel"),
        (a_real("use_dora"), "has use_dora=True (DoRA): load it with peft.PeftModel on the base"),
        (a_real("lora_bias"), "has lora_bias=True (biases of its own): load it with"),
        (option(bias="lora_only"), "has bias='lora_only', and only 'none' is merged"),
        (option(trainable_token_indices=[1]), "has trainable_token_indices=[1] (rows of an embedding)"),
        (option(init_lora_weights="pissa_niter_4"), "has init_lora_weights='pissa_niter_4', for which PEFT changes"),
        (option(alora_invocation_tokens=[1, 2]), "its alora_invocation_tokens makes it a variant of LoRA"),
        (option(target_modules=["q_proj"]), "o_proj.lora_A.weight', for which Qwen3MoeForCausalLM with its config"),
        (
            option(target_modules=["none_such"], target_parameters=None),
            "Target modules {'none_such'} not found in the base model",
        ),
        (option(r=8), "is [32, 64], where [64, 64] fits the model"),
        (adapter_tensors(lambda state: state.pop(Q_PROJ)), f"it lacks '{Q_PROJ}', which its configuration asks for"),
        (
            adapter_tensors(lambda state: state.update({"base_model.model.extra.weight": torch.ones(2)})),
            "it holds 'base_model.model.extra.weight', for which Qwen3MoeForCausalLM",
        ),
        (an_embedding, "embed_tokens"),
        (tied, "changes 'lm_head.weight', which BASE"),
        (other_base, "does not fit BASE"),
        (smaller_base, "is [32, 64], where [32, 32] fits the model"),
        (shallower_base, "layers.1."),
        (other_config, "does not fit BASE"),
        (internal_layout, "experts.0.down_proj.weight', which the adapter changes: load it with transformers"),
        (quantized, "is quantized (quantization_config in config.json): give its unquantized weights"),
        (fp8, "q_proj.weight' as F8_E4M3, and an adapter is folded into F64, F32, F16, BF16"),
        (truncated, "is damaged: model-"),
        (a_file_less, "lacks"),
        (no_config, "holds no config.json: give the directory of a saved model"),
        (unknown_model, "is no causal language model of transformers"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_nothing_is_written(damage: Callable[[Path], None], says: str, pair: Path, cli) -> None:
    damage(pair)
    code, out, err = cli(pair / "base", pair / "adapter", pair / "out")
    assert (code, out) == (2, "")
    (line,) = [each for each in err.splitlines() if each.startswith("hf-moe-accel merge: error: ")]
    assert says in line, line
    assert line == err.splitlines()[-1]
    assert {path.name for path in pair.iterdir()} == {"base", "adapter"}


def test_refused_arguments(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli) -> None:
    base, adapter, file, full = pair / "base", pair / "adapter", tmp_path / "file", tmp_path / "full"
    file.write_text("")
    full.mkdir()
    (full / "mine").write_text("")
    (tmp_path / "dead.partial").mkdir()
    for arguments, says in (
        ((base, adapter, file), "is a file: name a directory, which is made"),
        ((base, adapter, full), "is not empty, and nothing in it is overwritten: name a new directory"),
        ((base, adapter, "/proc"), "is not empty"),
        ((base, adapter, tmp_path / "dead"), "a command that died has left it"),
        ((base, adapter, base / "out"), "which is not changed: name a directory elsewhere"),
        ((base, adapter, adapter / "out"), "which is not changed: name a directory elsewhere"),
        ((file, adapter, tmp_path / "out"), f"BASE {file} is a file: give its directory, or a hub id"),
        (("none/such", adapter, tmp_path / "out"), "BASE none/such is no directory, and the hub's cache and the hub"),
        (("./none/such", adapter, tmp_path / "out"), "BASE ./none/such is no directory"),
        ((base, tmp_path / "none", tmp_path / "out"), f"ADAPTER {tmp_path / 'none'} is no directory"),
        ((adapter, base, tmp_path / "out"), "ADAPTER"),
    ):
        code, _, err = cli(*arguments)
        assert code == 2 and says in err.splitlines()[-1], err
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = cli(base, adapter, tmp_path / "out")
    assert code == 2 and "adapters need PEFT, which is not installed: pip install 'hf_moe_accel[lora]'" in err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "^C"])
def test_a_failure_leaves_nothing(error: BaseException, pair: Path, cli) -> None:
    real, calls = merging._merge, []

    def fails(*arguments: Any) -> Tensor:
        calls.append(arguments)
        if len(calls) > 20:
            raise error
        return real(*arguments)

    with mock.patch.object(merging, "_merge", fails):
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                main(["merge", str(pair / "base"), str(pair / "adapter"), str(pair / "new/out")])
        else:
            code, out, err = cli(pair / "base", pair / "adapter", pair / "new/out")
            assert (code, out) == (1, "")
            assert err.splitlines()[-1] == "FAILED: nothing was merged: [Errno 28] No space left on device"
    assert not any((pair / "new").iterdir())
    assert cli(pair / "base", pair / "adapter", pair / "new/out")[0] == 0


def test_a_file_that_shrinks_meanwhile(pair: Path, cli) -> None:
    real = merging.Merge.write

    def write(plan: merging.Merge, *arguments: Any) -> None:
        truncated(pair)
        real(plan, *arguments)

    with mock.patch.object(merging.Merge, "write", write):
        code, _, err = cli(pair / "base", pair / "adapter", pair / "out")
    assert code == 1 and err.splitlines()[-1].endswith("became shorter while it was read")
    assert not (pair / "out").exists() and not (pair / "out.partial").exists()


def test_help_is_quick() -> None:
    code = (
        "import sys; from hf_moe_accel.cli import main\n"
        "try: main(['merge', '--help'])\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for text in ("BASE ADAPTER OUT", "exit code:", "examples:", "bit for bit"):
        assert text in done.stdout
