"""English speech in voices modelled on recorded people, by Debian's package flite; nothing is installed."""

import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import soundfile
from lhotse.cut import MonoCut
from rich.progress import track

from mapreuse.speech._audio import write_wav
from mapreuse.speech._errors import CorpusError
from mapreuse.speech._features import resample
from mapreuse.speech._prompts import cache_dir, fetch_packages
from mapreuse.speech._synthesis import cut_of

# Black and Lenzo's voices; the first is a woman, as is the voice of the English prompts, and speaks half the time.
_VOICES = {"slt": (140, 230), "rms": (80, 140), "awb": (90, 160), "kal16": (80, 140)}  # mean pitch in Hz, from and to
_WEIGHTS = (3, 1, 1, 1)
_STRETCH = (0.75, 1.2)  # how long phones last beside the voice's own durations


def speak_with_flite(texts: Sequence[str], out_dir: Path, *, seed: int, sampling_rate: int = 8000) -> list[MonoCut]:
    """Speaks every English text once, in a voice, tempo and pitch drawn from `seed` and the text, into wav files.

    Returns the cuts in the order of `texts`. A second call, or one after an interruption, speaks only what is
    missing. Raises `CorpusError` where flite is neither installed nor can be fetched.
    """
    keys = [
        hashlib.sha256(json.dumps(["flite", text, seed, sampling_rate]).encode()).hexdigest()[:20] for text in texts
    ]
    paths = [out_dir / "flite" / key[:2] / f"{key}.wav" for key in keys]
    missing = [(text, key, path) for text, key, path in zip(texts, keys, paths, strict=True) if not path.exists()]
    if missing:
        command = _command()
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            spoken = workers.map(lambda work: _speak(command, *work, sampling_rate=sampling_rate), missing)
            for _ in track(spoken, description="Speaking with flite", total=len(missing)):
                pass
    return [cut_of(path, f"flite-{key}", text, "en") for text, key, path in zip(texts, keys, paths, strict=True)]


def _command() -> tuple[str, dict[str, str]]:
    """The program, and the environment it runs in."""
    if installed := shutil.which("flite"):
        return installed, dict(os.environ)
    root = fetch_packages(["flite", "libflite1"], cache_dir() / "flite-program", "speech by flite")
    library = next(root.glob("usr/lib/*/libflite.so.1"))
    return str(root / "usr/bin/flite"), {**os.environ, "LD_LIBRARY_PATH": str(library.parent)}


def _speak(command: tuple[str, dict[str, str]], text: str, key: str, path: Path, *, sampling_rate: int) -> None:
    generator = random.Random(key)
    (voice,) = generator.choices(list(_VOICES), _WEIGHTS)
    pitch, stretch = generator.uniform(*_VOICES[voice]), generator.uniform(*_STRETCH)
    path.parent.mkdir(parents=True, exist_ok=True)
    spoken = path.with_name(f".{path.stem}.{os.getpid()}")
    settings = ["--setf", f"int_f0_target_mean={pitch:.0f}", "--setf", f"duration_stretch={stretch:.2f}"]
    program, environment = command
    arguments = [program, "-voice", voice, *settings, "-t", text, "-o", str(spoken)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not spoken.exists():
        raise CorpusError(f"flite said nothing for {text!r}: {done.stderr.strip() or 'no output'}")
    samples, rate = soundfile.read(spoken, dtype="float32")
    spoken.unlink()
    write_wav(path, resample(samples, rate, sampling_rate).clip(-1, 1), sampling_rate)
