"""What every benchmark shares: arms run in turn, each in processes of its own, and results that say where they ran."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hf_moe_accel import __version__


def alternate(script: str, arms: Sequence[str], repeats: int, ranks: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Run each arm in turn, `repeats` times over, so that all arms see the same machine.

    Args:
        script: file that runs one arm when called with `--arm NAME --result FILE`.
        arms: their names.
        repeats: how often.
        ranks: processes of an arm, which find each other by torchrun's environment; 0 for a plain process.
        arguments: passed on.

    Returns:
        arm -> list of what the arm's rank 0 wrote, one a repeat.
    """
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // max(1, ranks)))}
    for repeat in range(repeats):
        for arm in arms:
            with tempfile.TemporaryDirectory() as directory:
                result = Path(directory, "result.json")
                command = [sys.executable]
                if ranks:
                    command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
                command += [script, "--arm", arm, "--result", str(result), *arguments]
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"arm {arm!r} failed:\n{done.stdout}\n{done.stderr}")
                results[arm].append(json.loads(result.read_text()))
            shown = ", ".join(f"{name} {value:,.4g}" for name, value in results[arm][-1].items())
            print(f"repeat {repeat + 1} of {repeats}  {arm:<12} {shown}", flush=True)
    return results


def medians(results: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """arm -> number -> its median over the repeats."""
    return {
        arm: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for arm, rows in results.items()
    }


def machine() -> dict[str, Any]:
    """Where this runs: hardware, versions, date."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"hf_moe_accel": __version__},
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    """Its name; bf16 products differ between processors by more than the arms do."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def write(path: str, content: dict[str, Any]) -> None:
    """Write results as JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {path}")


def profiler(device: str) -> torch.profiler.profile:
    """Of a GPU's kernels alone, since what notes the host's operations as well slows it down; else of operations."""
    activity = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[activity.CUDA if device == "cuda" else activity.CPU])


def show_profile(profiled: torch.profiler.profile, steps: int) -> None:
    """Print the kernels (on CPU: the operations) that take most of a step, and what the device waited for."""
    device = torch.autograd.DeviceType.CUDA
    # Ranges that somebody named stand beside the kernels in them.
    found = [event for event in profiled.events() if event.device_type == device and not event.is_user_annotation]
    if not found:
        print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
        return
    show_kernels([(event.name, event.time_range.start, event.time_range.end) for event in found], steps)


def show_kernels(kernels: Sequence[tuple[str, float, float]], steps: int) -> None:
    """Print the kernels that take most of a step, and the longest times between two in which the device did nothing.

    Args:
        kernels: (name, start, end), in microseconds.
        steps: in how many steps.
    """
    times: dict[str, list[float]] = {}
    gaps: list[tuple[float, str, str]] = []
    before, until = "", min(start for _, start, _ in kernels)
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        times.setdefault(name, []).append(end - start)
        if start > until:
            gaps.append((start - until, before, name))
        if end > until:
            before, until = name, end
    total = sum(map(sum, times.values()))
    print(f"{total / 1e3 / steps:.3f} ms a step in kernels, {sum(gap for gap, *_ in gaps) / 1e3 / steps:.3f} in none")
    print("  ms a step      %   calls a step  kernel")
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:30]:
        ms = sum(each) / 1e3 / steps
        print(f"{ms:>11.3f} {1e5 * ms * steps / total:>6.1f} {len(each) / steps:>14.1f}  {name[:110]}")
    print("  ms, longest   between these kernels")
    for gap, left, right in sorted(gaps, reverse=True)[:12]:
        print(f"{gap / 1e3:>13.3f}   {left[:50]} | {right[:50]}")


class PeakMemory:
    """Peak memory of this process since it was made, in MiB above what was in use then."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the cache keeps unused would hide growth
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
        self._before = self._read("VmRSS")

    def mib(self) -> float:
        """The peak so far."""
        return self._read("VmHWM") - self._before

    @staticmethod
    def _read(field: str) -> float:
        if torch.cuda.is_available():
            return (torch.cuda.max_memory_reserved() if field == "VmHWM" else torch.cuda.memory_reserved()) / 2**20
        return _host_mib(field)


class PeakHostMemory:
    """Peak anonymous memory of this process on the host since it was made, in MiB above what was in use then.

    Sampled, since the kernel keeps a peak (VmHWM) only together with mapped files: a loaded model's dense weights can
    still be views of the mapped checkpoint, and reading them would count, though the kernel can drop those pages.
    """

    def __init__(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps unused would hide growth
        self._before = self._peak = _host_mib("RssAnon")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def mib(self) -> float:
        """The peak; ends the sampling."""
        self._done.set()
        self._thread.join()
        return self._peak - self._before

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self._peak = max(self._peak, _host_mib("RssAnon"))


def _host_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
