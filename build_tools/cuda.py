"""Compiling the CUDA library: with which compiler, for which GPUs, on how many cores.

The compiler is NVIDIA's own from PyPI, a build requirement in pyproject.toml. Its packages for CUDA 12 have
no nvcc, so CUDA 12 needs an installed toolkit. Environment variables, all optional:

  PAHM_CUDA=0         no CUDA library
  PAHM_CUDA_ARCHS     architectures, such as "80;90+PTX"; else TORCH_CUDA_ARCH_LIST, else DEFAULT_ARCHS
  PAHM_CUDA_HOME      a toolkit to use instead; an error if its major version is not torch's
  CUDA_HOME           the same, but ignored if it does not fit
  MAX_JOBS            compilers at once; else as many as cores and memory allow
  NVCC_APPEND_FLAGS   nvcc's own: "-lineinfo" adds source lines for a profiler

`nvcc` on the PATH comes last. Its folder is the one that nvcc reports, because the file on the PATH may be a
script elsewhere.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHS = "75;80;86;90;100;120+PTX"  # as in torch's own builds; 89 runs the code for 86
# The compiler makes the same PTX for both, so it is made once: half of the time that an architecture takes.
SAME_PTX = {"86": "80", "120": "100"}
COMPILE = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-Xfatbin=-compress-all"]
DEFINE = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
# Link the CUDA runtime statically, because torch's may have another version or be no separate library.
# csrc/cuda/launch.h sets the current device of both.
LINK = ["-shared", "-nodlink", "-cudart=static", "-Xlinker=--no-undefined,--as-needed"]
LIBRARIES = ["-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10"]
BYTES_PER_JOB = 2 << 30


class Skip(Exception):
    """The reason, as one clause, why no CUDA library is built. The install continues without it."""


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    version: tuple[int, int]

    @staticmethod
    def at(home: Path) -> Toolkit | None:
        """The toolkit in folder `home`, or None if it has no working compiler."""
        nvcc = home / "bin" / "nvcc"
        found = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
        return Toolkit(nvcc, (int(found[1]), int(found[2]))) if found else None

    def supported(self) -> set[str]:
        """The architectures that the compiler supports, as {"75", "80", ...}."""
        return set(re.findall(r"compute_(\w+)", _output(self.nvcc, "--list-gpu-arch")))


def find(torch_cuda: str | None, environ: Mapping[str, str]) -> Toolkit:
    """The toolkit to compile with, for a torch with CUDA version `torch_cuda` (None: without CUDA).

    Raises Skip if there is no toolkit, and ValueError if PAHM_CUDA_HOME names one that does not fit.
    """
    if environ.get("PAHM_CUDA") == "0":
        raise Skip("PAHM_CUDA=0")
    if torch_cuda is None:
        raise Skip("this torch has no CUDA")
    if sys.platform != "linux":
        raise Skip("they are built on Linux alone")
    major = int(torch_cuda.split(".")[0])
    if named := _named(major, environ):
        return named
    for home in (*_from_pypi(major), *_from_path(environ)):
        toolkit = Toolkit.at(home)
        if toolkit and toolkit.version[0] == major:
            return toolkit
    raise Skip(f"no nvcc of CUDA {major} found, for torch's {torch_cuda} (PAHM_CUDA_HOME names a toolkit)")


def architectures(environ: Mapping[str, str], supported: set[str]) -> list[str]:
    """nvcc's options for the architectures in PAHM_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST, or for the defaults.

    Architectures with the same PTX share it; where it is kept, later GPUs of either can use it. Leaves out
    defaults that the compiler does not support. Raises ValueError for a list that cannot be read
    and for a requested architecture that is not supported.
    """
    source = next((name for name in ("PAHM_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST") if environ.get(name)), None)
    asked = [part for part in re.split(r"[;,\s]+", environ[source] if source else DEFAULT_ARCHS) if part]
    entries = [_architecture(part, source) for part in asked]
    usable = [(arch, ptx) for arch, ptx in entries if arch.rstrip("af") in supported]
    if not usable or (source and usable != entries):
        lacking = ", ".join(part for part, entry in zip(asked, entries, strict=True) if entry not in usable)
        known = ", ".join(sorted(supported)) or "none"
        raise ValueError(
            f"{source or 'pahm'} asks for code for {lacking or 'nothing'}; this nvcc has {known}"
        )
    if not source:
        usable[-1] = (usable[-1][0], True)
    archs = [arch for arch, _ in usable]
    made_for = {arch: SAME_PTX[arch] if SAME_PTX.get(arch) in archs else arch for arch in archs}
    kept = dict.fromkeys(made_for[arch] for arch, ptx in usable if ptx)
    options = [f"-gencode=arch=compute_{made_for[arch]},code=sm_{arch}" for arch in archs]
    return options + [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in kept]


def jobs(environ: Mapping[str, str]) -> int:
    """How many compilers may run at once: MAX_JOBS, or as many as the cores and the free memory allow."""
    if given := environ.get("MAX_JOBS"):
        if not given.isdecimal() or int(given) == 0:
            raise ValueError(f"MAX_JOBS must be a whole number from 1, got {given!r}")
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _free_memory() // BYTES_PER_JOB))


def shared_out(jobs: int, architectures: int) -> tuple[int, int]:
    """How many files to compile at once, and how many architectures of each: files are few and take long."""
    threads = min(jobs, architectures)
    return jobs // threads, threads


def build(toolkit: Toolkit, sources: Sequence[str], library: Path, folder: Path, torch: Path) -> None:
    """Compile changed sources in `folder`, and link `library` against the torch installed in `torch`.

    Raises ValueError for an unusable environment variable, Skip without ninja, and
    subprocess.CalledProcessError, after the compiler's own message, if a source does not compile.
    """
    ninja = shutil.which("ninja")
    if ninja is None:
        raise Skip("no ninja found")
    options = architectures(os.environ, toolkit.supported())
    files, threads = shared_out(jobs(os.environ), len(options))
    include = ["-I", str(Path("csrc").resolve()), "-isystem", str(torch / "include")]
    host = ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") and "NVCC_CCBIN" not in os.environ else []
    compile = _command(toolkit.nvcc, *COMPILE, *DEFINE, *options, *include, *host)
    # nvcc looks for cudart in lib64, which the PyPI toolkit lacks.
    libraries = _command("-L", toolkit.nvcc.parent.parent / "lib", "-L", torch / "lib", *LIBRARIES)
    link = _command(toolkit.nvcc, *LINK, *host)
    objects = {f"{Path(source).stem}.o": Path(source).resolve() for source in sources}
    lines = [
        "rule compile",
        f"  command = {compile} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link} $in -o $out {libraries}",
        *(f"build {name}: compile {_path(source)}" for name, source in objects.items()),
        f"build {_path(library.resolve())}: link {' '.join(objects)}",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    # Not among the options in the file, because another number would recompile everything.
    threads_too = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} --threads={threads}"
    environment = {**os.environ, "NVCC_APPEND_FLAGS": threads_too}
    subprocess.run([ninja, "-C", str(folder), f"-j{files}"], check=True, env=environment)


def _named(major: int, environ: Mapping[str, str]) -> Toolkit | None:
    """The toolkit that PAHM_CUDA_HOME or CUDA_HOME names."""
    for name in ("PAHM_CUDA_HOME", "CUDA_HOME"):
        if not environ.get(name):
            continue
        toolkit = Toolkit.at(Path(environ[name]))
        if toolkit and toolkit.version[0] == major:
            return toolkit
        found = f"CUDA {toolkit.version[0]}.{toolkit.version[1]}" if toolkit else "no bin/nvcc that runs"
        sentence = f"{name}={environ[name]} has {found}, but torch needs CUDA {major}"
        if name == "PAHM_CUDA_HOME":
            raise ValueError(sentence)
        print(f"pahm: {sentence}: passed over")
    return None


def _from_pypi(major: int) -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    return [Path(folder, f"cu{major}") for folder in (spec and spec.submodule_search_locations) or []]


def _from_path(environ: Mapping[str, str]) -> list[Path]:
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    said = _output(nvcc, "--dryrun", "-c", "x.cu") if nvcc else ""
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return [Path(top[1].strip()).resolve()] if top else []


def _architecture(entry: str, source: str | None) -> tuple[str, bool]:
    """("90a", True) for "90a+PTX" and "9.0a+PTX"."""
    found = re.fullmatch(r"(\d+)\.?(\d[af]?)(\+PTX)?", entry)
    if not found:
        raise ValueError(f"{source} must look like 80;90+PTX or 8.0;9.0+PTX, got {entry!r} in it")
    return found[1] + found[2], found[3] is not None


def _free_memory() -> int:
    """Bytes that are free in the machine and in the container; a huge number if neither says."""
    limits = [sys.maxsize]
    for file, pattern, unit in (
        ("/proc/meminfo", r"MemAvailable:\s+(\d+)", 1024),
        ("/sys/fs/cgroup/memory.max", r"(\d+)", 1),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", r"(\d+)", 1),
    ):
        if Path(file).exists() and (found := re.search(pattern, Path(file).read_text())):
            limits.append(int(found[1]) * unit)
    return min(limits)


def _output(*command: str | Path) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def _command(*arguments: str | Path) -> str:
    return shlex.join(str(a) for a in arguments).replace("$", "$$")


def _path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))
