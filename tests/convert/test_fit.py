"""Closed-form refit, against least squares and against the held-out error measured independently."""

import pytest
import torch
from families import build
from text_batches import random_batches
from torch.nn import functional

import mapreuse as mr
from mapreuse.convert._fit import _Sums


@pytest.mark.parametrize("with_bias", [True, False])
def test_streamed_normal_equations_solve_the_ridge_regression(with_bias):
    """Ridge towards given weights is least squares with the penalty as extra rows."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(200, 6).double(), torch.randn(200, 3).double()
    weight, bias = torch.randn(3, 6).double(), torch.randn(3).double() if with_bias else None
    sums = _Sums()
    for rows in torch.arange(200).split(37):
        sums.add(inputs[rows], targets[rows])
    solved, intercept = sums.solve(weight, bias, ridge=0.3)

    strength = 0.3 * inputs.square().sum(0).mean()
    ones = torch.ones(200, 1).double()
    left = torch.cat([inputs, ones], 1) if with_bias else inputs
    width = left.shape[1]
    penalty = strength.sqrt() * torch.eye(6, width).double()
    expected = torch.linalg.lstsq(
        torch.cat([left, penalty]), torch.cat([targets, strength.sqrt() * weight.mT])
    ).solution
    torch.testing.assert_close(solved, expected[:6].mT)
    if with_bias:
        torch.testing.assert_close(intercept, expected[6])


def test_a_refit_brings_the_converted_model_closer_on_batches_it_has_not_seen():
    model, _ = build("bert")
    plan = mr.ReusePlan.grouped(4, 2)
    converted = mr.convert(model, plan)
    unseen = random_batches(6, seed=1)

    def distance():
        with torch.no_grad():
            pairs = [(converted(**b).last_hidden_state, model(**b).last_hidden_state) for b in unseen]
        return sum(functional.mse_loss(a, b).item() for a, b in pairs)

    before = distance()
    reports = mr.fit(converted, model, random_batches(40))

    assert [report.layer for report in reports] == [1, 3]
    assert all(report.after < report.before for report in reports)
    assert distance() < 0.95 * before


def test_padding_changes_nothing():
    model, _ = build("bert")
    plan = mr.ReusePlan.grouped(4, 4)
    batches = random_batches(8)
    other = [dict(batch) for batch in batches]
    for batch in other:
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)
    fitted = [mr.convert(model, plan) for _ in range(2)]
    reports = [mr.fit(converted, model, given) for converted, given in zip(fitted, (batches, other), strict=True)]

    for one, two in zip(*reports, strict=True):
        assert one.after == pytest.approx(two.after, rel=1e-3)


def test_too_few_batches_a_missing_plan_and_nan_activations_are_refused():
    model, _ = build("bert")
    converted = mr.convert(model, mr.ReusePlan.grouped(4, 2))
    with pytest.raises(ValueError, match="at least 4 calibration batches, got 2"):
        mr.fit(converted, model, random_batches(2))
    with pytest.raises(ValueError, match="apply a plan to it first"):
        mr.fit(model, model, random_batches(4))
    with torch.no_grad():
        converted.encoder.layer[0].output.dense.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="layer 1: activations are not finite"):
        mr.fit(converted, model, random_batches(4))
