"""What a technique is, and how one is found by its name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import nn

from mapreuse.plan import ReusePlan

Model = TypeVar("Model", bound=nn.Module)
Kind = TypeVar("Kind", bound=type)


@runtime_checkable
class Technique(Protocol):
    """One way of compressing the self-attention of a Parakeet encoder.

    Techniques are frozen dataclasses of their settings. In the files' formulas, T is the number of encoder frames, C
    the width, H the number of heads, d the head dimension, H·d = C. Cost is that of one layer's attention beside its
    query, key, value and output projections (2·T·C² each, unless the file says that they are smaller), in FLOPs, two
    for a multiplication with its addition, and in numbers stored for a batch of one.
    """

    @property
    def name(self) -> str:
        """Unique and stable; includes the settings, and `parse` reads it back."""

    @property
    def title(self) -> str:
        """What a table calls it."""

    @property
    def source(self) -> str:
        """Where it was published."""

    @property
    def positions(self) -> str:
        """What becomes of the encoder's relative positions.

        "kept": they enter the scores. "dropped": scores are of contents alone, and only the convolutions know the
        order of frames. "none": there are no scores that positions could enter.
        """

    def apply(self, model: Model) -> Model:
        """Give the encoder of `model` this attention, in place; returns the model.

        Weights that still have a place are kept. Those that are new are drawn from PyTorch's generator.
        Raises `ValueError`, in one line, where the technique does not fit; the model is then unchanged.
        """


TECHNIQUES: dict[str, tuple[re.Pattern[str], type]] = {}
"""By notation: the pattern of the names, and the class that they make."""


def register(notation: str, pattern: str) -> Callable[[Kind], Kind]:
    """Register a technique's class.

    Args:
        notation: the form of its names, for people to read: "window-R".
        pattern: regular expression of its names; each named group is a field of the class. Digits become an integer,
            the group `plan` a `ReusePlan`, any other text True.
    """

    def add(cls: Kind) -> Kind:
        TECHNIQUES[notation] = re.compile(pattern), cls
        return cls

    return add


def parse(name: str) -> Technique:
    """The technique of this name. Raises `ValueError`, in one line, for an unknown one or impossible settings."""
    for pattern, cls in TECHNIQUES.values():
        match = pattern.fullmatch(name)
        if match is not None:
            fields = {field: _value(field, text) for field, text in match.groupdict().items() if text is not None}
            return cls(**fields)
    raise ValueError(f"no technique {name!r}; the forms are {', '.join(TECHNIQUES)}")


def _value(field: str, text: str) -> Any:
    if field == "plan":
        return ReusePlan.parse(text)
    return int(text) if text.isdigit() else True


def check_at_least_one(**settings: int) -> None:
    """Raises `ValueError`, naming the setting, where one is below 1."""
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
