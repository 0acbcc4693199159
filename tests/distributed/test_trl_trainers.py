"""TRL's trainers with ours in front: the numbers of stock TRL on as many ranks, with every kind of reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model

from tests.helpers.adapters import config, draw_factors
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import assert_close
from tests.helpers.trl_runs import loaded, other, run, write_inputs

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
