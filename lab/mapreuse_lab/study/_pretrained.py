"""The pretrained recogniser of the quick study: error rates under plans, recovery, and speed-up."""

from __future__ import annotations

import copy
from functools import cached_property, partial
from typing import Any

import numpy as np
from torch import Tensor

import mapreuse as mr
from mapreuse.measure import bench, time_interleaved
from mapreuse_lab.models import Metric, SpeechModel, models_under_plan
from mapreuse_lab.training import waveform_of

_KINDS = ("sdpa", "mapreuse", "mapreuse+openvino")
_DECODER = "decoder "
"""Plans whose names begin with this are plans of the decoder's self-attention; others are plans of the encoder."""

_CALIBRATION, _RECOVERY, _EVALUATION = 128, 512, 16
"""Number of recordings for alignment and refit, and of varied samples for recovery and for its evaluation."""

_EVALUATE_EVERY = 100
_TRANSCRIBED_SECONDS = 10


class PretrainedRecogniser:
    """What the quick study measures on a pretrained recogniser.

    Args:
        name: as `SpeechModel` takes it.
        corpus: name of the corpus.
    """

    def __init__(self, name: str, corpus: str) -> None:
        self.name, self.corpus = name, corpus

    @cached_property
    def speech(self) -> SpeechModel:
        """The recogniser, opened when it is first needed."""
        return SpeechModel(self.name, self.corpus, num_calibration=_CALIBRATION)

    def original(self) -> list[Metric]:
        """The metrics of the original."""
        return self.speech.evaluate(self.speech.model)

    def quality(self, name: str, recovery_seconds: float) -> dict[str, list[Metric]]:
        """The metrics under a plan: by index, aligned, refitted.

        If `recovery_seconds` is not 0, the refitted encoder is then trained for so long to match the original's
        hidden states on varied speech of the train part.
        """
        speech, found = self.speech, {}
        stack, plan = self._planned(name)
        for done, model in models_under_plan(speech, plan, stack):
            found[done] = speech.evaluate(model)
        if recovery_seconds:
            encoder, original = (one.get_submodule(stack) for one in (model, speech.model))
            config = mr.DistillConfig(seconds=recovery_seconds, evaluate_every=_EVALUATE_EVERY, bfloat16=False)
            held_out = speech.varied(_EVALUATION, split="dev")
            mr.distill(encoder, original, speech.varied(_RECOVERY), config, held_out=held_out)
            found["recovered"] = speech.evaluate(model)
        return found

    def encoder_plans(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The plans of the encoder among these names."""
        return tuple(name for name in names if not name.startswith(_DECODER))

    def latency(self, plans: tuple[str, ...], seconds: tuple[int, ...], repeats: int) -> dict[str, Any]:
        """Latency of the encoder on recordings of these lengths, as `bench` returns it."""
        batches = {f"{length} s": self._recording(length) for length in seconds}
        encoder = self.speech.model.get_submodule(self.speech.stack)
        return bench(encoder, batches, plans=",".join(("full", *plans)), kinds=_KINDS, repeats=repeats)

    def transcription(self, names: tuple[str, ...], repeats: int) -> dict[str, Any]:
        """Latency of a whole transcription of ten seconds by the original, and under each plan."""
        speech = self.speech
        models = {"full": speech.model} | {name: copy.deepcopy(speech.model) for name in names}
        for name in names:
            stack, plan = self._planned(name)
            mr.apply(models[name].get_submodule(stack), plan)
        inputs = self._recording(_TRANSCRIBED_SECONDS)
        limit = speech.model.generation_config.max_length
        length = speech.model.generate(**inputs, max_length=limit).shape[1]
        # All models write as many tokens, so that errors of the transcript do not count.
        settings = {"min_length": length, "max_length": length, "do_sample": False}
        calls = {name: partial(one.generate, **inputs, **settings) for name, one in models.items()}
        found = time_interleaved(calls, repeats=repeats, title="transcription")
        return {name: latency.data() for name, latency in found.items()}

    def _planned(self, name: str) -> tuple[str, mr.ReusePlan]:
        """The path of the encoder or decoder that a plan is for, and the plan."""
        model, plan = self.speech.model, mr.ReusePlan.parse(name.removeprefix(_DECODER))
        part = model.get_decoder() if name.startswith(_DECODER) else model.get_encoder()
        return next(path for path, one in model.named_modules() if one is part), plan

    def _recording(self, seconds: int) -> dict[str, Tensor]:
        """Inputs of the encoder for test recordings, one after the other."""
        rate = self.speech.extractor.sampling_rate
        samples = np.concatenate([waveform_of(cut, rate) for cut in self.speech.cuts])
        return self.speech.inputs(np.resize(samples, seconds * rate))
