"""Cuts recordings at pauses, so that silence and length do not matter to a recogniser."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

_FRAME_SECONDS = 0.02
_SILENCE_DB = 40.0
"""A frame is silent if it is this much quieter than the loudest tenth of a second of the recording."""

_MARGIN_SECONDS = 0.2
"""Kept before and after speech."""

MAX_PIECE_SECONDS = 20.0
"""Longer speech without a pause is cut where it is quietest."""

_MAX_PAUSE_SECONDS = 1.0
"""Longer pauses separate pieces; within a piece, a recording is kept as it is."""


def speech_pieces(samples: Float[np.ndarray, " samples"], rate: int) -> list[Float[np.ndarray, " samples"]]:
    """The parts of a recording with speech, each at most `MAX_PIECE_SECONDS` long, in their order.

    Silence before, after and between the parts is left out, so its length changes nothing. A recording without a
    sound has no parts.
    """
    if not len(samples):
        return []
    hop = round(_FRAME_SECONDS * rate)
    levels = _levels(samples, hop)
    return [samples[start * hop : end * hop] for start, end in _spans(levels)]


def _levels(samples: np.ndarray, hop: int) -> Float[np.ndarray, " frames"]:
    """Mean power of each frame."""
    padded = np.pad(samples.astype(np.float64), (0, -len(samples) % hop))
    return np.square(padded).reshape(-1, hop).mean(1)


def _spans(levels: Float[np.ndarray, " frames"]) -> list[tuple[int, int]]:
    """First frame and last frame + 1 of each piece."""
    margin, longest, pause = (
        round(seconds / _FRAME_SECONDS) for seconds in (_MARGIN_SECONDS, MAX_PIECE_SECONDS, _MAX_PAUSE_SECONDS)
    )
    spans: list[tuple[int, int]] = []
    for start, end in _runs(_loud(levels)):
        start, end = max(0, start - margin), min(len(levels), end + margin)
        if spans and start - spans[-1][1] <= pause - 2 * margin and end - spans[-1][0] <= longest:
            spans[-1] = spans[-1][0], end
        else:
            spans.append((max(start, spans[-1][1] if spans else 0), end))
    return [piece for start, end in spans for piece in _halved(levels, start, end, longest)]


def _loud(levels: Float[np.ndarray, " frames"]) -> Bool[np.ndarray, " frames"]:
    width = round(0.1 / _FRAME_SECONDS)
    peak = np.convolve(levels, np.ones(width) / width).max(initial=0.0)
    return levels > peak * 10 ** (-_SILENCE_DB / 10)


def _runs(loud: Bool[np.ndarray, " frames"]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loud, [False]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _halved(levels: Float[np.ndarray, " frames"], start: int, end: int, longest: int) -> list[tuple[int, int]]:
    """A span, cut at the quietest frame of its middle half until no part is longer than `longest`."""
    if end - start <= longest:
        return [(start, end)]
    quarter = (end - start) // 4
    cut = start + quarter + int(levels[start + quarter : end - quarter].argmin())
    return [*_halved(levels, start, cut, longest), *_halved(levels, cut, end, longest)]
