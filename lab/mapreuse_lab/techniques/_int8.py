"""8-bit weights, alone or with attention map reuse: the product that most users would try first.

    y = s x̂ Ŵᵀ + b,   Ŵ and x̂ integers of 8 bits; a scale for W, and one for every call for x

It changes the linear layers of all layers, feed-forward included, and no product of queries, keys and values.
`torch.ao.quantization.quantize_dynamic` does it after recovery, which trains float weights.

Cost: the operations of full attention, in 8 bits.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from mapreuse.models import find_stack
from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._pretrained import PretrainedStack
from mapreuse_lab.techniques._reuse import share_maps
from mapreuse_lab.techniques._technique import Technique, wrong_depth


class Int8(Technique, notation="int8[+reuse-{plan}]", label="int8[, reuse {plan}]", from_scratch=False):
    """Linear layers with 8-bit weights and activations.

    Attributes:
        plan: whose map each layer applies; None if layers share none.
    """

    plan: ReusePlan | None = None
    source = "quantize_dynamic of PyTorch"

    def why_not(self, stack: PretrainedStack) -> str:
        return "" if self.plan is None else wrong_depth(self.plan, stack)

    def convert(self, stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> None:
        if self.plan is not None:
            share_maps(stack, self.plan, batches)

    def finish(self, model: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch recommends torchao for new code
            for layer in find_stack(model).layers:
                torch.ao.quantization.quantize_dynamic(layer.layer, {nn.Linear}, inplace=True)
