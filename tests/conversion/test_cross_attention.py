"""Plans for cross-attention are aligned and refitted, against definitions and errors measured independently."""

import pytest
import torch
from agreement import PLANS
from encoder_decoders import FAMILIES, SHARED, converted, decoder_batches, following, original
from oracle import output_of_layer

import mapreuse as mr
from mapreuse.conversion._align import output_errors
from mapreuse.conversion._layer_cache import LayerCache
from mapreuse.models import find_stack, output_projection, value_projection

GROUPS = PLANS["groups of 2"]
ONE = mr.ReusePlan.from_sources([0, 1, 0, 3])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_of_an_assignment_is_the_change_of_the_output_of_cross_attention(family):
    whole = original(family)[0]
    eager, (batch,) = whole.get_decoder(), decoder_batches(family, 1)
    with following(whole, {"cross": mr.ReusePlan.full(4)}) as maps:
        eager(**batch, use_cache=False)
    first, own = maps["cross"][:2]
    layer, valid = find_stack(eager, "cross").layers[1], batch["attention_mask"].bool()
    values = value_projection(layer).module(batch["encoder_hidden_states"]).view(3, 7, 4, 8).transpose(1, 2)
    parts = output_projection(layer).weight.T.view(4, 8, -1)
    size = sum((own[:, h] @ values[:, h] @ parts[h])[valid].square().sum() for h in range(4))
    expected = torch.tensor(
        [
            [((first[:, s] - own[:, h]) @ values[:, h] @ parts[h])[valid].square().sum() / size for h in range(4)]
            for s in range(4)
        ]
    )
    model = converted(family, {}).get_decoder()
    found = output_errors(model, {1: (0,)}, [batch], attention="cross")[1][0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)
    aligned = mr.align(model, GROUPS, [batch], attention="cross")
    assert aligned.layers[1] == tuple((0, head) for head in expected.argmin(0).tolist())


def relative(actual, target):
    """Root of the mean over the channels of each channel's relative squared error."""
    return ((actual - target).norm(dim=0) / target.norm(dim=0)).square().mean().sqrt().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reported_error_of_a_refit_is_that_of_the_layers_output(family):
    """With values lost, which only values of the encoder's states can restore."""
    (batch,) = decoder_batches(family, 1)
    before, model = converted(family, {}).get_decoder(), converted(family, {"cross": ONE}).get_decoder()
    with torch.no_grad():
        value_projection(find_stack(model, "cross").layers[2]).module.weight.normal_(std=0.3)
    valid = batch["attention_mask"].bool()
    target = output_of_layer(before, 2, batch)[valid]
    lost = relative(output_of_layer(model, 2, batch)[valid], target)
    (report,) = mr.refit(model, before, [batch] * 4, attention="cross")
    assert report.before == pytest.approx(lost, rel=1e-3)
    assert report.after == pytest.approx(relative(output_of_layer(model, 2, batch)[valid], target), rel=1e-3)
    assert report.values
    assert report.after < 0.5 * report.before


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_run_from_their_cache_under_plans_of_both_attentions(family):
    """A layer whose output is cached still makes the maps that later layers apply."""
    (batch,) = decoder_batches(family, 1)
    plans = {"self": mr.ReusePlan.from_sources([0, 0, 2, 2]), "cross": mr.ReusePlan.from_sources([0, 1, 0, 1])}
    model = converted(family, plans).get_decoder()
    for attention in plans:
        cache = LayerCache(model, [batch], attention)
        for index in (3, 2, 3):
            once, again = cache.outputs(index, 0, [lambda: None, lambda: None])
            torch.testing.assert_close(once, output_of_layer(model, index, batch))
            torch.testing.assert_close(again, once)


def test_a_plan_for_each_attention_is_converted_after_the_other():
    batches, unseen = decoder_batches("t5", 12), decoder_batches("t5", 4, seed=1)
    before = converted("t5", {}).get_decoder()
    model = mr.convert(mr.convert(before, GROUPS, batches, attention="cross"), GROUPS, batches)
    by_index = converted("t5", {"self": GROUPS, "cross": GROUPS}).get_decoder()

    @torch.no_grad()
    def distance(one):
        pairs = [(one(**batch).last_hidden_state, before(**batch).last_hidden_state) for batch in unseen]
        rows = unseen[0]["attention_mask"].bool()
        return sum((actual - target)[rows].square().sum() for actual, target in pairs).sqrt()

    assert [mr.plan_of(model, attention).reuses(1) for attention in ("self", "cross")] == [True, True]
    assert distance(model) < 0.95 * distance(by_index)


def test_a_whole_model_is_refitted_like_its_decoder():
    whole, batch = original("bart")
    batch = batch | {"decoder_input_ids": torch.randint(3, 50, (2, 7))}
    with torch.no_grad():
        states = whole.get_encoder()(**original("bart")[1]).last_hidden_state
    of_decoder = {
        "input_ids": batch["decoder_input_ids"],
        "encoder_hidden_states": states,
        "encoder_attention_mask": batch["attention_mask"],
    }
    model, decoder = converted("bart", SHARED["cross"]), converted("bart", SHARED["cross"]).get_decoder()
    one = mr.refit(model, whole, [batch] * 4, attention="cross")
    other = mr.refit(decoder, whole.get_decoder(), [of_decoder] * 4, attention="cross")
    for kind in ("before", "after"):
        errors = ([getattr(report, kind) for report in reports] for reports in (one, other))
        assert next(errors) == pytest.approx(next(errors), rel=1e-3, abs=1e-6)


def test_what_cannot_be_converted_is_refused_on_one_line():
    model, batches = converted("bart", SHARED["cross"]), decoder_batches("bart", 4)
    before = converted("bart", {}).get_decoder()
    distillation = mr.DistillConfig(steps=1)
    cases = [
        (lambda: mr.refit(before, before, batches, attention="cross"), "apply a plan to it first"),
        (lambda: mr.refit(model.get_decoder(), before, batches), "apply a plan to it first"),
        (lambda: mr.align(model.get_decoder(), GROUPS, batches, attention="cross"), "shares attention maps already"),
        (lambda: mr.align(before, GROUPS, batches, attention="both"), "attention must be 'self' or 'cross'"),
        (
            lambda: mr.convert(before, GROUPS, batches, attention="cross", distillation=distillation),
            "distillation needs a plan for self-attention; leave it out",
        ),
    ]
    for call, problem in cases:
        with pytest.raises(ValueError, match=problem) as refused:
            call()
        assert "\n" not in str(refused.value)
