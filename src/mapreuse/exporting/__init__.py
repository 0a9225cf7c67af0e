"""How does a model leave PyTorch? Files for OpenVINO and ONNX Runtime, in float32 or int8."""

from mapreuse.exporting._export import RUNTIMES, check_runtime, export
from mapreuse.exporting._library import LIBRARY, build_library
from mapreuse.exporting._runtimes import ExportedDecoder, open_decoder, open_exported

__all__ = [
    "LIBRARY",
    "RUNTIMES",
    "ExportedDecoder",
    "build_library",
    "check_runtime",
    "export",
    "open_decoder",
    "open_exported",
]
