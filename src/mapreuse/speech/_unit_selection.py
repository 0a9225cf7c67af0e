"""New sentences in a recorded voice: its recordings, cut at the middles of phones, put together anew."""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from lhotse.cut import Cut, MonoCut
from numpy import ndarray
from rich.progress import track

from mapreuse.speech._audio import waveform_of, write_wav
from mapreuse.speech._forced_alignment import CEPSTRA, HOP, PAUSE, Phone, align_phones, cepstra
from mapreuse.speech._synthesis import cut_of, pronounce

_CANDIDATES = 40  # recordings of one pair of phones that are compared
_JOIN = 4.0  # cost of a join inside a phone, beside the distance of the cepstra there
_BREAK = 16.0  # cost of a join between two phones that no recording says one after the other
_TEMPO = 3.0  # cost of a pair whose phones last e times as long, or as short, as the sentence's tempo asks for
_TEMPOS = (-0.5, 0.1)  # of a sentence: logarithm of how long its phones last, beside their medians
_FADE = 0.008  # seconds over which pieces overlap
_SHIFT = 0.004  # seconds by which a piece may move to join in phase
_LONGEST_PAUSE = 0.12  # kept of a silence, in seconds


def concatenate(
    cuts: Sequence[Cut], texts: Sequence[str], language: str, out_dir: Path, *, seed: int, sampling_rate: int
) -> list[MonoCut]:
    """Sentences said by the voice of `cuts`, as wav files in `out_dir`, in the order of `texts`.

    Unit selection (Hunt and Black, ICASSP 1996): of all recordings of every pair of neighbouring phones, those are
    taken whose joins, in the middles of phones, cost least; what a join costs is drawn at random around the distance
    of the cepstra there, so that a word is not said in one way only. A text with a phone that is never said is left
    out. A second call with the same arguments writes only what is missing.
    """
    audio = [waveform_of(cut, sampling_rate) for cut in cuts]
    transcripts = [cut.supervisions[0].text for cut in cuts]
    inputs = [[cut.id for cut in cuts], transcripts, language, seed, sampling_rate]
    directory = out_dir / "concatenated" / hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    keys = [hashlib.sha256(text.encode()).hexdigest()[:20] for text in texts]
    said = dict(zip(keys, pronounce(texts, language), strict=True))
    voice: Voice | None = None
    made = []
    for key, text in track(list(zip(keys, texts, strict=True)), description="Putting sentences together"):
        path = directory / key[:2] / f"{key}.wav"
        if not path.exists():
            voice = voice or Voice.of(
                audio, align_phones(audio, pronounce(transcripts, language), sampling_rate), sampling_rate
            )
            samples = voice.say([phone for word in said[key] for phone in word], random.Random(f"{seed}:{key}"))
            if samples is None:
                continue
            path.parent.mkdir(exist_ok=True)
            write_wav(path, samples, sampling_rate)
        made.append(cut_of(path, f"{directory.name}-{key}", text, language))
    return made


@dataclass(frozen=True)
class Voice:
    """Every phone of every recording: where it is, what it sounds like in its middle, and which follows which."""

    audio: Sequence[ndarray]
    sampling_rate: int
    recording: ndarray  # of every phone: the number of its recording
    start: ndarray  # of every phone, in samples
    middle: ndarray
    stop: ndarray
    timbre: ndarray  # (phone, cepstra) at the middle
    length: ndarray  # of every phone: logarithm of how long it lasts, beside the median of those of its name
    by_name: dict[str, list[int]]
    pairs: dict[tuple[str, str], list[int]]  # the first of every two neighbouring phones

    @classmethod
    def of(cls, audio: Sequence[ndarray], aligned: Sequence[Sequence[Phone]], sampling_rate: int) -> "Voice":
        """The voice of recordings and their phones; a recording that begins or ends in speech gets a pause there."""
        names: list[str] = []
        times: list[tuple[int, float, float]] = []
        for number, phones in enumerate(aligned):
            if not phones:
                continue
            end = len(audio[number]) / sampling_rate
            before = [Phone(PAUSE, 0.0, 0.0)] if phones[0].name != PAUSE else []
            after = [Phone(PAUSE, end, end)] if phones[-1].name != PAUSE else []
            for phone in (*before, *phones, *after):
                names.append(phone.name)
                times.append((number, phone.start, min(phone.stop, end)))
        recording = np.array([number for number, _, _ in times])
        seconds = np.array([(start, (start + stop) / 2, stop) for _, start, stop in times])
        start, middle, stop = np.round(seconds * sampling_rate).astype(int).T
        by_name: dict[str, list[int]] = defaultdict(list)
        pairs: dict[tuple[str, str], list[int]] = defaultdict(list)
        for here, name in enumerate(names):
            by_name[name].append(here)
            if here and recording[here] == recording[here - 1]:
                pairs[names[here - 1], name].append(here - 1)
        length = np.log(np.maximum(stop - start, 1) / sampling_rate)
        for found in by_name.values():
            length[found] -= np.median(length[found])
        sounds = [cepstra(samples, sampling_rate)[:, :CEPSTRA] for samples in audio]
        deviation = np.concatenate(sounds).std(0)
        timbre = np.stack([_around(sounds[n], m / HOP) for n, m in zip(recording, seconds[:, 1], strict=True)])
        return cls(
            audio,
            sampling_rate,
            recording,
            start,
            middle,
            stop,
            timbre / deviation,
            length,
            dict(by_name),
            dict(pairs),
        )

    def say(self, phones: Sequence[str], generator: random.Random) -> ndarray | None:
        """The waveform of these phones between two pauses; None where one of them was never recorded."""
        wanted = [PAUSE, *phones, PAUSE]
        if any(phone not in self.by_name for phone in wanted):
            return None
        tempo = generator.uniform(*_TEMPOS)
        noise = np.random.default_rng(generator.randrange(2**32))
        steps: list[
            tuple[ndarray, ndarray]
        ] = []  # candidates: phone whose second half, phone whose first half is taken
        costs: list[ndarray] = []
        origins: list[ndarray] = []
        for first, second in pairwise(wanted):
            left, right = self._candidates(first, second, steps[-1][1] if steps else None, generator)
            own = np.where(right == left + 1, 0.0, _BREAK)
            own += _TEMPO * abs((self.length[left] + self.length[right]) / 2 - tempo)
            if not steps:
                total, origin = own, np.zeros(len(left), dtype=int)
            else:
                before = steps[-1][1]
                distance = np.linalg.norm(self.timbre[before][:, None] - self.timbre[left][None], axis=2)
                joins = (_JOIN + distance) * noise.lognormal(0.0, 0.5, (1, len(left)))
                joins[before[:, None] == left[None]] = 0.0
                reached = costs[-1][:, None] + joins
                origin = reached.argmin(0)
                total = reached.min(0) + own
            steps.append((left, right))
            costs.append(total)
            origins.append(origin)
        chosen = [int(costs[-1].argmin())]
        for origin in origins[:0:-1]:
            chosen.append(int(origin[chosen[-1]]))
        path = [(int(l[c]), int(r[c])) for (l, r), c in zip(steps, chosen[::-1], strict=True)]
        return self._joined(self._pieces(path))

    def _candidates(
        self, first: str, second: str, before: ndarray | None, generator: random.Random
    ) -> tuple[ndarray, ndarray]:
        found = self.pairs.get((first, second), [])
        if not found:
            count = _CANDIDATES
            return (
                np.array(generator.choices(self.by_name[first], k=count)),
                np.array(generator.choices(self.by_name[second], k=count)),
            )
        if len(found) > _CANDIDATES:
            followers = set() if before is None else set(before.tolist())
            found = sorted({*generator.sample(found, _CANDIDATES), *followers.intersection(found)})
        left = np.array(found)
        return left, left + 1

    def _pieces(self, path: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """(recording, first sample, sample after the last) of every stretch taken in one piece."""
        pieces: list[tuple[int, int, int]] = []
        rest = round(_LONGEST_PAUSE * self.sampling_rate)
        for number, (left, right) in enumerate(path):
            whole = right == left + 1
            first = self.middle[left] if number else max(self.middle[left], self.stop[left] - rest)
            last = self.middle[right] if number < len(path) - 1 else min(self.middle[right], self.start[right] + rest)
            spans = (
                [(left, first, last)] if whole else [(left, first, self.stop[left]), (right, self.start[right], last)]
            )
            for phone, begin, end in spans:
                recording = int(self.recording[phone])
                if pieces and pieces[-1][0] == recording and pieces[-1][2] == begin:
                    pieces[-1] = (recording, pieces[-1][1], int(end))
                else:
                    pieces.append((recording, int(begin), int(end)))
        return pieces

    def _joined(self, pieces: Sequence[tuple[int, int, int]]) -> ndarray:
        """The pieces one after the other, overlapping a little, each moved to where it is most in phase."""
        fade, shift = round(_FADE * self.sampling_rate), round(_SHIFT * self.sampling_rate)
        ramp = np.linspace(0, 1, fade, dtype=np.float32)
        joined = np.zeros(0, dtype=np.float32)
        for recording, begin, end in pieces:
            samples = self.audio[recording]
            if len(joined) < fade:
                joined = np.concatenate([joined, samples[begin:end]])
                continue
            tail = joined[-fade:]
            earliest = max(begin - fade - shift, 0)
            window = samples[earliest : begin + shift]
            if len(window) < fade:
                joined = np.concatenate([joined, samples[begin:end]])
                continue
            places = np.lib.stride_tricks.sliding_window_view(window, fade)
            likeness = places @ tail / (np.linalg.norm(places, axis=1) + 1e-3)
            place = earliest + int(likeness.argmax())
            mixed = tail * (1 - ramp) + samples[place : place + fade] * ramp
            joined = np.concatenate([joined[:-fade], mixed, samples[place + fade : max(end, place + fade)]])
        return joined


def _around(rows: ndarray, place: float) -> ndarray:
    """The mean of three rows around a place."""
    middle = min(round(place), len(rows) - 1)
    return rows[max(middle - 1, 0) : middle + 2].mean(0)
