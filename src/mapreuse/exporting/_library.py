"""A library of operators for OpenVINO, compiled from the kernels in C for the installed version of OpenVINO."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

LIBRARY = "mapreuse_kernels.so"
"""The file of the library beside an exported model."""

_FLAGS = ["-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


def compiler() -> str:
    """The C++ compiler.

    Raises:
        ValueError: if there is none, or the system is not Linux.
    """
    found = shutil.which("c++")
    if not sys.platform.startswith("linux"):
        raise ValueError(f"kernels=True works on Linux only, not on {sys.platform}; export with kernels=False")
    if found is None:
        raise ValueError("kernels=True needs a C++ compiler: apt install g++ (or export with kernels=False)")
    return found


def build_library(openvino: Any, file: Path) -> None:
    """Compile the operators from the headers that OpenVINO's wheel contains.

    Raises:
        ValueError: with the compiler's message, if it fails.
    """
    package, here = Path(openvino.__file__).parent, Path(__file__).parent
    libraries = [
        next(iter(sorted((package / "libs").glob(f"lib{name}.so*"))), None)
        for name in ("openvino", "openvino_onnx_frontend", "tbb")
    ]
    if not (package / "include").is_dir() or None in libraries:
        raise ValueError(
            f"kernels=True needs the headers and libraries of OpenVINO's wheel, which {package} does not contain: "
            "pip install openvino"
        )
    sources = [str(here / "_openvino.cpp"), "-x", "c", str(here / "_int8.c"), "-x", "none"]
    command = [compiler(), *_FLAGS, f"-I{package / 'include'}", "-o", str(file), *sources, *map(str, libraries)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
        raise ValueError(f"the operators for OpenVINO do not compile: {' '.join(lines[:1])}")
