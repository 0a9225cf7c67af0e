"""A recogniser of the lab with its calibration speech and its error rates."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from mapreuse_lab.models._metrics import Metric, error_rate_metrics
from mapreuse_lab.training import Recogniser, evaluate, open_corpus, speech_batches

_CALIBRATION_BATCHES = 16


class CtcModel:
    """A recogniser that the lab trained, and the speech that it is calibrated and evaluated on.

    Calibration uses the train part of a corpus; evaluation uses another part, which has no transcript in common.

    Args:
        directory: of the recogniser.
        corpus: name of a corpus, as `open_corpus` takes it.
        split: part of the corpus for the evaluation: test, dev or all.
    """

    stack = ""

    def __init__(self, directory: str | Path, corpus: str = "prompts:en", split: str = "test"):
        self.recogniser = Recogniser.load(directory)
        self.model = self.recogniser.model
        self.corpus, self.cuts = corpus, open_corpus(corpus).part(split)

    def calibration(self, stack: str = "") -> list[dict[str, Tensor]]:
        """Batches of at most 8 utterances."""
        return speech_batches(self.recogniser, self.corpus, split="train", max_batches=_CALIBRATION_BATCHES)

    def evaluate(self, model: nn.Module) -> list[Metric]:
        """Word and character error rates on the corpus."""
        scores = evaluate(self.recogniser.with_model(model), self.cuts)
        return error_rate_metrics(scores.references, scores.hypotheses)
