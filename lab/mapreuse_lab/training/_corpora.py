"""Opens speech corpora by name: prompts, synthetic speech, LibriSpeech, Kaldi directories and lhotse manifests."""

import gzip
import hashlib
import json
import math
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.cut import Cut, MixedCut, PaddingCut
from lhotse.serialization import deserialize_item
from lhotse.utils import fastcopy

from mapreuse.console import one_line
from mapreuse_lab.training._audio import whole_cut
from mapreuse_lab.training._files import CorpusError, cache_dir
from mapreuse_lab.training._normalise import LANGUAGES, normalise
from mapreuse_lab.training._prompts import ATTRIBUTIONS, read_prompts
from mapreuse_lab.training._sentences import generate_sentences
from mapreuse_lab.training._synthesis import synthesise

_FORMS = "prompts:<language>, synthetic:<language>, librispeech:<directory>, cuts:<manifest> or kaldi:<directory>"
_SYNTHETIC_UTTERANCES = 1500
_TOLERANCE = 0.001  # seconds by which rounded times may exceed the end of a recording
_READ_BY_COMMANDS = (".opus", ".sph")  # lhotse puts the names of such files into a shell command
_LANGUAGE_NAMES = {
    **{code: code for code in LANGUAGES},
    **{"english": "en", "french": "fr", "spanish": "es", "italian": "it", "russian": "ru"},
}


@dataclass(frozen=True)
class Corpus:
    """Recorded or synthetic speech with transcripts, in three parts that have no transcript in common.

    Attributes:
        name: as given to `open_corpus`.
        language: code of the language.
        sampling_rate: in Hz.
        attribution: authors and licence of the recordings, as far as they are known.
        train, dev, test: one cut per utterance, mono, with the normalised transcript in `supervisions[0].text`.
    """

    name: str
    language: str
    sampling_rate: int
    attribution: str
    train: CutSet
    dev: CutSet
    test: CutSet

    @property
    def held_out(self) -> list[str]:
        """The transcripts of dev and test, sorted. No training text may contain them."""
        return sorted({cut.supervisions[0].text for cut in (*self.dev, *self.test)})

    def part(self, split: str) -> list[MonoCut]:
        """The utterances of train, dev, test or all.

        Raises:
            CorpusError: if there is no such part, or it is empty.
        """
        parts = {"train": self.train, "dev": self.dev, "test": self.test}
        if split not in (*parts, "all"):
            raise CorpusError(f"{self.name} has no part {split!r}; choose train, dev, test or all")
        cuts = [cut for name, part in parts.items() if split in (name, "all") for cut in part]
        if not cuts:
            raise CorpusError(f"{self.name}: the {split} split is empty; use --split all")
        return cuts


def open_corpus(name: str) -> Corpus:
    """Open a corpus. Prompts are downloaded and synthetic speech is generated if they are not in the cache.

    `split_by_transcript` makes the parts. LibriSpeech keeps its official splits, but training utterances whose
    transcript is in dev or test are left out.

    Args:
        name: one of the following, with en, fr, es, it or ru as `<language>`:

            - `prompts:<language>`: recorded telephone prompts, one voice per language, 8 kHz.
            - `synthetic:<language>`: generated sentences in synthetic voices, 8 kHz.
            - `librispeech:<directory>`: the directory that contains `train-*`, `dev-*` and `test-*`, 16 kHz.
            - `cuts:<manifest>`: a lhotse CutSet, `.jsonl` or `.jsonl.gz`.
            - `kaldi:<directory>`: a Kaldi data directory with `wav.scp` and `text`, optionally `segments` and
              `utt2lang`.

            Manifests and Kaldi directories are English unless their supervisions, or `utt2lang`, name a language.

    Raises:
        CorpusError: with one line, for an unknown name, a missing or unreadable file, or a recording that only a
            command or the network could provide.
    """
    kind, _, where = name.partition(":")
    openers = {
        "prompts": _open_prompts,
        "synthetic": _open_synthetic,
        "librispeech": _open_librispeech,
        "cuts": _open_cuts,
        "kaldi": _open_kaldi,
    }
    if not where or kind not in openers:
        raise CorpusError(f"no corpus {name!r}; a corpus is {_FORMS}")
    if kind in ("prompts", "synthetic"):
        if where not in LANGUAGES:
            raise CorpusError(f"{name}: no such language; choose one of {', '.join(LANGUAGES)}")
    elif not Path(where).exists():
        raise CorpusError(f"{name}: {where} does not exist")
    return openers[kind](name, where)


def split_by_transcript(cuts: Iterable[MonoCut], *, seed: int = 0) -> tuple[CutSet, CutSet, CutSet]:
    """Split cuts into train, dev and test sets that have no transcript in common.

    Only transcripts with at least three words are held out: 10 % of them for dev, 20 % for test. The split depends
    only on the transcripts and the seed. The sets may share speakers, and a held-out transcript may be part of a
    longer training transcript.
    """
    cuts = list(cuts)
    texts = {cut.supervisions[0].text for cut in cuts}
    long = [text for text in texts if len(text.split()) >= 3]
    long.sort(key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())
    num_test, num_dev = round(0.2 * len(long)), round(0.1 * len(long))
    in_test, in_dev = set(long[:num_test]), set(long[num_test : num_test + num_dev])
    parts: tuple[list[MonoCut], list[MonoCut], list[MonoCut]] = ([], [], [])
    for cut in cuts:
        text = cut.supervisions[0].text
        parts[2 if text in in_test else 1 if text in in_dev else 0].append(cut)
    train, dev_cuts, test_cuts = (CutSet.from_cuts(part) for part in parts)
    return train, dev_cuts, test_cuts


def _open_prompts(name: str, language: str) -> Corpus:
    cuts = []
    for prompt, path, written in read_prompts(language):
        if text := normalise(written, language):
            recording = Recording.from_file(path, recording_id=f"{language}-{prompt.replace('/', '-')}")
            cuts.append(whole_cut(recording, text, language))
    return Corpus(name, language, 8000, ATTRIBUTIONS[language], *split_by_transcript(cuts))


def _open_synthetic(name: str, language: str) -> Corpus:
    texts = generate_sentences(_SYNTHETIC_UTTERANCES, language, seed=0)
    cuts = synthesise(texts, language, cache_dir() / "synthetic", seed=0)
    return Corpus(name, language, 8000, "synthetic speech by espeak-ng", *split_by_transcript(cuts))


def _open_librispeech(name: str, where: str) -> Corpus:
    parts = {part: sorted(Path(where).glob(f"{part}-*")) for part in ("train", "dev", "test")}
    if not any(parts.values()):
        raise CorpusError(f"{name}: {where} contains no directory train-*, dev-* or test-*")
    cuts: dict[str, list[MonoCut]] = {"train": [], "dev": [], "test": []}
    for part, directories in parts.items():
        for directory in directories:
            cuts[part] += _normalised(name, _librispeech_cuts(name, directory), language="en")
    held_out = {cut.supervisions[0].text for cut in cuts["dev"] + cuts["test"]}
    cuts["train"] = [cut for cut in cuts["train"] if cut.supervisions[0].text not in held_out]
    rate = next(cut.sampling_rate for part in cuts.values() for cut in part)
    train, dev, test = (CutSet.from_cuts(cuts[part]) for part in ("train", "dev", "test"))
    return Corpus(name, "en", rate, "LibriSpeech (Panayotov et al., 2015), CC-BY 4.0", train, dev, test)


def _librispeech_cuts(name: str, directory: Path) -> list[MonoCut]:
    """One cut per line of the transcript files; the recordings are in the same directories."""
    files = {
        key: (listing.parent / f"{key}.flac", text)
        for listing in sorted(directory.rglob("*.trans.txt"))
        for key, text in _keyed_lines(name, listing)
    }
    if not files:
        raise CorpusError(
            f"{name}: {directory} is not in LibriSpeech's layout: it has no *.trans.txt with utterances"
        )
    missing = [str(file) for file, _ in files.values() if not file.is_file()]
    if missing:
        named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CorpusError(f"{name}: {len(missing)} of {len(files)} recordings with a transcript are missing: {named}")
    return [whole_cut(_recording(name, file, key), text) for key, (file, text) in files.items()]


def _open_cuts(name: str, where: str) -> Corpus:
    cuts, number = [], 0
    try:
        with (gzip.open if where.endswith(".gz") else open)(where, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                described = json.loads(line)
                for key, value in _numbers(described):
                    if isinstance(value, bool) or not (isinstance(value, int | float) and math.isfinite(value)):
                        raise ValueError(f"its {key} is {value!r}, expected a finite number")
                cuts.append(deserialize_item(described))
                if not isinstance(cuts[-1], Cut):
                    raise ValueError(f"expected a cut, got a {type(cuts[-1]).__name__}")
    except Exception as problem:  # whatever lhotse's parsers raise
        raise CorpusError(f"{name}, line {number}: not a cut of lhotse ({one_line(problem)})") from None
    return _split_corpus(name, _normalised(name, cuts))


def _numbers(manifest: object) -> Iterator[tuple[str, object]]:
    """Every time, number of samples and sampling rate in a manifest."""
    for key, value in manifest.items() if isinstance(manifest, dict) else ():
        if key in ("start", "duration", "num_samples", "sampling_rate"):
            yield key, value
        yield from _numbers(value)
    for value in manifest if isinstance(manifest, list) else ():
        yield from _numbers(value)


def _open_kaldi(name: str, where: str) -> Corpus:
    directory = Path(where)
    texts = dict(_keyed_lines(name, directory / "text"))
    recordings = {}
    for recording_id, path in _keyed_lines(name, directory / "wav.scp"):
        if path.endswith("|"):
            raise CorpusError(f"{name}: wav.scp gives a command for {recording_id}; write the audio to a file first")
        recordings[recording_id] = _recording(name, directory / path, recording_id)
    segments = {key: (key, 0.0, -1.0) for key in recordings}
    if (directory / "segments").exists():
        segments = {}
        for key, rest in _keyed_lines(name, directory / "segments"):
            try:
                recording_id, first, last = rest.split()
                segments[key] = (recording_id, float(first), float(last))
                if not all(map(math.isfinite, segments[key][1:])):
                    raise ValueError
            except ValueError:
                keys = [line.split()[:1] for line in (directory / "segments").read_text().splitlines()]
                raise CorpusError(
                    f"{name}: segments, line {keys.index([key]) + 1}: {key} has {rest!r}; expected a recording, its "
                    "start and end in seconds"
                ) from None
    languages = dict(_keyed_lines(name, directory / "utt2lang")) if (directory / "utt2lang").exists() else {}
    cuts = []
    for key, (recording_id, start, end) in segments.items():
        if key in texts and recording_id in recordings:
            recording = recordings[recording_id]
            duration = (recording.duration if end < 0 else min(end, recording.duration)) - start
            supervision = SupervisionSegment(
                key, recording_id, 0.0, duration, text=texts[key], language=languages.get(key)
            )
            cuts.append(MonoCut(key, start, duration, 0, supervisions=[supervision], recording=recording))
    return _split_corpus(name, _normalised(name, cuts))


def _keyed_lines(name: str, path: Path) -> list[tuple[str, str]]:
    """First word and rest of each line of a file, as in Kaldi and LibriSpeech. Lines with one word are skipped."""
    if not path.is_file():
        raise CorpusError(f"{name}: {path} is missing; a Kaldi data directory has wav.scp and text")
    try:
        lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise CorpusError(f"{name}: {path} is not UTF-8 text") from None
    return [(line[0], line[1].strip()) for line in lines if len(line) == 2]


def _normalised(name: str, cuts: Iterable[MonoCut], language: str | None = None) -> list[MonoCut]:
    """One cut per utterance with words, its transcript normalised.

    Without `language`, the language of a transcript is that of its supervision, or English.
    """
    normalised = []
    for cut in chain.from_iterable(_utterances(name, whole) for whole in cuts):
        spoken = language or _LANGUAGE_NAMES.get((cut.supervisions[0].language or "en").lower())
        if spoken is None:
            raise CorpusError(
                f"{name}: {cut.id} is in language {cut.supervisions[0].language!r}; choose one of "
                f"{', '.join(LANGUAGES)}"
            )
        text = normalise(cut.supervisions[0].text or "", spoken)
        if text:
            normalised.append(cut.map_supervisions(lambda s, t=text, lang=spoken: fastcopy(s, text=t, language=lang)))
    if not normalised:
        raise CorpusError(f"{name}: no utterance with a transcript")
    return normalised


def _utterances(name: str, cut: Cut) -> list[MonoCut]:
    """A cut for each supervision of a cut."""
    if reason := _problem(cut):
        raise CorpusError(f"{name}: {cut.id}: {reason}")
    try:
        return list(cut.trim_to_supervisions(keep_overlapping=False))
    except Exception as problem:  # lhotse asserts what it expects of times, channels and samples
        raise CorpusError(f"{name}: {cut.id}: not a cut that lhotse can read ({one_line(problem)})") from None


def _problem(cut: Cut) -> str | None:
    """Why a cut is not usable speech, or None."""
    for source in _sources(cut.to_dict()):
        kind, where = source["type"], source["source"]
        if kind != "file":
            return f"its recording is of type {kind} ({str(where)[:60]}); write the audio to a file first"
        if problem := _problem_of_file(Path(where)):
            return f"its recording {problem}"
    parts = [track.cut for track in cut.tracks] if isinstance(cut, MixedCut) else [cut]
    for part in (part for part in parts if not isinstance(part, PaddingCut)):
        recording = part.recording
        if recording is None:
            return "no recording"
        if not (part.start >= 0 and part.duration > 0 and part.end <= recording.duration + _TOLERANCE):
            return f"from {part.start} to {part.end} s of a recording of {recording.duration:.2f} s"
    for one in cut.supervisions:
        if not 0 <= one.start < one.end <= cut.duration + _TOLERANCE:
            return f"its supervision {one.id} is from {one.start} to {one.end} s of {cut.duration:.2f} s"
    return None


def _sources(manifest: object) -> Iterator[dict[str, Any]]:
    """Every audio source in a manifest, including those that are mixed in or used as reverberation."""
    if isinstance(manifest, dict):
        for key, value in manifest.items():
            yield from value if key == "sources" else _sources(value)
    elif isinstance(manifest, list):
        for value in manifest:
            yield from _sources(value)


def _problem_of_file(file: Path) -> str | None:
    if not file.is_file():
        return f"{file} does not exist"
    if file.suffix.lower() in _READ_BY_COMMANDS and shlex.quote(str(file)) != str(file):
        return f"{file} would be read by a shell command, but its name has special characters; rename it"
    return None


def _recording(name: str, file: Path, recording_id: str) -> Recording:
    if reason := _problem_of_file(file):
        raise CorpusError(f"{name}: {recording_id}: {reason}")
    try:
        return Recording.from_file(file, recording_id=recording_id)
    except Exception as problem:  # lhotse tries several readers and raises whatever they raise
        raise CorpusError(f"{name}: {file} cannot be read as audio ({one_line(problem)})") from None


def _split_corpus(name: str, cuts: list[MonoCut]) -> Corpus:
    languages = {cut.supervisions[0].language for cut in cuts}
    if len(languages) > 1:
        raise CorpusError(f"{name}: contains several languages ({', '.join(sorted(languages))}); expected one")
    attribution = "unknown; see the source of the recordings"
    train, dev, test = split_by_transcript(cuts)
    return Corpus(name, languages.pop(), cuts[0].sampling_rate, attribution, train, dev, test)
