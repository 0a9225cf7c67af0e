"""The checkpoints that long runs leave in a folder."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

DAMAGED = (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError, SafetensorError)
"""What reading a damaged checkpoint raises."""


def checkpoints(folder: Path) -> list[Path]:
    """`checkpoint-<step>` in a folder, by their steps; whatever else is there is not ours."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def save_moments(optimizer: Optimizer, file: Path) -> None:
    """Write what an optimizer has summed for each parameter; its settings are not in the file."""
    state = optimizer.state_dict()["state"]
    moments = {f"{number}.{name}": value.contiguous() for number, one in state.items() for name, value in one.items()}
    save_file(moments, file)


def load_moments(optimizer: Optimizer, file: Path) -> None:
    """Give an optimizer what `save_moments` wrote. Raises one of `DAMAGED` where the file is not that."""
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(file).items():
        number, name = key.split(".")
        moments.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
