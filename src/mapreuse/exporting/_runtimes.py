"""OpenVINO and ONNX Runtime: how their files are made, quantised and run."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mapreuse.console import refused_in_one_line
from mapreuse.exporting._library import LIBRARY, build_library, compiler

Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""A model in a runtime: inputs by name to outputs by name."""


@dataclass(frozen=True)
class Calibration:
    """What quantisation to int8 needs: typical inputs, and the names of the operators that stay in float."""

    batches: Sequence[Mapping[str, Tensor]]
    in_float: Sequence[str]


_PIP = "pip install 'mapreuse[export]'"


def required(*names: str) -> list[Any]:
    """Import packages of the extra "export".

    Raises:
        ModuleNotFoundError: with the command that installs the one that is missing.
    """
    found = []
    for name in names:
        try:
            found.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            if error.name not in (name, None):
                raise
            raise ModuleNotFoundError(f"exporting needs the package {name}: {_PIP}") from None
    return found


class Runtime(ABC):
    """A runtime: its packages, its files, and how it opens them."""

    packages: tuple[str, ...]
    file: str

    @abstractmethod
    def check_kernels(self) -> None:
        """Raise `ValueError` if no library of operators can be made for this runtime."""

    @abstractmethod
    def write(self, onnx_file: Path, directory: Path, calibration: Calibration | None, *, kernels: bool) -> None:
        """Write the runtime's files to `directory`, quantised to int8 if there are calibration batches.

        With `kernels`, the program contains operators of mapreuse, and their library is written, too.
        """

    @abstractmethod
    def open(self, directory: Path, threads: int | None) -> Run:
        """Open the files for inference on the CPU."""


class OpenVino(Runtime):
    """`openvino_model.xml` and `.bin`, the names that optimum and sentence-transformers look for."""

    packages = ("openvino",)
    file = "openvino_model.xml"

    def check_kernels(self) -> None:
        compiler()

    def write(self, onnx_file: Path, directory: Path, calibration: Calibration | None, *, kernels: bool) -> None:
        (openvino,) = required("openvino")
        if kernels:
            build_library(openvino, directory / LIBRARY)
        model = openvino.convert_model(onnx_file, extension=str(directory / LIBRARY) if kernels else None)
        if calibration is not None:
            model = _quantised(model, calibration)
        openvino.save_model(model, directory / self.file, compress_to_fp16=False)

    def open(self, directory: Path, threads: int | None) -> Run:
        (openvino,) = required("openvino")
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        core = openvino.Core()
        if (directory / LIBRARY).is_file():
            core.add_extension(directory / LIBRARY)
        compiled = core.compile_model(directory / self.file, "CPU", options)

        def run(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            outputs = compiled({name: tensor.numpy() for name, tensor in batch.items()})
            return {port.get_any_name(): torch.from_numpy(np.array(array)) for port, array in outputs.items()}

        return run


class Onnx(Runtime):
    """`model.onnx`, the name that optimum and sentence-transformers look for."""

    packages = ("onnxruntime", "onnx")
    file = "model.onnx"

    def check_kernels(self) -> None:
        raise ValueError(
            "kernels=True is for runtime='openvino': ONNX Runtime's package lacks the headers for operators; use "
            "kernels=False"
        )

    def write(self, onnx_file: Path, directory: Path, calibration: Calibration | None, *, kernels: bool) -> None:
        (onnx,) = required("onnx")
        model = onnx.load(onnx_file)
        if calibration is not None:
            model = _quantised(model, calibration)
        large = model.ByteSize() > 1 << 30  # one file may hold 2 GB
        onnx.save(model, directory / self.file, save_as_external_data=large, location=f"{self.file}_data")

    def open(self, directory: Path, threads: int | None) -> Run:
        (onnxruntime,) = required("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        session = onnxruntime.InferenceSession(directory / self.file, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def run(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            outputs = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
            return dict(zip(names, map(torch.from_numpy, outputs), strict=True))

        return run


RUNTIMES: dict[str, Runtime] = {"openvino": OpenVino(), "onnx": Onnx()}
"""The runtimes that `export` writes for, by name."""


def _quantised(model: Any, calibration: Calibration) -> Any:
    """The model in int8: post-training quantisation by NNCF, with its settings for Transformers."""
    (nncf,) = required("nncf")
    data = [{name: tensor.numpy() for name, tensor in batch.items()} for batch in calibration.batches]
    with refused_in_one_line("NNCF cannot quantise this model: "):
        return nncf.quantize(
            model,
            nncf.Dataset(data),
            subset_size=len(data),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=list(calibration.in_float), validate=False),
        )


def open_exported(path: str | Path, *, threads: int | None = None) -> Run:
    """Open a directory that `export` wrote, for inference on the CPU in the precision of its weights.

    A library of kernels in the directory is loaded, which runs its code: open only directories that you trust.

    Args:
        path: the directory.
        threads: number of CPU threads; None for the runtime's default.

    Returns:
        A function from inputs (tensors by name) to outputs (tensors by name).

    Raises:
        ValueError: if the directory contains no exported model.
    """
    for runtime in RUNTIMES.values():
        if (Path(path) / runtime.file).is_file():
            return runtime.open(Path(path), threads)
    files = " or ".join(runtime.file for runtime in RUNTIMES.values())
    raise ValueError(f"{path} contains no exported model: it has no {files}")
