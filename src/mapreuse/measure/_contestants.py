"""Contestants of a benchmark: one model with different attention, plans, storages and optimizations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from mapreuse.models import apply, check_batch, copy_with_same_weights, find_stack, optimize
from mapreuse.plan import ReusePlan

SHARING = "mapreuse"
OPTIMIZE, COMPILE = "+optimize", "+compile"

Batch = Mapping[str, Any]

Attention = Callable[[nn.Module], object]
"""Changes the attention of a model in place."""


def use_attention(model: nn.Module, implementation: str) -> None:
    """Select an attention implementation of `transformers` in all configs of a model, in place."""
    configs: list[Any] = [
        module.config for module in model.modules() if isinstance(getattr(module, "config", None), PreTrainedConfig)
    ]
    if not configs and implementation != "sdpa":
        raise ValueError(f"{type(model).__name__} has no config that selects {implementation} attention")
    for config in configs:
        config._attn_implementation = implementation


ATTENTIONS: dict[str, Attention] = {name: partial(use_attention, implementation=name) for name in ("eager", "sdpa")}
"""The attention implementations of `transformers` that a model is compared with."""


@dataclass(frozen=True)
class Contestant:
    """One way to run a model.

    Attributes:
        kind: "eager", "sdpa", another attention implementation, or "mapreuse".
        plan: notation of the plan, or "full". Only "mapreuse" shares maps.
        storage: storage of shared maps.
        optimized: `optimize` was called on the model.
        compiled: the model runs under `torch.compile`.
    """

    kind: str
    plan: str = "full"
    storage: str = "dense"
    optimized: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        """Name in tables, such as "sdpa" or "mapreuse 4x4 recompute+optimize"."""
        words = [self.kind]
        if self.kind == SHARING:
            words += [self.plan] if self.storage == "dense" else [self.plan, self.storage]
        return " ".join(words) + OPTIMIZE * self.optimized + COMPILE * self.compiled

    def build(self, model: nn.Module, attentions: Mapping[str, Attention] = ATTENTIONS) -> nn.Module:
        """A copy of `model` that runs as this contestant does, uncompiled. Weights are shared where possible."""
        built = copy_with_same_weights(model)
        if self.kind == SHARING:
            apply(built, ReusePlan.parse(self.plan, len(find_stack(model).layers)), storage=self.storage)
        else:
            attentions[self.kind](built)
        return optimize(built) if self.optimized else built


def contestants(
    kinds: Sequence[str],
    plans: Sequence[str],
    storages: Sequence[str],
    attentions: Collection[str] = tuple(ATTENTIONS),
) -> list[Contestant]:
    """One contestant for each kind; of "mapreuse", one for each plan and storage. Uncompiled contestants come first.

    Raises:
        ValueError: if there is no such kind.
    """
    suffixes = ("", OPTIMIZE, COMPILE, OPTIMIZE + COMPILE)
    allowed = [kind + suffix for suffix in suffixes for kind in (*attentions, SHARING)]
    found: list[Contestant] = []
    for name in kinds:
        if name not in allowed:
            raise ValueError(f"contestants must be some of {', '.join(allowed)}; got {name!r}")
        kind = name.partition("+")[0]
        pairs = [("full", "dense")]
        if kind == SHARING:  # storage makes no difference to a plan without sharing
            pairs = [(plan, "dense" if plan == "full" else storage) for plan, storage in product(plans, storages)]
        found += [Contestant(kind, *pair, optimized=OPTIMIZE in name, compiled=COMPILE in name) for pair in pairs]
    return sorted(dict.fromkeys(found), key=lambda one: one.compiled)


def split_plans(text: str, num_layers: int) -> tuple[str, ...]:
    """The plans in a text, in which commas separate them; the default plans if it is empty.

    The notation of a plan may contain commas too: groups belong to one plan until they have `num_layers` layers. By
    default: no reuse, groups of 2 and 4, and two groups, if they divide the number of layers.

    Example:
        >>> split_plans("full,1x4,4x3,8x2", 16)
        ('full', '1x4,4x3', '8x2')

    Raises:
        ValueError: if a plan cannot be read, or does not have `num_layers` layers.
    """
    plans, begun = list[str](), ""
    for part in text.split(","):
        begun = ",".join(filter(None, (begun, part.strip())))
        if _has_all_layers(begun, num_layers):
            plans.append(begun)
            begun = ""
    for plan in filter(None, (*plans, begun)):
        ReusePlan.parse(plan, num_layers)
    sizes = [size for size in (2, 4, num_layers // 2) if size > 1 and num_layers % size == 0]
    return tuple(plans) or ("full", *dict.fromkeys(f"{size}x{num_layers // size}" for size in sizes))


def _has_all_layers(notation: str, num_layers: int) -> bool:
    try:
        return notation == "full" or ReusePlan.parse(notation).num_layers >= num_layers
    except ValueError:
        return False


def named_batches(batches: Iterable[Batch] | Mapping[str, Batch]) -> dict[str, Batch]:
    """Batches by name; if they have none, by the shape of their first tensor, such as "input_ids 8 × 128"."""
    if isinstance(batches, Mapping):
        return dict(batches)
    named: dict[str, Batch] = {}
    for batch in batches:
        check_batch(batch)
        name, tensor = next((name, value) for name, value in batch.items() if isinstance(value, Tensor))
        named.setdefault(f"{name} {' × '.join(map(str, tensor.shape))}", batch)
    return named
