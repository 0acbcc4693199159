"""What `prepare_moe_model` chooses, reports and leaves as it was, on one process."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM as PlainAutoModel
from transformers import PreTrainedModel

from hf_moe_accel import AutoModelForCausalLM, MoEAccelConfig, prepare_moe_model
from hf_moe_accel.dispatch.local import LocalDispatcher
from hf_moe_accel.experts.eager import EagerBackend
from hf_moe_accel.experts.grouped_mm import GroupedMMBackend
from hf_moe_accel.experts.padded_bmm import PaddedBMMBackend
from hf_moe_accel.hf.discover import find_experts
from hf_moe_accel.hf.install import NAME
from hf_moe_accel.log import warn_once
from hf_moe_accel.prepare import Setup, choose_setup
from hf_moe_accel.runtime import runtime_of
from tests.helpers.models import MOE, ragged_batch_dataset, tiny_config, tiny_model
from tests.helpers.tolerances import assert_close


def loss_of(model: PreTrainedModel) -> torch.Tensor:
    rows = ragged_batch_dataset(4, 16, seed=2)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return model(**batch).loss


def set_up(monkeypatch: pytest.MonkeyPatch, ranks: int, ranks_per_node: int, **choices: Any) -> Setup | None:
    """What is chosen for a model of 8 experts on the meta device, without a process group."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_per_node))
    with torch.device("meta"):
        model = PlainAutoModel.from_config(tiny_config("qwen3_moe"))
    return choose_setup(model, find_experts(model), MoEAccelConfig(**choices))


@pytest.mark.parametrize("name", [name for name in MOE if name != "phimoe"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_prepared_model_computes_the_same_loss_and_gradients(name: str, backend: str) -> None:
    plain, prepared = tiny_model(name), prepare_moe_model(tiny_model(name), MoEAccelConfig(expert_backend=backend))
    losses = [loss_of(model) for model in (plain, prepared)]
    for loss in losses:
        loss.backward()
    assert_close(losses[1], losses[0], "training")
    gradients = [{key: p.grad for key, p in model.named_parameters()} for model in (plain, prepared)]
    assert gradients[0].keys() == gradients[1].keys()
    # A parameter that takes no part has no gradient without us, and zeros or none with us.
    for key, expected in gradients[0].items():
        if expected is not None:
            assert_close(gradients[1][key], expected, "training", key)


def test_preparing_again_changes_nothing() -> None:
    model = tiny_model("qwen3_moe")
    assert prepare_moe_model(model) is model
    runtime = runtime_of(model)
    assert runtime is not None
    assert isinstance(runtime.dispatcher, LocalDispatcher)
    assert isinstance(runtime.backend, PaddedBMMBackend)
    assert prepare_moe_model(model, MoEAccelConfig(expert_backend="padded_bmm")) is model
    assert runtime_of(model) is runtime


@pytest.mark.parametrize(
    "choice",
    [
        {"ep_size": 2},
        {"dp_replicate_size": 2},
        {"token_dispatcher": "all_to_all"},
        {"expert_backend": "eager"},
        {"overlap_chunks": 2},
        {"expert_checkpointing": "full"},
        {"check_tokens": True},
    ],
)
def test_other_choices_for_a_prepared_model_are_refused(choice: dict[str, Any]) -> None:
    model = prepare_moe_model(tiny_model("qwen3_moe"))
    ((name, value),) = choice.items()
    with pytest.raises(
        ValueError, match=f"{name}={value!r} comes too late: .*ep 1 x efsdp 1.*, LocalDispatcher and PaddedBMMBackend"
    ):
        prepare_moe_model(model, MoEAccelConfig(**choice))


def test_names_stay_and_are_saved_under_the_hub_keys(tmp_path: Path) -> None:
    plain, model = tiny_model("qwen3_moe"), prepare_moe_model(tiny_model("qwen3_moe"))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    reloaded, info = PlainAutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_close(reloaded.state_dict(), plain.state_dict(), "exact")


def test_report(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hf_moe_accel"):
        prepare_moe_model(tiny_model("mixtral"), MoEAccelConfig(expert_backend="eager"))
    (text,) = caplog.messages
    for part in ("MixtralForCausalLM", "2 MoE layers of 8 experts", "ep 1 x efsdp 1 x replicas 1", "local", "eager"):
        assert part in text


def test_dense_model_comes_back_as_it_was_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    model = tiny_model("llama")
    with caplog.at_level(logging.WARNING, logger="hf_moe_accel"):
        assert prepare_moe_model(model) is model
    assert runtime_of(model) is None
    assert "save_pretrained" not in vars(model)
    (record,) = caplog.records
    assert "LlamaForCausalLM has no mixture-of-experts layers" in record.message


def test_layers_with_different_numbers_of_experts() -> None:
    def model() -> PreTrainedModel:
        mixed, small = tiny_model("qwen3_moe"), tiny_model("qwen3_moe", num_experts=6)
        mixed.model.layers[1].mlp = small.model.layers[1].mlp
        return mixed

    prepared = prepare_moe_model(model())
    assert_close(loss_of(prepared), loss_of(model()), "training")
    counts = runtime_of(prepared).stats.take().choices_LE
    assert counts.shape == (2, 8)
    assert counts.sum(1).tolist() == [4 * 16 * 2] * 2
    assert counts[1, 6:].tolist() == [0, 0]


def test_copy_of_a_prepared_model_is_independent() -> None:
    model = prepare_moe_model(tiny_model("qwen3_moe"))
    copied = copy.deepcopy(model)
    assert runtime_of(copied) is not runtime_of(model)
    before = loss_of(model).detach()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert_close(loss_of(model), before, "exact")
    assert loss_of(copied).item() != before.item()
    runtime = runtime_of(copied)
    assert runtime is not None
    runtime.stats.take()
    loss_of(model)
    assert int(runtime.stats.take().choices_LE.sum()) == 0


def test_adapters_on_attention_go_with_prepared_experts() -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_model("qwen3_moe"), LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    expected = loss_of(adapted).detach()
    assert prepare_moe_model(adapted) is adapted
    assert runtime_of(adapted) is not None
    loss = loss_of(adapted)
    assert_close(loss, expected, "training")
    loss.backward()
    assert all((p.grad is not None) == ("lora_" in name) for name, p in adapted.named_parameters())


def test_experts_that_were_never_bound_say_so() -> None:
    model = tiny_model("qwen3_moe")
    model.set_experts_implementation(NAME)
    with pytest.raises(RuntimeError, match="never bound to a runtime.*prepare_moe_model"):
        loss_of(model)


@pytest.mark.parametrize(
    ("ranks", "ranks_per_node", "choices", "layout", "dispatcher"),
    [
        (1, 1, {}, "ep 1 x efsdp 1 x replicas 1 (1 rank)", "local"),
        (4, 4, {}, "ep 4 x efsdp 1 x replicas 1 (4 ranks)", "all_to_all"),
        (16, 8, {}, "ep 8 x efsdp 2 x replicas 1 (16 ranks)", "all_to_all"),
        (16, 8, {"dp_replicate_size": 4}, "ep 4 x efsdp 1 x replicas 4 (16 ranks)", "all_to_all"),
        (12, 6, {}, "ep 2 x efsdp 6 x replicas 1 (12 ranks)", "all_to_all"),
        (12, 6, {"ep_size": 4}, "ep 4 x efsdp 3 x replicas 1 (12 ranks)", "all_to_all"),
        (4, 4, {"ep_size": 1}, "ep 1 x efsdp 4 x replicas 1 (4 ranks)", "local"),
        (4, 4, {"token_dispatcher": "local"}, "ep 1 x efsdp 4 x replicas 1 (4 ranks)", "local"),
        (4, 4, {"token_dispatcher": "all_to_all"}, "ep 4 x efsdp 1 x replicas 1 (4 ranks)", "all_to_all"),
    ],
)
def test_layout(
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    ranks_per_node: int,
    choices: dict[str, Any],
    layout: str,
    dispatcher: str,
) -> None:
    setup = set_up(monkeypatch, ranks, ranks_per_node, **choices)
    assert setup is not None
    assert setup.topology.describe() == layout
    assert setup.dispatcher == dispatcher


def test_layout_that_auto_could_not_choose_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = set_up(monkeypatch, 3, 3)
    assert setup is not None
    assert setup.topology.ep_size == 1
    (note,) = [note for note in setup.notes if note.startswith("expert parallelism")]
    assert "no number above 1 divides the 8 experts, the 3 ranks" in note


def test_backend_that_auto_could_not_choose_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (PaddedBMMBackend, GroupedMMBackend):
        monkeypatch.setattr(backend, "why_not", staticmethod(lambda *_: "the reason"))
    setup = set_up(monkeypatch, 1, 1)
    assert setup is not None
    assert setup.backend == "eager"
    assert setup.notes == ("padded_bmm: the reason", "grouped_mm: the reason")
    with pytest.raises(ValueError, match="expert_backend='grouped_mm' cannot serve this model: the reason"):
        set_up(monkeypatch, 1, 1, expert_backend="grouped_mm")


def test_from_pretrained_and_from_config_on_one_process(tmp_path: Path) -> None:
    plain = tiny_model("qwen3_moe")
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, moe_config=MoEAccelConfig(expert_backend="eager"))
    runtime = runtime_of(loaded)
    assert runtime is not None
    assert isinstance(runtime.backend, EagerBackend)
    assert_close(loss_of(loaded), loss_of(plain), "training")
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(plain.config, dtype=torch.bfloat16)
    torch.manual_seed(3)
    expected = PlainAutoModel.from_config(plain.config, dtype=torch.bfloat16)
    assert made.dtype == torch.bfloat16
    assert runtime_of(made) is not None
    assert_close(made.state_dict(), expected.state_dict(), "exact")


def test_arguments_of_from_pretrained_reach_transformers(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert runtime_of(model) is not None
    assert not any(info.values())
