"""New sentences in the recorded voice: recordings are cut into words, and the words put together anew."""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile
from jaxtyping import Float
from lhotse.cut import Cut, MonoCut
from torch import Tensor

from mapreuse.speech._features import resample
from mapreuse.speech._recogniser import Recogniser
from mapreuse.speech._synthesis import cut_of
from mapreuse.speech._texts import generate_texts

_FADE = 0.005  # seconds over which two words overlap
_PAUSE = 0.12  # longest silence put between two words
_RANDOM_SHARE = 0.5  # of the sentences are words in any order, so that no context can be learnt by heart


def align(logits: Float[Tensor, "frames outputs"], labels: Sequence[int]) -> list[tuple[int, int]]:
    """First frame and frame after the last of every label on the likeliest CTC path (Viterbi; Graves et al., 2006).

    Output 0 is the blank. Raises `ValueError` where there are too few frames for the labels.
    """
    log_probs = logits.log_softmax(-1).cpu().numpy()
    states = np.zeros(2 * len(labels) + 1, dtype=int)
    states[1::2] = labels
    skips = np.zeros(len(states), dtype=bool)
    skips[3::2] = states[3::2] != states[1:-2:2]
    score = np.full(len(states), -np.inf)
    score[:2] = log_probs[0, states[:2]]
    steps = np.zeros((len(log_probs), len(states)), dtype=np.int8)
    for frame in range(1, len(log_probs)):
        choices = np.full((3, len(states)), -np.inf)
        choices[0] = score
        choices[1, 1:] = score[:-1]
        choices[2, 2:] = np.where(skips[2:], score[:-2], -np.inf)
        steps[frame] = choices.argmax(0)
        score = choices.max(0) + log_probs[frame, states]
    state = len(states) - 1 if score[-1] > score[-2] else len(states) - 2
    if not np.isfinite(score[state]):
        raise ValueError(f"{len(log_probs)} frames are too few to align {len(labels)} labels")
    spans: list[list[int]] = [[-1, -1] for _ in labels]
    for frame in range(len(log_probs) - 1, -1, -1):
        if state % 2:
            span = spans[state // 2]
            span[0], span[1] = frame, span[1] if span[1] >= 0 else frame + 1
        state -= int(steps[frame, state])
    return [(first, last) for first, last in spans]


def cut_words(recogniser: Recogniser, cuts: Sequence[Cut]) -> dict[str, list[np.ndarray]]:
    """Every spoken instance of every word, cut out at the quietest moment between it and its neighbours.

    Cuts that the recogniser cannot align are left out.
    """
    rate = recogniser.feature_config.sampling_rate
    words: dict[str, list[np.ndarray]] = defaultdict(list)
    for cut in cuts:
        samples = resample(cut.load_audio()[0], cut.sampling_rate, rate)
        text = cut.supervisions[0].text
        logits, lengths = recogniser.logits([samples])
        try:
            spans = align(logits[0, : int(lengths[0])], recogniser.encode(text))
        except ValueError:
            continue
        frame = len(samples) / int(lengths[0])
        borders, position = [0], 0
        for word in text.split()[:-1]:
            position += len(word)
            early, late = spans[position - 1][1] * frame, spans[position + 1][0] * frame
            borders.append(_quietest(samples, round(early - frame), round(late + frame), rate))
            position += 1
        borders.append(len(samples))
        for word, start, stop in zip(text.split(), borders, borders[1:], strict=False):
            if stop - start > 2 * _FADE * rate:
                words[word].append(samples[start:stop])
    return dict(words)


def splice(
    words: Mapping[str, Sequence[np.ndarray]],
    count: int,
    language: str,
    out_dir: Path,
    *,
    seed: int,
    sampling_rate: int,
    transcripts: Sequence[str],
    exclude: Sequence[str],
) -> list[MonoCut]:
    """`count` sentences spoken with cut-out words, as wav files in `out_dir`; none contains an excluded transcript.

    Half recombine the transcripts as `generate_texts` does, as far as every word was recorded; half are two to eight
    recorded words in any order. A second call with the same arguments writes only what is missing.
    """
    generator = random.Random(f"splice:{language}:{seed}")
    recombined = generate_texts(3 * count, language, seed=seed + 1, transcripts=transcripts, exclude=exclude)
    sayable = [text for text in recombined if all(word in words for word in text.split())]
    vocabulary = sorted(words)
    lengths = [(word, [len(samples) for samples in words[word]]) for word in vocabulary]
    inputs = [lengths, count, language, seed, sampling_rate, list(transcripts), list(exclude)]
    directory = out_dir / hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    banned = [f" {text} " for text in exclude]
    cuts: list[MonoCut] = []
    while len(cuts) < count:
        if sayable and generator.random() > _RANDOM_SHARE:
            text = generator.choice(sayable)
        else:
            text = " ".join(generator.choices(vocabulary, k=generator.randint(2, 8)))
        if any(held_out in f" {text} " for held_out in banned):
            continue
        path = directory / f"{len(cuts):06d}.wav"
        samples = _joined([generator.choice(words[word]) for word in text.split()], generator, sampling_rate)
        if not path.exists():
            partial = path.with_suffix(".partial")
            soundfile.write(partial, samples, sampling_rate, subtype="PCM_16", format="WAV")
            partial.replace(path)
        cuts.append(cut_of(path, f"{directory.name}-{path.stem}", text, language))
    return cuts


def _joined(pieces: Sequence[np.ndarray], generator: random.Random, rate: int) -> np.ndarray:
    fade = round(_FADE * rate)
    ramp = np.linspace(0, 1, fade, dtype=np.float32)
    joined = np.zeros(0, dtype=np.float32)
    for piece in pieces:
        piece = piece * 10 ** (generator.uniform(-3, 3) / 20)
        piece[:fade] *= ramp
        piece[-fade:] *= ramp[::-1]
        pause = np.zeros(round(generator.uniform(0, _PAUSE) * rate), dtype=np.float32)
        joined = np.concatenate([joined, piece, pause])
    return np.clip(joined, -1, 1)


def _quietest(samples: np.ndarray, start: int, stop: int, rate: int) -> int:
    """The sample between start and stop around which 20 ms are quietest."""
    start, stop = max(start, 0), min(stop, len(samples))
    window = round(0.02 * rate)
    power = np.convolve(samples[start:stop] ** 2, np.ones(window), mode="same")
    return start + int(power.argmin()) if len(power) else start
