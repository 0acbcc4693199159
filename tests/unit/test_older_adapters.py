"""Adapters that were saved in other forms: read as what they are, or refused where that cannot be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel as StockPeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_moe_accel import PeftModel, export_adapter, prepare_moe_model
from hf_moe_accel.hf.peft_bridge import saved_adapter
from hf_moe_accel.hf.peft_bridge.older_files import current_files
from tests.helpers.adapters import Adapted
from tests.helpers.models import ragged_batch_dataset, tiny_model
from tests.helpers.tolerances import assert_close

FILE = "adapter_model.safetensors"
# Experts with as many inputs as outputs in the down projection, which alone is adapted: no shape tells the layout.
SQUARE: dict[str, Any] = {"sizes": {"moe_intermediate_size": 64}, "target_parameters": ["experts.down_proj"]}


def logits(model: Any) -> Tensor:
    rows = torch.stack([row["input_ids"] for row in ragged_batch_dataset(2, 8, seed=9)])
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=rows).logits
    return result


def by_ours(directory: Path, name: str, sizes: dict[str, int] | None = None, **more: Any) -> Tensor:
    return logits(prepare_moe_model(PeftModel.from_pretrained(tiny_model(name, **(sizes or {})), directory, **more)))


def swap(directory: Path, version: str | None, num_experts: int = 8) -> None:
    """Write a file as PEFT did before 0.19.1.

    Its product for an expert was `einsum("o r e, e r i -> e i o", B, A)` with A [E, r, first dim of the parameter] and
    B [second dim, r, E]; today's is `einsum("o r e, e r i -> e o i")` with A over the inputs.
    """
    tensors = load_file(directory / FILE)
    for key in [key for key in tensors if "experts" in key and "lora_A" in key]:
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        factor_a, factor_b = a.reshape(num_experts, -1, a.size(1)), b.reshape(b.size(0), -1, num_experts)
        old_a = torch.einsum("ore->ero", factor_b).reshape(-1, b.size(0))
        old_b = torch.einsum("eri->ire", factor_a).reshape(a.size(1), -1)
        tensors[key], tensors[key.replace("lora_A", "lora_B")] = old_a.contiguous(), old_b.contiguous()
    save_file(tensors, directory / FILE)
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | {"peft_version": version}))


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h", "deepseek_v3"])
def test_swapped_factors_are_seen_by_their_shapes(name: str, tmp_path: Path) -> None:
    """So are those of real files of PEFT 0.18.0 and 0.19.0, which were compared once by hand."""
    Adapted(name)().save_pretrained(tmp_path)
    expected = by_ours(tmp_path, name)
    swap(tmp_path, None)
    assert_close(by_ours(tmp_path, name), expected, "training")


@pytest.mark.parametrize(
    ("version", "layout"), [("0.18.0", None), ("0.19.0", None), (None, "swapped"), ("0.21.2", "swapped")], ids=str
)
def test_where_no_shape_tells_the_version_or_the_user_does(version: Any, layout: Any, tmp_path: Path) -> None:
    Adapted("qwen3_moe", **SQUARE)().save_pretrained(tmp_path)
    expected = by_ours(tmp_path, "qwen3_moe", SQUARE["sizes"])
    swap(tmp_path, version)
    assert_close(by_ours(tmp_path, "qwen3_moe", SQUARE["sizes"], layout=layout), expected, "training")


@pytest.mark.parametrize("version", [None, "0.19.0.dev0"])
def test_what_nothing_tells_must_be_given(version: Any, tmp_path: Path) -> None:
    Adapted("qwen3_moe", **SQUARE)().save_pretrained(tmp_path)
    expected = by_ours(tmp_path, "qwen3_moe", SQUARE["sizes"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_version": version}))
    with pytest.raises(ValueError, match="Give layout='current' if it was saved by PEFT 0.19.1 or later"):
        by_ours(tmp_path, "qwen3_moe", SQUARE["sizes"])
    with pytest.raises(ValueError, match="layout='old' must be 'current'"):
        by_ours(tmp_path, "qwen3_moe", SQUARE["sizes"], layout="old")
    assert_close(by_ours(tmp_path, "qwen3_moe", SQUARE["sizes"], layout="current"), expected, "training")


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("qwen3_moe", {}),
        ("mixtral", {"target_parameters": ["experts.down_proj"]}),
        ("nemotron_h", {"use_rslora": True}),
        ("deepseek_v3", {"target_modules": ["q_a_proj"]}),
        ("phimoe", {"rank_pattern": {r".*experts\.down_proj": 2}}),
    ],
    ids=str,
)
def test_what_export_adapter_writes_is_read_back_as_it_was(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = Adapted(name, **more)()
    model.save_pretrained(tmp_path / "stacked")
    export_adapter(prepare_moe_model(model), tmp_path / "single")
    expected = load_file(tmp_path / "stacked" / FILE)
    with current_files(tiny_model(name), tmp_path / "single", None) as current:
        found = load_file(current / FILE)
    assert found.keys() == expected.keys()
    if "rank_pattern" not in more:  # one rank serves all in the other form: the rest is zeros there
        assert_close(found, expected, "training")
    assert_close(by_ours(tmp_path / "single", name), by_ours(tmp_path / "stacked", name), "training")


def matrices_of_v4(directory: Path, name: str, projections: list[str], num_experts: int = 8) -> None:
    """An adapter of transformers v4: each linear layer of each expert with a pair of its own."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = {key: value.shape for key, value in saved_model(name, directory).items()}
    tensors = {}
    for key, shape in shapes.items():
        stem = key.removesuffix(".weight")
        if ".experts." in key and stem.rpartition(".")[2] in projections or "q_proj" in key:
            for factor, size in (("A", (4, shape[1])), ("B", (shape[0], 4))):
                draw = torch.randn(size, generator=generator) * 0.1
                tensors[f"base_model.model.{stem}.lora_{factor}.weight"] = draw
    save_file(tensors, directory / FILE)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [*projections, "q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))


def saved_model(name: str, directory: Path) -> dict[str, Tensor]:
    tiny_model(name).save_pretrained(directory / "base")
    return load_file(directory / "base" / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "projections"),
    [("qwen3_moe", ["gate_proj", "up_proj", "down_proj"]), ("mixtral", ["w1", "w2", "w3"])],
    ids=str,
)
def test_single_experts_as_stock_peft_reads_them(name: str, projections: list[str], tmp_path: Path) -> None:
    matrices_of_v4(tmp_path / "v4", name, projections)
    stock = logits(StockPeftModel.from_pretrained(tiny_model(name), tmp_path / "v4"))
    model = PeftModel.from_pretrained(tiny_model(name), tmp_path / "v4")
    lora = model.get_base_model().model.layers[0].mlp.experts.lora
    assert lora["gate_up_proj"].r == {"default": 8} and lora["gate_up_proj"].lora_alpha == {"default": 16}
    assert_close(logits(prepare_moe_model(model)), stock, "training")


@pytest.mark.parametrize(
    ("name", "projections"), [("phimoe", ["w1", "w2", "w3"]), ("nemotron_h", ["up_proj", "down_proj"])], ids=str
)
def test_single_experts_of_models_that_stock_peft_does_not_translate(
    name: str, projections: list[str], tmp_path: Path
) -> None:
    """The oracle adds each product to its matrix of the hub's checkpoint."""
    matrices_of_v4(tmp_path / "v4", name, projections)
    base, factors = saved_model(name, tmp_path), load_file(tmp_path / "v4" / FILE)
    for key in base:
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in factors:
            base[key] += 2 * factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
    save_file(base, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    merged = type(tiny_model(name)).from_pretrained(tmp_path / "base")
    assert_close(by_ours(tmp_path / "v4", name), logits(merged), "training")


def test_older_files_merge_offline_as_they_compute(tmp_path: Path) -> None:
    Adapted("qwen3_moe")().save_pretrained(tmp_path)

    def products() -> dict[str, Tensor]:
        found = {}
        with torch.device("meta"):
            model = tiny_model("qwen3_moe")
        for name, parts in saved_adapter(model, tmp_path).items():
            (part,) = (read() for read in parts)
            found[name] = part.b @ part.a
        return found

    expected = products()
    swap(tmp_path, None)
    assert_close(products(), expected, "training")


def test_a_matrix_without_a_place_is_named(tmp_path: Path) -> None:
    matrices_of_v4(tmp_path / "v4", "mixtral", ["w1", "w2", "w3"])
    with pytest.raises(ValueError, match=r"experts\.0\.w1\.lora_A\.weight' has no place in GptOssForCausalLM"):
        PeftModel.from_pretrained(tiny_model("gpt_oss"), tmp_path / "v4")
