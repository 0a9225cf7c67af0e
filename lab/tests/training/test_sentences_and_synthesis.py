import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapreuse_lab.training import evaluate
from mapreuse_lab.training._normalise import LANGUAGES, normalise
from mapreuse_lab.training._sentences import generate_sentences
from mapreuse_lab.training._synthesis import synthesise
from wordfreq import top_n_list


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_generated_sentences_never_contain_a_held_out_transcript(prompts, seed):
    transcripts = sorted({cut.supervisions[0].text for cut in prompts.train})
    made = generate_sentences(200, "en", seed=seed, transcripts=transcripts, exclude=prompts.held_out)
    assert len(set(made)) == 200
    assert not [text for text in made for held_out in prompts.held_out if f" {held_out} " in f" {text} "]


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_normalised_and_the_same_for_the_same_seed(language):
    made = generate_sentences(100, language, seed=3)
    assert made == generate_sentences(100, language, seed=3)
    assert made != generate_sentences(100, language, seed=4)
    assert all(normalise(text, language) == text for text in made)


def test_too_large_a_number_of_sentences_is_refused():
    words = {word for text in generate_sentences(800, "ru", seed=0) for word in text.split()} | {
        *top_n_list("ru", 5000)
    }
    with pytest.raises(ValueError, match=r"found only \d+ different sentences in 'ru', needed 50"):
        generate_sentences(50, "ru", seed=0, exclude=words)


def test_synthesis_resumes_and_gives_the_same_bits(tmp_path):
    """Also in another second: by default, espeak-ng seeds the noise of breathy voices with the time of day."""
    texts = generate_sentences(20, "en", seed=0)
    synthesise(texts[:3], "en", tmp_path / "a", seed=0)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.wav")}
    resumed = synthesise(texts, "en", tmp_path / "a", seed=0)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    time.sleep(1)
    whole = synthesise(texts, "en", tmp_path / "b", seed=0)
    for one, other in zip(resumed, whole, strict=True):
        np.testing.assert_array_equal(one.load_audio(), other.load_audio())
    assert [cut.supervisions[0].text for cut in resumed] == texts


def test_other_seeds_give_other_voices(tmp_path):
    (one,) = synthesise(["hello world"], "en", tmp_path, seed=0)
    (other,) = synthesise(["hello world"], "en", tmp_path, seed=1)
    assert one.num_samples != other.num_samples


def test_the_shipped_recogniser_understands_new_synthetic_speech(baseline, tmp_path):
    texts = ["press three to hear the next message", "your call cannot be answered at the moment"]
    texts = [f"{text} {number}" for text in texts for number in ("one", "two", "seven", "nine")]
    assert evaluate(baseline, synthesise(texts, "en", tmp_path, seed=5)).cer < 0.3


def test_a_language_without_voices_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no synthetic voices for language 'de'"):
        synthesise(["guten tag"], "de", tmp_path, seed=0)
