"""Refits that plans share, against refits from the start."""

from dataclasses import replace

import pytest
import torch
from families import build
from text_batches import random_batches

import mapreuse as mr
from mapreuse.conversion import Judged, LayerFit, _refit
from mapreuse.conversion._refits import Refits
from mapreuse.conversion._targets import Wanted
from mapreuse.models import find_stack, output_projection

OWN = (None,) * 4
BELOW = ((0, 0), None, None, (0, 1))
FIRST, ALIKE, REORDERED, OTHER = (
    mr.ReusePlan((OWN, layer, OWN, last))
    for layer, last in (
        (BELOW, (None, (0, 2), (0, 3), None)),
        (BELOW, (None, (2, 2), (0, 3), None)),
        (BELOW, (None, (1, 2), None, (0, 1))),  # so that heads of layer 1 come in another order
        (((0, 0), None, None, (0, 2)), (None, (0, 2), (0, 3), None)),
    )
)


@pytest.fixture
def fitted(monkeypatch):
    """The layers that were refitted from the start."""

    def fit_layer(index, *rest):
        indices.append(index)
        return original(index, *rest)

    indices, original = [], _refit._fit_layer
    monkeypatch.setattr(_refit, "_fit_layer", fit_layer)
    return indices


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(("plan", "refitted"), [(ALIKE, [3]), (REORDERED, [1, 3]), (OTHER, [1, 3]), (FIRST, [])])
def test_what_a_plan_takes_from_another_is_what_refitting_it_gives(family, plan, refitted, fitted):
    original, batches = build(family)[0], random_batches(8)
    wanted, refits = Wanted(original, batches), Refits(kept_bytes=2**20)
    _refit.refit(mr.apply(build(family)[0], FIRST), wanted, refits)
    fitted.clear()
    model, alone = (mr.apply(build(family)[0], plan) for _ in range(2))
    reports = _refit.refit(model, wanted, refits)

    assert fitted == refitted
    assert reports[0].ridge is not None
    for one, other in zip(reports, mr.refit(alone, original, batches), strict=True):
        assert one.after == pytest.approx(other.after, rel=1e-5)
        assert replace(one, before=0.0, after=0.0) == replace(other, before=0.0, after=0.0)
    for name, parameter in alone.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], parameter, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kept_bytes", "again"), [(0, [1, 2, 3]), (12_000, [1]), (2**20, [])])
def test_only_so_many_bytes_are_kept_and_the_oldest_go_first(kept_bytes, again, fitted):
    """Output and values of a layer are 2 · 32 · 32 floats of four bytes: 8 KiB at most."""
    original, plan = build("bert")[0], mr.ReusePlan.grouped(4, 4)
    wanted, refits = Wanted(original, random_batches(8)), Refits(kept_bytes)
    _refit.refit(mr.convert(original, plan), wanted, refits)
    fitted.clear()
    known = [layer for layer in (1, 2, 3) if refits.again(mr.convert(original, plan), plan, layer) is not None]

    assert sorted({1, 2, 3} - set(known)) == again
    assert sum(w.output.nbytes + w.values.nbytes for _, w in refits._kept.values()) <= kept_bytes


def test_what_was_asked_for_last_goes_last():
    original, plan, refits = build("bert")[0], mr.ReusePlan.grouped(4, 4), Refits(kept_bytes=12_000)
    model = mr.convert(original, plan)
    _refit.refit(model, Wanted(original, random_batches(8)), refits)
    assert len(refits._kept) == 2
    refits.again(model, plan, 2)
    refits.keep(model, plan, LayerFit(1, before=0.5, after=0.4, ridge=1.0, values=False))

    assert [refits.again(model, plan, layer) is not None for layer in (1, 2, 3)] == [True, True, False]


def test_plans_that_are_judged_refit_what_they_have_in_common_once(fitted):
    judged = Judged(build("bert")[0], random_batches(8), lambda model: 0.5)
    judged(FIRST)
    judged(ALIKE)

    assert fitted == [1, 3, 3]


def test_a_layer_that_kept_its_weights_keeps_them_again():
    plan = FIRST
    model, other = (mr.apply(build("bert")[0], plan) for _ in range(2))
    refits = Refits(kept_bytes=2**20)
    with torch.no_grad():
        output_projection(find_stack(other).layers[1]).weight.zero_()
    refits.keep(other, plan, LayerFit(1, before=0.5, after=0.5, ridge=None, values=False))
    weight = output_projection(find_stack(model).layers[1]).weight.clone()

    assert refits.again(model, plan, 1) == LayerFit(1, 0.5, 0.5, None, False)
    assert torch.equal(output_projection(find_stack(model).layers[1]).weight, weight)
    assert refits.again(model, replace(plan, layers=(OWN, OWN, *plan.layers[2:])), 1) is None
