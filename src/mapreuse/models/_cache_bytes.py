"""How many bytes a model caches for each token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mapreuse.models._apply import applied_plans
from mapreuse.models._layout import LayerLayout
from mapreuse.models._plan_conversions import plan_conversions
from mapreuse.models._projections import form_of, head_dim_of
from mapreuse.models._source import Unsupported
from mapreuse.models._stack import find_stack
from mapreuse.plan import ReusePlan


@dataclass(frozen=True)
class CacheBytes:
    """Bytes that a decoder caches for each token of one text. As text, the table of the plan with these numbers.

    Attributes:
        plan: the plan.
        layers: bytes of each layer under the plan.
        unshared: bytes of each layer without sharing.
    """

    plan: ReusePlan
    layers: tuple[int, ...]
    unshared: tuple[int, ...]

    def __str__(self) -> str:
        table = str(self.plan).splitlines()
        lines = table[-len(self.layers) :]
        width = max(map(len, lines))
        rows = (f"{line:<{width}}  {size:>6,} bytes" for line, size in zip(lines, self.layers, strict=True))
        return "\n".join([*table[: -len(self.layers)], self.summary(), *rows])

    def summary(self) -> str:
        """The sum over all layers, as one line of text."""
        before, after = sum(self.unshared), sum(self.layers)
        saved = f" ({before:,} without sharing: {after / before - 1:+.1%})" if after != before else ""
        return f"cache: {after:,} bytes a token{saved}"


def cache_bytes(model: nn.Module, plan: ReusePlan | None = None) -> CacheBytes:
    """Count the bytes that a decoder caches for each token.

        bytes[l] = (heads of the keys that layer l projects + heads of its values) · head_dim · bytes of a number

    In share mode "corrected", a reusing layer also caches `rank` numbers for each head of its values. Numbers are as
    wide as the weights. Layers with a sliding window store no more tokens than the window has. The
    cache of cross-attention is not counted.

    Args:
        model: a decoder, or the part of a model that holds one stack of layers. It is unchanged.
        plan: a plan for a model without one. None: the plan in force, or no sharing.

    Raises:
        ValueError: if the model keeps no cache, or has a plan and another one is given.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(
        ...     num_hidden_layers=4, hidden_size=64, num_attention_heads=4, intermediate_size=64, vocab_size=9
        ... )
        >>> print(cache_bytes(transformers.LlamaModel(config), ReusePlan.parse("2x2")))
        4 layers: 2 computing, 2 reusing
        cache: 1,536 bytes a token (2,048 without sharing: -25.0%)
        layer 0  computes           512 bytes
        layer 1  reuses layer 0     256 bytes
        layer 2  computes           512 bytes
        layer 3  reuses layer 2     256 bytes
    """
    stack = find_stack(model)
    applied = list(applied_plans(model).values())
    if applied and plan not in (None, applied[0].plan):
        raise ValueError("the model has another plan in force; give the original model, or no plan")
    if not keeps_cache(model):
        raise Unsupported(f"{type(stack.module).__name__} keeps no cache; only decoders do")
    layouts: list[LayerLayout]
    if applied:
        plan = applied[0].plan
        layouts = [layer.attention._layout for layer in stack.layers]  # type: ignore[misc]
    else:
        plan = plan or ReusePlan.full(len(stack.layers))
        layouts = [conversion.layout for conversion in plan_conversions(model, stack, plan)]
    layers, unshared = [], []
    for layer, layout in zip(stack.layers, layouts, strict=True):
        size = next(layer.attention.parameters()).element_size()
        head = head_dim_of(layer) * size
        low_rank = (layout.rank or 0) * layout.num_value_heads * size
        layers.append((len(layout.key_heads) + layout.num_value_heads) * head + low_rank)
        unshared.append(2 * layout.num_value_heads * head)
    return CacheBytes(plan, tuple(layers), tuple(unshared))


def keeps_cache(model: nn.Module) -> bool:
    """Whether the stack of a model is a decoder that can use a cache: its attention is causal and updates one."""
    layer = find_stack(model).layers[0]
    return bool(getattr(layer.attention, "is_causal", False)) and form_of(layer).cache is not None
