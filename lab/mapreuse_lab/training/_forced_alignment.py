"""When every phone of a transcribed recording is said: monophone hidden Markov models, trained on the recordings."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.fft import dct
from scipy.special import logsumexp

from mapreuse_lab.training._features import FeatureConfig, mel_filters

PAUSE = "_"
HOP = 0.005  # seconds between frames of cepstra
CEPSTRA = 13  # before their differences

_WINDOW = 0.02
_STATES = 3  # of every phone; a pause has one
_ROWS = 4096  # scored at a time
_SMALLEST_VARIANCE = 0.05  # where that of the features is 1


@dataclass(frozen=True)
class Phone:
    """One phone of a recording, in seconds from its start; `name` is `PAUSE` for silence."""

    name: str
    start: float
    stop: float


def align_phones(
    audio: Sequence[Float[ndarray, "samples"]],
    words: Sequence[Sequence[Sequence[str]]],
    sampling_rate: int,
    *,
    rounds: int = 15,
) -> list[list[Phone]]:
    """The phones of every recording with their times; a pause stands between words where one is heard.

    `words[i]` gives, word by word, the phones that `audio[i]` says. Every phone is a chain of three hidden states,
    each a mixture of diagonal Gaussians over cepstra with their first and second differences. The models start from
    recordings cut into equal parts and learn from `rounds` of Viterbi alignment, their mixtures split on the way
    (Rabiner and Juang, "Fundamentals of speech recognition", 1993, chapter 6). A recording of fewer frames than
    states gets no phones.
    """
    frames = [cepstra(samples, sampling_rate) for samples in audio]
    names = sorted({phone for said in words for word in said for phone in word})
    chains = [_chain(said, names) for said in words]
    chosen = [i for i in range(len(audio)) if len(frames[i]) >= np.count_nonzero(chains[i])]
    rows = np.concatenate([frames[i] for i in chosen])
    rows = (rows - rows.mean(0)) / rows.std(0)
    borders = np.cumsum([0, *(len(frames[i]) for i in chosen)])
    paths = [_even_path(chains[i], len(frames[i])) for i in chosen]
    model = None
    for done in range(rounds + 1):
        states = np.concatenate([chains[i][path] for i, path in zip(chosen, paths, strict=True)])
        split = done in (rounds // 3, 2 * rounds // 3)
        model = _Mixtures.first(rows, states, 1 + _STATES * len(names)) if model is None else model
        model = (model.split() if split else model).trained(rows, states)
        scores = model.scores(rows)
        paths = [
            viterbi(scores[start:stop][:, chains[i]], chains[i] == 0)
            for i, start, stop in zip(chosen, borders, borders[1:], strict=False)
        ]
    aligned: list[list[Phone]] = [[] for _ in audio]
    for i, path in zip(chosen, paths, strict=True):
        aligned[i] = _phones(chains[i], path, names)
    return aligned


def cepstra(samples: Float[ndarray, "samples"], sampling_rate: int) -> Float[ndarray, "frames features"]:
    """13 mel-frequency cepstra every 5 ms with first and second differences (Davis and Mermelstein, 1980)."""
    config = FeatureConfig(sampling_rate=sampling_rate, window=_WINDOW, hop=HOP, num_mel_bins=26)
    length = config.window_samples
    padded = np.pad(samples, (length // 2, length))
    windows = np.lib.stride_tricks.sliding_window_view(padded, length)[:: config.hop_samples]
    windows = windows[: len(samples) // config.hop_samples + 1] * np.hanning(length)
    num_bins = 2 ** (length - 1).bit_length() * 2
    power = np.abs(np.fft.rfft(windows, num_bins)) ** 2
    mel = np.log(power @ mel_filters(config, num_bins).double().numpy() + 1e-4)
    static = dct(mel, norm="ortho")[:, :CEPSTRA]
    slope = _slope(static)
    return np.concatenate([static, slope, _slope(slope)], axis=1).astype(np.float32)


def viterbi(scores: Float[ndarray, "frames states"], skippable: Bool[ndarray, "states"]) -> Int[ndarray, "frames"]:
    """The path with the highest sum of scores through a chain of states: the state of every frame.

    From one frame to the next it stays, goes on to the next state, or leaves out one `skippable` state (Viterbi,
    1967). It begins and ends at the ends of the chain, whose outermost states may be left out where skippable.
    Raises `ValueError` where there are too few frames to reach the end.
    """
    num_frames, num_states = scores.shape
    leap = np.full(num_states, -np.inf)
    leap[2:][skippable[1:-1]] = 0.0
    best = np.full(num_states, -np.inf)
    best[0] = scores[0, 0]
    if skippable[0]:
        best[1] = scores[0, 1]
    steps = np.zeros((num_frames, num_states), dtype=np.int8)
    came = np.full((3, num_states), -np.inf)
    for frame in range(1, num_frames):
        came[0] = best
        came[1, 1:] = best[:-1]
        came[2, 2:] = best[:-2]
        came[2] += leap
        steps[frame] = came.argmax(0)
        best = came.max(0) + scores[frame]
    state = num_states - 1
    if skippable[-1] and best[-2] > best[-1]:
        state -= 1
    if not np.isfinite(best[state]):
        raise ValueError(f"{num_frames} frames are too few for a chain of {num_states} states")
    path = np.zeros(num_frames, dtype=np.int64)
    for frame in range(num_frames - 1, -1, -1):
        path[frame] = state
        state -= int(steps[frame, state])
    return path


@dataclass(frozen=True)
class _Mixtures:
    """Gaussians with diagonal covariance for every state: arrays of (state, Gaussian), then (…, feature)."""

    weights: ndarray
    means: ndarray
    variances: ndarray

    @classmethod
    def first(cls, rows: ndarray, states: ndarray, num_states: int) -> "_Mixtures":
        """One Gaussian a state, that of all rows."""
        shape = (num_states, 1, rows.shape[1])
        return cls(np.ones(shape[:2]), np.zeros(shape), np.ones(shape)).trained(rows, states)

    def split(self) -> "_Mixtures":
        """Every Gaussian twice, moved apart by a fifth of its deviation either way."""
        step = 0.2 * np.sqrt(self.variances)
        return _Mixtures(
            np.concatenate([self.weights, self.weights], axis=1) / 2,
            np.concatenate([self.means - step, self.means + step], axis=1),
            np.concatenate([self.variances, self.variances], axis=1),
        )

    def trained(self, rows: ndarray, states: ndarray) -> "_Mixtures":
        """One step of expectation maximisation within every state, given which state every row is in."""
        weights, means, variances = self.weights.copy(), self.means.copy(), self.variances.copy()
        factors, constants = self._quadratic()
        order = np.argsort(states, kind="stable")
        found, firsts = np.unique(states[order], return_index=True)
        for state, members in zip(found, np.split(order, firsts[1:]), strict=True):
            part = rows[members].astype(np.float64)
            density = _powers(part) @ factors[state].T + constants[state]
            share = np.exp(density - np.logaddexp.reduce(density, axis=1)[:, None])
            mass = share.sum(0) + 1e-3
            mean = share.T @ part / mass[:, None]
            spread = share.T @ part**2 / mass[:, None] - mean**2
            enough = mass > 20
            weights[state] = mass / mass.sum()
            means[state][enough] = mean[enough]
            variances[state][enough] = np.maximum(spread, _SMALLEST_VARIANCE)[enough]
        return _Mixtures(weights, means, variances)

    def scores(self, rows: ndarray) -> ndarray:
        """Log-likelihood of every row in every state."""
        states, size = self.weights.shape
        scores = np.empty((len(rows), states), dtype=rows.dtype)
        factors, constants = (part.astype(rows.dtype) for part in self._quadratic())
        for start in range(0, len(rows), _ROWS):
            densities = _powers(rows[start : start + _ROWS]) @ factors.reshape(states * size, -1).T
            densities = densities.reshape(-1, states, size) + constants
            scores[start : start + _ROWS] = logsumexp(densities, axis=2)
        return scores

    def _quadratic(self) -> tuple[ndarray, ndarray]:
        """The logarithm of weight × density under every Gaussian: `_powers(x) @ factors + constant`."""
        inverse = 1 / self.variances
        factors = np.concatenate([-0.5 * inverse, self.means * inverse], axis=2)
        spread = np.log(2 * np.pi * self.variances) + self.means**2 * inverse
        return factors, np.log(self.weights) - 0.5 * spread.sum(2)


def _powers(rows: ndarray) -> ndarray:
    return np.concatenate([rows**2, rows], axis=1)


def _chain(words: Sequence[Sequence[str]], names: Sequence[str]) -> ndarray:
    """The states a recording goes through: 0 is a pause, before and after every word."""
    index = {name: 1 + _STATES * number for number, name in enumerate(names)}
    states = [0]
    for word in words:
        for phone in word:
            states += range(index[phone], index[phone] + _STATES)
        states.append(0)
    return np.array(states)


def _even_path(chain: ndarray, num_frames: int) -> ndarray:
    """Frames in equal parts over the states of the phones, with a twentieth of them in silence at either end."""
    inner = np.flatnonzero(chain)
    edge = min(num_frames // 20, (num_frames - len(inner)) // 2)
    middle = inner[np.arange(num_frames - 2 * edge) * len(inner) // (num_frames - 2 * edge)]
    return np.concatenate([np.zeros(edge, dtype=np.int64), middle, np.full(edge, len(chain) - 1)])


def _phones(chain: ndarray, path: ndarray, names: Sequence[str]) -> list[Phone]:
    """What the path of one recording says."""
    place = np.where(chain == 0, 0, 1).cumsum()  # of every state of the chain: 1 + its number among those of phones
    phone = np.where(chain == 0, -1, (place - 1) // _STATES)
    owner = phone[path]
    # A pause is told from its neighbours by the state itself; two pauses never follow each other.
    starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    stops = np.r_[starts[1:], len(path)]
    states = chain[path[starts]]
    named = [PAUSE if state == 0 else names[(state - 1) // _STATES] for state in states.tolist()]
    times = zip(named, (starts * HOP).tolist(), (stops * HOP).tolist(), strict=True)
    return [Phone(*time) for time in times]


def _slope(rows: ndarray) -> ndarray:
    """The linear slope over five frames, those beyond the ends equal to the ends."""
    padded = np.pad(rows, ((2, 2), (0, 0)), mode="edge")
    return (2 * (padded[4:] - padded[:-4]) + padded[3:-1] - padded[1:-3]) / 10
