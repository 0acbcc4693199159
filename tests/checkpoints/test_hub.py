"""What a prepared model uploads is what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from hf_moe_accel import MoEAccelConfig, prepare_moe_model
from tests.helpers.models import tiny_model
from tests.helpers.ranks import RanksError, run_ranks


class Hub:
    """Stands in for the client of the hub: keeps the files of a commit."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append({"repo_id": repo_id, **options})
        return mock.Mock(repo_id=repo_id)

    def create_branch(self, **options: Any) -> None:
        self.calls.append(options)

    def create_commit(self, *, operations: Any, **options: Any) -> str:
        self.calls.append(options)
        self.files = {each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations}
        return "a commit"


def upload(directory: str, way: str, error: Exception | None = None) -> tuple[Any, Hub]:
    model = tiny_model("qwen3_moe")
    if dist.is_initialized():
        prepare_moe_model(model, MoEAccelConfig(ep_size=2))
    hub = Hub()
    card = mock.Mock(save=lambda path: Path(path).write_text("a card"))
    with (
        mock.patch("transformers.utils.hub.hf_api", lambda: hub),
        mock.patch("transformers.modeling_utils.hf_api", lambda: hub),
        mock.patch("hf_moe_accel.hf.export.hf_api", lambda: hub),
        mock.patch.object(hub, "create_repo", side_effect=error or hub.create_repo),
        mock.patch("transformers.utils.hub.create_and_tag_model_card", return_value=card),
        mock.patch("transformers.modeling_utils.create_and_tag_model_card", return_value=card),
        mock.patch("hf_moe_accel.hf.export.create_and_tag_model_card", return_value=card),
    ):
        if way == "push_to_hub":
            answer = model.push_to_hub("me/model", commit_message="mine", private=True, token="t", revision="tried")
        else:
            answer = model.save_pretrained(directory, push_to_hub=True, repo_id="me/model", commit_message="mine")
    return answer, hub.__dict__ | {"create_repo": None}


def tensors(files: dict[str, bytes], directory: Path) -> dict[str, torch.Tensor]:
    directory.mkdir()
    read = {}
    for name, content in files.items():
        if name.endswith(".safetensors"):
            (directory / name).write_bytes(content)
            read |= load_file(directory / name)
    return read


def given(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if value is not None}


def check(way: str, tmp_path: Path) -> None:
    ((answer, stock),) = run_ranks(upload, 1, str(tmp_path / "stock"), way)
    (first, ours), (second, nothing) = run_ranks(upload, 2, str(tmp_path / "ours"), way)
    assert (first, second) == (answer, None)
    assert [given(call) for call in ours["calls"]] == [given(call) for call in stock["calls"]]
    assert not nothing["calls"]
    kept = {"config.json", "generation_config.json", "README.md"}
    assert {name: ours["files"][name] for name in kept} == {name: stock["files"][name] for name in kept}
    expected = tensors(stock["files"], tmp_path / "theirs")
    actual = tensors(ours["files"], tmp_path / "mine")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in actual.items())


def test_push_to_hub(tmp_path: Path) -> None:
    check("push_to_hub", tmp_path)


def test_save_pretrained_with_push_to_hub(tmp_path: Path) -> None:
    check("save_pretrained", tmp_path)


def test_a_repository_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(RanksError) as error:
        run_ranks(upload, 2, str(tmp_path / "ours"), "save_pretrained", PermissionError("not yours"))
    text = "AllRanksError: Creating the repository me/model failed on rank 0: PermissionError: not yours"
    assert str(error.value).count(text) == 2
    assert not (tmp_path / "ours").exists()
