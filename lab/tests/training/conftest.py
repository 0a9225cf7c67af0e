"""Real speech and small recognisers for the tests."""

from pathlib import Path

import pytest
from lhotse import CutSet
from mapreuse_lab.training import BASELINE, Corpus, FeatureConfig, Recogniser, alphabet, open_corpus


@pytest.fixture(scope="session")
def prompts() -> Corpus:
    """The English prompts: real speech."""
    return open_corpus("prompts:en")


@pytest.fixture(scope="session")
def baseline() -> Recogniser:
    """The shipped recogniser."""
    return Recogniser.load(BASELINE)


@pytest.fixture(scope="session")
def wav(prompts) -> Path:
    """A real recording of a few seconds, 8 kHz."""
    cut = next(cut for cut in prompts.test if 3 < cut.duration < 5)
    return Path(cut.recording.sources[0].source)


def few_of(prompts: Corpus) -> Corpus:
    """A dozen short real recordings, to train on for seconds."""
    short = [cut for cut in prompts.train if 0.5 < cut.duration < 1.5][:12]
    dev = [cut for cut in prompts.dev if cut.duration < 2][:3]
    parts = CutSet.from_cuts(short), CutSet.from_cuts(dev), CutSet.from_cuts([])
    return Corpus("prompts:en", "en", 8000, "", *parts)


@pytest.fixture(scope="session")
def few(prompts) -> Corpus:
    return few_of(prompts)


def tiny_recogniser(**settings) -> Recogniser:
    """An untrained recogniser with two narrow layers."""
    size = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 64, "subsampling_channels": 8}
    return Recogniser.create(alphabet("en"), **size, feature_config=FeatureConfig(num_mel_bins=32), **settings)


@pytest.fixture(scope="session")
def make_tiny():
    return tiny_recogniser


@pytest.fixture
def tiny() -> Recogniser:
    return tiny_recogniser()
