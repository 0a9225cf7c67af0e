"""A decoder as a function of tensors: its cache is an input and an output, with values only where layers reuse."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from mapreuse import models
from mapreuse.exporting._runtimes import PAST, PRESENT, TEXT, ExportedDecoder, Run, positions_of

_MIN_EXAMPLE = 4
"""Minimum length of an example: two positions in the cache and two new ones, since exporters fix a size of one."""


class WithFlatCache(nn.Module):
    """A language model whose cache consists of tensors, under the names that optimum uses.

        logits, present.0.key, present.0.value, … = model(input_ids, attention_mask, past_key_values.0.key, …)

    The mask covers the cached and the new positions. A layer all of whose heads reuse has no key.

    Args:
        model: a decoder of `transformers` with a language-model head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self.text = tuple(name for name in TEXT if name in accepted)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Logits of the new positions, and the cache of all positions."""
        num_layers = len(models.find_stack(self.model).layers)
        states = [
            models.CachedStates(inputs.get(f"{PAST}.{layer}.key"), inputs[f"{PAST}.{layer}.value"])
            for layer in range(num_layers)
        ]
        text = {name: inputs[name] for name in self.text}
        cache = models.cache_of_states(self.model, states)
        output = self.model(**text, past_key_values=cache, use_cache=True)
        return {"logits": output.logits} | self._named(PRESENT, output.past_key_values)

    def _named(self, prefix: str, cache: DynamicCache) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer, (keys, values) in enumerate(models.states_of_cache(self.model, cache)):
            found |= {} if keys is None else {f"{prefix}.{layer}.key": keys}
            found[f"{prefix}.{layer}.value"] = values
        return found

    def text_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs without a cache; positions are counted from the first token that is not padding."""
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "position_ids": positions_of(mask)}
        return {name: inputs[name] for name in self.text}

    def step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs for the second half of a text, with the cache of its first half."""
        length = batch["input_ids"].shape[1]
        whole = self.text_inputs(_resized(batch, len(batch["input_ids"]), max(length, _MIN_EXAMPLE)))
        past = whole["input_ids"].shape[1] // 2
        first = {name: tensor[:, :past] for name, tensor in whole.items()}
        cache = self.model(**first, past_key_values=DynamicCache(), use_cache=True).past_key_values
        rest = {name: tensor if name == "attention_mask" else tensor[:, past:] for name, tensor in whole.items()}
        # Exporters take a view for another input.
        return {name: tensor.clone() for name, tensor in (rest | self._named(PAST, cache)).items()}

    def dynamic_dims(self, inputs: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The dimensions of each input that may change: batch size, and length or past length."""
        return {name: (0, 2 if name.startswith(PAST) else 1) for name in inputs}

    def compared(self, run: Run, batch: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Exported logits of whole texts and those of PyTorch, without padding."""
        text = self.text_inputs(batch)
        valid = text["attention_mask"].bool()
        return {"logits": (run(batch)["logits"][valid], self.model(**text, use_cache=False).logits[valid])}


def decoder_difference(decoder: WithFlatCache, exported: ExportedDecoder, example: Mapping[str, Tensor]) -> float:
    """max |exported − PyTorch| / max |PyTorch| of the logits, over prompts and several steps after each.

    Texts are cut or repeated from the example, at three other shapes; in two of them, one is padded on the left.
    PyTorch computes them at once, without a cache.
    """

    def run(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": torch.cat(list(_in_steps(exported, batch)), 1)}

    largest = 0.0
    for batch in _other_texts(example):
        found, expected = decoder.compared(run, batch)["logits"]
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        largest = max(largest, math.inf if math.isnan(difference) else difference)
    return largest


def _in_steps(
    exported: ExportedDecoder, batch: Mapping[str, Tensor]
) -> Iterator[Float[Tensor, "batch new vocabulary"]]:
    """Logits of the first half, of three steps of one token, and of all other tokens at once."""
    length = batch["input_ids"].shape[1]
    cuts = sorted({0, length, *range(length // 2, min(length // 2 + 4, length))})
    exported.reset()
    for start, end in itertools.pairwise(cuts):
        yield exported(batch["input_ids"][:, start:end], batch["attention_mask"][:, :end])


def _other_texts(example: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    length = max(example["input_ids"].shape[1], 2 * _MIN_EXAMPLE)
    for items, factor, padding in ((1, 1.0, 0.0), (2, 0.75, 0.2), (3, 1.25, 0.4)):
        batch = _resized(example, items, math.ceil(factor * length))
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][-1, : math.ceil(padding * batch["input_ids"].shape[1])] = 0
        yield batch


def _resized(batch: Mapping[str, Tensor], items: int, length: int) -> dict[str, Tensor]:
    """A batch of another size, cut or repeated from this one."""

    def resized(tensor: Int[Tensor, "batch length"]) -> Tensor:
        return tensor[torch.arange(items) % len(tensor)][:, torch.arange(length) % tensor.shape[1]]

    return {name: resized(tensor) for name, tensor in batch.items()}
