"""Frames in steps of several, for techniques that group or pool them."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def in_steps(tensor: Float[Tensor, "*batch frames dim"], size: int) -> Float[Tensor, "*batch steps size dim"]:
    """Frames by step, ⌈T / size⌉ steps; missing frames of the last step are zero."""
    frames = tensor.shape[-2]
    steps = -(-frames // size)
    return functional.pad(tensor, (0, 0, 0, steps * size - frames)).unflatten(-2, (steps, size))


def valid_steps(valid: Bool[Tensor, "batch frames"] | None, size: int) -> Bool[Tensor, "batch steps"] | None:
    """True for steps whose first frame is not padding."""
    return None if valid is None else valid[:, ::size]


def step_distances(
    positions: Float[Tensor, "positions distances width"], size: int
) -> Float[Tensor, "positions step_distances width"]:
    """Encodings of the distances between n steps: (n − 1)·size, …, −(n − 1)·size frames."""
    frames = positions.shape[1] // 2 + 1
    longest = (frames - 1) // size * size
    return positions[:, frames - 1 - longest : frames + longest : size]
