import copy
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.grids import RUN_SLOW
from tests.helpers.models import (
    DENSE,
    MOE,
    NUM_EXPERTS,
    VOCAB_SIZE,
    ragged_batch_dataset,
    tiny_config,
    tiny_model,
    toy_tokenizer,
)
from tests.helpers.tolerances import TOLERANCES, assert_close

CONFTEST = Path(__file__).parents[1] / "conftest.py"


def batch(num=8, length=24):
    rows = ragged_batch_dataset(num, length)
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MOE + DENSE)
def test_tiny_models_train_and_load_as_saved(name, dtype, tmp_path):
    model = tiny_model(name, dtype=dtype)
    model(**batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert_close(loaded.state_dict(), model.state_dict(), "exact")
    with torch.no_grad():
        assert_close(loaded.eval()(**batch()).logits, model.eval()(**batch()).logits, "exact")


@pytest.mark.parametrize("name", MOE)
def test_tiny_models_spread_their_tokens(name):
    model = tiny_model(name).eval()
    assert model.config.num_experts_per_tok == 2
    counts = {}

    def count(module, args):
        counts[module] = torch.bincount(args[1].flatten(), minlength=NUM_EXPERTS)

    for key, module in model.named_modules():
        if key.endswith(".experts"):
            module.register_forward_pre_hook(count)
    with torch.no_grad():
        model(**batch())
    assert counts
    for per_expert in counts.values():
        assert (per_expert > 0).sum() >= 6 and per_expert.max() < per_expert.sum() / 2


def test_tiny_models_follow_from_the_arguments():
    state = torch.get_rng_state()
    one, same, other = tiny_model("mixtral"), tiny_model("mixtral"), tiny_model("mixtral", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(same.state_dict(), one.state_dict(), "exact")
    assert not torch.equal(other.lm_head.weight, one.lm_head.weight)
    assert_close(
        tiny_model("mixtral", dtype=torch.bfloat16).lm_head.weight, one.lm_head.weight.to(torch.bfloat16), "exact"
    )
    assert tiny_config("qwen3_moe", router_aux_loss_coef=0.5, num_hidden_layers=3).router_aux_loss_coef == 0.5
    assert len(tiny_model("qwen3_moe", num_hidden_layers=3).model.layers) == 3


def test_ragged_rows_end_at_different_places():
    rows = ragged_batch_dataset(16, 12, seed=3)
    ends = [int((row["labels"] != -100).sum()) for row in rows]
    assert len(set(ends)) > 4 and min(ends) >= 3
    for row, end in zip(rows, ends, strict=True):
        assert torch.equal(row["labels"][:end], row["input_ids"][:end]) and (row["labels"][end:] == -100).all()
        assert row["input_ids"].min() >= 3 and row["input_ids"].max() < VOCAB_SIZE
    again = ragged_batch_dataset(16, 12, seed=3)
    assert_close(again, rows, "exact")


def test_the_tokenizer_fits_the_models(tmp_path):
    tokenizer = toy_tokenizer()
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer("w0 w124 nothing")["input_ids"] == [3, 127, 2]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    config = tiny_config("qwen3_moe")
    assert (config.pad_token_id, config.eos_token_id) == (0, 1)
    tokenizer.save_pretrained(tmp_path)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False)
    assert type(tokenizer).from_pretrained(tmp_path).decode(tokenizer(text)["input_ids"]) == "w1"


@pytest.mark.parametrize("kind", TOLERANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_close_is_what_the_table_says(kind, dtype):
    rtol, atol = TOLERANCES[kind][dtype]
    expected = torch.ones(3, dtype=dtype)
    assert_close(expected.clone(), expected, kind)
    nearest = torch.nextafter(expected, torch.full_like(expected, 2.0))
    if rtol:
        assert_close(nearest, expected, kind)
    with pytest.raises(AssertionError, match="1 of 3 elements differ"):
        assert_close(torch.tensor([1.0, 1.01 + 2 * (rtol + atol), 1.0], dtype=dtype), expected, kind)


def test_what_is_not_close_is_described():
    expected = {"loss": [1.0, 2.0], "weights": torch.tensor([[1.0, 2.0], [4.0, 8.0]])}
    actual = copy.deepcopy(expected)
    assert_close(actual, expected, "training")
    actual["loss"][1] = 2.5
    actual["weights"][1, 0] = 5.0
    with pytest.raises(AssertionError) as error:
        assert_close(actual, expected, "training", name="run")
    text = str(error.value)
    assert "run['loss'][1]" in text and "difference 5.000e-01 at ()" in text
    assert "run['weights'] (2, 2) torch.float32: 1 of 4 elements differ" in text
    assert "difference 1.000e+00 at (1, 0): 5 instead of 4" in text and "relative difference 2.500e-01" in text


@pytest.mark.parametrize(
    ("actual", "expected", "said"),
    [
        (torch.ones(2), torch.ones(3), r"\(2,\) torch.float32 instead of \(3,\)"),
        (torch.ones(2), torch.ones(2, dtype=torch.bfloat16), "instead of .* torch.bfloat16"),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), "1 of 1 elements differ"),
        ({"a": 1}, {"b": 1}, r"missing keys \['b'\], unexpected keys \['a'\]"),
        ([1.0], [1.0, 2.0], "1 items instead of 2"),
        (3, 4, "3 instead of 4"),
    ],
)
def test_unlike_values_are_not_close(actual, expected, said):
    with pytest.raises(AssertionError, match=said):
        assert_close(actual, expected, "backend")


# ---------------------------------------------------------------------------------------------------------------------
# conftest.py, in sessions of its own


def run_session(directory, tests, *options, changes=""):
    """Runs pytest on `tests`, a mapping from path to text, below a copy of conftest.py with `changes` appended."""
    for path, text in tests.items():
        (directory / "tests" / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / "tests" / path).write_text(textwrap.dedent(text))
    shutil.copy(CONFTEST, directory / "tests")
    with (directory / "tests" / "conftest.py").open("a") as file:
        file.write(changes)
    (directory / "pyproject.toml").write_text(
        "[tool.pytest.ini_options]\naddopts = ['--strict-markers']\n"
        "markers = ['distributed: ', 'gpu: ', 'slow: ', 'trajectory: ']\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *options]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(command, cwd=directory, env=environ, capture_output=True, text=True, timeout=60)


SLEEPS = "import time\ndef test_sleeps(): time.sleep(0.3)"


def test_budgets_are_shown_and_held(tmp_path):
    tests = {"unit/test_a.py": SLEEPS, "integrations/test_b.py": SLEEPS}
    session = run_session(tmp_path, tests)
    assert session.returncode == 0, session.stdout
    assert re.search(r"^budget unit: \d+\.\d s of 240 s$", session.stdout, re.MULTILINE)
    assert re.search(r"^budget commands: \d+\.\d s of 240 s$", session.stdout, re.MULTILINE)
    assert "budget distributed" not in session.stdout and "exceeded" not in session.stdout

    too_little = "\nBUDGETS['unit'] = 0.1\n"
    session = run_session(tmp_path, tests, changes=too_little)
    assert session.returncode == pytest.ExitCode.TESTS_FAILED
    assert "budget unit exceeded" in session.stdout and "budget commands exceeded" not in session.stdout

    session = run_session(tmp_path, tests, "--run-slow", changes=too_little)
    assert session.returncode == 0 and "s of 0.1 s" in session.stdout and "exceeded" not in session.stdout


def test_slow_tests_run_only_on_request(tmp_path):
    # Or else the grids would not make their slow cases, and nothing would say so.
    slow = f"@pytest.mark.slow\ndef test_slow(): assert os.environ['{RUN_SLOW}']"
    tests = {"unit/test_a.py": f"import os\nimport pytest\n{slow}\ndef test_fast(): pass"}
    assert "1 passed, 1 deselected" in run_session(tmp_path, tests).stdout
    assert "2 passed" in run_session(tmp_path, tests, "--run-slow").stdout


def test_directories_give_markers(tmp_path):
    empty = "def test(): pass"
    tests = {f"{name}/test_{name}.py": empty for name in ("unit", "distributed", "trajectories", "gpu")}
    for marker, directory in {"distributed": "distributed", "trajectory": "trajectories"}.items():
        session = run_session(tmp_path, tests, "-m", marker, "-v")
        assert f"test_{directory}.py::test PASSED" in session.stdout and "1 passed, 3 deselected" in session.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_gpu_tests_are_skipped_without_one(tmp_path):
    session = run_session(tmp_path, {"gpu/test_a.py": "def test(): raise AssertionError"})
    assert session.returncode == 0 and "needs a CUDA device, and torch finds none" in session.stdout


def test_the_environment_is_offline():
    names = ("HF_HUB_OFFLINE", "WANDB_MODE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS")
    assert [os.environ[name] for name in names] == ["1", "offline", "false", "1"]
