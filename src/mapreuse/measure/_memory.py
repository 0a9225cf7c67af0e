"""How much memory does a forward pass need beside the weights? Each contestant is asked in a process of its own."""

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

_PEAK, _NOW = "VmHWM", "VmRSS"


class Killed(RuntimeError):
    """The process was ended by a signal, as the system does where memory runs out."""


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Bytes by which `call` raises the peak of memory in use over what was in use before.

    On CUDA, what PyTorch's allocator gave out; on the CPU, the resident set of the whole process, from `/proc`.
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
        raise ValueError("memory on the CPU is read from /proc, which this system does not have")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _resident(_NOW)
    call()
    return _resident(_PEAK) - before


def memory_in_fresh_process(function: Callable[..., int], request: dict[str, Any]) -> int:
    """What a function that measures peak memory, in bytes, returns in a new process.

    Args:
        function: one that can be imported by name.
        request: its keyword arguments, as JSON can hold them.

    Raises:
        RuntimeError: with the last line that the process wrote, where it failed; `Killed` where a signal ended it.
    """
    module, name = function.__module__, function.__qualname__
    program = f"import json, sys; from {module} import {name}; print({name}(**json.load(sys.stdin)))"
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if ran.returncode < 0:
        raise Killed(f"its process was ended by {signal.Signals(-ran.returncode).name}; out of memory, most likely")
    if ran.returncode:
        raise RuntimeError((ran.stderr.strip().splitlines() or ["no message"])[-1])
    return int(ran.stdout.splitlines()[-1])


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")
