"""What runs a network: PyTorch, `torch.compile`, OpenVINO or ONNX Runtime."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pahm import __version__
from pahm.infer.export import Flat, portable, unflatten, write_onnx
from pahm.infer.fold import folded
from pahm.infer.prepare import prepare
from pahm.infer.reconstruct import HandNetwork
from pahm.model.network import HandNet, Prediction
from pahm.whole_file import whole_file
from pahm_ops import _library

AUTO = {"cpu": ["torch"]}
"""What "auto" tries on each type of device, in this order; on other types of device
"torch". `benchmarks/bench_engines.py` compares them.
"""
TOLERANCE = 1e-4  # metres by which an engine's vertices may differ from the network's own


class Engine:
    """A network as one of `ENGINES` runs it. It is called as the network is, and is a `HandNetwork`.

    name: of the engine. run: images (B, 3, S, S), B at least 1, of the dtype and on the device of the
    network's `joint_regressor`, to a `Prediction`. A call raises ValueError for no images and for images of
    another size.
    """

    def __init__(self, name: str, network: HandNetwork, run: Run) -> None:
        self.name = name
        self.config, self.topology = network.config, network.topology
        self.joint_regressor = network.joint_regressor
        self._run = run

    def __call__(self, images: Tensor) -> Any:
        size = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, size, size) or not len(images):
            raise ValueError(
                f"images: expected (B, 3, {size}, {size}) with B of at least 1, got {tuple(images.shape)}"
            )
        return self._run(images)


def make_engine(network: nn.Module, device: torch.device, name: str = "auto") -> Engine:
    """The engine called `name`, one of `ENGINES`, for a network on a device.

    "auto" is the first of `AUTO` that is installed and works. One that is installed but fails is passed over
    with a warning. The network is put in evaluation mode; "torch" on another device than the CPU moves it
    there.

    Raises ValueError for an unknown name, for an engine that is not installed, for a device, a dtype or a
    network that the engine cannot take, and where the engine's vertices are not the network's.
    """
    if name != "auto":
        if name not in ENGINES:
            raise ValueError(f"engine: expected auto or one of {', '.join(ENGINES)}, got {name!r}")
        run = ENGINES[name](network.eval(), device)
        stands_for: Any = network
        return Engine(name, stands_for, run)
    failures: list[str] = []
    *others, last = AUTO.get(device.type, ["torch"])
    for other in others:
        try:
            engine = make_engine(network, device, other)
            break
        except NotInstalled:
            continue
        except ValueError as error:
            failures.append(str(error))
    else:
        engine = make_engine(network, device, last)
    if failures:
        warnings.warn(f"{'; '.join(failures)}; {engine.name} runs instead", RuntimeWarning, stacklevel=3)
    return engine


class NotInstalled(ValueError):
    """An engine needs packages that are not installed."""


Run = Callable[[Tensor], Any]


def _torch(network: nn.Module, device: torch.device) -> Run:
    module = network.to(device)
    kernels = _library.LOADED and device.type == "cpu"
    if kernels and isinstance(module, HandNet) and _dtype(module) == torch.float32:
        return prepare(module)
    return module.to(memory_format=torch.channels_last)


def _compile(network: nn.Module, device: torch.device) -> Run:
    if not isinstance(network, HandNet):
        raise ValueError(f"engine: compile runs a HandNet, got a {type(network).__name__}")
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(f"engine: compile needs a C++ compiler, and there is no {compiler}")
    module = folded(network.to(device)).to(memory_format=torch.channels_last)
    # One compilation for all batch sizes: each takes minutes.
    return torch.compile(module, dynamic=True)


class Runtime(ABC):
    """A network in a runtime without PyTorch, float32 on the CPU. It has as many threads as torch has."""

    name: str

    def __init__(self, network: HandNet) -> None:
        self.size = network.config.image_size
        self.threads = 0
        self.lock = threading.Lock()
        self.make(network)
        images = torch.randn(2, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            self.like: Prediction = network(images)
        error = (self(images).meshes[-1] - self.like.meshes[-1]).abs().max().item()
        if not error <= TOLERANCE:
            self.forget()
            raise ValueError(
                f"engine: {self.name} puts a vertex {error:.1e} m from where the network has it, expected at "
                f"most {TOLERANCE:g} m"
            )

    def __call__(self, images: Tensor) -> Prediction:
        with self.lock:  # one request at a time, and no change of the threads meanwhile
            if self.threads != torch.get_num_threads():
                self.threads = torch.get_num_threads()
                self.start(self.threads)
            values = self.run(images.detach().contiguous().numpy())
        return unflatten([torch.from_numpy(value) for value in values], self.like)

    @abstractmethod
    def make(self, network: HandNet) -> None:
        """Convert the network."""

    @abstractmethod
    def start(self, threads: int) -> None:
        """Get ready to run on this many threads."""

    @abstractmethod
    def run(self, images: npt.NDArray[np.float32]) -> Sequence[npt.NDArray[np.float32]]:
        """The tensors of `pahm.infer.export.flatten`, in memory of their own."""

    def forget(self) -> None:  # noqa: B027
        """Remove what is kept of a conversion that failed, if anything."""


class OpenVINO(Runtime):
    """OpenVINO, which reads the network's TorchScript trace: faster than by way of an ONNX file."""

    name = "openvino"

    def make(self, network: HandNet) -> None:
        import openvino

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer: shapes become constants, all but the batch
            self.model = openvino.convert_model(
                Flat(portable(network)).eval(),
                example_input=torch.zeros(2, 3, self.size, self.size),
                input=[(-1, 3, self.size, self.size)],
            )

    def start(self, threads: int) -> None:
        import openvino

        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",  # not bfloat16, which it prefers where the CPU has it
        }
        self.compiled = openvino.compile_model(self.model, "CPU", options)

    def run(self, images: npt.NDArray[np.float32]) -> Sequence[npt.NDArray[np.float32]]:
        return list(self.compiled([images]).values())


class ONNXRuntime(Runtime):
    """ONNX Runtime. PyTorch's exporter takes half a minute, so the ONNX file is kept for the next time."""

    name = "onnxruntime"

    def make(self, network: HandNet) -> None:
        self.file = _kept_file(network)
        if not self.file.is_file():
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(self.file, shared=True) as partial:
                    write_onnx(Flat(portable(network)).eval(), self.size, partial)
            except OSError as error:
                raise ValueError(
                    f"engine: onnxruntime cannot keep its file in {self.file.parent} ({error.strerror}), "
                    "expected a folder that can be written to: set TORCH_HOME"
                ) from error

    def start(self, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            str(self.file), options, providers=["CPUExecutionProvider"]
        )
        self.input = self.session.get_inputs()[0].name

    def run(self, images: npt.NDArray[np.float32]) -> Sequence[npt.NDArray[np.float32]]:
        found: Sequence[npt.NDArray[np.float32]] = self.session.run(None, {self.input: images})
        return found

    def forget(self) -> None:
        self.file.unlink(missing_ok=True)


def _kept_file(network: HandNet) -> Path:
    """Where the ONNX file of a network is kept: in torch's cache, named after its content."""
    total = hashlib.sha256(json.dumps(vars(network.config), sort_keys=True, default=str).encode())
    versions = (__version__, *(version(name) for name in ("torch", "onnx", "onnxscript")))
    total.update(" ".join(versions).encode())
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().flatten().contiguous().view(torch.uint8).numpy().data)
    return Path(torch.hub.get_dir()).parent / "pahm" / f"{total.hexdigest()[:32]}.onnx"


def _runtime(kind: type[Runtime], needs: Sequence[str]) -> Callable[[nn.Module, torch.device], Run]:
    def make(network: nn.Module, device: torch.device) -> Run:
        missing = [name for name in needs if importlib.util.find_spec(name) is None]
        if missing:
            raise NotInstalled(
                f"engine: {kind.name} needs {' and '.join(missing)}: pip install 'pahm[{kind.name}]'"
            )
        if not isinstance(network, HandNet):
            raise ValueError(f"engine: {kind.name} runs a HandNet, got a {type(network).__name__}")
        if device.type != "cpu":
            raise ValueError(f"engine: {kind.name} runs on the CPU, got the device {device}")
        if _dtype(network) != torch.float32:
            raise ValueError(f"engine: {kind.name} runs float32, got a network of {_dtype(network)}")
        try:
            return kind(network.to(device))
        except (ValueError, MemoryError):
            raise
        except Exception as error:  # converters have exceptions of their own for what they do not know
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"engine: {kind.name} cannot run this network ({reason})") from error

    return make


def _dtype(network: HandNet) -> torch.dtype:
    return network.joint_regressor.dtype


ENGINES: dict[str, Callable[[nn.Module, torch.device], Run]] = {
    "torch": _torch,
    "compile": _compile,
    "openvino": _runtime(OpenVINO, ["openvino"]),
    "onnxruntime": _runtime(ONNXRuntime, ["onnxruntime", "onnx", "onnxscript"]),
}
"""All engines. "torch" runs any network on any device; on a CPU it freezes a float32 `HandNet`."""
