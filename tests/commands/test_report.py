"""`hf-moe-accel report`: what it draws, and what stands on its page."""

from __future__ import annotations

import base64
import io
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hf_moe_accel.callbacks.pictures import MAX_POINTS, PARTS, _parts, by_layer, load, relative_load, smooth
from hf_moe_accel.callbacks.run_file import METRICS, NAME, Run, RunFile, read_run
from hf_moe_accel.cli import main
from tests.helpers import browser
from tests.helpers.grids import slow

ABOUT = {
    "model": "Qwen3MoeForCausalLM",
    "num_experts": [4, 4],
    "world_size": 2,
    "layout": "ep 2",
    "prepared": "experts <fused> & others",
    "config": {"ep_size": "auto", "expert_backend": "auto"},
}


def counted(step: int, layers: int = 2) -> dict[str, Any]:
    logs = {
        "loss": 5.0 - step / 10,
        "moe/step_time": 1.0,
        "moe/tokens_per_second": 100.0 + step,
        "moe/load_max_over_mean": 2.0,
        **{f"moe/time/{part}": 0.1 for part in ("data", "dispatch", "experts", "combine", "optimizer")},
        **{f"moe/time/{part}": 0.4 for part in ("forward", "backward")},
    }
    experts = {
        "load": [[step, 8, 8, 0]] * layers,
        "rank_tokens": [30, 10],
        "rank_max_over_mean": [1.5] * layers,
        "router_entropy": [0.5] * layers,
    }
    return {"step": step, "logs": logs, "experts": experts}


def write_run(folder: Path, records: list[dict[str, Any]], **about: Any) -> None:
    file = RunFile(folder, ABOUT | about, 0)
    for record in records:
        file.append(record)


class Page(HTMLParser):
    """Keeps images, text, and whatever would be loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: dict[str, bytes] = {}
        self.foreign: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in ("img", "meta"):
            self.open.append(tag)
        source = values.get("src") or values.get("href")
        if source and source.startswith("data:image/png;base64,"):
            self.images[str(values["alt"])] = base64.b64decode(source.split(",")[1], validate=True)
        elif source or tag in ("script", "link", "iframe"):
            self.foreign.append(f"{tag} {source}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_pictures_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = {"step": 0, "logs": {"eval_loss": 6.0}}
    write_run(tmp_path, [held_out, *(counted(step) for step in range(2, 12, 2))])
    assert main(["report", str(tmp_path)]) == 0
    folder = tmp_path / "report"
    assert capsys.readouterr().out == f"{folder / 'index.html'}: 5 logs up to step 10; the pictures lie beside it.\n"
    page = Page((folder / "index.html").read_text(encoding="utf-8"))
    assert not page.open and not page.foreign, "every element is closed, and nothing is loaded from elsewhere"
    assert list(page.images) == ["overview", "balance", "layers", "speed", "ranks"]
    for name, content in page.images.items():
        assert content == (folder / f"{name}.png").read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            assert 1000 < picture.width < 2000 and 200 < picture.height < 2000
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 20
    for words in (
        "Qwen3MoeForCausalLM, 2 MoE layers of 4 experts, on 2 ranks",
        "experts <fused> & others",
        "Numbers at step 10",
        "moe/tokens_per_second",
        "110",
        "expert_backend",
    ):
        assert words in page.text


@pytest.mark.parametrize("timed", [[], [2, 8]], ids=["never", "sometimes"])
def test_layers_are_not_timed_in_each_measured_step(timed: list[int], tmp_path: Path) -> None:
    """As where they are CUDA graphs."""
    records = [counted(step) for step in range(2, 12, 2)]
    for record in records:
        if record["step"] not in timed:
            for name in ("dispatch", "experts", "combine"):
                del record["logs"][f"moe/time/{name}"]
            del record["experts"]["router_entropy"]
    write_run(tmp_path, records)
    steps, parts = _parts(read_run(tmp_path))
    assert steps == (timed or [2, 4, 6, 8, 10])
    assert list(parts) == (list(PARTS) if timed else ["data", "other passes", "optimizer"])
    assert parts["other passes"] == pytest.approx([0.5 if timed else 0.8] * len(steps))
    assert main(["report", str(tmp_path)]) == 0


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, *slow(500)])
def test_the_page_in_a_browser(width: int, tmp_path: Path) -> None:
    every_number = dict.fromkeys(METRICS, 12345.678)
    records = [counted(step) for step in range(2, 12, 2)]
    write_run(tmp_path, [record | {"logs": every_number | record["logs"]} for record in records])
    assert main(["report", str(tmp_path)]) == 0
    found = browser.look_at(tmp_path / "report" / "index.html", width, tmp_path)
    assert "Qwen3MoeForCausalLM" in found["title"]
    assert found["width"] <= found["window"] == width, "it has to be scrolled sideways"
    assert list(found["pictures"]) == ["overview", "balance", "layers", "speed", "ranks"]
    for name, (in_file, on_page) in found["pictures"].items():
        assert in_file > 1000, f"{name} is not decoded"
        assert 0.8 * width < on_page <= width, f"{name} does not fit the window"
    with Image.open(found["screenshot"]) as seen:
        # The curves of the first pictures: anti-aliased lines have many shades.
        assert seen.width == width and len(seen.convert("RGB").getcolors(maxcolors=1 << 24)) > 100


def test_a_run_of_one_rank_without_measured_steps(tmp_path: Path) -> None:
    record = counted(4)
    record["logs"] = {"loss": 2.0, "moe/load_max_over_mean": 2.0, "moe/tokens_per_second": 3.0}
    write_run(tmp_path, [record], world_size=1)
    assert main(["report", str(tmp_path)]) == 0
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert list(page.images) == ["overview", "balance", "layers"]


def test_layers_are_left_out_where_they_are_many() -> None:
    run = Run(ABOUT, [counted(step, layers=40) for step in (2, 4)])
    with Image.open(io.BytesIO(load(run))) as picture:
        assert picture.height < 2500


def test_the_load_is_in_times_an_equal_share() -> None:
    steps, shares = relative_load([(2, {"load": [[2, 4, 6, 0]]}), (4, {"load": [[0, 0, 0, 0]]})], layer=0)
    assert steps == [2, 4]
    assert shares.tolist() == [[2 / 3, 4 / 3, 2, 0], [0, 0, 0, 0]]


def test_a_measure_by_layer() -> None:
    counted = [(2, {"load": [[2, 4, 6, 0], [0, 0, 0, 0]]}), (4, {"load": [[1, 1, 1, 1], [0, 0, 4, 0]]})]
    values = by_layer(counted, lambda load: load.max() / load.mean())
    assert values[0, 0] == 2 and math.isnan(values[0, 1])
    assert values[1].tolist() == [1, 4]


def test_neighbours_are_taken_together_where_points_are_many() -> None:
    num = 3 * MAX_POINTS
    steps, shares = relative_load([(i + 1, {"load": [[i % 3, 1]]}) for i in range(num)], layer=0)
    assert len(steps) == MAX_POINTS and steps[0] == 3 and steps[-1] == num
    assert shares.tolist() == [[1, 1]] * MAX_POINTS


def test_smoothing_reaches_as_far_on_either_side() -> None:
    assert smooth([0, 3, 0, 9], reach=1) == [0, 1, 4, 9]


@pytest.mark.parametrize("case", ["no run", "no loss"])
def test_nothing_to_draw(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if case == "no loss":
        write_run(tmp_path, [{"step": 0, "logs": {"eval_loss": 6.0}}])
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path)])
    assert stop.value.code == 2
    expected = f"holds no {NAME}" if case == "no run" else "has not logged a loss yet"
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_matplotlib_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "pip install 'hf_moe_accel[demo]'" in capsys.readouterr().err


def test_a_file_is_read_up_to_a_line_that_is_not_whole(tmp_path: Path) -> None:
    write_run(tmp_path, [counted(2), counted(4)])
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[:-5])
    assert [step for step, _ in read_run(tmp_path).counted()] == [2]
    (tmp_path / NAME).write_bytes(b'{"half')
    with pytest.raises(ValueError, match=f"holds no {NAME}"):
        read_run(tmp_path)
