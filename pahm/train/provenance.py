"""The provenance stored with a run's weights: versions, machine and git revision."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("pahm", "torch", "torchvision", "timm", "pytorch-lightning")


@functools.cache
def _provenance() -> dict[str, str | None]:
    found: dict[str, str | None] = {name: _version(name) for name in PACKAGES}
    found["torch"] = str(torch.__version__)  # with the build, such as +cu130
    found["python"] = platform.python_version()
    found["cpu"] = _cpu()
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found["revision"] = _revision(Path(__file__).parent)
    return found


def provenance() -> dict[str, str | None]:
    """The versions of Python and of the packages that affect training, the names of CPU and GPU, and the git
    revision of the source tree, with `+dirty` if its tracked files differ. The first call determines them.

    `gpu` is None without a GPU, `revision` None if the package was not imported from a git checkout.
    """
    return dict(_provenance())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _revision(package: Path) -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        # An environment inside another project's checkout would report that project's revision.
        git("ls-files", "--error-unmatch", "__init__.py")
        dirty = "+dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + dirty
    except (OSError, subprocess.SubprocessError):
        return None
