"""The Dockerfile's pins, the panels of W&B, and the scripts that start vLLM and SGLang."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from wandb_workspaces import workspaces

ROOT = Path(__file__).parents[2]
INTEGRATIONS = ROOT / "integrations"
DOCKERFILE = INTEGRATIONS / "docker/Dockerfile"
DOCKERIGNORE = INTEGRATIONS / "docker/Dockerfile.dockerignore"
PANELS = INTEGRATIONS / "wandb/panels.json"
SERVERS = sorted([*INTEGRATIONS.glob("vllm/*.sh"), *INTEGRATIONS.glob("sglang/*.sh")])
# Instructions of https://docs.docker.com/reference/dockerfile/ that are used here.
INSTRUCTIONS = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY"}
# As they stand in vllm/engine/arg_utils.py and vllm/entrypoints/common/cli_args.py of vLLM 0.33.0, and in
# sglang/srt/arg_groups/fields/ of SGLang 0.5.23; neither is installed here.
VLLM_FLAGS = {
    *("--tensor-parallel-size", "--enable-expert-parallel", "--port", "--enable-lora", "--max-lora-rank"),
    "--lora-modules",
}
SGLANG_FLAGS = {
    *("--model-path", "--tp-size", "--ep-size", "--port", "--enable-lora", "--lora-paths", "--lora-strict-loading"),
}
# Trainer's own numbers. What it logs has `train/` before its name in W&B; pictures, which it does not log, have not.
TRAINER_KEYS = {"train/loss", "train/grad_norm", "train/learning_rate"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, with continued lines put together and comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(name, rest) for name, rest in found]


def pins() -> dict[str, str]:
    """The versions of the ARG lines, by name."""
    return dict(rest.split("=", 1) for name, rest in instructions() if name == "ARG")


def test_dockerfile_reads() -> None:
    found = instructions()
    assert {name for name, _ in found} <= INSTRUCTIONS
    assert found[0][0] == "FROM" and len([name for name, _ in found if name == "FROM"]) == 1
    used = set(re.findall(r"\$\{([A-Z_]+)\}", " ".join(rest for _, rest in found)))
    assert used == pins().keys(), "an ARG that is not declared, or not used"
    for name, rest in found:
        if name == "RUN":
            subprocess.run(["bash", "-n"], input=rest, text=True, check=True)
        if name == "COPY":
            assert rest == ". ."


def test_dockerfile_pins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["te"])]
    specifiers = {bound.name: bound.specifier for bound in bounds}
    assert pins()["TORCH_VERSION"] in specifiers["torch"]
    assert pins()["TRANSFORMER_ENGINE_VERSION"] in specifiers["transformer-engine"]
    assert Version(pins()["NCCL_VERSION"]) >= Version("2.30.4"), "what DeepEP's README asks for"
    assert Version(pins()["NVSHMEM_VERSION"]) >= Version("3.3.9"), "what DeepEP's docs/nvshmem.md asks for"
    assert re.fullmatch(r"[0-9a-f]{40}", pins()["DEEP_EP_COMMIT"])
    packages = " ".join(rest for name, rest in instructions() if name == "RUN")
    pinned = {Requirement(text).name for text in re.findall(r'"([a-z][^"]+)==\$\{', packages)}
    assert pinned == {"torch", "nvidia-nccl-cu13", "nvidia-nvshmem-cu13", "transformer-engine"}
    # NCCL is the last thing that pip touches: it would put back the one that torch pins.
    assert packages.rindex("pip install") == packages.rindex('pip install --no-deps "nvidia-nccl-cu13==')
    # CUDA's major version is one throughout.
    assert dict(instructions())["FROM"].startswith("nvidia/cuda:13.")
    assert {f"core-cu{major}" for major in re.findall(r"core-cu(\d+)", packages)} == {"core-cu13"}


def test_dockerfile_filters_the_constraints() -> None:
    (command,) = re.findall(r"grep -vE '[^']+' constraints.txt", DOCKERFILE.read_text())
    kept = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    left_out = {*(ROOT / "constraints.txt").read_text().splitlines()} - {*kept.splitlines()}
    assert sorted(line.split("==")[0] for line in left_out) == ["torch", "triton"]


def test_what_is_not_in_the_repository_is_not_in_the_image() -> None:
    ignored = [line for line in (ROOT / ".gitignore").read_text().splitlines() if line and not line.startswith("#")]
    left_out = DOCKERIGNORE.read_text().splitlines()
    assert {f"**/{line}" if not line.startswith("/") else line[1:] for line in ignored} | {".git"} == {*left_out}


def panel_keys() -> set[str]:
    return {key for panels in json.loads(PANELS.read_text()).values() for panel in panels for key in panel["keys"]}


def test_panels_read() -> None:
    panels = [panel for section in json.loads(PANELS.read_text()).values() for panel in section]
    assert all(panel["title"] and panel["keys"] for panel in panels)
    assert all(panel.keys() <= {"title", "keys", "kind"} for panel in panels)
    assert {panel.get("kind", "line") for panel in panels} == {"line", "stacked", "media", "table"}
    keys = [key for panel in panels for key in panel["keys"]]
    assert len(keys) == len(set(keys))


def test_panel_keys_are_logged() -> None:
    """Every number of a panel is one that the package logs, and every one that it logs has a panel."""
    logged = set()
    for path in (ROOT / "hf_moe_accel").rglob("*.py"):
        logged |= set(re.findall(r'"(moe/[a-z_/]+)"', path.read_text()))
    assert {key.removeprefix("train/") for key in panel_keys() - TRAINER_KEYS} == logged


def test_workspace_is_built(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    saved = []
    monkeypatch.setattr(workspaces.Workspace, "save", lambda self: saved.append(self) or self)
    monkeypatch.setattr(workspaces.Workspace, "url", "https://workspace")
    monkeypatch.setattr(sys, "argv", ["workspace.py", "entity", "project"])
    runpy.run_path(str(INTEGRATIONS / "wandb/workspace.py"), run_name="__main__")
    assert capsys.readouterr().out == "https://workspace\n"
    (workspace,) = saved
    model = workspace._to_model().model_dump_json()
    assert all(json.dumps(key) in model for key in panel_keys())


def served(script: Path, tmp_path: Path, *arguments: str, **env: str) -> list[str]:
    """What a script starts, with an engine in place that prints its arguments."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    name, body = ("vllm", 'printf "%s\\n" vllm "$@"')
    if script.parent.name == "sglang":
        name, body = ("python3", 'printf "%s\\n" python3 "$@"')
    (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (programs / name).chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", script, *arguments], env={"PATH": path, **env}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("script", SERVERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_servers(script: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 12}')
    is_adapter = script.stem == "serve_adapter"
    arguments = ("base", str(tmp_path)) if is_adapter else ("model",)
    command = served(script, tmp_path, *arguments, "--more", "1", TP="4")
    flags = {word for word in command if word.startswith("--")}
    assert command[-2:] == ["--more", "1"]
    assert flags - {"--more"} <= (VLLM_FLAGS if script.parent.name == "vllm" else SGLANG_FLAGS)
    assert ("--enable-lora" in flags) == is_adapter
    assert command.count("4") == (2 if "--ep-size" in flags else 1)
    if is_adapter:
        assert f"tuned={tmp_path}" in command
        assert "--max-lora-rank" not in flags or command[command.index("--max-lora-rank") + 1] == "16"
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    missing = subprocess.run(["bash", script], capture_output=True, text=True)
    assert missing.returncode == 1 and "names no" in missing.stderr


def test_the_example_prints_these_commands() -> None:
    text = (ROOT / "examples/merge_and_serve.py").read_text()
    printed = {
        frozenset(re.findall(r" (--[a-z-]+)", line)) for line in re.findall(r"^  (?:vllm|python) .*", text, re.M)
    }
    assert printed == {
        frozenset({"--tensor-parallel-size", "--enable-expert-parallel"}),
        frozenset({"--model-path", "--tp-size", "--ep-size"}),
        frozenset({"--tensor-parallel-size", "--enable-lora", "--max-lora-rank", "--lora-modules"}),
        frozenset({"--model-path", "--tp-size", "--lora-paths", "--lora-strict-loading"}),
    }


def test_first_line_of_the_readme() -> None:
    assert (INTEGRATIONS / "README.md").read_text().startswith("Nothing here is imported")


def test_nothing_is_left_out() -> None:
    files = {path for name in ("docker", "wandb", "vllm", "sglang") for path in (INTEGRATIONS / name).iterdir()}
    assert files == {DOCKERFILE, DOCKERIGNORE, PANELS, PANELS.parent / "workspace.py", *SERVERS}
    assert len(SERVERS) == 4
