"""OpenVINO and ONNX Runtime: how their files are made, quantised and run."""

from __future__ import annotations

import importlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mapreuse.console import refused_in_one_line
from mapreuse.exporting._library import LIBRARY, build_library, compiler

Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""A model in a runtime: inputs by name to outputs by name."""


TEXT = ("input_ids", "attention_mask", "position_ids")
"""Names of the inputs of a decoder. The mask covers the cached and the new positions."""

PAST, PRESENT = "past_key_values", "present"
"""First parts of the names of a decoder's cache, as inputs and as outputs: `past_key_values.0.key`, …"""

BEAMS = "beam_idx"
"""The input of a stateful model with, for each text, the index of the text whose cache it continues."""

DESCRIPTION = "mapreuse_export.json"
"""The file with the description of an export."""


class ExportedDecoder(ABC):
    """An exported language model that keeps its cache from call to call. `open_decoder` opens one.

    Calls return the logits of the new tokens:

        logits = decoder(input_ids, attention_mask)        (batch, new, vocabulary)

    `attention_mask` (batch, cached + new) is 0 for padding, which is on the left. The cache grows by the new tokens.
    """

    names: frozenset[str]
    """The names of its inputs."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = positions_of(attention_mask)[:, -input_ids.shape[1] :]
        inputs = dict(zip(TEXT, (input_ids, attention_mask, positions), strict=True))
        return torch.from_numpy(self._step({name: inputs[name].numpy() for name in TEXT if name in self.names}))

    @abstractmethod
    def reset(self) -> None:
        """Empty the cache: the next call begins new texts."""

    @abstractmethod
    def _step(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The logits for these inputs and the cache."""


def positions_of(attention_mask: Tensor) -> Tensor:
    """The position of each token: 0 for padding on the left and the first token, then 1, 2, …"""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


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
    def write(
        self, onnx_file: Path, directory: Path, int8: Calibration | Literal["weights"] | None, *, kernels: bool
    ) -> None:
        """Write the runtime's files to `directory`, in int8 with calibration batches, or with weights alone in int8.

        A decoder with a cache becomes stateful in OpenVINO, whose requests keep the cache from call to call. With
        `kernels`, the program contains operators of mapreuse, and their library is written, too.
        """

    @abstractmethod
    def open(self, directory: Path, threads: int | None) -> Run:
        """Open the files for inference on the CPU."""

    @abstractmethod
    def open_decoder(self, directory: Path, threads: int | None) -> ExportedDecoder:
        """Open the files of a decoder for inference on the CPU."""


class OpenVino(Runtime):
    """`openvino_model.xml` and `.bin`, the names that optimum and sentence-transformers look for."""

    packages = ("openvino",)
    file = "openvino_model.xml"

    def check_kernels(self) -> None:
        compiler()

    def write(
        self, onnx_file: Path, directory: Path, int8: Calibration | Literal["weights"] | None, *, kernels: bool
    ) -> None:
        (openvino,) = required("openvino")
        if kernels:
            build_library(openvino, directory / LIBRARY)
        model = openvino.convert_model(onnx_file, extension=str(directory / LIBRARY) if kernels else None)
        if int8 is not None:
            model = _quantised(model, int8)
        if any(name.startswith(PAST) for port in model.inputs for name in port.names):
            _make_stateful(openvino, model)
        openvino.save_model(model, directory / self.file, compress_to_fp16=False)

    def open(self, directory: Path, threads: int | None) -> Run:
        compiled = self._compiled(directory, threads)

        def run(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            outputs = compiled({name: tensor.numpy() for name, tensor in batch.items()})
            return {port.get_any_name(): torch.from_numpy(np.array(array)) for port, array in outputs.items()}

        return run

    def open_decoder(self, directory: Path, threads: int | None) -> ExportedDecoder:
        return _StatefulDecoder(self._compiled(directory, threads))

    def _compiled(self, directory: Path, threads: int | None) -> Any:
        (openvino,) = required("openvino")
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        core = openvino.Core()
        if (directory / LIBRARY).is_file():
            core.add_extension(directory / LIBRARY)
        return core.compile_model(directory / self.file, "CPU", options)


class _StatefulDecoder(ExportedDecoder):
    """A decoder in OpenVINO: the request has the cache as its state."""

    def __init__(self, compiled: Any) -> None:
        self.names = frozenset(port.get_any_name() for port in compiled.inputs)
        self._request = compiled.create_infer_request()

    def reset(self) -> None:
        self._request.reset_state()

    def _step(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        beams = np.arange(len(inputs["input_ids"]), dtype=np.int32)
        return np.array(self._request.infer(inputs | {BEAMS: beams})["logits"])


class Onnx(Runtime):
    """`model.onnx`, the name that optimum and sentence-transformers look for."""

    packages = ("onnxruntime", "onnx")
    file = "model.onnx"

    def check_kernels(self) -> None:
        raise ValueError(
            "kernels=True is for runtime='openvino': ONNX Runtime's package lacks the headers for operators; use "
            "kernels=False"
        )

    def write(
        self, onnx_file: Path, directory: Path, int8: Calibration | Literal["weights"] | None, *, kernels: bool
    ) -> None:
        (onnx,) = required("onnx")
        model = onnx.load(onnx_file)
        if int8 is not None:
            model = _quantised(model, int8)
        large = model.ByteSize() > 1 << 30  # one file may hold 2 GB
        onnx.save(model, directory / self.file, save_as_external_data=large, location=f"{self.file}_data")

    def open(self, directory: Path, threads: int | None) -> Run:
        session = self._session(directory, threads)
        names = [output.name for output in session.get_outputs()]

        def run(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            outputs = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
            return dict(zip(names, map(torch.from_numpy, outputs), strict=True))

        return run

    def open_decoder(self, directory: Path, threads: int | None) -> ExportedDecoder:
        return _PastDecoder(self._session(directory, threads))

    def _session(self, directory: Path, threads: int | None) -> Any:
        (onnxruntime,) = required("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        return onnxruntime.InferenceSession(directory / self.file, options, providers=["CPUExecutionProvider"])


class _PastDecoder(ExportedDecoder):
    """A decoder in ONNX Runtime: the cache is an output of each call and an input of the next."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._shapes = {port.name: port.shape for port in session.get_inputs()}
        self.names = frozenset(self._shapes)
        self._outputs = [port.name for port in session.get_outputs()]
        self._past: dict[str, np.ndarray] = {}

    def reset(self) -> None:
        self._past = {}

    def _step(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        items = len(inputs["input_ids"])
        empty = {
            name: np.zeros((items, shape[1], 0, shape[3]), np.float32)
            for name, shape in self._shapes.items()
            if name.startswith(PAST)
        }
        outputs = dict(zip(self._outputs, self._session.run(None, inputs | (self._past or empty)), strict=True))
        logits = outputs.pop("logits")
        self._past = {name.replace(PRESENT, PAST, 1): array for name, array in outputs.items()}
        return logits


RUNTIMES: dict[str, Runtime] = {"openvino": OpenVino(), "onnx": Onnx()}
"""The runtimes that `export` writes for, by name."""


def _make_stateful(openvino: Any, model: Any) -> None:
    """Turn the cache of a decoder in OpenVINO from inputs and outputs into states, in place.

    A state begins with no positions, for as many texts as the call has. `beam_idx` selects the texts that go on.
    """
    operators = importlib.import_module("openvino.opset13")
    passes = importlib.import_module("openvino.passes")
    beams = operators.parameter([-1], np.int32, name=BEAMS)
    beams.output(0).set_names({BEAMS})
    model.add_parameters([beams])
    results = {name: result for result in model.get_results() for name in result.input_value(0).get_names()}
    states = []
    for parameter in model.get_parameters():
        name = next((one for one in parameter.output(0).get_names() if one.startswith(PAST)), None)
        if name is not None:
            readers = list(parameter.output(0).get_target_inputs())
            continued = operators.gather(parameter, beams, operators.constant(0, np.int64))
            for reader in readers:
                reader.replace_source_output(continued.output(0))
            states.append((parameter, results[name.replace(PAST, PRESENT, 1)]))
    manager = passes.Manager()
    manager.register_pass(passes.MakeStateful(states))
    manager.run_passes(model)
    items = operators.gather(
        operators.shape_of(model.input("input_ids"), output_type="i64"),
        operators.constant([0], np.int64),
        operators.constant(0, np.int64),
    )
    for read in model.get_ops():
        if read.get_type_name() == "ReadValue":
            _, heads, _, width = (size.min_length for size in read.get_output_partial_shape(0))
            shape = operators.concat([items, operators.constant([heads, 0, width], np.int64)], 0)
            read.set_arguments([operators.broadcast(operators.constant(0.0, np.float32), shape)])
    model.validate_nodes_and_infer_types()


def _quantised(model: Any, calibration: Calibration | Literal["weights"]) -> Any:
    """The model in int8: post-training quantisation by NNCF, with its settings for Transformers; or its weights."""
    (nncf,) = required("nncf")
    if calibration == "weights":
        with refused_in_one_line("NNCF cannot compress the weights of this model: "):
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    data = [{name: tensor.numpy() for name, tensor in batch.items()} for batch in calibration.batches]
    with refused_in_one_line("NNCF cannot quantise this model: "):
        return nncf.quantize(
            model,
            nncf.Dataset(data),
            subset_size=len(data),
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.FIRST_LAYER if weight_bits() == 8 else nncf.OverflowFix.ENABLE
            ),
            ignored_scope=nncf.IgnoredScope(names=list(calibration.in_float), validate=False),
        )


def weight_bits() -> int:
    """Bits that int8 weights may use on this processor: 8, or 7 on x86 without VNNI.

    There, two 8-bit products are added in 16 bits, which overflow: outputs would be wrong without an error.
    """
    features = torch.cpu.get_capabilities()
    overflows = features.get("architecture") == "x86_64" and not (
        features.get("avx512_vnni") or features.get("avx_vnni")
    )
    return 7 if overflows else 8


def open_exported(path: str | Path, *, threads: int | None = None) -> Run:
    """Open a directory that `export` wrote, for inference on the CPU in the precision of its weights.

    A library of kernels in the directory is loaded, which runs its code: open only directories that you trust.

    Args:
        path: the directory.
        threads: number of CPU threads; None for the runtime's default.

    Returns:
        A function from inputs (tensors by name) to outputs (tensors by name). A decoder begins with an empty cache in
        each call, and returns logits; `open_decoder` keeps its cache.

    Raises:
        ValueError: if the directory contains no exported model.
    """
    runtime = _runtime_of(Path(path))
    if _description(Path(path)).get("weight_bits", 0) > weight_bits():
        warnings.warn(
            f"{path} was exported in int8 on a processor with VNNI; this one has none, and 8-bit products overflow "
            "on it: export the model again on this processor",
            stacklevel=2,
        )
    if not _is_decoder(Path(path)):
        return runtime.open(Path(path), threads)
    decoder = runtime.open_decoder(Path(path), threads)

    def run(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        decoder.reset()
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        return {"logits": decoder(batch["input_ids"], mask)}

    return run


def open_decoder(path: str | Path, *, threads: int | None = None) -> ExportedDecoder:
    """Open a language model that `export` wrote, for generation on the CPU.

    Args:
        path: the directory.
        threads: number of CPU threads; None for the runtime's default.

    Returns:
        A function that keeps the cache: `decoder(input_ids, attention_mask)` returns the logits of the new tokens;
        `decoder.reset()` empties the cache.

    Raises:
        ValueError: if the directory contains no exported decoder.
    """
    runtime = _runtime_of(Path(path))
    if not _is_decoder(Path(path)):
        raise ValueError(f"{path} contains an encoder, which has no cache; open it by open_exported")
    return runtime.open_decoder(Path(path), threads)


def _runtime_of(path: Path) -> Runtime:
    for runtime in RUNTIMES.values():
        if (path / runtime.file).is_file():
            return runtime
    files = " or ".join(runtime.file for runtime in RUNTIMES.values())
    raise ValueError(f"{path} contains no exported model: it has no {files}")


def _is_decoder(path: Path) -> bool:
    return bool(_description(path).get("cache"))


def _description(path: Path) -> dict[str, Any]:
    file = path / DESCRIPTION
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
