import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from mapreuse_lab.training import Corpus, CorpusError, open_corpus, waveform_of
from mapreuse_lab.training._corpora import split_by_transcript
from mapreuse_lab.training._normalise import normalise


def texts(cuts) -> set[str]:
    return {cut.supervisions[0].text for cut in cuts}


def make_cuts(transcripts: list[str]) -> list[MonoCut]:
    return [
        MonoCut(f"cut-{i}", 0.0, 1.0, 0, supervisions=[SupervisionSegment(f"s-{i}", f"r-{i}", 0.0, 1.0, text=text)])
        for i, text in enumerate(transcripts)
    ]


def refusal(name: str) -> str:
    """The one-line error message of a corpus that cannot be opened."""
    with pytest.raises(CorpusError) as refused:
        open_corpus(name)
    assert "\n" not in str(refused.value)
    return str(refused.value)


sentences = st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=5).map(" ".join), max_size=60)


@given(sentences, st.integers(0, 3))
def test_no_held_out_transcript_is_in_the_training_set(transcripts, seed):
    cuts = make_cuts(transcripts)
    train, dev, test = split_by_transcript(cuts, seed=seed)
    assert sorted(cut.id for part in (train, dev, test) for cut in part) == sorted(cut.id for cut in cuts)
    assert not texts(train) & texts(dev)
    assert not texts(train) & texts(test)
    assert not texts(dev) & texts(test)
    long = {text for text in transcripts if len(text.split()) >= 3}
    assert texts(test) | texts(dev) <= long
    assert (len(texts(test)), len(texts(dev))) == (round(0.2 * len(long)), round(0.1 * len(long)))


@given(sentences, st.randoms())
def test_the_split_of_a_transcript_does_not_depend_on_the_order_of_the_cuts(transcripts, random):
    cuts = make_cuts(transcripts)
    parts = split_by_transcript(cuts, seed=0)
    random.shuffle(cuts)
    assert [texts(part) for part in split_by_transcript(cuts, seed=0)] == [texts(part) for part in parts]


def test_the_prompts_are_real_speech_with_normalised_transcripts(prompts):
    cuts = [*prompts.train, *prompts.dev, *prompts.test]
    assert len(cuts) > 540
    assert 22 * 60 < sum(cut.duration for cut in cuts) < 27 * 60
    assert all(cut.sampling_rate == 8000 and cut.supervisions[0].text for cut in cuts)
    assert all(normalise(text) == text for text in texts(cuts))
    audio = next(iter(prompts.test)).load_audio()
    assert audio.shape[0] == 1
    assert audio.std() > 0.01
    assert "Allison Smith" in prompts.attribution


def write_speech(path: Path, seconds: float = 0.5, rate: int = 16000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(round(seconds * rate)), rate)


def test_librispeech_keeps_its_official_splits_but_trains_on_no_held_out_transcript(tmp_path):
    spoken = {
        "train-clean-5/7/1": ["A MAN SAID", "MISTER QUILTER IS"],
        "dev-clean/8/2": ["HE WENT"],
        "test-clean/9/3": ["MISTER QUILTER IS"],
    }
    for folder, lines in spoken.items():
        speaker, chapter = folder.split("/")[1:]
        for number in range(len(lines)):
            write_speech(tmp_path / folder / f"{speaker}-{chapter}-{number:04d}.flac")
        listing = "".join(f"{speaker}-{chapter}-{i:04d} {line}\n" for i, line in enumerate(lines))
        (tmp_path / folder / f"{speaker}-{chapter}.trans.txt").write_text(listing)
    corpus = open_corpus(f"librispeech:{tmp_path}")
    assert corpus.sampling_rate == 16000
    assert texts(corpus.train) == {"a man said"}
    assert texts(corpus.dev) == {"he went"}
    assert texts(corpus.test) == {"mister quilter is"}
    assert next(iter(corpus.test)).load_audio().shape == (1, 8000)


@pytest.fixture
def kaldi(tmp_path) -> Path:
    write_speech(tmp_path / "audio" / "one.wav", seconds=2.0)
    (tmp_path / "wav.scp").write_text("one audio/one.wav\n")
    (tmp_path / "segments").write_text("one-a one 0.0 0.5\none-b one 0.5 -1\n")
    (tmp_path / "text").write_text("one-a Hello!\none-b Dial 7 now\n")
    return tmp_path


def test_a_kaldi_directory_is_cut_at_its_segments_and_may_name_its_language(kaldi):
    corpus = open_corpus(f"kaldi:{kaldi}")
    cuts = {cut.supervisions[0].text: cut for part in (corpus.train, corpus.dev, corpus.test) for cut in part}
    assert set(cuts) == {"hello", "dial seven now"}
    assert cuts["hello"].load_audio().shape == (1, 8000)
    assert cuts["dial seven now"].duration == pytest.approx(1.5)
    (kaldi / "text").write_text("one-a Mañana\none-b marque el 7 ahora\n")
    (kaldi / "utt2lang").write_text("one-a es\none-b es\n")
    corpus = open_corpus(f"kaldi:{kaldi}")
    assert corpus.language == "es"
    assert texts([*corpus.train, *corpus.dev, *corpus.test]) == {"mañana", "marque el siete ahora"}


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("audio/one.wav", "this is no sound\n" * 100, "audio/one.wav cannot be read as audio"),
        ("segments", "one-a one 0.5 0.2\n", "one-a: from 0.5 to 0.2 s of a recording of 2.00 s"),
        ("segments", "one-a one 7.0 9.0\n", "one-a: from 7.0 to 2.0 s of a recording of 2.00 s"),
        ("wav.scp", "one sph2pipe one.sph |\n", "wav.scp gives a command for one"),
        ("wav.scp", "one x;touch ran;.sph\n", "its name has special characters"),
        ("segments", "one-a one 0.5 soon\n", "expected a recording, its start and end in seconds"),
        ("segments", "one-b one 0 1\none-c\none-a one nan 1\n", "segments, line 3: one-a has 'one nan 1'"),
        ("segments", "one-a one 0 inf\n", "segments, line 1: one-a has 'one 0 inf'"),
        ("utt2lang", "one-a tlh\none-b tlh\n", "in language 'tlh'"),
    ],
)
def test_an_invalid_kaldi_directory_is_refused_on_one_line(kaldi, file, content, problem):
    (kaldi / "x;touch ran;.sph").write_bytes(b"")
    (kaldi / file).write_text(content)
    assert problem in refusal(f"kaldi:{kaldi}")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "it has no *.trans.txt with utterances"),
        ({"9-3.trans.txt": "9-3-0000 HELLO\n", "9-3-0000.flac": "no sound"}, "9-3-0000.flac cannot be read as audio"),
        ({"9-3.trans.txt": "9-3-0000 HELLO\n"}, "1 of 1 recordings with a transcript are missing: "),
    ],
)
def test_an_invalid_librispeech_directory_is_refused_on_one_line(tmp_path, files, reason):
    chapter = tmp_path / "test-clean" / "9" / "3"
    chapter.mkdir(parents=True)
    for name, content in files.items():
        (chapter / name).write_text(content)
    assert reason in refusal(f"librispeech:{tmp_path}")


def test_missing_recordings_are_named(kaldi):
    corpus = open_corpus(f"kaldi:{kaldi}")
    cuts = [*corpus.train, *corpus.dev, *corpus.test]
    (kaldi / "audio" / "one.wav").unlink()
    with pytest.raises(ValueError, match="one-a: its recording cannot be read"):
        waveform_of(min(cuts, key=lambda cut: cut.start), 8000)


def test_any_cut_manifest_is_a_corpus(prompts, tmp_path):
    manifest = tmp_path / "cuts.jsonl.gz"
    CutSet.from_cuts(list(prompts.test)[:30]).to_file(manifest)
    corpus = open_corpus(f"cuts:{manifest}")
    assert texts([*corpus.train, *corpus.dev, *corpus.test]) == texts(list(prompts.test)[:30])
    assert (len(corpus.train), corpus.sampling_rate) > (15, 8000)
    assert len(corpus.test) > len(corpus.dev) > 0


def _by_command(cut: dict, path: Path) -> None:
    cut["recording"]["sources"][0].update(type="command", source=f"touch {path}")


def _reverberated(cut: dict, path: Path) -> None:
    response = {**cut["recording"], "sources": [{"type": "command", "channels": [0], "source": f"touch {path}"}]}
    cut["recording"]["transforms"] = [{"name": "ReverbWithImpulseResponse", "kwargs": {"rir": response}}]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda cut, _: cut.pop("recording"), "no recording"),
        (lambda cut, _: cut["supervisions"][0].update(start=1.5), "one is from 1.5 to 3.5 s of 2.00 s"),
        (lambda cut, _: cut.update(start=1.0), "from 1.0 to 3.0 s of a recording of 2.00 s"),
        (lambda cut, _: cut["recording"]["sources"][0].update(source="gone.wav"), "gone.wav does not exist"),
        (_by_command, "its recording is of type command"),
        (_reverberated, "its recording is of type command"),
    ],
)
def test_an_invalid_cut_is_refused_by_name_and_runs_no_command(tmp_path, change, problem):
    write_speech(tmp_path / "one.wav", seconds=2.0)
    cut = Recording.from_file(tmp_path / "one.wav").to_cut()
    cut.supervisions = [SupervisionSegment("one", cut.recording_id, 0.0, 2.0, text="dial seven now")]
    written = cut.to_dict()
    change(written, tmp_path / "ran")
    (tmp_path / "cuts.jsonl").write_text(json.dumps(written) + "\n")
    message = refusal(f"cuts:{tmp_path / 'cuts.jsonl'}")
    assert f"cuts.jsonl: {cut.id}: " in message
    assert problem in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "soon", None, True])
def test_a_manifest_with_a_time_that_is_no_number_is_refused_by_its_line(tmp_path, value):
    write_speech(tmp_path / "one.wav", seconds=2.0)
    cut = Recording.from_file(tmp_path / "one.wav").to_cut()
    cut.supervisions = [SupervisionSegment("one", cut.recording_id, 0.0, 2.0, text="dial seven now")]
    for change in (
        lambda written: written.update(start=value),
        lambda written: written["supervisions"][0].update(duration=value),
        lambda written: written["recording"].update(sampling_rate=value),
    ):
        bad = cut.to_dict()
        change(bad)
        (tmp_path / "cuts.jsonl").write_text(json.dumps(cut.to_dict()) + "\n" + json.dumps(bad) + "\n")
        assert "cuts.jsonl, line 2: not a cut of lhotse (its " in refusal(f"cuts:{tmp_path / 'cuts.jsonl'}")


def test_synthetic_speech_is_a_corpus(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("mapreuse_lab.training._corpora._SYNTHETIC_UTTERANCES", 30)
    corpus = open_corpus("synthetic:it")
    assert isinstance(corpus, Corpus)
    assert len(corpus.train) + len(corpus.dev) + len(corpus.test) == 30
    assert not texts(corpus.train) & set(corpus.held_out)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("prompts", "a corpus is"),
        ("prompts:de", "no such language; choose one of en, fr"),
        ("klingon:en", "a corpus is"),
        ("librispeech:/nowhere", "/nowhere does not exist"),
        ("", "a corpus is"),
    ],
)
def test_an_unknown_name_is_refused_on_one_line(name, reason):
    assert reason in refusal(name)


def test_a_broken_manifest_is_refused_on_one_line(tmp_path):
    (tmp_path / "broken.jsonl").write_text("{not json\n")
    assert "line 1: not a cut of lhotse" in refusal(f"cuts:{tmp_path}/broken.jsonl")


@pytest.fixture
def bare_machine(monkeypatch, tmp_path) -> Path:
    """A machine with an empty cache and nothing on its path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("mapreuse_lab.training._prompts._SYSTEM", tmp_path / "system")
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    return tools


def test_without_apt_the_error_gives_a_remedy(bare_machine):
    with pytest.raises(CorpusError, match=r"^prompts:en needs .*asterisk-core-sounds-en-wav.*make study CORPUS=syn"):
        open_corpus("prompts:en")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("/usr/bin/touch asterisk-core-sounds-en_1.6.1-1_all.deb", "SHA-256"),
        ("echo 'E: no network' >&2; exit 100", "E: no network"),
    ],
)
def test_a_download_that_fails_or_is_damaged_leaves_nothing(bare_machine, tmp_path, program, reason):
    for tool in ("apt-get", "dpkg-deb"):
        (bare_machine / tool).write_text(f"#!/bin/sh\n{program}\n")
        (bare_machine / tool).chmod(0o755)
    assert reason in refusal("prompts:en")
    assert list((tmp_path / "cache" / "mapreuse").iterdir()) == []


def test_a_part_is_named_and_never_empty(prompts, few):
    assert prompts.part("dev") == list(prompts.dev)
    assert len(prompts.part("all")) == sum(map(len, (prompts.train, prompts.dev, prompts.test)))
    with pytest.raises(CorpusError, match="no part 'valid'; choose train, dev, test or all"):
        prompts.part("valid")
    with pytest.raises(CorpusError, match=r"the test split is empty; use --split all"):
        few.part("test")
