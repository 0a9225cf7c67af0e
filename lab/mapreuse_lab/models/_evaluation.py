"""Quality of a pretrained model under a plan: heads by index, aligned, and refitted."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AutoConfig

import mapreuse as mr
from mapreuse.console import Table
from mapreuse_lab.models._ctc import CtcModel
from mapreuse_lab.models._embeddings import EmbeddingModel
from mapreuse_lab.models._in_runtime import in_runtime
from mapreuse_lab.models._language import LanguageModel
from mapreuse_lab.models._metrics import Metric
from mapreuse_lab.models._packages import model_source
from mapreuse_lab.models._speech import SpeechModel
from mapreuse_lab.training import BASELINE, Recogniser


class Task(Protocol):
    """A pretrained model with its calibration data and its metrics.

    Attributes:
        model: the model.
        stack: path of the module whose layers share maps by default; empty for the whole model.
    """

    model: Any
    stack: str

    def calibration(self, stack: str) -> list[dict[str, Tensor]]:
        """Batches for the module with the stack."""

    def evaluate(self, model: nn.Module) -> list[Metric]:
        """The metrics of a converted copy of the model."""


def open_task(name: str, **speech: Any) -> Task:
    """Open a pretrained model with the task that its configuration tells.

    Args:
        name: a name of `MODEL_PACKAGES`, a directory, a name on the Hugging Face Hub, or baseline (the shipped
            recogniser).
        speech: `corpus` and `split` for recognisers, as `SpeechModel` takes them.

    Raises:
        ValueError: if there is no such model, or options for speech are given for another model.
    """
    source = str(BASELINE) if name == "baseline" else model_source(name)
    if Recogniser.is_saved_in(source):
        return CtcModel(source, **speech)
    try:
        config = AutoConfig.from_pretrained(source)
    except OSError:
        raise ValueError(f"{name}: neither a model of `mapreuse-lab fetch` nor a directory with a model") from None
    if config.is_encoder_decoder:
        return SpeechModel(source, **speech)
    if speech:
        raise ValueError(f"--corpus and --split belong to speech recognisers; {name} is a {config.model_type} model")
    causal = any(one.endswith(("ForCausalLM", "LMHeadModel")) for one in config.architectures or ())
    return LanguageModel(source) if causal else EmbeddingModel(source)


def models_under_plan(task: Task, plan: mr.ReusePlan, stack: str | None = None) -> Iterator[tuple[str, Any]]:
    """Copies of a task's model that share maps: with heads by index, aligned, and aligned and refitted.

    Args:
        task: the model with its data.
        plan: which layers share.
        stack: path of the module whose layers share, with `.cross` at its end for cross-attention; default: that
            of the task.

    Yields:
        What was done, and the whole model. The refit changes the aligned model in place.
    """
    stack = task.stack if stack is None else stack
    attention = "cross" if stack.endswith(".cross") else "self"
    stack = stack.removesuffix(".cross")
    original = task.model.get_submodule(stack)

    def shared(one: mr.ReusePlan) -> Any:
        model = copy.deepcopy(task.model)
        mr.apply(model.get_submodule(stack), one, attention=attention)
        return model

    yield "by index", shared(plan)
    batches = task.calibration(stack)
    model = shared(mr.align(original, plan, batches, attention=attention))
    yield "aligned", model
    mr.refit(model.get_submodule(stack), original, batches, attention=attention)
    yield "refitted", model


def evaluate_plan(
    task: Task,
    plan: mr.ReusePlan | None = None,
    stack: str | None = None,
    runtime: str | None = None,
    int8: bool = False,
) -> dict[str, list[Metric]]:
    """The metrics of the original, and of `models_under_plan`.

    Args:
        task: the model with its data.
        plan: which layers share; None evaluates the original alone.
        stack: path of the module whose layers share; default: that of the task.
        runtime: "openvino" or "onnx" also evaluates each model with the task's stack in this runtime.
        int8: there in int8; the weights alone of a language model.
    """
    found = {}
    for name, model in chain([("original", task.model)], models_under_plan(task, plan, stack) if plan else []):
        found[name] = task.evaluate(model)
        if runtime is not None:
            with tempfile.TemporaryDirectory() as folder:
                batches = task.calibration(task.stack)
                exported = in_runtime(model, task.stack, batches, runtime, int8, Path(folder) / "export")
                found[f"{name}, {runtime}{' int8' * int8}"] = task.evaluate(exported)
    return found


def quality_tables(found: dict[str, list[Metric]]) -> list[Table]:
    """Each metric of each model with its interval, and compared with the first model."""
    (first, original), *others = found.items()
    rows = [
        [one.name, str(len(one.sums)), *(some[i].text() for some in found.values())] for i, one in enumerate(original)
    ]
    tables = [Table("", ["metric", "samples", *found], rows, ["Brackets: 95 % bootstrap interval."])]
    if others:
        rows = [[one.name, *(some[i].text_against(one) for _, some in others)] for i, one in enumerate(original)]
        note = "Differences, or ratios of perplexities; brackets: 95 % interval of the paired bootstrap."
        tables.append(Table(f"against {first}", ["metric", *(name for name, _ in others)], rows, [note]))
    return tables


def quality_json(found: dict[str, list[Metric]]) -> dict[str, Any]:
    """Values and intervals of all models, and comparisons with the first one, for a JSON file."""
    original = next(iter(found.values()))
    return {
        name: {
            one.name: {"value": one.value, "interval": one.interval, "against": one.against(base)}
            for one, base in zip(metrics, original, strict=True)
        }
        for name, metrics in found.items()
    }
