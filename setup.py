"""Compiles the libraries; everything else about the package is in pyproject.toml.

Three libraries, all optional:
  pahm_ops/_ops.abi3.so       csrc/ops.cpp, csrc/cpu/*.cpp   the ops, against LibTorch's stable ABI
  pahm_ops/_cuda.abi3.so      csrc/cuda/*.cu                 their CUDA kernels, loaded if torch has CUDA
  pahm_ops/mesh/_tables.*.so  csrc/mesh/*.cpp                index tables of meshes, through pybind11
Each source in csrc/cpu holds its kernels for every instruction set of the architecture and picks one at run
time. The CUDA library has code for every GPU. So nothing here depends on the machine that builds.
build_tools/cuda.py picks the CUDA compiler; torch's own search for a toolkit is not used.
"""

import os
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.errors import CompileError
from torch.utils.cpp_extension import BuildExtension, CppExtension

sys.path.insert(0, str(Path(__file__).parent))
from build_tools import cuda

HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))
COMPILE = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall"]
CUDA = "pahm_ops._cuda"


def extensions() -> list[Extension]:
    ops = CppExtension(
        "pahm_ops._ops",
        ["csrc/ops.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=[*COMPILE, "-Wno-psabi"],
        depends=HEADERS,
        py_limited_api=True,
    )
    found = [ops, Extension(CUDA, sorted(glob("csrc/cuda/*.cu")), depends=HEADERS, py_limited_api=True)]
    if sources := sorted(glob("csrc/mesh/*.cpp")):
        import pybind11

        found.append(
            Extension(
                "pahm_ops.mesh._tables",
                sources,
                include_dirs=[pybind11.get_include(), str(Path("csrc").resolve())],
                # Ties between collapses must break the same way on every CPU.
                extra_compile_args=[*COMPILE, "-ffp-contract=off"],
                language="c++",
                depends=HEADERS,
            )
        )
    return found


class Build(BuildExtension):
    """Compiles what it can; without a compiler the package still installs and runs its reference ops."""

    def build_extensions(self) -> None:
        wanted, self.extensions = self.extensions, []
        tools = [getattr(self.compiler, name, None) for name in ("compiler_so", "compiler_cxx", "linker_so")]
        missing = [tool[0] for tool in tools if tool and shutil.which(tool[0]) is None]
        if missing:
            print(f"pahm: no C++ compiler ({missing[0]} not found): no kernels compiled, ops run on PyTorch")
        else:
            gpu = [extension for extension in wanted if extension.name == CUDA and self.build_cuda(extension)]
            self.extensions = [extension for extension in wanted if extension.name != CUDA]
            super().build_extensions()
            self.extensions += gpu
        self.left_out = [extension for extension in wanted if extension not in self.extensions]
        for extension in self.left_out:  # Otherwise the result of an earlier build would be installed.
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)

    def build_cuda(self, extension: Extension) -> bool:
        """Whether the library was built. A missing compiler is not an error, but a failing one is."""
        library, installed = Path(self.get_ext_fullpath(extension.name)), Path(torch.__file__).parent
        try:
            os.environ["MAX_JOBS"] = str(cuda.jobs(os.environ))
            toolkit = cuda.find(torch.version.cuda, os.environ)
            cuda.build(toolkit, extension.sources, library, Path(self.build_temp, "cuda"), installed)
        except cuda.Skip as reason:
            print(f"pahm: no CUDA kernels compiled: {reason}")
            return False
        except ValueError as error:
            raise CompileError(f"pahm: {error}") from None
        except subprocess.CalledProcessError:
            hint = "PAHM_CUDA=0 installs without CUDA kernels"
            raise CompileError(f"pahm: {toolkit.nvcc} failed, see above ({hint})") from None
        return True

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for extension in self.left_out:
            Path(self.get_ext_filename(extension.name)).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return super().get_outputs() if self.extensions else []


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
