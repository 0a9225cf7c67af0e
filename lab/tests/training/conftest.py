"""Real speech and small recognisers for the tests."""

from functools import partial
from pathlib import Path

import numpy as np
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


@pytest.fixture(scope="session")
def few(prompts) -> Corpus:
    """A dozen short real recordings, to train on for seconds."""
    short = [cut for cut in prompts.train if 0.5 < cut.duration < 1.5][:12]
    dev = [cut for cut in prompts.dev if cut.duration < 2][:3]
    parts = CutSet.from_cuts(short), CutSet.from_cuts(dev), CutSet.from_cuts([])
    return Corpus("prompts:en", "en", 8000, "", *parts)


@pytest.fixture(scope="session")
def make_tiny():
    """Makes untrained recognisers with two narrow layers."""
    size = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    config = FeatureConfig(num_mel_bins=32)
    return partial(Recogniser.create, alphabet("en"), **size, subsampling_channels=8, feature_config=config)


@pytest.fixture
def tiny(make_tiny) -> Recogniser:
    return make_tiny()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
