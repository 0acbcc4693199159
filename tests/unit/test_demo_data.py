"""The demo's data and options; no training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hf_moe_accel.cli import main
from hf_moe_accel.demo import data
from hf_moe_accel.demo.command import check_demo
from hf_moe_accel.demo.history import History
from hf_moe_accel.demo.options import DemoOptions, OutputFiles

VOCAB_SIZE = 1024


@pytest.fixture(scope="module")
def pairs() -> list[data.Pair]:
    return data.collect_pairs()


@pytest.fixture(scope="module")
def tokenizer(pairs):
    return data.train_tokenizer(pairs[:2000], VOCAB_SIZE)


def history() -> History:
    return History(
        model="a model",
        num_steps=4,
        train_loss=[(2, 5.0), (4, 4.0)],
        held_out_loss=[(0, 6.0), (4, 4.5)],
        num_tokens=100,
        train_seconds=2.0,
        samples=[data.Pair("f()", "Do it.")],
    )


# -- pairs


def test_thousands_of_pairs_are_found_and_known_ones_are_among_them(pairs):
    assert len(pairs) > 4000
    found = dict(pairs)
    assert found["textwrap.TextWrapper.fill(self, text)"].startswith("fill(text : string) -> string")
    assert found["json.encoder.JSONEncoder.encode(self, o)"] == (
        "Return a JSON string representation of a Python data structure."
    )
    assert all(pair.docstring and "\n" not in pair.signature + pair.docstring for pair in pairs)


def test_sources_are_parsed_and_not_imported(pairs):
    assert any(pair.signature.startswith("turtle.") for pair in pairs)
    assert "turtle" not in sys.modules


def test_pairs_come_from_the_standard_library_without_its_tests(pairs):
    modules = {pair.signature.split("(")[0].split(".")[0] for pair in pairs}
    assert modules <= sys.stdlib_module_names
    assert modules.isdisjoint({"test", "idlelib", "turtledemo", "lib2to3"})


@pytest.mark.slow
def test_pairs_are_read_in_a_fixed_order(pairs):
    assert data.collect_pairs() == pairs


def test_a_library_without_sources_is_an_error_that_says_what_to_do(tmp_path):
    (tmp_path / "json.py").write_text('def loads():\n    """Load."""\n')
    (tmp_path / "abc.py").write_text("this is no Python")
    with pytest.raises(ValueError, match=r"Found 1 documented .* needs 1000 or more\. Use a Python"):
        data.collect_pairs(tmp_path)


def test_definitions_inside_if_class_and_function_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MIN_PAIRS", 1)
    package = tmp_path / "json"
    package.mkdir()
    source = r"""
if True:
    class A(dict):
        "First.\n\nSecond."
        async def f(self, *, x: int = 1): "Do\n  f."
"""
    (package / "__init__.py").write_text(source)
    assert data.collect_pairs(tmp_path) == [
        ("json.A(dict)", "First."),
        ("json.A.f(self, *, x: int=1)", "Do f."),
    ]


# -- split


def test_no_docstring_is_on_both_sides(pairs):
    train, held_out = data.split_pairs(pairs)
    assert sorted(train + held_out) == sorted(pairs)
    assert 0.03 < len(held_out) / len(pairs) < 0.07

    def docstrings(side):
        return {" ".join(pair.docstring.lower().split()) for pair in side}

    assert docstrings(train).isdisjoint(docstrings(held_out))


def test_the_split_does_not_depend_on_the_order_of_the_pairs(pairs):
    assert sorted(data.split_pairs(pairs[::-1])[1]) == sorted(data.split_pairs(pairs)[1])


def test_case_and_white_space_make_no_difference_to_the_split():
    pairs = [data.Pair(f"f{number}()", text) for number, text in enumerate(["Close it.", "close  it.", "CLOSE IT."])]
    assert sorted(map(len, data.split_pairs(pairs, held_out_fraction=0.5))) == [0, 3]


# -- tokenizer


@pytest.mark.parametrize("text", ["json.loads(s, *, cls=None)\nDeserialize ``s``.", "  naïve ≠ 日本\t🙂\n", ""])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_has_the_size_and_the_special_tokens_that_the_model_needs(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    assert {tokenizer.pad_token_id, tokenizer.eos_token_id} == {0, 1}


def test_tokenizer_reloads_as_it_was_saved(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "statistics.mean(data)\nReturn the sample arithmetic mean of data."
    assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (reloaded.pad_token, reloaded.eos_token) == (tokenizer.pad_token, tokenizer.eos_token)


# -- batches


def test_an_example_is_signature_docstring_and_end(tokenizer):
    pair = data.Pair("os.getcwd()", "Return the current directory.")
    [example] = data.encode_pairs([pair], tokenizer, max_length=128)
    assert tokenizer.decode(example["input_ids"]) == "os.getcwd()\nReturn the current directory.<|eos|>"
    [cut] = data.encode_pairs([pair], tokenizer, max_length=4)
    assert cut["input_ids"] == example["input_ids"][:4]


def test_padding_is_seen_by_neither_attention_nor_loss():
    batch = data.PadToLongest(pad_token_id=9)([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]


def test_batches_hold_examples_of_similar_length_and_an_epoch_repeats_none():
    examples = [{"input_ids": [0] * (1 + number % 97)} for number in range(640)]
    ordered = data.order_examples(examples, batch_size=16, num_batches=50, seed=3)
    assert len(ordered) == 50 * 16
    assert len({id(example) for example in ordered[: 40 * 16]}) == 640

    def num_computed(examples):
        lengths = [len(example["input_ids"]) for example in examples]
        return sum(16 * max(lengths[start : start + 16]) for start in range(0, 640, 16))

    num_tokens = sum(len(example["input_ids"]) for example in examples)
    assert num_computed(ordered[:640]) < 1.25 * num_tokens < num_computed(examples)


def test_the_order_of_training_follows_the_seed():
    examples = [{"input_ids": [number]} for number in range(64)]

    def order(seed):
        return [example["input_ids"][0] for example in data.order_examples(examples, 8, 8, seed)]

    assert order(0) == order(0) != order(1)


# -- what is written


def test_history_reloads_as_it_was_saved(tmp_path):
    history().save(tmp_path / "history.json")
    reloaded = History.load(tmp_path / "history.json")
    assert reloaded == history()


def test_clearing_the_output_removes_an_earlier_demo_and_nothing_else(tmp_path):
    files = OutputFiles(tmp_path / "out")
    files.clear()
    files.checkpoint.mkdir()
    files.adapter.mkdir()
    for path in (files.picture, files.history, files.reference, files.checkpoint / "config.json"):
        path.write_text("old")
    mine = files.folder / "notes.txt"
    mine.write_text("mine")
    files.clear()
    assert list(files.folder.iterdir()) == [mine]


# -- options


def test_missing_matplotlib_is_named_before_anything_starts(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'hf_moe_accel\[demo\]'"):
        check_demo(DemoOptions())


def test_lora_needs_peft_and_the_demo_without_it_does_not(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else object())
    check_demo(DemoOptions(str(tmp_path)))
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--lora", "--output-dir", str(tmp_path)])
    assert stop.value.code == 2
    assert "pip install 'hf_moe_accel[lora]'" in capsys.readouterr().err


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--nproc 4 is more than this machine's GPUs, 2"):
        check_demo(DemoOptions(nproc=4))


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path, capsys):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--output-dir", str(path)])
    assert stop.value.code == 2
    assert "is a file: name a folder" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--steps", "--nproc"])
@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many"])
def test_counts_must_be_whole_and_positive(flag, value, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", f"{flag}={value}"])
    assert stop.value.code == 2
    assert "is no whole number of 1 or more" in capsys.readouterr().err
