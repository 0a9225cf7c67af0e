"""Reuse of attention outputs: a layer maps the attention output of an earlier layer by a small fitted function.

    attention[l] = attention[s] W[l] + b[l]

with attention[l] (T, C) the output of layer l's output projection, and s the source of l in a plan. W (C, C) and b
are fitted to the original's outputs on calibration data by ridge regression.

Cost: 2·T·C² FLOPs in a reading layer, which has no other projections and no map. Stored: T·C numbers, until the last
reader.

In the paper the function is a convolution between two linear layers, trained with the model. A linear map is its
closed form.

Paper: https://arxiv.org/abs/2301.02240
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._notation import layer_sources
from mapreuse_lab.techniques._pretrained import AttentionInputs, LayerStore, PretrainedStack
from mapreuse_lab.techniques._technique import Technique, wrong_depth

_RIDGE = 1e-6
"""Ridge, relative to the mean square of the inputs."""


class PublishedOutput(nn.Module):
    """A source layer's output projection."""

    def __init__(self, projection: nn.Linear, layer: int, store: LayerStore) -> None:
        super().__init__()
        self.projection, self.layer, self.store = projection, layer, store

    def forward(self, context: Tensor) -> Tensor:
        self.store.tensors[self.layer] = self.projection(context)
        return self.store.tensors[self.layer]


class MappedOutput(nn.Module):
    """A linear map of a source layer's attention output, in the place of a reading layer's output projection."""

    def __init__(self, weight: Tensor, bias: Tensor, source: int, store: LayerStore) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.source, self.store = source, store

    def forward(self, context: Tensor) -> Tensor:
        return nn.functional.linear(self.store.tensors[self.source], self.weight, self.bias)


class MappedOutputs(
    Technique, notation="outputs-{plan}", label="attention outputs mapped, {plan}", from_scratch=False
):
    """Layers map their source's attention output.

    Attributes:
        plan: whose output each layer maps, layer by layer.
    """

    plan: ReusePlan
    source = "Venkataramanan et al., Skip-Attention, ICLR 2024 (arXiv 2301.02240)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plan.num_heads is not None:
            raise ValueError("whole layers map outputs; the plan must not have head assignments")

    def why_not(self, stack: PretrainedStack) -> str:
        return wrong_depth(self.plan, stack)

    def convert(self, stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> None:
        sources, store = layer_sources(self.plan), LayerStore(stack.module)
        readers = [layer for layer in stack.layers if sources[layer.index] != layer.index]
        products = {layer.index: torch.zeros(0) for layer in readers}
        for batch in batches:
            rows = stack.recorded(batch)
            for index, before in products.items():
                given = nn.functional.pad(rows[sources[index]]["attention"].double(), (0, 1), value=1.0)
                both = torch.cat([given, rows[index]["attention"].double()], dim=-1)
                products[index] = given.mT @ both + (before if before.numel() else 0)
        stack.use_interface()
        for layer in readers:
            product = products[layer.index]
            width = len(product)
            ridge = _RIDGE * product[:, :width].diagonal()[:-1].mean()
            penalty = torch.full((width,), ridge.item(), dtype=torch.float64)
            penalty[-1] = 0.0
            fitted = torch.linalg.solve(product[:, :width] + penalty.diag(), product[:, width:]).mT
            dtype = layer.projection("output").weight.dtype
            weight, bias = fitted[:, :-1].to(dtype), fitted[:, -1].to(dtype)
            layer.use(self.core(self, layer))
            layer.remove("query", "key", "value")
            layer.replace("output", MappedOutput(weight.contiguous(), bias.contiguous(), sources[layer.index], store))
        for index in sorted({sources[layer.index] for layer in readers}):
            source = stack.layers[index]
            source.replace("output", PublishedOutput(source.projection("output"), index, store))

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """The zeros that stand in the place of values; nothing reads them."""
        return inputs.values
