"""Closed-form refit, against least squares and against the held-out error measured independently."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
import transformers
from families import FAMILIES, _text, build
from oracle import output_of_layer, valid_rows
from packed_encoders import encoder, peaked
from text_batches import random_batches
from torch import nn
from torch.nn import functional
from vision_blocks import VisionTransformer

import mapreuse as mr
from mapreuse.conversion import LayerRefit, PlanEvaluator, _least_squares, _refit
from mapreuse.conversion._least_squares import HeadProjections, LeastSquares
from mapreuse.conversion._refit import RefitCache, refit_layers
from mapreuse.conversion._targets import Targets
from mapreuse.models import find_stack, output_projection, value_projection

FEW, MANY = 11, 200
"""Numbers of rows: few enough to be stored as they are, and enough for normal equations."""


def random_problem(rows, maps, with_bias=True, value_heads=None):
    """Projections of inputs of width 5 by each map, and the rows of a regression."""
    torch.manual_seed(0)
    heads, inputs = len(maps), 5 * (max(maps) + 1)
    weights = HeadProjections(
        maps,
        torch.randn(value_heads or heads, 5, 3).double(),
        torch.randn(value_heads or heads, 3).double(),
        torch.randn(heads, 3, 4).double(),
        torch.randn(4).double() if with_bias else None,
    )
    return weights, *(torch.randn(rows, width).double() for width in (inputs, 4, 4))


def contexts(weights, inputs):
    """The definition, head by head."""
    repeats = len(weights.maps) // len(weights.values)
    values, biases = (one.repeat_interleave(repeats, 0) for one in (weights.values, weights.value_bias))
    heads = zip(weights.maps, values, biases, strict=True)
    return torch.cat([inputs[:, 5 * m : 5 * m + 5] @ value + bias for m, value, bias in heads], 1)


def outputs(weights, inputs):
    return contexts(weights, inputs) @ weights.output.flatten(0, 1) + (0 if weights.bias is None else weights.bias)


def summed(weights, inputs, targets, drift, dtype=torch.float32):
    """Rows added in the precision of a model."""
    sums = LeastSquares(weights)
    for rows in torch.arange(len(inputs)).split(4):
        sums.add(*(one[rows].to(dtype) for one in (inputs, targets, drift)))
    return sums


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("share", "block"), [(0.0, 512), (1.0, 4)])
def test_the_solved_output_projection_is_that_of_ridge_regression(rows, with_bias, share, block, monkeypatch):
    """A ridge penalty equals extra rows in ordinary least squares."""
    monkeypatch.setattr(_least_squares, "_BLOCK", block)
    start, inputs, targets, drift = random_problem(rows, (0, 1), with_bias)
    solved = summed(start, inputs, targets, drift).solve(0.3, share)

    left = contexts(start, inputs)
    strength = (0.3 * left.square().sum(0).mean()).sqrt()
    left = torch.cat([left, torch.ones(rows, 1).double()], 1) if with_bias else left
    penalty = strength * torch.eye(6, left.shape[1]).double()
    expected = torch.linalg.lstsq(
        torch.cat([left, penalty]), torch.cat([targets + share * drift, strength * start.output.flatten(0, 1)])
    ).solution
    torch.testing.assert_close(solved.output.flatten(0, 1), expected[:6])
    if with_bias:
        torch.testing.assert_close(solved.bias, expected[6])


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize(("maps", "last"), [((0, 1), 1), ((0, 1, 1), 1), ((2, 1, 1, 0), 2), ((0, 1, 2, 0, 1, 0), 3)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_no_small_change_of_solved_values_lowers_the_penalised_error(rows, with_bias, maps, last):
    """The `last` heads share one value head, as in grouped-query attention."""
    start, inputs, targets, drift = random_problem(rows, maps, with_bias, len(maps) // last)
    solved = summed(start, inputs, targets, drift)._solve_values(start, 1.0, 0.05)
    by_map = [inputs[:, 5 * number : 5 * number + 5] for number in maps[-last:]]
    gram = sum(one.mT @ one for one in by_map) / last
    product = sum(one @ one.mT for one in start.output[-last:])
    strength = 0.05 * torch.linalg.eigvalsh(gram).mean() * torch.linalg.eigvalsh(product).mean()

    def penalised(values):
        wrong = outputs(replace(start, values=values), inputs) - targets - drift
        return wrong.square().sum() + strength * (values - start.values).square().sum()

    least = penalised(solved.values)
    assert least < penalised(start.values)
    for _ in range(20):
        change = torch.zeros_like(solved.values)
        change[-1] = 0.01 * torch.randn(5, 3).double()
        assert penalised(solved.values + change) > least


@pytest.mark.parametrize("rows", [7, MANY])
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_error_from_sums_is_the_error_of_the_outputs(rows, share, with_bias):
    weights, inputs, targets, drift = random_problem(rows, (0, 1, 1, 2), with_bias)
    on_contexts = HeadProjections.of_contexts(weights.output, weights.bias)
    wrong = outputs(weights, inputs) - targets - share * drift
    expected = pytest.approx((wrong.square().sum() / targets.square().sum()).sqrt().item())
    assert summed(weights, inputs, targets, drift).error(weights, share) == expected
    of_contexts = summed(on_contexts, weights.contexts(inputs), targets, drift, torch.float64)
    assert of_contexts.error(on_contexts, share) == expected


def test_a_refit_reduces_the_error_on_unseen_batches():
    model, _ = build("bert")
    plan = mr.ReusePlan.grouped(4, 2)
    converted = mr.convert(model, plan)
    unseen = random_batches(6, seed=1)

    def distance():
        with torch.no_grad():
            pairs = [(converted(**b).last_hidden_state, model(**b).last_hidden_state) for b in unseen]
        return sum(functional.mse_loss(a, b).item() for a, b in pairs)

    before = distance()
    reports = mr.refit(converted, model, random_batches(40))

    assert [report.layer for report in reports] == [1, 3]
    assert all(report.after < report.before for report in reports)
    assert distance() < 0.95 * before


@pytest.mark.parametrize(
    ("family", "second"),
    [
        pytest.param("bert", 0, marks=pytest.mark.full),
        pytest.param("bert", ((0, 2), (0, 0), (0, 2), (0, 2)), marks=pytest.mark.full),
        ("bert", ((0, 2), None, None, (0, 2))),
        ("llama", 0),
    ],
)
def test_a_refit_recovers_lost_values(family, second):
    """If every head applies a different map, several apply the same one, some compute their own, or share values."""
    model, _ = build(family)
    converted = mr.convert(model, mr.ReusePlan((None, second, None, None)))
    torch.manual_seed(0)
    with torch.no_grad():
        value_projection(find_stack(converted).layers[1]).module.weight.normal_(std=0.3)
    (report,) = mr.refit(converted, model, random_batches(60))

    assert report.values
    assert report.after < 0.7 * report.before


def relative(actual, target):
    """Root of the mean over the channels of each channel's relative squared error."""
    actual, target = (one.flatten(0, -2) for one in (actual, target))
    return ((actual - target).norm(dim=0) / target.norm(dim=0)).square().mean().sqrt().item()


def refitted(model, batch, index, converted):
    """The report of the only reusing layer, after comparing its errors with those measured by hooks."""
    valid = valid_rows(model, batch, model(**batch))
    target = output_of_layer(model, index, batch)[valid]
    before = relative(output_of_layer(converted, index, batch)[valid], target)
    (report,) = mr.refit(converted, model, [batch] * 4)
    assert report.before == pytest.approx(before, rel=1e-3)
    assert report.after == pytest.approx(relative(output_of_layer(converted, index, batch)[valid], target), rel=1e-3)
    return report


@pytest.mark.parametrize("family", ["gpt2", "llama", "parakeet"])
def test_the_reported_error_is_that_of_the_layers_output(family):
    """For fused, grouped and relative attention."""
    model, batch = build(family)
    report = refitted(model, batch, 1, mr.convert(model, mr.ReusePlan.from_sources([0, 0, 2, 3])))
    assert report.after < 0.9 * report.before


def test_a_model_whose_first_layers_have_changed_is_refitted_as_it_is():
    model, batch = build("bert")
    converted = mr.convert(model, mr.ReusePlan.from_sources([0, 1, 2, 2]))
    with torch.no_grad():
        converted.encoder.layer[0].output.dense.weight *= -1
    refitted(model, batch, 3, converted)


def test_a_layer_without_values_keeps_finite_weights():
    original, _ = build("bert")
    with torch.no_grad():
        for parameter in original.encoder.layer[1].attention.self.value.parameters():
            parameter.zero_()
    model = mr.convert(original, mr.ReusePlan.grouped(4, 2))
    mr.refit(model, original, random_batches(8))
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_a_source_layer_may_have_a_projection_of_another_class():
    class OtherLinear(nn.Linear):
        pass

    reports = []
    for projection in (nn.Linear, OtherLinear):
        model, _ = build("bert")
        model.encoder.layer[0].attention.output.dense.__class__ = projection
        converted = mr.convert(model, mr.ReusePlan.from_sources([0, 0, 0, 3]))
        reports.append(mr.refit(converted, model, random_batches(8)))
    assert reports[0] == reports[1]
    assert [report.layer for report in reports[0]] == [1, 2]


def torch_encoder(batch_first, norm_first):
    batches = [{"src": torch.randn(3, 9, 32)} for _ in range(8)]
    batches = [b if batch_first else {"src": b["src"].transpose(0, 1)} for b in batches]
    return encoder(batch_first=batch_first, norm_first=norm_first), batches


def timm_blocks():
    return peaked(VisionTransformer()), [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(8)]


@pytest.mark.parametrize(
    "made",
    [*(functools.partial(torch_encoder, *form) for form in ((True, False), (False, True))), timm_blocks],
    ids=["torch", "torch, positions first, norms first", "timm"],
)
def test_encoders_of_torch_and_timm_are_aligned_and_refitted(made):
    torch.manual_seed(0)
    model, batches = made()
    plan = mr.align(model, mr.ReusePlan.from_sources([0, 0, 2, 3]), batches)
    converted = mr.convert(model, plan)
    (report,) = mr.refit(converted, model, [batches[0]] * 4)
    model.train()  # dropout is zero; in evaluation a torch encoder would take its fast path, past the attention
    target, actual = (output_of_layer(one, 1, batches[0]) for one in (model, converted))
    assert report.after == pytest.approx(relative(actual, target), rel=1e-3)
    assert report.after < 0.9 * report.before


@pytest.mark.parametrize("family", ["olmo2", "llama", "bert"])
def test_no_refitted_layer_is_worse_on_held_out_batches(family, monkeypatch):
    """OLMo 2 normalises before the residual sum, so drift cannot be corrected there; BERT normalises after it."""
    monkeypatch.setitem(FAMILIES, "olmo2", lambda: _text(transformers.Olmo2Config, transformers.Olmo2Model))
    original, _ = build(family)
    batches = random_batches(8)
    plan = mr.align(original, mr.ReusePlan.grouped(4, 4), batches)
    aligned, refitted = (mr.convert(original, plan) for _ in range(2))
    reports = mr.refit(refitted, original, batches)
    held_out = batches[3::4]
    assert [report.layer for report in reports] == [1, 2, 3]

    def error(model, index):
        actual, target = (
            torch.cat([output_of_layer(one, index, batch)[batch["attention_mask"].bool()] for batch in held_out])
            for one in (model, original)
        )
        return relative(actual, target)

    for report in reports:
        assert report.after <= report.before
        assert report.after == pytest.approx(error(refitted, report.layer), rel=1e-3), "with earlier layers refitted"
    assert error(refitted, 3) <= error(aligned, 3)


@pytest.mark.parametrize(("family", "implementation"), [("bert", "sdpa"), ("gpt2", "eager")])
def test_padding_changes_nothing(family, implementation):
    model, _ = build(family, implementation=implementation)
    plan = mr.ReusePlan.grouped(4, 4)
    batches = [{name: value.flip(1) for name, value in batch.items()} for batch in random_batches(8)]
    other = [dict(batch) for batch in batches]
    for batch in other:
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)
    fitted = [mr.convert(model, plan) for _ in range(2)]
    reports = [mr.refit(converted, model, given) for converted, given in zip(fitted, (batches, other), strict=True)]

    for one, two in zip(*reports, strict=True):
        assert one.after == pytest.approx(two.after, rel=1e-3)


def test_too_few_batches_a_missing_plan_and_nan_activations_are_refused():
    model, _ = build("bert")
    converted = mr.convert(model, mr.ReusePlan.grouped(4, 2))
    with pytest.raises(ValueError, match="at least 4 calibration batches, got 2"):
        mr.refit(converted, model, random_batches(2))
    with pytest.raises(ValueError, match="apply a plan to it first"):
        mr.refit(model, model, random_batches(4))
    padding = [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])} for batch in random_batches(4)]
    for few, got in (
        (padding, "got 0 and 0"),
        (padding[:3] + random_batches(1), "got 31 and 0"),
        (random_batches(4, size=1, length=6), "got 3 and 9"),
    ):
        with pytest.raises(ValueError, match=f"at least 8 positions that are not padding .*: {got}; give more"):
            mr.refit(converted, model, few)
    with torch.no_grad():
        converted.encoder.layer[0].output.dense.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="layer 1: activations are not finite"):
        mr.refit(converted, model, random_batches(4))


def replaced_by_nan(output):
    return output.fill_(float("nan"))


def interrupted(output):
    raise KeyboardInterrupt


@pytest.mark.parametrize("disturbed", [replaced_by_nan, interrupted])
def test_useless_candidates_and_an_interrupt_leave_the_weights_unchanged(disturbed):
    """The disturbance begins with the first candidate."""
    original = build("bert")[0]
    model = mr.convert(original, mr.ReusePlan.grouped(4, 2))
    before = copy.deepcopy(model.state_dict())
    for layer in model.encoder.layer:
        dense = layer.attention.output.dense
        weight = dense.weight.detach().clone()
        dense.register_forward_hook(
            lambda module, _, output, weight=weight: None if module.weight.equal(weight) else disturbed(output)
        )
    if disturbed is interrupted:
        with pytest.raises(KeyboardInterrupt):
            mr.refit(model, original, random_batches(8))
    else:
        assert all(report.ridge is None for report in mr.refit(model, original, random_batches(8)))
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_a_model_in_float64_is_refitted_like_one_in_float32():
    reports = []
    for dtype in (torch.float32, torch.float64):
        original = build("bert")[0].to(dtype)
        model = mr.convert(original, mr.ReusePlan((None, ((0, 2), None, None, (0, 2)), None, None)))
        torch.manual_seed(0)
        with torch.no_grad():
            value = model.encoder.layer[1].attention.self.value
            value.weight.copy_(0.3 * torch.randn(value.weight.shape))
        reports += mr.refit(model, original, random_batches(60))
    assert reports[0].values
    assert reports[0].after == pytest.approx(reports[1].after, rel=1e-3)


OWN = (None,) * 4
BELOW = ((0, 0), None, None, (0, 1))
FIRST, ALIKE, OTHERS, OTHER = (
    mr.ReusePlan((OWN, layer, OWN, last))
    for layer, last in (
        (BELOW, (None, (0, 2), (0, 3), None)),
        (BELOW, (None, (2, 2), (0, 3), None)),
        (BELOW, (None, (1, 2), None, (0, 1))),  # other heads of layer 1 are applied
        (((0, 0), None, None, (0, 2)), (None, (0, 2), (0, 3), None)),
    )
)


@pytest.fixture
def fitted(monkeypatch):
    """The layers that were refitted without the cache."""

    def fit_layer(index, *rest):
        indices.append(index)
        return original(index, *rest)

    indices, original = [], _refit._refit_layer
    monkeypatch.setattr(_refit, "_refit_layer", fit_layer)
    return indices


@pytest.mark.sample(5)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(("plan", "refitted"), [(ALIKE, [3]), (OTHERS, [3]), (OTHER, [1, 3]), (FIRST, [])])
def test_cached_layers_equal_refitted_ones(family, plan, refitted, fitted):
    original, batches = build(family)[0], random_batches(8)
    targets, refits = Targets(original, batches), RefitCache(max_bytes=2**20)
    refit_layers(mr.apply(build(family)[0], FIRST), targets, refits)
    fitted.clear()
    model, alone = (mr.apply(build(family)[0], plan) for _ in range(2))
    reports = refit_layers(model, targets, refits)

    assert fitted == refitted
    assert reports[0].ridge is not None
    for one, other in zip(reports, mr.refit(alone, original, batches), strict=True):
        assert one.after == pytest.approx(other.after, rel=1e-5)
        assert replace(one, before=0.0, after=0.0) == replace(other, before=0.0, after=0.0)
    for name, parameter in alone.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], parameter, rtol=1e-4, atol=1e-4)


def test_the_refit_cache_keeps_to_its_size_and_drops_the_least_recently_used():
    """The output projection of a layer has 32 · 32 floats of four bytes: 4 KiB."""
    original, plan, refits = build("bert")[0], mr.ReusePlan.grouped(4, 4), RefitCache(max_bytes=12_000)
    model = mr.convert(original, plan)

    def cached():
        return [layer for layer in (3, 2, 1) if refits.restore(model, plan, layer) is not None]

    refit_layers(model, Targets(original, random_batches(8)), refits)
    assert cached() == [3, 2]
    refits.store(model, plan, LayerRefit(1, before=0.5, after=0.4, ridge=1.0, values=False))
    assert cached() == [2, 1]


def test_evaluated_plans_refit_common_layers_once(fitted):
    evaluate = PlanEvaluator(build("bert")[0], random_batches(8), lambda model: 0.5)
    evaluate(FIRST)
    evaluate(ALIKE)

    assert fitted == [1, 3, 3]


def test_a_layer_that_kept_its_weights_keeps_them_when_restored():
    plan = FIRST
    model, other = (mr.apply(build("bert")[0], plan) for _ in range(2))
    refits = RefitCache(max_bytes=2**20)
    with torch.no_grad():
        output_projection(find_stack(other).layers[1]).weight.zero_()
    refits.store(other, plan, LayerRefit(1, before=0.5, after=0.5, ridge=None, values=False))
    weight = output_projection(find_stack(model).layers[1]).weight.clone()

    assert refits.restore(model, plan, 1) == LayerRefit(1, 0.5, 0.5, None, False)
    assert torch.equal(output_projection(find_stack(model).layers[1]).weight, weight)
    assert refits.restore(model, replace(plan, layers=(OWN, OWN, *plan.layers[2:])), 1) is None
