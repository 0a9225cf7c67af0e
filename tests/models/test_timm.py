"""Attention in timm's style under a plan: results, gradients, refusals."""

import copy

import pytest
import torch
from agreement import PLANS
from oracle import defined_packed_output, disagreement
from packed_encoders import peaked
from torch import nn
from vision_blocks import Attention, Block, MaskedTransformer, OldAttention, VisionTransformer

import mapreuse as mr

GROUPS = PLANS["groups of 2"]
EVERY = torch.ones(2, 17, dtype=torch.bool)
STYLES = {
    "fused": {},
    "normed queries and keys": {"qk_norm": True},
    "not fused": {"fused_attn": False, "qk_norm": True},
    "earlier version": {"attention": OldAttention},
}


def pictures():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.sample(5)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("style", STYLES)
def test_blocks_in_a_sequence_agree_with_the_definition(style, plan):
    model = peaked(VisionTransformer(**STYLES[style]))
    with torch.no_grad():
        untouched = model(pictures())
        expected = defined_packed_output(model, PLANS[plan], pictures())
        found = mr.apply(model, PLANS[plan])(pictures())
    if plan == "full":
        assert max(disagreement(found, other, EVERY) for other in (expected, untouched)) <= 1e-5
    else:
        assert disagreement(found, expected, EVERY) <= 1e-4
        assert disagreement(untouched, expected, EVERY) > 1e-1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("plan", ["full", "other heads", "in part"])
def test_blocks_in_a_loop_with_padding_agree_with_the_definition(plan, fused):
    model = peaked(MaskedTransformer(fused_attn=fused))
    valid = torch.arange(9) < torch.tensor([[9], [5], [2]])
    mask = valid[:, None, None].expand(3, 1, 9, 9)
    torch.manual_seed(1)
    x = torch.randn(3, 9, 32)
    with torch.no_grad():
        expected = defined_packed_output(model, PLANS[plan], x, attn_mask=mask)
        found = mr.apply(model, PLANS[plan])(x, attn_mask=mask)
    assert found.isfinite().all()
    assert disagreement(found, expected, valid) <= 1e-4


@pytest.mark.parametrize("plan", ["groups of 2", "other heads", "in part"])
def test_blocks_with_a_norm_of_the_context_agree_with_the_definition(plan):
    model = peaked(VisionTransformer(scale_norm=True))
    for block in model.blocks:
        nn.init.normal_(block.attn.norm.weight)
    with torch.no_grad():
        expected = defined_packed_output(model, PLANS[plan], pictures())
        found = mr.apply(model, PLANS[plan])(pictures())
    assert disagreement(found, expected, EVERY) <= 1e-4


def test_blocks_train_with_the_gradients_of_the_definition():
    model = peaked(VisionTransformer(qk_norm=True)).train()
    converted = mr.apply(copy.deepcopy(model), PLANS["in part"])
    found, expected = pictures().requires_grad_(), pictures().requires_grad_()
    weight = torch.randn(2, 17, 32)
    (converted(found) * weight).sum().backward()
    (defined_packed_output(model, PLANS["in part"], expected) * weight).sum().backward()
    assert disagreement(found.grad, expected.grad, torch.ones(2, 3, 16, dtype=torch.bool)) <= 1e-3
    assert converted.blocks[1].attn.qkv.weight.grad.abs().max() > 0


class GatedAttention(Attention):
    def forward(self, x):
        return super().forward(x) * x.sigmoid()


def test_attention_that_only_resembles_timms_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="GatedAttention: its modules resemble those of timm's Attention"):
        mr.apply(VisionTransformer(attention=GatedAttention), GROUPS)
    model = VisionTransformer()
    model.blocks[2].attn.scale = 0.5
    with pytest.raises(ValueError, match=r"Attention: its scale is 0.5, but its fused attention uses 0.35"):
        mr.apply(model, GROUPS)
    monkeypatch.setitem(Attention.forward.__globals__, "maybe_add_mask", lambda scores, mask=None: scores)
    with pytest.raises(ValueError, match="Attention: its functions on masks are not those of timm"):
        mr.apply(VisionTransformer(), GROUPS)


def test_a_block_called_outside_its_model_is_refused():
    model = mr.apply(VisionTransformer(), GROUPS)
    with pytest.raises(ValueError, match=r"layer 0 .* was called by itself"):
        model.blocks[0](torch.randn(1, 4, 32))


def test_a_sequence_of_different_classes_is_no_stack():
    class OtherBlock(Block):
        pass

    with pytest.raises(ValueError, match="holds no list of layers"):
        mr.apply(nn.Sequential(Block(32, 4), OtherBlock(32, 4)), mr.ReusePlan.grouped(2, 2))
