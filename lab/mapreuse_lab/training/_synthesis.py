"""Speech synthesis with the espeak-ng library that `espeakng-loader` bundles."""

from __future__ import annotations

import _ctypes
import ctypes
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile
from lhotse import CutSet, Recording

from mapreuse.console import tracked
from mapreuse.data import resample
from mapreuse_lab.training._audio import whole_cut
from mapreuse_lab.training._files import write_whole

_ACCENTS = {
    "en": (*["en-us"] * 6, "en-us-nyc", "en", "en-gb-scotland", "en-029"),
    "fr": ("fr", "fr-be", "fr-ch"),
    "es": ("es", "es-419"),
    "it": ("it",),
    "ru": ("ru",),
}
_VARIANTS = (
    *("f1", "f2", "f3", "f4", "f5", "linda", "belinda", "steph", "steph2", "steph3", "Alicia", "Annie", "Andrea"),
    *("anika", "aunty", "grandma", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "klatt", "klatt2", "klatt3"),
    *("klatt4", "adam", "Alex", "Andy", "Denis", "Gene", "Lee", "Marco", "Michael", "Mike", "max", "michel", "paul"),
    *("quincy", "rob", "robert", "travis", "victor", "zac", "boris", "david", "ed", "edward", "ian", "john"),
)

# Constants of espeak-ng's speak_lib.h.
_SYNCHRONOUS, _UTF8, _RATE, _PITCH, _RANGE = 2, 1, 1, 3, 4
_PHONEME_EVENTS, _IPA_EVENTS = 1, 2  # options of espeak_Initialize
_LAST_EVENT, _PHONEME_EVENT = 0, 7  # types of events

_SEED = 1  # of the noise in breath and consonants; espeak-ng's default is the time of day


class _Event(ctypes.Structure):
    """`espeak_EVENT` of espeak-ng's speak_lib.h; of its union `id`, the name of the phoneme."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def synthesise(
    texts: Sequence[str], language: str, out_dir: str | Path, *, seed: int, sampling_rate: int = 8000
) -> CutSet:
    """Speak each text once, into a 16-bit mono wav file.

    Voice, accent, speed and pitch are drawn at random for each text and seed. Files that exist from an earlier call
    are not made again. The cuts are in the order of `texts`, with the texts as supervisions.

    Args:
        language: en, fr, es, it or ru.
        out_dir: directory of the wav files, created if missing.
        sampling_rate: in Hz.

    Raises:
        ValueError: for another language.
        RuntimeError: if espeak-ng does not start.
    """
    directory = Path(out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    cuts = []
    for text in tracked(f"Synthesising speech ({language})", texts):
        key = key_of(text, language, seed, sampling_rate)
        path = directory / key[:2] / f"{key}.wav"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            samples, _ = speak(text, language, random.Random(key), sampling_rate)
            write = partial(soundfile.write, data=samples, samplerate=sampling_rate, subtype="PCM_16")
            write_whole(path, partial(write, format="WAV"))
        cuts.append(whole_cut(Recording.from_file(path, recording_id=f"synthetic-{key}"), text, language))
    return CutSet.from_cuts(cuts)


def key_of(text: str, language: str, seed: int, sampling_rate: int) -> str:
    """The key of an utterance: the name of its file and the seed of its voice."""
    return hashlib.sha256(json.dumps([text, language, seed, sampling_rate]).encode()).hexdigest()[:20]


def speak(
    text: str, language: str, generator: random.Random, sampling_rate: int
) -> tuple[np.ndarray, list[tuple[str, float]]]:
    """The waveform of a text, and each of its phonemes with its start in seconds; "" is a pause."""
    if language not in _ACCENTS:
        raise ValueError(f"no synthetic voices for language {language!r}; choose one of {', '.join(_ACCENTS)}")
    voice = f"{generator.choice(_ACCENTS[language])}+{generator.choice(_VARIANTS)}"
    data = text.encode() + b"\0"
    with _engine() as (library, rate, chunks, starts):
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice!r}; reinstall espeakng-loader")
        library.espeak_SetParameter(_RATE, generator.randrange(130, 195), 0)
        library.espeak_SetParameter(_PITCH, generator.randrange(25, 75), 0)
        library.espeak_SetParameter(_RANGE, generator.randrange(25, 80), 0)
        library.espeak_Synth(data, len(data), 0, 0, 0, _UTF8, None, None)
    if not chunks:
        raise RuntimeError(f"espeak-ng made no sound for {text!r} with voice {voice!r}")
    samples = np.concatenate(chunks).astype(np.float32) / 32768
    return resample(samples, rate, sampling_rate).clip(-1, 1), [(name, sample / rate) for name, sample in starts]


@contextmanager
def _engine() -> Iterator[tuple[ctypes.CDLL, int, list[np.ndarray], list[tuple[str, int]]]]:
    """A fresh engine: the library, its sampling rate, and two lists that its callback fills during synthesis.

    The first list receives samples, the second one phonemes with the number of their first sample.

    The library keeps state in static variables, so the sound of an utterance would depend on the one before.
    Unloading the library after each utterance (a few milliseconds) prevents that.
    """
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
    library.espeak_Synth.argtypes = [
        *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
        *(ctypes.c_void_p, ctypes.c_void_p),
    ]
    chunks: list[np.ndarray] = []
    starts: list[tuple[str, int]] = []

    def receive(samples, count, events):
        received = takewhile(lambda event: event.type != _LAST_EVENT, events or ())
        phonemes = (event for event in received if event.type == _PHONEME_EVENT)
        # The name is cut at 8 bytes, perhaps within a character.
        starts.extend((event.name.decode(errors="ignore"), event.sample) for event in phonemes)
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    options = _PHONEME_EVENTS | _IPA_EVENTS
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), options)
    if rate <= 0:
        raise RuntimeError("espeak-ng did not start; reinstall espeakng-loader")
    library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
    callback = _CALLBACK(receive)
    library.espeak_SetSynthCallback(callback)
    try:
        yield library, rate, chunks, starts
    finally:
        library.espeak_Terminate()
        _ctypes.dlclose(library._handle)
