"""What is compiled, and for which machines; everything else about the package is in pyproject.toml.

Two libraries, both optional:
  pahm_ops/_ops.abi3.so       csrc/ops.cpp, csrc/cpu/*.cpp   the ops, against LibTorch's stable ABI
  pahm_ops/mesh/_tables.*.so  csrc/mesh/*.cpp                index tables of meshes, through pybind11
Each source of csrc/cpu holds its kernels for every instruction set of its architecture and picks one at run
time, so nothing here depends on the CPU that builds. Only .cpp files are listed: no CUDA toolkit is searched.
CUDA kernels have their place in csrc/cuda and csrc/kernels, as a third library, loaded where torch has CUDA.
"""

import shutil
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

HEADERS = sorted(glob("csrc/**/*.h", recursive=True))
COMPILE = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall"]


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
    found = [ops]
    if sources := sorted(glob("csrc/mesh/*.cpp")):
        import pybind11

        found.append(
            Extension(
                "pahm_ops.mesh._tables",
                sources,
                include_dirs=[pybind11.get_include()],
                # Ties between collapses must break alike on every CPU.
                extra_compile_args=[*COMPILE, "-ffp-contract=off"],
                language="c++",
                depends=HEADERS,
            )
        )
    return found


class Build(BuildExtension):
    """Compiles where it can; without a compiler the package installs and runs its reference ops."""

    def build_extensions(self) -> None:
        tools = [getattr(self.compiler, name, None) for name in ("compiler_so", "compiler_cxx", "linker_so")]
        missing = [tool[0] for tool in tools if tool and shutil.which(tool[0]) is None]
        if missing:
            print(f"pahm: no C++ compiler ({missing[0]} not found): no kernels compiled, ops run on PyTorch")
            self.extensions = []
            return
        super().build_extensions()

    def get_outputs(self) -> list[str]:
        return super().get_outputs() if self.extensions else []


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
