"""The reuse plan: which layer applies which layer's attention map. Pure Python, without torch."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

HeadSource: TypeAlias = tuple[int, int] | None
"""`(source layer, source head)`, or None if the head computes its own map."""

LayerSource: TypeAlias = int | tuple[HeadSource, ...] | None
"""None: all heads compute. An integer: all heads apply the same head of that layer. A tuple: one entry per head."""

SHARE_MODES = ("map", "keys", "corrected")
"""What a source layer publishes for its group: its weights, which keys matter, or its scores."""

_FORMAT = "mapreuse-plan"
_VERSIONS = (1, 2)
"""Versions of plans in JSON: for plans that share maps only, and for plans with other share modes."""
SETTINGS = {"keys": ("keys", 128), "window": ("keys", 64), "block": ("keys", 16), "rank": ("corrected", 16)}
"""Settings of share modes, by name: the mode and the default."""
_GROUPS = re.compile(r"\s*(\d+)\s*[x×]\s*(\d+)\s*")
_MAX_LAYERS = 10_000
_MAX_SHOWN = 200
"""Maximum number of characters of the notation that an error message repeats."""


@dataclass(frozen=True)
class ReusePlan:
    """Assigns a source of its attention map to every layer and head.

    Each head `h` of layer `l` either computes its own attention map or reuses the map of an earlier layer:

        context[l, h] = map[source layer, source head] @ values[l, h]

    A reusing head skips the query and key projections, the scores and the softmax. Its source must compute its own
    map: reuse is never chained.

    This is share mode "map". In share mode "keys", the source publishes which keys matter: for each block of
    queries, the `keys` keys with the most weight. A reusing layer computes its own softmax over these keys, the keys
    less than `window` positions away, and the first key:

        context[l, h] = softmax(scores[l, h] over the source's keys, the window and the first key) @ values[l, h]

    It keeps its query and key projections, and skips most of the T × T scores.

    In share mode "corrected", the source publishes its scores. A reusing layer adds products of its own queries and
    keys, which have only `rank` numbers per head and are rotated by their positions:

        context[l, h] = softmax(scores[source layer, source head] + R(x A[l, h]) R(x B[l, h])ᵀ) @ values[l, h]

    A and B replace the query and key projections. `apply` sets A to zero, which is share mode "map"; `refit` fits A
    and B to the original's maps.

    Most plans come from `parse`, `grouped` or `from_sources`. Plans are immutable, hashable, and equal if they assign
    the same sources and share modes.

    Shim, Choi & Sung, "Understanding the Role of Self Attention for Efficient Speech Recognition" (ICLR 2022), and
    "Exploring Attention Map Reuse for Efficient Transformer Neural Networks" (arXiv 2301.12444). For keys: Yang et
    al., "TidalDecode" (arXiv 2410.05076), and "Kascade" (arXiv 2512.16391). For corrected scores: Mu et al.,
    "Cross-layer Attention Sharing for Pre-trained Large Language Models" (LiSA, arXiv 2408.01890).

    Args:
        layers: one entry per layer. None: the layer computes its map. An integer: all heads apply the same-numbered
            heads of that layer. A tuple: one entry per head, None or `(source layer, source head)`. A tuple that
            means the same as None or an integer is stored as that.
        share: the share mode, "map", "keys" or "corrected". A tuple has one entry per layer; entries of layers that
            compute are ignored and stored as None, and all readers of a source have the same mode.
        keys: number of keys that a source publishes for a block of queries, in share mode "keys". Default: 128.
        window: a reusing layer also attends to the keys less than `window` positions away. Default: 64.
        block: number of queries that share one set of keys. Default: 16. Each step of decoding is its own block.
        rank: width of the queries and keys that a reusing layer adds, in share mode "corrected". Even. Default: 16.

    Raises:
        ValueError: if a source is not an earlier layer that computes that head, or a share mode or one of its
            settings is not valid. The message names layer and head.

    Examples:
        >>> plan = ReusePlan.parse("1x2,2x1")
        >>> plan.layers
        (None, None, None, 2)
        >>> print(plan)
        4 layers: 3 computing, 1 reusing
        layer 0  computes
        layer 1  computes
        layer 2  computes
        layer 3  reuses layer 2
    """

    layers: tuple[LayerSource, ...]
    share: str | tuple[str | None, ...] = "map"
    keys: int | None = None
    window: int | None = None
    block: int | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or not isinstance(self.layers, Sequence):
            raise ValueError(
                f"a plan needs one entry per layer, such as (None, 0): got {self.layers!r}; parse reads text"
            )
        if not 1 <= len(self.layers) <= _MAX_LAYERS:
            raise ValueError(f"a plan needs at least one layer and at most {_MAX_LAYERS}, got {len(self.layers)}")
        numbers = {layer: len(heads) for layer, heads in enumerate(self.layers) if isinstance(heads, list | tuple)}
        if len(set(numbers.values())) > 1:
            given = ", ".join(f"{number} heads for layer {layer}" for layer, number in numbers.items())
            raise ValueError(f"all layers of a plan must have the same number of heads, got {given}")
        layers = tuple(_normalised(source, layer) for layer, source in enumerate(self.layers))
        object.__setattr__(self, "layers", layers)
        for layer, source in enumerate(layers):
            if isinstance(source, int):
                self._check_source(f"layer {layer}", layer, source, range(self.num_heads or 1))
                continue
            for head, entry in enumerate(source or ()):
                if entry is not None:
                    self._check_source(f"layer {layer}, head {head}", layer, entry[0], entry[1:])
        self._check_share()

    @classmethod
    def full(cls, num_layers: int) -> ReusePlan:
        """The plan without reuse: each of `num_layers` layers computes its own map."""
        return cls.grouped(num_layers, 1)

    @classmethod
    def grouped(cls, num_layers: int, group_size: int) -> ReusePlan:
        """Divide the layers into groups of consecutive layers that share one map.

        The first layer of each group computes the map and the others reuse it. The last group is shorter if
        `group_size` does not divide `num_layers`.

        Examples:
            >>> ReusePlan.grouped(num_layers=5, group_size=2).layers
            (None, 0, None, 2, None)
        """
        if not all(_is_index(number) and 1 <= number <= _MAX_LAYERS for number in (num_layers, group_size)):
            raise ValueError(
                f"num_layers and group_size must be integers from 1 to {_MAX_LAYERS}, got {num_layers!r} and "
                f"{group_size!r}; for example, ReusePlan.grouped(16, 4) makes four groups of four layers"
            )
        return cls.from_sources([layer - layer % group_size for layer in range(num_layers)])

    @classmethod
    def from_sources(
        cls, sources: Sequence[int], heads: Mapping[int, Sequence[int | None]] | None = None
    ) -> ReusePlan:
        """Make a plan from the source layer of each layer.

        Args:
            sources: `sources[l]` is the layer whose map layer `l` applies, or `l` itself if the layer computes.
            heads: a head assignment for some of the reusing layers: the source head that each head applies, or None
                if that head computes its own map. Several heads may apply the same source head.

        Examples:
            >>> ReusePlan.from_sources([0, 0, 2, 2], heads={3: [1, 1, 0, None]}).layers[3]
            ((2, 1), (2, 1), (2, 0), None)
        """
        if not isinstance(sources, Iterable) or not all(map(_is_index, sources)):
            raise ValueError(
                f"sources must be a list of the source layer of each layer, such as [0, 0], got {sources!r}"
            )
        if not isinstance(heads or {}, Mapping):
            raise ValueError(f"heads must be a dictionary, such as {{1: [0, 1]}}, got {heads!r}")
        layers: list[LayerSource] = [None if source == layer else source for layer, source in enumerate(sources)]
        for layer, assignment in (heads or {}).items():
            if not _is_index(layer) or not 0 <= layer < len(layers):
                raise ValueError(f"heads assigns heads to layer {layer}, but the plan has layers 0–{len(layers) - 1}")
            source = layers[layer]
            if not isinstance(source, int):
                raise ValueError(f"heads assigns heads to layer {layer}, but that layer computes its own map")
            if isinstance(assignment, str) or not isinstance(assignment, Iterable):
                raise ValueError(f"heads needs one source head for each head of layer {layer}, got {assignment!r}")
            layers[layer] = tuple(None if head is None else (source, head) for head in assignment)
        return cls(tuple(layers))

    @classmethod
    def parse(
        cls,
        text: str,
        num_layers: int | None = None,
        *,
        share: str | tuple[str | None, ...] = "map",
        keys: int | None = None,
        window: int | None = None,
        block: int | None = None,
        rank: int | None = None,
    ) -> ReusePlan:
        """Make a plan from text.

        Accepted forms:
            "full"      every layer computes its own map; needs `num_layers`
            "4x4"       group size × number of groups: four groups of four layers
            "1x4,4x3"   from the first layer on: four layers that compute, then three groups of four layers
            "[0,0,2,2]" JSON list: the source layer of each layer, as for `from_sources`
            "{…}"       JSON object, as written by `to_json`

        Args:
            text: the plan.
            num_layers: the number of layers that the plan must have. None: any.
            share, keys, window, block, rank: share mode and its settings, as for `ReusePlan`. A JSON object has its
                own.

        Raises:
            ValueError: if the text is none of these, or the plan has another number of layers. The message gives the
                position of the wrong character.

        Examples:
            >>> ReusePlan.parse("2x2") == ReusePlan.parse("[0,0,2,2]") == ReusePlan.grouped(4, 2)
            True
            >>> print(ReusePlan.parse("1x1,2x1", share="keys", keys=64))
            3 layers: 2 computing, 1 reusing
            keys: 64 for each block of 16 queries, a window of 64 and the first key
            layer 0  computes
            layer 1  computes
            layer 2  reuses the keys of layer 1
        """
        if not isinstance(text, str):
            raise ValueError(f'a plan is parsed from text such as "4x4", got {text!r}')
        settings = keys, window, block, rank
        if share != "map" or any(setting is not None for setting in settings):
            if text.lstrip()[:1] == "{":
                raise ValueError("a plan in JSON has its own share mode; change it by dataclasses.replace")
            plan = cls.parse(text, num_layers)
            return cls(plan.layers, share, *settings)
        if num_layers is not None:
            plan = cls.full(num_layers) if text == "full" else cls.parse(text)
            if plan.num_layers != num_layers:
                raise ValueError(f"plan {text!r} is for {plan.num_layers} layers, but the model has {num_layers}")
            return plan
        if text.lstrip()[:1] in ("{", "["):
            return cls.from_json(text)
        sources: list[int] = []
        position = 0
        while True:
            match = _GROUPS.match(text, position)
            if match is None:
                raise _notation_error(text, position, "expected group size × number of groups, such as 4x3")
            size, count = int(match[1]), int(match[2])
            if size == 0 or count == 0:
                raise _notation_error(text, match.start(1), "group size and number of groups must be at least 1")
            if len(sources) + size * count > _MAX_LAYERS:
                raise _notation_error(text, match.start(1), f"a plan has at most {_MAX_LAYERS} layers")
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
        """Read a plan from the output of `to_json`, or from a JSON list of source layers.

        Raises:
            ValueError: if the text is anything else.
        """
        if not isinstance(text, str):
            raise ValueError(f"a plan is read from JSON text, as to_json writes it, got {text!r}")
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise _notation_error(text, error.pos, f"not JSON: {error.msg}") from None
        except RecursionError:
            raise ValueError("not a plan: the JSON is nested too deeply") from None
        if isinstance(data, list):
            if not all(_is_index(source) for source in data):
                raise ValueError(
                    f"a JSON list must hold the source layer of each layer, such as [0, 0, 2, 2], got {text}"
                )
            return cls.from_sources(data)
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError(f'not a plan: expected a JSON object with "format": "{_FORMAT}"')
        if data.get("version") not in _VERSIONS:
            raise ValueError(
                f"plan version {data.get('version')!r} is not supported; this mapreuse reads versions "
                f"{_VERSIONS[0]} and {_VERSIONS[1]}"
            )
        if not isinstance(data.get("layers"), list):
            raise ValueError('a plan needs "layers", a list with one entry per layer')
        layers = tuple(_normalised(source, layer) for layer, source in enumerate(data["layers"]))
        if data["version"] == 1:
            return cls(layers)
        share = data.get("share")
        settings = (data.get(name) for name in SETTINGS)
        return cls(layers, tuple(share) if isinstance(share, list) else share, *settings)  # type: ignore[arg-type]

    def to_json(self) -> str:
        """The plan as one line of JSON; `from_json` and `parse` read it back."""
        written: dict[str, Any] = {"format": _FORMAT, "version": 1, "layers": self.layers}
        if self.share != "map":
            settings = {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}
            written |= {"version": 2, "share": self.share, **settings}
        return json.dumps(written)

    @property
    def num_layers(self) -> int:
        """Number of layers in the plan."""
        return len(self.layers)

    @property
    def is_full(self) -> bool:
        """Whether every layer computes its own map."""
        return all(source is None for source in self.layers)

    @property
    def num_heads(self) -> int | None:
        """Number of heads per layer if some layer has a head assignment; None if any number of heads fits."""
        return next((len(source) for source in self.layers if isinstance(source, tuple)), None)

    def heads(self, layer: int, num_heads: int) -> tuple[HeadSource, ...]:
        """The source of each head of `layer`, in a model with `num_heads` heads."""
        source = self.layers[layer]
        if isinstance(source, tuple):
            return source
        return tuple(None if source is None else (source, head) for head in range(num_heads))

    def sources(self, layer: int) -> tuple[int, ...]:
        """The layers whose maps `layer` applies, in ascending order; empty for a computing layer."""
        source = self.layers[layer]
        if isinstance(source, int):
            return (source,)
        return tuple(sorted({entry[0] for entry in source or () if entry is not None}))

    def readers(self, layer: int) -> tuple[int, ...]:
        """The layers that apply a map of `layer`, in ascending order."""
        return tuple(other for other in range(layer + 1, self.num_layers) if layer in self.sources(other))

    def computes(self, layer: int) -> bool:
        """Whether at least one head of `layer` computes its own map, over all keys or over those of its source."""
        source = self.layers[layer]
        return source is None or self.share_of(layer) == "keys" or (isinstance(source, tuple) and None in source)

    def reuses(self, layer: int) -> bool:
        """Whether at least one head of `layer` applies another layer's map or attends to its keys."""
        return self.layers[layer] is not None

    def share_of(self, layer: int) -> str | None:
        """The share mode by which `layer` reuses its source; None for a computing layer."""
        if self.layers[layer] is None:
            return None
        return self.share if isinstance(self.share, str) else self.share[layer]

    def __str__(self) -> str:
        """A summary line, then one line per layer. Share modes with settings add a line with them."""
        computing = sum(source is None for source in self.layers)
        layers = "1 layer" if self.num_layers == 1 else f"{self.num_layers} layers"
        lines = [f"{layers}: {computing} computing, {self.num_layers - computing} reusing"]
        if self.keys is not None:
            block = f"block of {self.block} queries"
            lines.append(f"keys: {self.keys} for each {block}, a window of {self.window} and the first key")
        if self.rank is not None:
            lines.append(f"corrected: scores plus products of rank {self.rank}")
        width = len(str(self.num_layers - 1))
        for layer, source in enumerate(self.layers):
            lines.append(f"layer {layer:>{width}}  {_describe(source, self.share_of(layer))}")
        return "\n".join(lines)

    def _check_share(self) -> None:
        """Check the share modes and their settings, and store them in one form."""
        given = self.share if isinstance(self.share, tuple) else (self.share,) * self.num_layers
        if len(given) != self.num_layers:
            raise ValueError(f"share needs one mode for each of the {self.num_layers} layers, got {len(given)}")
        if unknown := [mode for mode in given if mode not in (None, *SHARE_MODES)]:
            raise ValueError(f"share must be one of {', '.join(SHARE_MODES)}, got {unknown[0]!r}")
        modes = [None if source is None else mode for source, mode in zip(self.layers, given, strict=True)]
        for layer, source in enumerate(self.layers):
            if modes[layer] == "keys" and not isinstance(source, int):
                raise ValueError(f'layer {layer} has a head assignment, but share mode "keys" is for whole layers')
            if (
                modes[layer] == "corrected"
                and isinstance(source, tuple)
                and (None in source or len(self.sources(layer)) > 1)
            ):
                raise ValueError(
                    f'layer {layer}: in share mode "corrected", all heads must reuse, and from one source layer'
                )
            if source is not None and len({modes[e] for s in self.sources(layer) for e in self.readers(s)}) > 1:
                raise ValueError(f"layer {layer} and other readers of its source have different share modes")
            if source is not None and modes[layer] is None:
                raise ValueError(f"layer {layer} reuses, but has no share mode; use {' or '.join(SHARE_MODES)}")
        used = set(modes) - {None}
        object.__setattr__(self, "share", next(iter(used), "map") if len(used) < 2 else tuple(modes))
        for name, (mode, default) in SETTINGS.items():
            value = getattr(self, name)
            if value is not None and (not _is_index(value) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
            if value is not None and mode not in given:
                raise ValueError(f'{name}={value} is a setting of share="{mode}", which the plan does not use')
            object.__setattr__(self, name, operator.index(value or default) if mode in used else None)
        if self.rank is not None and self.rank % 2:
            raise ValueError(f"rank must be even, because pairs of numbers are rotated, got {self.rank}")

    def _check_source(self, name: str, layer: int, source: int, source_heads: Sequence[int]) -> None:
        """Raise `ValueError` unless `source` is an earlier layer that computes these heads."""
        if not 0 <= source < layer:
            earlier = f" (0–{layer - 1}) that computes its own" if layer else "; layer 0 must compute"
            raise ValueError(
                f"{name} reuses layer {source}'s map, but a source must be an earlier layer{earlier}; see ReusePlan"
            )
        for head in source_heads:
            entries = self.heads(source, self.num_heads or 1)
            if not 0 <= head < len(entries):
                raise ValueError(
                    f"{name} reuses head {head} of layer {source}, but its heads are 0–{len(entries) - 1}"
                )
            entry = entries[head]
            if entry is not None:
                raise ValueError(
                    f"{name} reuses head {head} of layer {source}, but that head does not compute its own map: it "
                    f"reuses layer {entry[0]}'s map; name that layer as the source instead"
                )


def _normalised(source: Any, layer: int) -> LayerSource:
    if source is None:
        return None
    if _is_index(source):
        return operator.index(source)
    if not isinstance(source, list | tuple) or not source:
        raise ValueError(f"layer {layer}: expected None, a source layer, or one entry per head, got {source!r}")
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
    text = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
    return ValueError(f"plan {text!r}, character {position + 1}: {problem}")


def _describe(source: LayerSource, share: str | None) -> str:
    if source is None:
        return "computes"
    if isinstance(source, int):
        published = {"map": "", "keys": "the keys of ", "corrected": "the scores of "}[share or "map"]
        return f"reuses {published}layer {source}"
    heads = "scores" if share == "corrected" else "heads"
    return f"{heads}: " + ", ".join(
        "computes" if entry is None else f"layer {entry[0]} head {entry[1]}" for entry in source
    )
