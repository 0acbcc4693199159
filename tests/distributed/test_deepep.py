"""DeepEP as a whole: buffers, waits and handles over passes, models, checkpointing and training. Over the double."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_moe_accel import AcceleratedMoETrainer, AutoModelForCausalLM, MoEAccelConfig, prepare_moe_model
from hf_moe_accel.dispatch import DISPATCHERS, all_to_all
from hf_moe_accel.dispatch.all_to_all import AllToAllDispatcher
from hf_moe_accel.dispatch.deepep import DeepEPDispatcher
from hf_moe_accel.experts.eager import EagerBackend
from hf_moe_accel.moe import overlap
from hf_moe_accel.moe.forward import forward
from hf_moe_accel.ops import deep_ep as library
from hf_moe_accel.ops.permutation import sum_segments
from hf_moe_accel.runtime import MoERuntime
from hf_moe_accel.topology import ExpertTopology
from tests.distributed.test_dispatch_contract import NUM_EXPERTS, opened
from tests.distributed.test_token_path import part_of
from tests.helpers import deep_ep_double as double
from tests.helpers import grids
from tests.helpers.grids import slow
from tests.helpers.loops import load_checkpoint
from tests.helpers.models import ragged_batch_dataset, tiny_model
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import assert_close
from tests.helpers.trajectories import trajectory_arguments

HIDDEN = 256


@contextmanager
def under(version: str | None) -> Iterator[double.Record | None]:
    """The double; None: all_to_all, its sums rounded as DeepEP's are, so that the two are equal bit for bit.

    torch's embedding bag rounds a sum that lies half way between two numbers of bf16 up, DeepEP to the even one.
    """
    if version is not None:
        with double.installed(version) as record:
            yield record
        return
    with mock.patch.object(
        all_to_all, "sum_segments", lambda rows, *at: sum_segments(rows.float(), *at).to(rows.dtype)
    ):
        yield None


# ---------------------------------------------------------------------------------------------------------------------
# When the host waits


def waits(version: str, chunks: int) -> dict[str, Any]:
    with double.installed(version) as record:
        dispatcher = DeepEPDispatcher(dist.group.WORLD, HIDDEN, NUM_EXPERTS)
        before = len(record.made)
        ids = torch.randint(0, NUM_EXPERTS, (7, 2))
        x, weights = torch.randn(7, HIDDEN).bfloat16(), torch.rand(7, 2)
        plan = dispatcher.plan(ids, NUM_EXPERTS, chunks)
        planned, record.calls = record.calls, []
        assert record.open_events == 0
        sending = [dispatcher.dispatch(x, weights, plan, i) for i in range(chunks)]
        under_way = record.open_events
        rows = [pending.wait() for pending in sending]
        back = [dispatcher.combine(rows[i].x_ND, plan, i) for i in range(chunks)]
        grads = [dispatcher.combine_backward(x, plan, i) for i in range(chunks)]
        grad_rows = [pending.wait() for pending in grads]
        returned = [
            dispatcher.dispatch_backward(g, r.weights_R, plan, i, r)
            for i, (g, r) in enumerate(zip(grad_rows, rows, strict=True))
        ]
        assert record.open_events >= 2 * chunks
        for pending in (*back, *returned):
            pending.wait()
        dispatcher.close()
        return {"before": before, "planned": planned, "under way": under_way, "after": set(record.calls)}


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("version", double.VERSIONS)
def test_the_host_waits_in_the_plan_alone(version: str, chunks: int) -> None:
    for found in run_ranks(waits, 2, version, chunks):
        assert found["before"] == 0, "a buffer was made before it was needed"
        assert found["planned"] == ["dispatch"] * chunks
        # V1 sends the weights by themselves.
        assert found["under way"] == chunks * (2 if version == "v1" else 1)
        assert found["after"] == {"cached dispatch", "combine"}, "calls without a handle wait on the host"


def auto_chunks(version: str) -> list[int]:
    """The chunks that this rank cuts the two layers of two passes in."""
    cut: list[int] = []
    with double.installed(version), mock.patch.object(overlap, "TOKENS_OF_A_CHUNK", 8):
        dispatcher = DeepEPDispatcher(dist.group.WORLD, HIDDEN, NUM_EXPERTS)
        choice = overlap.ChunkChoice("auto")
        for most in (24, 5):
            num_tokens = most if dist.get_rank() == 0 else 3
            ids = torch.randint(0, NUM_EXPERTS, (num_tokens, 2))
            for layer in (0, 1):
                cut.append(choice.of(layer, dispatcher))
                choice.learn(dispatcher, dispatcher.plan(ids, NUM_EXPERTS, cut[-1]))
        dispatcher.close()
    return cut


@pytest.mark.parametrize("version", double.VERSIONS)
def test_auto_cuts_by_the_tokens_of_the_fullest_rank(version: str) -> None:
    assert run_ranks(auto_chunks, 2, version) == [[1, 3, 1, 1]] * 2


def rows_in_fp32(version: str) -> None:
    with opened(f"deepep {version}") as dispatcher:
        plan = dispatcher.plan(torch.zeros(3, 1, dtype=torch.int64), NUM_EXPERTS)
        dispatcher.dispatch(torch.zeros(3, HIDDEN), torch.ones(3, 1), plan, 0)


def test_rows_of_another_dtype_are_refused() -> None:
    with pytest.raises(AssertionError, match="carries bf16 rows, and these are torch.float32.*'all_to_all'"):
        run_ranks(rows_in_fp32, 2, "v1")


# ---------------------------------------------------------------------------------------------------------------------
# Passes and models at once


def passes(version: str | None) -> dict[str, Any]:
    """Passes of two models, forward before backward, with batches that outgrow V2's first buffer."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    spec = replace(grids.make_spec(8, **grids.KINDS["gated"]), hidden_size=HIDDEN)
    generator = torch.Generator().manual_seed(0)
    up = 0.1 * torch.randn(8, spec.pre_activation_size, HIDDEN, generator=generator)
    down = 0.1 * torch.randn(8, HIDDEN, spec.intermediate_size, generator=generator)
    weights = grids.ExpertWeights(up.bfloat16(), down.bfloat16())
    mine = part_of(weights, rank, world_size)
    mine = mine._replace(up=mine.up.clone().requires_grad_(), down=mine.down.clone().requires_grad_())

    def runtime() -> MoERuntime:
        make = AllToAllDispatcher if version is None else lambda group: DeepEPDispatcher(group, HIDDEN, 8)
        topology = ExpertTopology(world_size, 8, world_size)
        return MoERuntime(topology, make(dist.group.WORLD), EagerBackend(), [8], 60.0)

    with under(version) as record, closing(runtime()) as one, closing(runtime()) as other:
        found: dict[str, Any] = {}
        outs = []
        for seed, (model, most) in enumerate([(one, 5), (other, 9), (one, 300), (one, 2)]):
            num = max(most - rank, 0)  # ranks differ
            x = torch.randn(num, HIDDEN, generator=generator).bfloat16().requires_grad_()
            ids = torch.rand(num, 8, generator=generator).argsort(1)[:, :3]
            routing = torch.rand(num, 3, generator=generator).requires_grad_()
            out = forward(spec, x, ids, routing, mine, model, 0)
            outs.append(out)
            found |= {f"out {seed}": out.detach(), f"x {seed}": x, f"routing {seed}": routing}
        sum(out.float().square().sum() for out in outs).backward()
        if record is not None:
            assert len(record.alive) == 2, "a buffer for each model"
    found = {
        key: value.grad if isinstance(value, Tensor) and value.is_leaf and value.requires_grad else value
        for key, value in found.items()
    }
    return found | {"up": mine.up.grad, "down": mine.down.grad}


@pytest.mark.parametrize("world_size", [4, *slow(2)])
@pytest.mark.parametrize("version", double.VERSIONS)
def test_passes_and_models_keep_apart(version: str, world_size: int) -> None:
    expected = run_ranks(passes, world_size, None)
    assert_close(run_ranks(passes, world_size, version), expected, "exact")


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(
    version: str | None, dispatcher: str, output_dir: str, checkpointing: bool, level: str = "activation"
) -> dict[str, Any]:
    with under(version) as record:
        model = tiny_model("qwen3_moe", dtype=torch.bfloat16, hidden_size=HIDDEN)
        args = trajectory_arguments(output_dir, 2, 2, 3, gradient_checkpointing=checkpointing)
        trainer = AcceleratedMoETrainer(
            model=model,
            args=args,
            train_dataset=ragged_batch_dataset(48, 16, seed=3),
            moe_config=MoEAccelConfig(token_dispatcher=dispatcher, expert_checkpointing=level),
        )
        trainer.train()
        chosen = type(model.moe_runtime.dispatcher).__name__
        alive = [] if record is None else list(record.alive)
        trainer.save_model(f"{output_dir}/final")
        history = [(h["loss"], float(h["grad_norm"])) for h in trainer.state.log_history if "loss" in h]
        return {"history": history, "chosen": chosen, "left": len(alive), "calls": record and record.calls}


@pytest.mark.parametrize(
    ("version", "world_size", "dispatcher", "checkpointing", "level"),
    [
        ("v1", 2, "deepep", True, "activation"),
        ("v2", 2, "auto", False, "full"),
        *slow(("v1", 4, "auto", False, "full"), ("v2", 4, "auto", False, "full"), ("v2", 2, "deepep", True, "full")),
    ],
)
def test_training_equals_all_to_all(
    version: str, world_size: int, dispatcher: str, checkpointing: bool, level: str, tmp_path: Path
) -> None:
    stock, ours = str(tmp_path / "all_to_all"), str(tmp_path / "deepep")
    expected = run_ranks(train, world_size, None, "all_to_all", stock, checkpointing, init=False)
    actual = run_ranks(train, world_size, version, dispatcher, ours, checkpointing, level, init=False)
    for of_rank in actual:
        assert of_rank["chosen"] == "DeepEPDispatcher"
        assert of_rank["left"] == 0, "training ends, and a buffer is still there"
        # Two layers, three steps, two micro-batches each; a recompute neither routes nor sends.
        assert of_rank["calls"].count("dispatch") == 2 * 3 * 2
        assert of_rank["calls"].count("combine") == 2 * 2 * 3 * 2
        # Rows, in V1 weights, gradients; and again the rows that were not kept.
        cached = (3 if version == "v1" else 2) + (level == "full")
        assert of_rank["calls"].count("cached dispatch") == 2 * 3 * 2 * cached
    assert_close(actual[0]["history"], expected[0]["history"], "exact")
    assert_close(load_checkpoint(f"{ours}/final"), load_checkpoint(f"{stock}/final"), "exact")


def search(version: str | None, dispatcher: str, output_dir: str) -> tuple[Any, list[str]]:
    """Three trials, of which rank 0's search ends the second early."""
    import optuna

    class PruneTheSecond(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return trial.number == 1

    def make() -> Any:
        return tiny_model("qwen3_moe", dtype=torch.bfloat16, hidden_size=HIDDEN, num_hidden_layers=1)

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with under(version) as record:
        rows = ragged_batch_dataset(16, 16, seed=3)
        args = trajectory_arguments(output_dir, 2, 1, 2, eval_strategy="steps", eval_steps=1)
        trainer = AcceleratedMoETrainer(
            model_init=make,
            args=args,
            train_dataset=rows,
            eval_dataset=rows[:4],
            moe_config=MoEAccelConfig(token_dispatcher=dispatcher),
        )
        ends = []
        train = trainer.train

        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                return train(*args, **kwargs)
            finally:
                ends.append("nothing left" if record is None or not record.alive else "a buffer is left")

        trainer.train = watched  # type: ignore[method-assign]
        best = trainer.hyperparameter_search(
            lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
            n_trials=3,
            direction="minimize",
            backend="optuna",
            sampler=optuna.samplers.RandomSampler(seed=1),
            pruner=PruneTheSecond(),
        )
    return best and (best.run_id, best.objective), ends


def test_a_search_that_ends_trials_early(tmp_path: Path) -> None:
    expected, _ = run_ranks(search, 2, None, "all_to_all", str(tmp_path / "all_to_all"), init=False)
    found = run_ranks(search, 2, "v1", "deepep", str(tmp_path / "deepep"), init=False)
    assert found[0][0] == expected[0]
    assert [ends for _, ends in found] == [["nothing left"] * 3] * 2, "a trial ended with its buffer"


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def choose(version: str, without: int | None, wanted: str, directory: str | None = None) -> tuple[str, str]:
    """The dispatcher, and what rank 0 says, where one rank cannot."""
    with under(version), pytest.MonkeyPatch.context() as patch:
        if dist.is_initialized() and dist.get_rank() == without:
            patch.setattr(library, "why_not_device", lambda device: "its GPU is gone")
        said: list[str] = []
        patch.setattr("hf_moe_accel.prepare.say", said.append)
        model = tiny_model("qwen3_moe", dtype=torch.bfloat16, hidden_size=HIDDEN)
        model = prepare_moe_model(model, MoEAccelConfig(token_dispatcher=wanted))
        return type(model.moe_runtime.dispatcher).__name__, "\n".join(said)


@pytest.mark.parametrize("without", [0, 1, None])
def test_all_ranks_take_what_each_can(without: int | None) -> None:
    found = run_ranks(choose, 2, "v2", without, "auto")
    expected = "DeepEPDispatcher" if without is None else "AllToAllDispatcher"
    assert [name for name, _ in found] == [expected] * 2
    report = found[0][1]
    assert ("dispatcher  deepep" if without is None else "dispatcher  all_to_all") in report
    assert ("deepep: its GPU is gone" in report) == (without is not None)
    assert ("(rank 1)" in report) == (without == 1)


def load_by_name(directory: str) -> str:
    with double.installed("v1"):
        config = MoEAccelConfig(token_dispatcher="deepep")
        model = AutoModelForCausalLM.from_pretrained(directory, moe_config=config, dtype=torch.bfloat16)
        name = type(model.moe_runtime.dispatcher).__name__
        ids = torch.randint(3, 128, (1, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        model.moe_runtime.close()
        return name


def test_a_model_loaded_by_name(tmp_path: Path) -> None:
    tiny_model("qwen3_moe", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert run_ranks(load_by_name, 2, str(tmp_path), init=False) == ["DeepEPDispatcher"] * 2


def fail_in_training() -> int:
    with double.installed("v1") as record:
        dispatcher: Any = DISPATCHERS.load("deepep")(dist.group.WORLD, 64, 8)
        dispatcher.plan(torch.zeros(2, 1, dtype=torch.int64), 8)
        try:
            raise RuntimeError("a rank fails")
        except RuntimeError:
            dispatcher.close()
        left = len(record.alive)
        dispatcher.close()
        return left


def test_a_failing_rank_does_not_wait_for_the_others() -> None:
    assert run_ranks(fail_in_training, 2) == [1, 1]
