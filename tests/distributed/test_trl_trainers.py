"""TRL's trainers with ours in front: the numbers of stock TRL on as many ranks, with every kind of reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model

from tests.helpers.adapters import config, draw_factors
from tests.helpers.models import toy_tokenizer
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import assert_close
from tests.helpers.trl_runs import data, loaded, other, run, write_inputs

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("trl")
    write_inputs(directory)
    return str(directory)


def adapted(source: str) -> Any:
    """With an adapter that is not zero, which is therefore a reference of its own."""
    model = get_peft_model(loaded(source), config())
    draw_factors(model)
    return model


def without_padding(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How long the padded rows are depends on the batches that the ranks have."""
    return [{key: value for key, value in entry.items() if key != "total_flos"} for entry in log]


LORA: dict[str, Any] = {"load": loaded, "options": {"peft_config": config()}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SFT": ("SFT", {}),
    "SFT, a loaded model": ("SFT", {"load": loaded}),
    "SFT, LoRA on experts": ("SFT", LORA),
    "DPO, the reference is implied": ("DPO", {}),
    "DPO, the reference is implied by a loaded model": ("DPO", {"load": loaded}),
    "DPO, a reference is given": ("DPO", {"options": {"ref_model": other}}),
    "DPO, the reference is without the adapter": ("DPO", LORA),
    "DPO, the reference is a copy of the adapter": ("DPO", {"load": adapted}),
    "DPO, the reference is computed before": ("DPO", {"precompute_ref_log_probs": True}),
    "DPO, the reference follows": ("DPO", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "KTO": ("KTO", {}),
    "KTO, the reference is computed before": ("KTO", {"precompute_ref_log_probs": True}),
    "Reward": ("Reward", {}),
    "Reward, LoRA on experts": ("Reward", {"options": {"peft_config": config(task_type="SEQ_CLS")}}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_stock_trl(case: str, inputs: str) -> None:
    """At a learning rate that moves the loss, so that whatever does not train shows in the next steps."""
    kind, options = CASES[case]
    options = {"learning_rate": 1e-3} | options
    (single,) = run_ranks(run, 1, kind, False, inputs, **options)
    (ours,) = run_ranks(run, 1, kind, True, inputs, **options)
    assert_close(ours, single, "training", "one rank")
    stock, _ = run_ranks(run, 2, kind, False, inputs, **options, init=False)
    for log in run_ranks(run, 2, kind, True, inputs, **options, init=False):
        assert_close(log, stock, "training", "two ranks")
        # KTO pairs the rows of a rank's batch to estimate its KL.
        if kind != "KTO":
            assert_close(*map(without_padding, (log, single)), "training", "two ranks against one")


def streamed(directory: str) -> Any:
    return data(directory, "texts", streaming=True)


def held_out(directory: str) -> Any:
    return data(directory, "texts").select(range(6))


def with_generation_markers(directory: str) -> Any:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }} {% endgeneration %}"
        "{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
    )
    return tokenizer


VARIANTS: dict[str, dict[str, Any]] = {
    "packing": {"packing": True, "max_length": 24},
    "wrapped packing": {"packing": True, "packing_strategy": "wrapped", "max_length": 24},
    "padding-free": {"padding_free": True, "max_length": None},
    "completion-only": {"name": "completions"},
    "assistant-only": {
        "name": "chats",
        "assistant_only_loss": True,
        "options": {"processing_class": with_generation_markers},
    },
    "dft loss": {"loss_type": "dft"},
    "streaming": {"options": {"train_dataset": streamed}},
    "accumulation": {"gradient_accumulation_steps": 2},
    "auxiliary loss": {"router_aux_loss_coef": 0.01},
    "selective checkpointing": {"gradient_checkpointing_kwargs": {"selective": True}},
    "no checkpointing": {"gradient_checkpointing": False},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "options": {"eval_dataset": held_out}},
    "frozen experts": {"options": {"peft_config": config(target_parameters=None)}},
    "adapters that are copied whole": {"options": {"peft_config": config(modules_to_save=["embed_tokens"])}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_arguments_of_sft(variant: str, inputs: str) -> None:
    options = {"learning_rate": 1e-3} | VARIANTS[variant]
    stock, _ = run_ranks(run, 2, "SFT", False, inputs, **options, init=False)
    for log in run_ranks(run, 2, "SFT", True, inputs, **options, init=False):
        assert_close(log, stock, "training")
