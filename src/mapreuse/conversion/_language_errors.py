"""Errors of converted language models: growth of the perplexity, of texts and of repeated passages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from mapreuse.conversion._layer_cache import in_evaluation_mode
from mapreuse.models import optimized

_MIN_TOKENS = 4
"""Minimum number of tokens of a text: a passage of two tokens, repeated."""


def perplexity_error(original: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Callable[[nn.Module], float]:
    """Make a function that gives the relative growth of a converted language model's perplexity.

        error = perplexity / perplexity of the original − 1,   perplexity = exp(−mean of log p(x_t | x_<t))

    The mean is over all tokens but the first of each text. Padding is left out.

    Args:
        original: a model whose forward takes `input_ids` and returns `logits`.
        batches: batches with `input_ids`, and an `attention_mask` if texts are padded.

    Raises:
        ValueError: if the model returns no logits, or a text has fewer than four tokens.
    """
    return _growth(original, [(text, 1) for text in _texts(original, batches)])


def copying_error(original: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Callable[[nn.Module], float]:
    """Make a function that gives the relative growth of the perplexity of repeated passages.

    The first half of each text is repeated, and only the tokens of the copy count, but for its first one. A model
    that finds the passage in its context predicts the copy almost perfectly. Lost recall shows here, while
    `perplexity_error` hides it. Arguments and errors are those of `perplexity_error`.
    """
    passages = [text[:, : text.shape[1] // 2] for text in _texts(original, batches)]
    return _growth(original, [(passage.repeat(1, 2), passage.shape[1] + 1) for passage in passages])


def _texts(original: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[Int[Tensor, "1 tokens"]]:
    """The texts of batches, one by one and without padding."""
    texts = []
    for batch in batches:
        if "input_ids" not in batch:
            raise ValueError(f"{type(original).__name__}: the metric needs input_ids, got {', '.join(batch)}")
        tokens = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(tokens)).bool()
        texts += [one[kept][None] for one, kept in zip(tokens, mask, strict=True)]
    if (shortest := min(text.shape[1] for text in texts)) < _MIN_TOKENS:
        raise ValueError(f"the metric needs texts of at least {_MIN_TOKENS} tokens, but one has {shortest}")
    return texts


def _growth(original: nn.Module, counted: list[tuple[Tensor, int]]) -> Callable[[nn.Module], float]:
    """The relative growth of the perplexity of texts, each from a token on."""

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        found = []
        with in_evaluation_mode(model), optimized(model):
            for text, first in counted:
                output = model(input_ids=text)
                if not isinstance(getattr(output, "logits", None), Tensor):
                    raise ValueError(
                        f"{type(model).__name__} returns no logits, which the metric needs; give the model with its "
                        "head, such as AutoModelForCausalLM opens it"
                    )
                logits = output.logits[0, first - 1 : -1].float()
                found.append(functional.cross_entropy(logits, text[0, first:], reduction="none").double())
        return float(torch.cat(found).mean())

    target = loss(original)
    return lambda model: math.exp(loss(model) - target) - 1
