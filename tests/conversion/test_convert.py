"""Conversion copies."""

import copy

import torch
from families import build
from text_batches import random_batches

import mapreuse as mr


def test_the_original_stays_untouched():
    model, batch = build("bert")
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        converted = mr.convert(model, mr.ReusePlan.grouped(4, 2), [batch] * 4)
        after = model(**batch).last_hidden_state

    assert torch.equal(before, after)
    assert mr.plan_of(model) is None
    assert mr.plan_of(converted).layers[1] is not None


def test_with_batches_it_is_align_apply_and_fit():
    model, _ = build("bert")
    plan, batches = mr.ReusePlan.grouped(4, 2), random_batches(8)
    by_hand = mr.apply(copy.deepcopy(model), mr.align(model, plan, batches))
    mr.refit(by_hand, model, batches)
    converted = mr.convert(model, plan, iter(batches))

    assert mr.plan_of(converted) == mr.plan_of(by_hand)
    for name, weight in by_hand.state_dict().items():
        assert torch.equal(weight, converted.state_dict()[name])


def test_without_batches_the_plan_is_applied_as_it_is():
    model, _ = build("bert")
    plan = mr.ReusePlan.from_sources([0, 0, 2, 2], heads={1: [3, 3, 0, 1]})

    assert mr.plan_of(mr.convert(model, plan)) == plan


def test_the_strategy_is_carried_through():
    model, batch = build("bert")
    plan = mr.ReusePlan.grouped(4, 2)
    with torch.no_grad():
        dense = mr.convert(model, plan)(**batch).last_hidden_state
        recomputed = mr.convert(model, plan, storage="recompute")(**batch).last_hidden_state

    torch.testing.assert_close(dense, recomputed, atol=1e-4, rtol=1e-4)
