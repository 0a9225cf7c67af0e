"""The pretrained recogniser of the quick study: error rates under plans of its encoder, recovery, and speed-up."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

import mapreuse as mr
from mapreuse.measure import bench
from mapreuse_lab.models import Metric, SpeechModel, models_under_plan, quality_json
from mapreuse_lab.training import waveform_of

_KINDS = ("sdpa", "mapreuse")
_EVALUATE_EVERY = 100


class PretrainedRecogniser:
    """What the quick study measures on a pretrained recogniser; each method returns JSON.

    Args:
        name: as `SpeechModel` takes it.
        corpus: name of the corpus.
    """

    def __init__(self, name: str, corpus: str) -> None:
        self.name, self.corpus = name, corpus

    @cached_property
    def speech(self) -> SpeechModel:
        """The recogniser, opened when it is first needed."""
        return SpeechModel(self.name, self.corpus)

    @cached_property
    def original(self) -> list[Metric]:
        """The metrics of the original."""
        return self.speech.evaluate(self.speech.model)

    def quality(self, plan: str, recovery_seconds: float) -> dict[str, Any]:
        """Error rates of the original and under a plan of the encoder: by index, aligned, refitted.

        If `recovery_seconds` is not 0, the refitted encoder is then trained for so long to match the original's
        hidden states on calibration data.
        """
        speech, found = self.speech, {"original": self.original}
        for done, model in models_under_plan(speech, mr.ReusePlan.parse(plan)):
            found[done] = speech.evaluate(model)
        if recovery_seconds:
            encoder, original = (one.get_submodule(speech.stack) for one in (model, speech.model))
            config = mr.DistillConfig(seconds=recovery_seconds, evaluate_every=_EVALUATE_EVERY, bfloat16=False)
            mr.distill(encoder, original, speech.calibration(), config)
            found["recovered"] = speech.evaluate(model)
        return quality_json(found)

    def latency(self, plans: tuple[str, ...], seconds: tuple[int, ...], repeats: int) -> dict[str, Any]:
        """Latency of the encoder on recordings of these lengths, as `bench` returns it."""
        batches = {f"{length} s": self._recording(length) for length in seconds}
        encoder = self.speech.model.get_submodule(self.speech.stack)
        return bench(encoder, batches, plans=",".join(("full", *plans)), kinds=_KINDS, repeats=repeats)

    def _recording(self, seconds: int) -> dict[str, Tensor]:
        """Inputs of the encoder for test recordings, one after the other."""
        rate = self.speech.extractor.sampling_rate
        samples = np.concatenate([waveform_of(cut, rate) for cut in self.speech.cuts])
        return self.speech.inputs(np.resize(samples, seconds * rate))
