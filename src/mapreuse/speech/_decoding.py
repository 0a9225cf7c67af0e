import math
from itertools import takewhile

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from mapreuse.speech._language_model import LanguageModel

_NONE = -math.inf
_CONTEXT = 64  # outputs kept for the language model's history


def greedy(logits: Float[Tensor, "batch frames outputs"], lengths: Int[Tensor, "batch"]) -> list[list[int]]:
    """Best path decoding: the likeliest output of every frame, repeats merged, blanks (output 0) removed."""
    decoded = []
    for path, length in zip(logits.argmax(-1).cpu(), lengths.tolist(), strict=True):
        numbers = torch.unique_consecutive(path[:length])
        decoded.append(numbers[numbers != 0].tolist())
    return decoded


def beam_search(
    log_probabilities: Float[ndarray, "frames outputs"],
    *,
    width: int = 16,
    threshold: float = 9.0,
    language_model: LanguageModel | None = None,
    weight: float = 0.0,
    bonus: float = 0.0,
) -> list[int]:
    """The outputs (blanks removed) that maximise, over all their alignments and among those the beam visits,

        log p_ctc(y | audio) + weight · log p_lm(y) + bonus · |y|

    by prefix beam search: after every frame the `width` best prefixes survive; each keeps apart the probability of
    its alignments that end in blank and in its last output, so that repeats merge rightly. Outputs less likely in a
    frame than e^−`threshold` times the likeliest are not tried there. With a width and a threshold that exclude
    nothing the result is exact. Hannun et al., "First-pass large vocabulary continuous speech recognition using
    bi-directional recurrent DNNs", 2014.
    """
    # prefix -> (log p ending in blank, log p ending in its last output, weighted language score)
    beam: dict[tuple[int, ...], tuple[float, float, float]] = {(): (0.0, _NONE, 0.0)}
    settled: list[int] = []
    for frame in log_probabilities:
        blank = float(frame[0])
        candidates = [int(n) for n in np.flatnonzero(frame > frame.max() - threshold) if n]
        scores = {number: float(frame[number]) for number in candidates}
        following: dict[tuple[int, ...], list[float]] = {}
        longer_ones: dict[tuple[int, ...], set[int]] = {}
        worst = math.inf
        for prefix, (in_blank, in_output, language) in beam.items():
            total = _add(in_blank, in_output)
            again = in_output + float(frame[prefix[-1]]) if prefix else _NONE
            following[prefix] = [total + blank, again, language]
            worst = min(worst, _add(total + blank, again) + language)
            if prefix:
                longer_ones.setdefault(prefix[:-1], set()).add(prefix[-1])
        # A prefix that is new comes of one other alone. Where the beam is full, one below all that stay is not kept.
        least = worst if len(beam) == width else _NONE
        for prefix, (in_blank, in_output, language) in beam.items():
            total = _add(in_blank, in_output)
            last = prefix[-1] if prefix else 0
            after = language_model.log_probabilities(prefix) if language_model and weight and scores else None
            known = longer_ones.get(prefix, ())
            for number, score in scores.items():
                ended = (in_blank if number == last else total) + score
                if number in known:
                    found = following[(*prefix, number)]
                    found[1] = _add(found[1], ended)
                    continue
                gain = bonus if after is None else bonus + weight * float(after[number])
                if ended + language + gain >= least:
                    following[(*prefix, number)] = [_NONE, ended, language + gain]
        best = sorted(following.items(), key=lambda item: -(_add(item[1][0], item[1][1]) + item[1][2]))[:width]
        beam = {prefix: (entry[0], entry[1], entry[2]) for prefix, entry in best}
        if min(map(len, beam)) > 256:
            # What every prefix begins with is decided; setting it aside keeps an hour of speech linear in time.
            agreeing = takewhile(lambda column: len(set(column)) == 1, zip(*beam, strict=False))
            decided = sum(1 for _ in agreeing) - _CONTEXT
            if decided > 0:
                settled += next(iter(beam))[:decided]
                beam = {prefix[decided:]: entry for prefix, entry in beam.items()}

    def final_score(prefix: tuple[int, ...]) -> float:
        in_blank, in_output, language = beam[prefix]
        end = weight * float(language_model.log_probabilities(prefix)[0]) if language_model and weight else 0.0
        return _add(in_blank, in_output) + language + end

    return [*settled, *max(beam, key=final_score)]


def _add(first: float, second: float) -> float:
    """log(exp(first) + exp(second))."""
    if first < second:
        first, second = second, first
    return first if second == _NONE else first + math.log1p(math.exp(second - first))
