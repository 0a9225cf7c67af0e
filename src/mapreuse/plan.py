"""Who reuses whose attention map: the `ReusePlan`, in pure Python."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

HeadSource: TypeAlias = tuple[int, int] | None
"""`(source layer, source head)`, or None where the head computes its own map."""

LayerSource: TypeAlias = int | tuple[HeadSource, ...] | None
"""None: every head computes. An integer: every head applies the same head of that layer. A tuple: head by head."""

_FORMAT = "mapreuse-plan"
_VERSION = 1
_GROUPS = re.compile(r"\s*(\d+)\s*[x×]\s*(\d+)\s*")
_MOST_LAYERS = 10_000
_SHOWN = 200
"""Characters of a notation that an error repeats."""
_SINGULAR = {True: "", False: "s"}


@dataclass(frozen=True)
class ReusePlan:
    """For every layer and head, whose attention map it applies.

    Layer `l`, head `h` either computes its own map, or reuses the map of `(source layer, source head)`, which must be
    an earlier layer that computes that head:

        context[l, h] = map[source(l, h)] @ values[l, h]

    `layers[l]` is None when the whole layer computes, a layer index when all its heads apply the same-numbered heads
    of that layer, or a tuple with one entry for each head: None (computes) or `(source layer, source head)`. A tuple
    that says no more than None or an index is replaced by it, so that equal plans compare equal.

    Example:
        >>> plan = ReusePlan.parse("1x2,2x1")
        >>> plan.layers
        (None, None, None, 2)

    Raises `ValueError`, naming the layer and head, when a source is not an earlier layer that computes that head.
    """

    layers: tuple[LayerSource, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a plan needs at least one layer")
        layers = tuple(_normalised(source, layer) for layer, source in enumerate(self.layers))
        object.__setattr__(self, "layers", layers)
        self._check_number_of_heads()
        for layer, source in enumerate(layers):
            if isinstance(source, int):
                self._check_layer_source(layer, source)
            elif source is not None:
                for head, head_source in enumerate(source):
                    if head_source is not None:
                        self._check_head_source(layer, head, head_source)

    @classmethod
    def full(cls, num_layers: int) -> ReusePlan:
        """The plan that reuses nothing: each of `num_layers` layers computes its own map."""
        return cls.grouped(num_layers, 1)

    @classmethod
    def grouped(cls, num_layers: int, group_size: int) -> ReusePlan:
        """Groups of `group_size` consecutive layers, the first of each computing; the last group may be shorter.

        Shim, Choi & Sung, "Exploring Attention Map Reuse for Efficient Transformer Neural Networks" (2301.12444).
        """
        if not (_is_index(num_layers) and _is_index(group_size) and num_layers >= 1 and group_size >= 1):
            raise ValueError(
                f"num_layers and group_size must be whole numbers from 1 up, got {num_layers!r} and {group_size!r}; "
                "ReusePlan.grouped(16, 4) is four groups of four layers"
            )
        return cls.from_sources([layer - layer % group_size for layer in range(num_layers)])

    @classmethod
    def from_sources(
        cls, sources: Sequence[int], heads: Mapping[int, Sequence[int | None]] | None = None
    ) -> ReusePlan:
        """A plan from one source layer for each layer; a layer that names itself computes.

        Args:
            sources: `sources[l]` is the layer whose map layer `l` applies, or `l` itself.
            heads: for some reusing layers, the source head that each of their heads applies (any head may be named
                more than once), or None where that head computes its own map (partial reuse).

        Example:
            >>> ReusePlan.from_sources([0, 0, 2, 2], heads={3: [1, 1, 0, None]}).layers[3]
            ((2, 1), (2, 1), (2, 0), None)
        """
        layers: list[LayerSource] = [None if source == layer else source for layer, source in enumerate(sources)]
        numbers = {layer: len(assignment) for layer, assignment in (heads or {}).items()}
        if len(set(numbers.values())) > 1:
            given = ", ".join(f"{number} heads for layer {layer}" for layer, number in numbers.items())
            raise ValueError(f"all layers of a plan have the same number of heads, got {given}")
        for layer, assignment in (heads or {}).items():
            if not _is_index(layer) or not 0 <= layer < len(layers):
                raise ValueError(f"heads are given for layer {layer}, but the plan has layers 0–{len(layers) - 1}")
            source = layers[layer]
            if not isinstance(source, int):
                raise ValueError(f"heads are given for layer {layer}, but it computes its own map")
            layers[layer] = tuple(None if head is None else (source, head) for head in assignment)
        return cls(tuple(layers))

    @classmethod
    def parse(cls, text: str) -> ReusePlan:
        """A plan from its notation.

        Accepted forms:
            "4x4"       group size × number of groups: four groups of four layers
            "1x4,4x3"   from the lowest layer up: four layers on their own, then three groups of four
            "[0,0,2,2]" JSON: the source layer of each layer, as for `from_sources`
            "{…}"       JSON: what `to_json` writes

        Raises `ValueError` pointing at the character that does not belong.
        """
        if not isinstance(text, str):
            raise ValueError(f'a plan\'s notation is text, such as "4x4", got {text!r}')
        if text.lstrip()[:1] in ("{", "["):
            return cls.from_json(text)
        sources: list[int] = []
        position = 0
        while True:
            match = _GROUPS.match(text, position)
            if match is None:
                raise _notation_error(text, position, "expected group size × groups, such as 4x3")
            size, count = int(match[1]), int(match[2])
            if size == 0 or count == 0:
                raise _notation_error(text, match.start(1), "group size and number of groups must be at least 1")
            if len(sources) + size * count > _MOST_LAYERS:
                raise _notation_error(text, match.start(1), f"a plan has at most {_MOST_LAYERS} layers")
            for _ in range(count):
                sources += [len(sources)] * size
            position = match.end()
            if position == len(text):
                return cls.from_sources(sources)
            if text[position] != ",":
                raise _notation_error(text, position, "expected a comma or the end")
            position += 1

    @classmethod
    def from_json(cls, text: str) -> ReusePlan:
        """The plan that `to_json` wrote, or a JSON list of source layers. Raises `ValueError` on anything else."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise _notation_error(text, error.pos, f"not JSON: {error.msg}") from None
        except RecursionError:
            raise ValueError("not a plan: its JSON is nested too deeply") from None
        if isinstance(data, list):
            if not all(_is_index(source) for source in data):
                raise ValueError(f"a JSON list must hold one source layer for each layer, got {text}")
            return cls.from_sources(data)
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError(f'not a plan: expected a JSON object with "format": "{_FORMAT}"')
        if data.get("version") != _VERSION:
            raise ValueError(f"plan version {data.get('version')!r} is not supported, only {_VERSION}")
        if not isinstance(data.get("layers"), list):
            raise ValueError('a plan needs "layers", a list with one entry for each layer')
        return cls(tuple(_normalised(source, layer) for layer, source in enumerate(data["layers"])))

    def to_json(self) -> str:
        """The plan as one line of JSON, read back by `from_json` and `parse`."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, "layers": self.layers})

    @property
    def num_layers(self) -> int:
        """Number of layers the plan speaks of."""
        return len(self.layers)

    @property
    def is_full(self) -> bool:
        """True when nothing is reused."""
        return all(source is None for source in self.layers)

    @property
    def num_heads(self) -> int | None:
        """Number of heads, where some layer is planned head by head; None where any number will do."""
        return next((len(source) for source in self.layers if isinstance(source, tuple)), None)

    def heads(self, layer: int, num_heads: int) -> tuple[HeadSource, ...]:
        """Layer `layer` head by head, for a model of `num_heads` heads."""
        source = self.layers[layer]
        if isinstance(source, tuple):
            return source
        return tuple(None if source is None else (source, head) for head in range(num_heads))

    def sources(self, layer: int) -> tuple[int, ...]:
        """The layers whose maps `layer` applies, in order; empty for a computing layer."""
        source = self.layers[layer]
        if isinstance(source, int):
            return (source,)
        return tuple(sorted({entry[0] for entry in source or () if entry is not None}))

    def readers(self, layer: int) -> tuple[int, ...]:
        """The later layers that apply a map of `layer`, in order."""
        return tuple(other for other in range(layer + 1, self.num_layers) if layer in self.sources(other))

    def computes(self, layer: int) -> bool:
        """True when some head of `layer` computes its own map."""
        source = self.layers[layer]
        return source is None or (isinstance(source, tuple) and None in source)

    def reuses(self, layer: int) -> bool:
        """True when some head of `layer` applies another layer's map."""
        return self.layers[layer] is not None

    def __str__(self) -> str:
        """A table with one line for each layer."""
        computing = sum(source is None for source in self.layers)
        lines = [
            f"{self.num_layers} layer{_SINGULAR[self.num_layers == 1]}, "
            f"{computing} computing, {self.num_layers - computing} reusing"
        ]
        width = len(str(self.num_layers - 1))
        for layer, source in enumerate(self.layers):
            lines.append(f"layer {layer:>{width}}  {_describe(source)}")
        return "\n".join(lines)

    def _check_number_of_heads(self) -> None:
        by_head = [(layer, len(source)) for layer, source in enumerate(self.layers) if isinstance(source, tuple)]
        for layer, number in by_head:
            if number != by_head[0][1]:
                raise ValueError(
                    f"layer {layer} speaks of {number} heads, but layer {by_head[0][0]} of {by_head[0][1]}; "
                    "all layers of a plan have the same number"
                )

    def _check_layer_source(self, layer: int, source: int) -> None:
        self._check_earlier(f"layer {layer}", layer, source)
        if self.layers[source] is not None:
            head = next((h for h, s in enumerate(self.heads(source, 1)) if s is not None), 0)
            raise ValueError(
                f"layer {layer} reuses layer {source}'s map, but layer {source} does not compute head {head}: "
                f"it reuses layer {self.sources(source)[0]}'s; name that layer as the source instead"
            )

    def _check_head_source(self, layer: int, head: int, head_source: tuple[int, int]) -> None:
        source, source_head = head_source
        name = f"layer {layer}, head {head}"
        self._check_earlier(name, layer, source)
        entry, num_heads = self.layers[source], self.num_heads or 0
        if not 0 <= source_head < num_heads:
            raise ValueError(
                f"{name} reuses head {source_head} of layer {source}, but its heads are 0–{num_heads - 1}"
            )
        computes = entry is None or (isinstance(entry, tuple) and entry[source_head] is None)
        if not computes:
            raise ValueError(
                f"{name} reuses head {source_head} of layer {source}, but that head does not compute its own map; "
                "name the head it reuses instead"
            )

    @staticmethod
    def _check_earlier(name: str, layer: int, source: int) -> None:
        if 0 <= source < layer:
            return
        earlier = f"an earlier layer (0–{layer - 1})" if layer else "an earlier layer, and layer 0 has none: it"
        verb = "that computes its own" if layer else "must compute its own"
        raise ValueError(f"{name} reuses layer {source}'s map, but a source must be {earlier} {verb}; see ReusePlan")


def _normalised(source: Any, layer: int) -> LayerSource:
    if source is None:
        return None
    if _is_index(source):
        return operator.index(source)
    if not isinstance(source, list | tuple) or not source:
        raise ValueError(f"layer {layer}: expected None, a source layer, or one entry for each head, got {source!r}")
    entries: list[HeadSource] = []
    for head, entry in enumerate(source):
        if entry is None:
            entries.append(None)
        elif isinstance(entry, list | tuple) and len(entry) == 2 and all(map(_is_index, entry)):
            entries.append((operator.index(entry[0]), operator.index(entry[1])))
        else:
            raise ValueError(
                f"layer {layer}, head {head}: expected None or (source layer, source head), got {entry!r}"
            )
    if all(entry is None for entry in entries):
        return None
    first = entries[0]
    if first is not None and all(entry == (first[0], head) for head, entry in enumerate(entries)):
        return first[0]
    return tuple(entries)


def _is_index(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _notation_error(text: str, position: int, problem: str) -> ValueError:
    text = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
    return ValueError(f"plan {text!r}, character {position + 1}: {problem}")


def _describe(source: LayerSource) -> str:
    if source is None:
        return "computes"
    if isinstance(source, int):
        return f"reuses layer {source}"
    return "heads: " + ", ".join(
        "computes" if entry is None else f"layer {entry[0]} head {entry[1]}" for entry in source
    )
