"""How does a model leave PyTorch? Files for OpenVINO and ONNX Runtime, in float32 or int8."""

from mapreuse.export._export import RUNTIMES, export
from mapreuse.export._runtimes import open_exported

__all__ = [
    "RUNTIMES",
    "export",
    "open_exported",
]
