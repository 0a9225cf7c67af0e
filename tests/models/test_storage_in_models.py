"""Storages and memory budgets on whole models."""

import logging

import jaxtyping
import pytest
import torch
from agreement import PLANS
from families import build
from oracle import defined_output, disagreement, size_of, valid_rows

import mapreuse as mr
from mapreuse.maps import DenseMap, SharedMaps

GROUPS = PLANS["groups of 2"]
BY_HEADS = mr.ReusePlan((None, ((0, 0), (0, 1), (0, 2), None), ((0, 0), (0, 1), (0, 2), (1, 3)), None))
"""One head's map of layer 1 is alive beside those of layer 0."""


@pytest.fixture
def published(monkeypatch):
    """The maps published during the test, as pairs of layer and map."""
    found, publish = [], SharedMaps.publish

    def publishing(self, layer, attention_map):
        found.append((layer, attention_map))
        publish(self, layer, attention_map)

    monkeypatch.setattr(SharedMaps, "publish", publishing)
    return found


def bytes_alive(monkeypatch, model, batch):
    """The maximum number of bytes of published maps alive at once in one pass."""
    alive, maximum = {}, [0]
    publish, release = SharedMaps.publish, SharedMaps.release

    def publishing(self, layer, attention_map):
        alive[layer] = size_of(attention_map)
        maximum[0] = max(maximum[0], sum(alive.values()))
        publish(self, layer, attention_map)

    def releasing(self, layer):
        alive.pop(layer)
        release(self, layer)

    monkeypatch.setattr(SharedMaps, "publish", publishing)
    monkeypatch.setattr(SharedMaps, "release", releasing)
    with torch.no_grad():
        model(**batch)
    monkeypatch.undo()
    assert alive == {}
    return maximum[0]


@pytest.mark.sample(5)
@pytest.mark.parametrize("family", ["parakeet", "bert", "gpt2", "llama"])
@pytest.mark.parametrize(("storage", "tolerance"), [("dense16", 2e-3), ("dense8", 3e-2), ("auto", 3e-2)])
@pytest.mark.parametrize("plan", ["groups of 2", "in part"])
def test_compressed_maps_stay_near_the_definition(family, storage, tolerance, plan):
    model, batch = build(family, implementation="eager")
    reference = defined_output(model, batch, PLANS[plan])
    rows = valid_rows(model, batch, model(**batch))
    mr.apply(model, PLANS[plan], storage=storage)
    with torch.no_grad():
        assert disagreement(model(**batch).last_hidden_state, reference, rows) < tolerance


@pytest.mark.parametrize("plan", [GROUPS, PLANS["all from one"], BY_HEADS], ids=["groups", "all from one", "heads"])
@pytest.mark.parametrize("storage", ["dense", "dense8", "recompute"])
def test_a_budget_of_the_bytes_that_a_pass_uses_is_enough_and_a_byte_less_is_refused(monkeypatch, plan, storage):
    if plan is BY_HEADS and storage == "recompute":
        pytest.skip("queries and keys are counted head by head, but the mask is shared by them all")
    model, batch = build("bert")
    used = bytes_alive(monkeypatch, mr.apply(model, plan, storage=storage), batch)
    model, batch = build("bert")
    mr.apply(model, plan, storage=storage, memory_budget=used)
    with torch.no_grad():
        model(**batch)
    short, batch = build("bert")
    mr.apply(short, plan, storage=storage, memory_budget=used - 1)
    with torch.no_grad(), pytest.raises(ValueError, match=rf"memory_budget={used - 1}: the smallest is {storage}"):
        short(**batch)


@pytest.mark.parametrize("storage", ["dense", "dense8"])
def test_in_training_a_budget_must_hold_all_maps_uncompressed_because_autograd_keeps_them(published, storage):
    model, batch = build("bert")
    mr.apply(model, GROUPS, storage=storage)
    model(**batch)
    sizes = [size_of(one) for _, one in published]
    assert len(sizes) == 2
    for budget, fits in ((sum(sizes), True), (sum(sizes) - 1, False)):
        model, batch = build("bert")
        mr.apply(model, GROUPS, storage=storage, memory_budget=budget)
        if fits:
            model(**batch)
            continue
        with pytest.raises(ValueError, match=f"memory_budget={sum(sizes)}"):
            model(**batch)


def test_auto_stays_within_its_budget_and_logs_the_reason(monkeypatch, caplog):
    dense = bytes_alive(monkeypatch, mr.apply(build("bert")[0], GROUPS), build("bert")[1])
    model, batch = build("bert")
    mr.apply(model, GROUPS, storage="auto", memory_budget=dense // 2)
    with caplog.at_level(logging.INFO, logger="mapreuse"):
        used = bytes_alive(monkeypatch, model, batch)
    assert used <= dense // 2
    (line,) = [record.getMessage() for record in caplog.records if "is the fastest" in record.getMessage()]
    assert "(too large)" in line


def test_auto_trains_with_maps_that_have_gradients(published):
    model, batch = build("parakeet")
    mr.apply(model, GROUPS, storage="auto")
    model(**batch).last_hidden_state.square().mean().backward()
    assert len(published) == 2
    assert all(not isinstance(one, DenseMap) or one.scales is None for _, one in published)
    assert all(p.grad is not None for n, p in model.named_parameters() if "layers.0.self_attn.q_proj" in n)


def test_storage_and_budget_are_saved(tmp_path):
    model, batch = build("bert")
    mr.apply(model, GROUPS, storage="auto", memory_budget=1)
    mr.save(model, tmp_path)
    with torch.no_grad(), pytest.raises(ValueError, match="memory_budget=1"):
        mr.load(tmp_path)(**batch)


@pytest.mark.parametrize("budget", [0, -5, "1GB", float("nan"), float("inf"), 0.5])
def test_an_invalid_budget_is_refused(monkeypatch, budget):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside tests
    model, _ = build("bert")
    with pytest.raises(ValueError, match="memory_budget, in bytes, must be a whole number, at least 1, got") as error:
        mr.apply(model, GROUPS, memory_budget=budget)
    assert "\n" not in str(error.value)
    assert mr.plan_of(model) is None


@pytest.mark.sample(5)
@pytest.mark.parametrize("plan", ["other heads", "in part", "two sources"])
@pytest.mark.parametrize("family", ["bert", "parakeet", "llama", "gpt2"])
def test_only_layers_with_readers_publish_and_they_publish_the_heads_that_compute(published, family, plan):
    model, batch = build(family)
    with torch.no_grad():
        mr.apply(model, PLANS[plan])(**batch)
    expected = {
        layer: PLANS[plan].heads(layer, 4).count(None)
        for layer in range(PLANS[plan].num_layers)
        if PLANS[plan].readers(layer)
    }
    assert {layer: one.num_heads for layer, one in published} == expected
