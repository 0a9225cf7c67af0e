"""Who is timed: `transformers`' attentions, FlexAttention, and ours under each plan and storage."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType

import torch
from torch import Tensor, nn

from mapreuse.measure._definition import DEFINITION, follow
from mapreuse.measure._encoders import Encoder, EncoderSpec
from mapreuse.measure._flex import use_flex_attention
from mapreuse.models import apply, optimize
from mapreuse.plan import ReusePlan

PARTS = ("layers", "whole")
COMPILED = "+compile"
_PLAN = re.compile(r"\s*(\d+)\s*[x×]\s*(\d+)\s*")


@dataclass(frozen=True)
class Contestant:
    """One way to run an encoder.

    Attributes:
        kind: "eager", "sdpa", "sdpa+optimize", "flex" or "ours".
        plan: the plan's notation, or "full"; only ours reuse maps.
        storage: how ours carry shared maps.
        compiled: run under `torch.compile`.
    """

    kind: str
    plan: str = "full"
    storage: str = "dense"
    compiled: bool = False

    @property
    def name(self) -> str:
        """As shown in tables, such as "sdpa" or "ours 4x4 recompute+compile"."""
        words = [self.kind]
        if self.kind == "ours":
            words += [self.plan] if self.storage == "dense" else [self.plan, self.storage]
        return " ".join(words) + (COMPILED if self.compiled else "")

    @property
    def uncompiled(self) -> Contestant:
        """The contestant whose model this one compiles; itself where it is not compiled."""
        return replace(self, compiled=False)

    @property
    def compiles(self) -> bool:
        """True where the first call at a length compiles code for it."""
        return self.compiled or self.kind == "flex"


_UNCOMPILED = ("eager", "sdpa", "sdpa+optimize", "flex", "ours")
KINDS = tuple(kind + suffix for kind in _UNCOMPILED for suffix in ("", COMPILED))
"""The contestants to choose from: `transformers`' attentions, also with the convolutions as ours have them,
FlexAttention, and ours; each also compiled."""


def contestants(kinds: tuple[str, ...], plans: tuple[str, ...], storages: tuple[str, ...]) -> list[Contestant]:
    """One contestant for each kind, and for ours one for each plan and storage, uncompiled ones first."""
    found: list[Contestant] = []
    for kind in sorted(kinds, key=lambda kind: kind.endswith(COMPILED)):
        name, compiled = kind.removesuffix(COMPILED), kind.endswith(COMPILED)
        if name != "ours":
            found.append(Contestant(name, compiled=compiled))
            continue
        found += [
            Contestant(name, plan, storage, compiled)
            for plan in plans
            for storage in (storages if plan != "full" else ("dense",))
        ]
    return list(dict.fromkeys(found))


def plan_of_notation(notation: str, num_layers: int) -> ReusePlan:
    """The plan of `num_layers` layers that a notation means: "full", or what `ReusePlan.parse` takes."""
    if notation == "full":
        return ReusePlan.full(num_layers)
    plan = ReusePlan.parse(notation)
    if plan.num_layers != num_layers:
        raise ValueError(f"plan {notation!r} speaks of {plan.num_layers} layers, but the encoder has {num_layers}")
    return plan


def split_plans(text: str, num_layers: int) -> tuple[str, ...]:
    """Several notations in one line, parted by commas, as a list.

    A notation may hold commas itself: groups belong to one plan until they make up all `num_layers` layers. JSON ends
    where its brackets close.

    Example:
        >>> split_plans("full,1x4,4x3,8x2", 16)
        ('full', '1x4,4x3', '8x2')
    """
    plans: list[str] = []
    groups: list[str] = []
    rest = text.strip()
    while rest:
        if rest[0] in "[{" and not groups:
            _, end = json.JSONDecoder().raw_decode(rest)
            token, rest = rest[:end], rest[end:].lstrip(", ")
        else:
            token, _, rest = rest.partition(",")
            token, rest = token.strip(), rest.strip()
        group = _PLAN.fullmatch(token)
        if group is None and groups:
            break
        if group is None:
            plans.append(token)
            continue
        groups.append(token)
        if sum(int(size) * int(count) for size, count in _PLAN.findall(",".join(groups))) >= num_layers:
            plans.append(",".join(groups))
            groups = []
    if groups:
        plans.append(",".join(groups))
    for plan in plans:
        plan_of_notation(plan, num_layers)
    return tuple(plans)


def build(contestant: Contestant, spec: EncoderSpec, longest: int) -> Encoder:
    """The encoder as this contestant runs it, weights the same for all; compilation is left to `runner`."""
    return BUILDERS[contestant.kind](contestant, spec, longest)


def build_definition(plan: str, spec: EncoderSpec, longest: int) -> Encoder:
    """The encoder in `transformers`' eager attention, maps shared by the definition."""
    encoder = spec.build(DEFINITION, spec.num_layers, longest)
    follow(encoder.layers, plan_of_notation(plan, spec.num_layers))
    return encoder


def runner(encoder: Encoder, part: str, *, compiled: bool) -> Callable[[Tensor], Tensor]:
    """The call that is timed: inputs of `part` to last hidden states."""
    module: nn.Module = encoder if part == "whole" else encoder.layers

    def call(inputs: Tensor) -> Tensor:
        output = module(inputs)
        return output if isinstance(output, Tensor) else output.last_hidden_state

    if not compiled:
        return call
    # The compiler keeps what it compiled, and what it gave up on, by code object. With one of its own no contestant
    # suffers from another's graph breaks, although their layers share code.
    own = FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    # Shapes are fixed: one length is timed at a time, and a static graph is the fastest one.
    return torch.compile(own, dynamic=False)


def training_step(encoder: Encoder, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Forward and backward of the loss `mean(output · direction)`, for a random direction.

    A direction, not a norm: the last layer normalises its output, so a norm would have no gradient to speak of.
    """
    directions: dict[torch.Size, Tensor] = {}

    def step(inputs: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            output = run(inputs)
            if output.shape not in directions:
                directions[output.shape] = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
                directions[output.shape] = directions[output.shape].to(output)
            (output * directions[output.shape]).mean().backward()
            encoder.zero_grad(set_to_none=True)
        return output.detach()

    return step


def _library(contestant: Contestant, spec: EncoderSpec, longest: int) -> Encoder:
    return spec.build(contestant.kind, spec.num_layers, longest)


def _library_optimized(contestant: Contestant, spec: EncoderSpec, longest: int) -> Encoder:
    return optimize(spec.build("sdpa", spec.num_layers, longest))


def _flex(contestant: Contestant, spec: EncoderSpec, longest: int) -> Encoder:
    if not spec.has_relative_positions:
        return spec.build("flex_attention", spec.num_layers, longest)
    encoder = spec.build("sdpa", spec.num_layers, longest)
    use_flex_attention(encoder.layers)
    return encoder


def _ours(contestant: Contestant, spec: EncoderSpec, longest: int) -> Encoder:
    encoder = spec.build("sdpa", spec.num_layers, longest)
    apply(encoder.layers, plan_of_notation(contestant.plan, spec.num_layers), storage=contestant.storage)
    return optimize(encoder)


BUILDERS: dict[str, Callable[[Contestant, EncoderSpec, int], Encoder]] = {
    "eager": _library,
    "sdpa": _library,
    "sdpa+optimize": _library_optimized,
    "flex": _flex,
    "ours": _ours,
}
"""How each kind is built."""
