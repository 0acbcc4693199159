"""The demo's data: (signature, docstring) pairs from the sources of Python's own standard library.

Every Python installation carries some seven thousand documented functions and classes, so nothing is downloaded. The
sources are parsed with `ast` and never imported: importing some of them opens a browser or prints a poem.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

MIN_PAIRS = 1000
IGNORE_INDEX = -100  # what transformers' losses skip
# Test suites and programs inside the standard library: most of their docstrings document nothing.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idlelib", "turtledemo", "lib2to3", "site-packages"})


class Pair(NamedTuple):
    """What the model is given, and what it shall write.

    Attributes:
        signature: `json.dumps(obj, *, indent=None)`.
        docstring: its first paragraph, on one line.
    """

    signature: str
    docstring: str


def collect_pairs(stdlib: Path | None = None) -> list[Pair]:
    """Read the documented functions and classes of a standard library, in a fixed order.

    Args:
        stdlib: the folder to read; by default that of the running interpreter.

    Raises:
        ValueError: fewer than 1000 pairs were found, as in an interpreter that ships no `.py` files.
    """
    stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
    pairs = [pair for path in sorted(_source_files(stdlib)) for pair in _pairs_of_file(path, stdlib)]
    if len(pairs) < MIN_PAIRS:
        raise ValueError(
            f"Found {len(pairs)} documented functions and classes under {stdlib}; the demo needs {MIN_PAIRS} or more. "
            "Use a Python that has its standard library as .py files, as those of python.org, conda and uv do."
        )
    return pairs


def split_pairs(pairs: list[Pair], held_out_fraction: float = 0.05) -> tuple[list[Pair], list[Pair]]:
    """Split into (train, held out) by docstring, so that no held-out docstring was trained on under another signature.

    The side is read off a hash of the docstring (case and white space aside): it depends on neither order nor seed.
    """
    train: list[Pair] = []
    held_out: list[Pair] = []
    for pair in pairs:
        digest = hashlib.sha256(_normalized(pair.docstring).encode()).digest()
        is_held_out = int.from_bytes(digest[:8], "big") < held_out_fraction * 2**64
        (held_out if is_held_out else train).append(pair)
    return train, held_out


def train_tokenizer(pairs: list[Pair], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with `<|pad|>` and `<|eos|>`; any text survives a round trip through it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in (prompt_of(pair), pair.docstring)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|eos|>")


def prompt_of(pair: Pair) -> str:
    """The text before the docstring."""
    return pair.signature + "\n"


def encode_pairs(pairs: list[Pair], tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[dict[str, list[int]]]:
    """Encode each pair as `input_ids`: signature, docstring, end token.

    What reaches past `max_length` tokens is cut off, the end token with it.
    """
    texts = [prompt_of(pair) + pair.docstring + tokenizer.eos_token for pair in pairs]
    return [{"input_ids": input_ids[:max_length]} for input_ids in tokenizer(texts)["input_ids"]]


def order_examples(
    examples: list[dict[str, list[int]]], batch_size: int, num_batches: int, seed: int
) -> list[dict[str, list[int]]]:
    """Lay out training: as many batches as asked for, one after the other, each of examples of similar length.

    Every epoch is shuffled anew, sorted by length within groups of eight batches and cut into batches, which are
    shuffled again. The order depends on the seed alone, not on the number of ranks.
    """
    shuffle = random.Random(seed).shuffle
    batches: list[list[dict[str, list[int]]]] = []
    while len(batches) < num_batches:
        epoch = list(examples)
        shuffle(epoch)
        for start in range(0, len(epoch), 8 * batch_size):
            epoch[start : start + 8 * batch_size] = sorted(
                epoch[start : start + 8 * batch_size], key=lambda example: len(example["input_ids"])
            )
        batches_of_epoch = [
            epoch[start : start + batch_size] for start in range(0, len(epoch) - batch_size + 1, batch_size)
        ]
        shuffle(batches_of_epoch)
        batches += batches_of_epoch
    return [example for batch in batches[:num_batches] for example in batch]


class PadToLongest:
    """Collates examples into one batch, padded on the right to its longest example.

    Args:
        pad_token_id: the token to pad with, which the loss skips.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, each [batch, longest] int64."""
        import torch

        rows = [torch.tensor(example["input_ids"]) for example in examples]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        is_padding = input_ids == self.pad_token_id
        return {
            "input_ids": input_ids,
            "attention_mask": (~is_padding).long(),
            "labels": input_ids.masked_fill(is_padding, IGNORE_INDEX),
        }


def _source_files(stdlib: Path) -> Iterator[Path]:
    for top in stdlib.iterdir():
        if top.name.removesuffix(".py") in sys.stdlib_module_names:  # leaves out site-packages and its like
            for path in [top] if top.is_file() else top.rglob("*.py"):
                if SKIPPED_FOLDERS.isdisjoint(path.relative_to(stdlib).parts):
                    yield path


def _pairs_of_file(path: Path, stdlib: Path) -> Iterator[Pair]:
    try:
        module = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # deliberately broken sources exist
        return
    parts = path.relative_to(stdlib).with_suffix("").parts
    yield from _pairs_of_scope(module, ".".join(part for part in parts if part != "__init__"))


def _pairs_of_scope(scope: ast.AST, name: str) -> Iterator[Pair]:
    for node in ast.iter_child_nodes(scope):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _pairs_of_scope(node, name)  # definitions under `if` and `try`
            continue
        arguments = (
            ", ".join(map(ast.unparse, node.bases)) if isinstance(node, ast.ClassDef) else ast.unparse(node.args)
        )
        signature = f"{name}.{node.name}({arguments})"
        summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        if summary:
            yield Pair(signature, summary)
        yield from _pairs_of_scope(node, f"{name}.{node.name}")


def _normalized(text: str) -> str:
    return " ".join(text.lower().split())
