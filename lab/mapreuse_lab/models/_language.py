"""A causal language model with its calibration texts and its metrics: perplexity, copying and recall."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from wordfreq import top_n_list

from mapreuse.console import tracked
from mapreuse_lab.models._metrics import Metric
from mapreuse_lab.models._packages import model_source
from mapreuse_lab.models._texts import bible, essays, fortunes, python_reference

_CHARACTERS_PER_TOKEN = 8  # more than any of the texts has
_RECALL_PAIRS, _RECALL_PROMPTS = 16, 8


class LanguageModel:
    """A causal language model, its tokenizer, and the texts that it is calibrated and evaluated on.

    Calibration uses Debian's fortunes; evaluation uses the Bible, essays and Python's language reference.

    Args:
        name: a name of `MODEL_PACKAGES`, a directory, or a name on the Hugging Face Hub.
        length: tokens of a window of text.
        num_windows: windows of each kind of text in the evaluation; half as many are copied.
        num_calibration: windows of calibration text.
    """

    stack = ""

    def __init__(self, name: str = "smollm2", length: int = 512, num_windows: int = 8, num_calibration: int = 24):
        source = model_source(name)
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.length, self.num_windows, self.num_calibration = length, num_windows, num_calibration

    def calibration(self, stack: str = "") -> list[dict[str, Tensor]]:
        """Batches of one window of fortunes each."""
        windows = text_windows(self.tokenizer, "\n\n".join(fortunes()), self.length, self.num_calibration)
        return [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]

    def evaluate(self, model: nn.Module) -> list[Metric]:
        """Perplexity on each kind of text, perplexity of copies, and recall."""
        texts = {"Bible": bible(), "essays": essays(), "Python": python_reference()}
        windows = {
            name: text_windows(self.tokenizer, text, self.length, self.num_windows) for name, text in texts.items()
        }
        found = [perplexity(model, some, f"perplexity, {name}") for name, some in windows.items()]
        return [
            *found,
            Metric("perplexity, all", "perplexity", np.concatenate([one.sums for one in found])),
            copying(model, [window for some in windows.values() for window in some[::2]]),
            recall(model, self.tokenizer),
        ]


def text_windows(tokenizer: Any, text: str, length: int, number: int) -> list[Int[Tensor, "1 tokens"]]:
    """`number` windows of `length` tokens, spread evenly over a text; each starts with a line.

    Raises:
        ValueError: if the text is too short.
    """
    windows = []
    for index in range(number):
        start = index * len(text) // number
        start = text.find("\n", start) + 1 if index else 0
        piece = text[start : start + _CHARACTERS_PER_TOKEN * length]
        tokens = _tokens(tokenizer, piece)[:length]
        if len(tokens) < length:
            raise ValueError(f"a text of {len(text)} characters is too short for {number} windows of {length} tokens")
        windows.append(torch.tensor([tokens]))
    return windows


def perplexity(model: nn.Module, windows: list[Int[Tensor, "1 tokens"]], name: str = "perplexity") -> Metric:
    """Perplexity of windows of text, every token given the earlier ones of its window.

    perplexity = exp(−(Σ_t log p(x_t | x_<t)) / number of tokens)
    """
    losses = [token_losses(model, window)[0] for window in tracked(name, windows)]
    return Metric(name, "perplexity", np.array([(one.sum().item(), one.numel()) for one in losses]))


def copying(model: nn.Module, windows: list[Int[Tensor, "1 tokens"]], name: str = "copying") -> Metric:
    """Perplexity of a repeated passage: the first half of each window, twice; the first copy does not count.

    A model that finds the passage in its context predicts the copy almost perfectly. Lost recall shows here, while
    the perplexity of other text hides it. The first token of the copy does not count, for nothing announces it.
    """
    repeated = [window[:, : window.shape[1] // 2].repeat(1, 2) for window in windows]
    losses = [token_losses(model, one)[0, one.shape[1] // 2 :] for one in tracked(name, repeated)]
    return Metric(name, "perplexity", np.array([(one.sum().item(), one.numel()) for one in losses]))


def recall(
    model: nn.Module, tokenizer: Any, num_pairs: int = _RECALL_PAIRS, num_prompts: int = _RECALL_PROMPTS
) -> Metric:
    """Fraction of numbers of a list that a model predicts when they are asked for.

    A prompt lists words with a number of four digits each, then the same pairs again in another order. A number of
    the second list is right if each of its tokens is the most likely one, given everything before it.
    """
    words = [word for word in top_n_list("en", 2000) if len(word) > 4 and word.isalpha()]
    generator, found = random.Random(0), []
    for _ in tracked("recall", range(num_prompts)):
        pairs = [(word, generator.randint(1000, 9999)) for word in generator.sample(words, num_pairs)]
        listed = "".join(f"{word}: {number}\n" for word, number in pairs) + "\n"
        tokens, answers = _tokens(tokenizer, listed), []
        for word, number in generator.sample(pairs, num_pairs):
            tokens += _tokens(tokenizer, f"{word}:")
            answer = _tokens(tokenizer, f" {number}")
            answers.append(slice(len(tokens), len(tokens) + len(answer)))
            tokens += answer + _tokens(tokenizer, "\n")
        predicted = [0, *_logits(model, torch.tensor([tokens]))[0].argmax(-1).tolist()]
        found.append((sum(predicted[one] == tokens[one] for one in answers), num_pairs))
    return Metric("recall", "rate", np.array(found))


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def token_losses(model: Any, tokens: Int[Tensor, "1 tokens"]) -> Float[Tensor, "1 tokens-1"]:
    """Negative log-likelihood of every token but the first."""
    logits = _logits(model, tokens)
    return functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:].to(logits.device), reduction="none").double()


@torch.no_grad()
def _logits(model: Any, tokens: Int[Tensor, "1 tokens"]) -> Float[Tensor, "1 tokens vocabulary"]:
    return model(input_ids=tokens.to(model.device), use_cache=False).logits.float()
