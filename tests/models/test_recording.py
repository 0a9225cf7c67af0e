"""A recorder returns the maps in effect, and maps and values in the order of the original heads."""

import gc
import weakref

import pytest
import torch
from families import build
from torch.nn.attention.flex_attention import create_block_mask

from mapreuse import ReusePlan, apply, optimize, plan_of
from mapreuse.models import MapRecorder, not_padding

PLANS = {
    "full": ReusePlan.full(4),
    "groups": ReusePlan.grouped(4, 2),
    "heads": ReusePlan.from_sources([0, 0, 0, 3], {1: [2, 0, 3, 1], 2: [None, 1, 1, None]}),
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("storage", ["dense", "recompute"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("family", ["parakeet", "bert"])
def test_under_a_plan_it_returns_the_maps_in_effect_heads_in_order(family, plan, storage):
    model, batch = build(family)
    before = MapRecorder(model)(batch)
    optimize(apply(model, plan, storage=storage))  # as the recorder does, so that both round alike
    found = MapRecorder(model, under_plan=True)(batch)
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions

    assert torch.equal(found.valid, before.valid)
    rows = found.valid
    for ours, theirs in zip(found.maps, attentions, strict=True):
        torch.testing.assert_close(ours.transpose(1, 2)[rows], theirs.transpose(1, 2)[rows], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.values[0], before.values[0])  # the first layer's input is the same
    assert plan_of(model) == plan


def test_values_keep_the_order_of_the_original_heads():
    model, batch = build("bert")
    before = MapRecorder(model)(batch)
    plan = ReusePlan.from_sources([0, 0, 2, 3], {1: [2, 0, 3, 1]})
    layer = model.encoder.layer[0]
    with torch.no_grad():
        layer.attention.output.dense.weight.zero_()  # so that the second layer's input does not hang on any map
    zeroed = MapRecorder(model)(batch)
    apply(model, plan)
    found = MapRecorder(model, under_plan=True)(batch)

    torch.testing.assert_close(found.values[1], zeroed.values[1])
    torch.testing.assert_close(found.maps[1], before.maps[0][:, [2, 0, 3, 1]])


def test_a_model_under_a_plan_is_refused_where_the_original_is_wanted():
    model, _ = build("bert")
    apply(model, PLANS["groups"])
    with pytest.raises(ValueError, match="the model shares attention maps already"):
        MapRecorder(model)


def positions_of(batch):
    """The batch, padded at the end, at the start and for one whole row; and which of its inputs are no padding."""
    (name,) = (name for name in batch if "mask" in name)
    length = batch[name].shape[1]
    emptied = {key: value.clone() for key, value in batch.items()}
    emptied[name][-1] = 0
    flipped = {key: value.flip(1) if value.shape[1:2] == (length,) else value for key, value in batch.items()}
    return [(one, one[name].bool()) for one in (batch, flipped, emptied)]


@pytest.mark.sample(3)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bert", "clip-text", "gpt2", "llama", "modernbert", "qwen2", "roberta"])
def test_padding_is_told_from_positions_wherever_it_is(family, implementation):
    model, batch = build(family, implementation=implementation)
    for given, wanted in positions_of(batch):
        assert torch.equal(MapRecorder(model)(given).valid, wanted)


def test_a_mask_that_says_nothing_of_padding_is_refused():
    """As `flex_attention`'s."""
    mask = create_block_mask(lambda batch, head, query, key: query >= key, None, None, 8, 8, device="cpu")
    with pytest.raises(ValueError, match="of type BlockMask; load the model with attn_implementation='sdpa'"):
        not_padding(mask, torch.zeros(1, 8, 4))


@pytest.mark.parametrize("family", ["bert", "parakeet", "gpt2"])
def test_the_copy_is_freed_with_the_recorder(family):
    """At once: a search makes many, and collecting cycles is too late for models of half a gigabyte."""
    model, batch = build(family)
    recorder = MapRecorder(model)
    recorder(batch)
    copied = [weakref.ref(module) for module in recorder._model.modules()]
    gc.collect()
    gc.disable()
    try:
        del recorder
        assert not any(module() for module in copied)
    finally:
        gc.enable()
