"""A copy that shares its parameters with a model can be changed without changing the model."""

import pytest
import torch
from families import FAMILIES, build
from packed_encoders import encoder
from vision_blocks import VisionTransformer

from mapreuse import ReusePlan, apply
from mapreuse.models import copy_with_same_weights

PLAN = ReusePlan.from_sources([0, 0, 2, 2], {1: [2, 0, 3, 1], 3: [3, 2, 1, 0]})

MODELS = {
    **{family: lambda family=family: build(family) for family in FAMILIES},
    "torch": lambda: (encoder(batch_first=True), {"src": torch.randn(3, 9, 32)}),
    "timm": lambda: (VisionTransformer(), {"pixel_values": torch.randn(4, 3, 16, 16)}),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_plan_applied_to_a_copy_leaves_the_model_as_it_was(make):
    model, batch = make()
    model.eval()
    parameters = dict(model.named_parameters())
    were = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    kinds = [type(module) for module in model.modules()]
    copied = copy_with_same_weights(model)

    assert [name for name, _ in copied.named_parameters()] == list(parameters)
    assert all(parameter is parameters[name] for name, parameter in copied.named_parameters())
    assert not {id(buffer) for buffer in copied.buffers()} & {id(buffer) for buffer in model.buffers()}
    apply(copied, PLAN)
    with torch.no_grad():
        copied(**batch)
    now = dict(model.named_parameters())
    assert list(now) == list(parameters)
    assert all(now[name] is parameters[name] and torch.equal(now[name], were[name]) for name in now)
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any(hasattr(module, "_map_reuse") for module in model.modules())
