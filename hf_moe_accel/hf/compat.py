"""Every version gate of the library, each with its reason."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

_NEEDED = {
    # `DistributedConfig(ep_size=...)`, `EPImplementationInterface` and the expert mesh took this form in 5.23.
    "transformers": "5.23",
    # `torch.nn.functional.grouped_mm` on CPU and CUDA, and FSDP2's `set_force_sum_reduction_for_comms`.
    "torch": "2.11",
}


def check_versions() -> None:
    """Raise if a library is too old.

    Raises:
        ImportError: names the library, its version, the one needed and the command.
    """
    for package, needed in _NEEDED.items():
        found = version(package)
        if Version(Version(found).base_version) < Version(needed):
            raise ImportError(
                f"hf_moe_accel needs {package}>={needed}, found {found}: pip install -U '{package}>={needed}'"
            )
