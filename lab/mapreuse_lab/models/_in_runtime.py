"""A pretrained model, or its encoder, that runs in OpenVINO or ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

import mapreuse as mr
from mapreuse.exporting import open_exported

CALIBRATION = 128
"""Number of batches that int8 is calibrated on."""


@dataclass
class ExportedOutput(BaseModelOutput):
    """Outputs of an exported model. No mask means that all positions are valid."""

    logits: Tensor | None = None
    attention_mask: Tensor | None = None


class ExportedModule(nn.Module):
    """An exported model, called as the PyTorch model is; arguments that the export does not have are ignored.

    An encoder says that all its outputs are valid: give it inputs without padding if a decoder reads them.

    Args:
        run: what `open_exported` returns.
        names: the inputs of the export.
    """

    device = "cpu"

    def __init__(self, run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], names: Sequence[str]):
        super().__init__()
        self.run, self.names = run, tuple(names)

    def forward(self, **kwargs: Any) -> ExportedOutput:
        found = self.run({name: kwargs[name] for name in self.names if kwargs.get(name) is not None})
        return ExportedOutput(last_hidden_state=found.get("last_hidden_state"), logits=found.get("logits"))


def in_runtime(
    model: nn.Module, stack: str, batches: Sequence[Mapping[str, Tensor]], runtime: str, int8: bool, directory: Path
) -> nn.Module:
    """A copy of a model in which a runtime computes the module at `stack`, or all of it.

    Args:
        model: the model.
        stack: path of an encoder in it, or empty for the whole model.
        batches: inputs of that module; the first is the example of the export, and int8 is calibrated on some.
        runtime: openvino or onnx.
        int8: quantise to 8 bits; of a language model, only the weights.
        directory: a new directory for the export.
    """
    part, example = model.get_submodule(stack), batches[0]
    calibration: Any = None
    if int8:
        some = list(batches)[:: max(1, len(batches) // CALIBRATION)][:CALIBRATION]
        calibration = "weights" if isinstance(part, GenerationMixin) else some
    mr.export(part, directory, example, runtime=runtime, int8=calibration)
    exported = ExportedModule(open_exported(directory, threads=torch.get_num_threads()), list(example))
    if not stack:
        return exported
    whole = copy.deepcopy(model)
    whole.set_submodule(stack, exported)
    return whole
