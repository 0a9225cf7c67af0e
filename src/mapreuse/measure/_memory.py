"""Peak memory of a call, measured in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Killed(RuntimeError):
    """A signal ended the process. The system does that when memory runs out."""


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Peak memory during a call, minus the memory in use before it, in bytes.

    On CUDA, it is the memory of PyTorch's allocator; on the CPU, the resident set size of the process, from `/proc`.

    Raises:
        ValueError: if the system has no `/proc`.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError("peak memory on the CPU is read from /proc, which this system does not have")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def memory_in_fresh_process(function: Callable[..., int], request: dict[str, Any]) -> int:
    """Result of a function that measures peak memory, called in a new process.

    Args:
        function: a function that can be imported by name and returns bytes.
        request: its keyword arguments; they must be JSON-compatible.

    Raises:
        RuntimeError: if the process fails, with its last line; `Killed` if a signal ended it.
    """
    module, name = function.__module__, function.__qualname__
    program = f"import json, sys; from {module} import {name}; print({name}(**json.load(sys.stdin)))"
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if ran.returncode < 0:
        raise Killed(
            f"its process was ended by {signal.Signals(-ran.returncode).name}, probably because memory ran out"
        )
    if ran.returncode:
        raise RuntimeError((ran.stderr.strip().splitlines() or ["no message"])[-1])
    return int(ran.stdout.splitlines()[-1])


def _resident(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024
