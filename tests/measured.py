"""What a watched model gives: outputs, derivatives, maps, FLOPs; the same code runs the definition."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from watched import HEADS, LAYERS, PLANS, WIDTH, Defined, Watched

from mapreuse.models import Layer, find_stack

Tensors = tuple[Tensor, ...]
Found = dict[str, Tensor]
"""What a run gives: "output", or gradients by the names of parameters."""
Run = Callable[[Tensors], Found]


@dataclasses.dataclass(frozen=True)
class Case:
    """One tool, one model, and the number of positions of the inputs that it is run with."""

    watcher: str
    family: str
    plan: str
    storage: str
    length: int

    def __str__(self) -> str:
        return f"{self.watcher}-{self.family}-{self.plan}-{self.storage}-{self.length}"


def output(model: Callable[..., Tensor], tensors: Tensors) -> Found:
    with torch.no_grad():
        return {"output": model(*tensors)}


def loss(model: Callable[..., Tensor], tensors: Tensors, part: int = 0, parts: int = 1) -> Tensor:
    """A sum of the outputs with different weights; after a norm, the sum of their squares would be constant.

    If the tensors are every n-th item of a batch, the weights are those of these items. The mean over all parts is
    the loss of the batch.
    """
    outputs = model(*tensors)
    weights = torch.arange(parts * outputs.numel()).view(-1, *outputs.shape[1:]).cos()
    return (outputs * weights[part::parts]).mean()


def gradients(model: Watched, tensors: Tensors, run: Callable[..., Tensor] | None = None) -> Found:
    model.zero_grad()
    loss(model if run is None else run, tensors).backward()
    return comparable(model, {name: parameter.grad for name, parameter in model.named_parameters()})


def changed_by_plans(layer: Layer) -> list[nn.Parameter]:
    """The parameters of a layer that a plan removes or orders anew."""
    beside = [
        one for name, one in layer.layer.named_parameters() if name.startswith("attention.output.dense")
    ]  # BERT
    return [*layer.attention.parameters(), *beside]


def comparable(model: Watched, slopes: dict[str, Tensor | None]) -> Found:
    """Gradients of the parameters that no plan changes, and norms of the others."""
    norms: Found = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, layer in enumerate(find_stack(model.model).layers):
        inner = [slopes.pop(names[id(parameter)], None) for parameter in changed_by_plans(layer)]
        squares = [slope.square().sum() for slope in inner if slope is not None]
        norms[f"attention of layer {index}"] = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
    return norms | {name: slope for name, slope in slopes.items() if slope is not None}


def outside_attention(model: Watched) -> dict[str, nn.Parameter]:
    """The parameters of the layers that no plan changes."""
    layers = find_stack(model.model).layers
    inner = {id(parameter) for layer in layers for parameter in changed_by_plans(layer)}
    outer = {id(parameter) for layer in layers for parameter in layer.layer.parameters()} - inner
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in outer}


def directions(parameters: dict[str, nn.Parameter]) -> Found:
    return {name: (10 * parameter.detach()).sin() / 10 for name, parameter in parameters.items()}


def loss_of(model: Watched, tensors: Tensors) -> Callable[[Found], Tensor]:
    return lambda parameters: loss(functools.partial(functional_call, model, parameters), (tensors,))


def second(model: Watched, tensors: Tensors) -> Found:
    """The gradient of the squared norm of all gradients, for one parameter of the first layer."""
    name, parameter = next(iter(outside_attention(model).items()))
    with sdpa_kernel(SDPBackend.MATH):
        learned = [one for one in model.parameters() if one.requires_grad]
        slopes = torch.autograd.grad(loss(model, tensors), learned, create_graph=True, allow_unused=True)
        penalty = torch.stack([slope.square().sum() for slope in slopes if slope is not None]).sum()
        return {name: torch.autograd.grad(penalty, [parameter])[0]}


def hessian_product(model: Watched, tensors: Tensors) -> Found:
    parameters = outside_attention(model)
    names, vectors = list(parameters), tuple(directions(parameters).values())

    def function(*values: Tensor) -> Tensor:
        return loss_of(model, tensors)(dict(zip(names, values, strict=True)))

    with sdpa_kernel(SDPBackend.MATH):
        _, products = torch.autograd.functional.hvp(function, tuple(parameters.values()), vectors)
    return dict(zip(names, products, strict=True))


def directional(model: Watched, tensors: Tensors) -> Found:
    parameters = outside_attention(model)
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    function = functools.partial(functional_call, model, args=tensors)
    with sdpa_kernel(SDPBackend.MATH):
        outputs, slopes = torch.func.jvp(function, (values,), (directions(parameters),))
    return {"output": outputs, "slopes": slopes}


def attentions(model: Watched, tensors: Tensors) -> Found:
    with torch.no_grad():
        if isinstance(model, Defined):
            model(*tensors)
            maps = model.maps
        else:
            batch = dict(zip(model.names, tensors[:-1], strict=True))
            maps = model.model(**batch, output_attentions=True).attentions
    return {f"layer {layer}": one * tensors[-1][:, None] for layer, one in enumerate(maps)}


def flops(model: Watched, tensors: Tensors) -> Found:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*tensors)
    return {"flops": torch.tensor([float(counter.get_total_flops())])}


def saved_flops(case: Case, batch: int, length: int) -> int:
    """FLOPs of the queries, keys and scores that reusing heads do not compute.

    Of the scores of relative positions, the original computes those of all 2·T − 1 distances for each query, and the
    kernels, which serve long inputs and compressed maps, only those of T. The forward of Whisper has a fixed number
    of heads: a layer in which some heads compute projects the queries and keys of all.
    """
    saved, dim, key_heads = 0, WIDTH // HEADS, 2 if case.family == "Llama" else HEADS
    distances = 2 * length - 1 if case.family in ("Wav2Vec2-Conformer", "Parakeet") else 0
    copies = batch if case.family == "Parakeet" else 1  # of the distances, in the original
    for layer in range(LAYERS):
        own = [head for head, source in enumerate(PLANS[case.plan].heads(layer, HEADS)) if source is None]
        keys = len({head * key_heads // HEADS for head in own})
        reusing = HEADS - len(own)
        if case.family == "Whisper encoder" and own:
            reusing, keys = 0, key_heads
        is_compressed = case.storage in ("dense16", "dense8") and PLANS[case.plan].readers(layer)
        computed_distances = min(distances, length) if length > 90 or is_compressed else distances
        saved += (
            2
            * WIDTH
            * dim
            * (batch * length * (reusing + key_heads - keys) + distances * (copies * HEADS - len(own)))
        )
        scores = HEADS * (length + distances)
        scores -= (HEADS if case.storage == "recompute" else len(own)) * (length + computed_distances)
        saved += 2 * batch * length * dim * scores
    return saved
