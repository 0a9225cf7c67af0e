"""A sentence encoder with its calibration sentences and its metrics: cosine and top-10 overlap."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from mapreuse.console import tracked
from mapreuse_lab.models._metrics import Metric
from mapreuse_lab.models._packages import model_source
from mapreuse_lab.models._texts import fortunes, python_reference, sentences

_NEIGHBOURS = 10
_MAX_TOKENS = 128


class EmbeddingModel:
    """An encoder whose mean last hidden state is the embedding of a sentence, and its sentences.

    Calibration uses sentences of Debian's fortunes; evaluation uses sentences of Python's language reference.

    Args:
        name: a name of `MODEL_PACKAGES`, a directory, or a name on the Hugging Face Hub.
        num_calibration, num_evaluation: numbers of sentences.
    """

    stack = ""

    def __init__(self, name: str = "minilm", num_calibration: int = 2048, num_evaluation: int = 1024):
        source = model_source(name)
        self.model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.num_calibration, self.num_evaluation = num_calibration, num_evaluation
        self._targets: Tensor | None = None

    def calibration(self, stack: str = "") -> list[dict[str, Tensor]]:
        """Batches of 16 sentences."""
        return self.batches(calibration_sentences()[: self.num_calibration])

    def batches(self, texts: list[str], size: int = 16) -> list[dict[str, Tensor]]:
        """Batches of sentences with similar numbers of tokens, in random order."""
        options: dict[str, Any] = {"truncation": True, "max_length": _MAX_TOKENS}
        lengths = dict(zip(texts, map(len, self.tokenizer(texts, **options)["input_ids"]), strict=True))
        ordered = sorted(texts, key=lambda text: (lengths[text], text))
        groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        random.Random(1).shuffle(groups)
        return [dict(self.tokenizer(group, padding=True, return_tensors="pt", **options)) for group in groups]

    @torch.no_grad()
    def embeddings(self, model: nn.Module) -> Float[Tensor, "sentences width"]:
        """Embeddings of the evaluation sentences by a converted copy of the model, normalised."""
        pooled = []
        for batch in tracked("embeddings", self.batches(evaluation_sentences()[: self.num_evaluation])):
            rows = batch["attention_mask"][..., None]
            pooled.append((model(**batch).last_hidden_state * rows).sum(1) / rows.sum(1))
        return functional.normalize(torch.cat(pooled), dim=-1)

    def evaluate(self, model: nn.Module) -> list[Metric]:
        """Similarity to the original's embeddings.

        cosine  = mean over sentences of ⟨e, e'⟩
        overlap = mean share of a sentence's ten nearest sentences that stay among the ten nearest
        """
        if self._targets is None:
            self._targets = self.embeddings(self.model)
        found, targets = self.embeddings(model), self._targets
        pairs = zip(_nearest(found).tolist(), _nearest(targets).tolist(), strict=True)
        overlap = [len(set(one) & set(other)) / _NEIGHBOURS for one, other in pairs]
        values = {"cosine": (found * targets).sum(-1).tolist(), "top-10 overlap": overlap}
        return [Metric(name, "similarity", np.stack([some, np.ones(len(some))], 1)) for name, some in values.items()]


def calibration_sentences() -> list[str]:
    """All sentences of the fortunes, without those of the evaluation, in random order."""
    evaluation = set(evaluation_sentences())
    return [text for text in sentences("\n\n".join(fortunes())) if text not in evaluation]


def evaluation_sentences() -> list[str]:
    """Sentences of Python's language reference, in random order."""
    return sentences(python_reference())


def _nearest(embeddings: Float[Tensor, "sentences width"]) -> Tensor:
    return (embeddings @ embeddings.mT).fill_diagonal_(-2).topk(_NEIGHBOURS).indices
