"""Search over share modes: errors and choices against the evaluation of every plan of a small model."""

import copy
import itertools
import sys

import pytest
import torch
import transformers as tf
from families import build
from text_batches import random_batches
from torch import nn

import mapreuse as mr
from mapreuse.conversion import (
    PlanEvaluator,
    ShareModeHeuristic,
    copying_error,
    hidden_state_error,
    parse_budget,
    perplexity_error,
)
from mapreuse.conversion._share_mode_heuristic import key_errors
from mapreuse.maps import KeySettings
from mapreuse.models import Unsupported

SETTINGS = {"keys": 2, "window": 2, "block": 2}
SAVINGS = {"map": 0.2, "corrected": 0.15, "keys": 0.1}


def decoder(num_layers=3):
    """A seed with which the source that changes a layer's output least is also the best one for the whole model."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "num_hidden_layers": num_layers, "intermediate_size": 32, "vocab_size": 50}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.dim() > 1):
            nn.init.normal_(parameter, std=0.4)
    return model.eval()


@pytest.fixture(scope="module")
def llama():
    return decoder()


@pytest.fixture
def savings(monkeypatch):
    """A device on which a reusing layer saves a fixed part of the time in each share mode."""

    def times(models, batch, **options):
        plans = {name: mr.plan_of(model) for name, model in models.items()}
        return {
            name: 1.0 if plan is None else 1 - sum(SAVINGS.get(plan.share_of(l), 0) for l in range(plan.num_layers))
            for name, plan in plans.items()
        }

    monkeypatch.setattr(sys.modules[mr.search.__module__], "_times", times)


def calibration(batches):
    return [batch for index, batch in enumerate(batches) if index % 4 != 1]


def converted(model, plan, batches):
    found = mr.apply(copy.deepcopy(model), plan)
    if not plan.is_full:
        mr.refit(found, model, calibration(batches))
    return found


def every_plan(model, modes, batches):
    """All plans for whole layers in which each reusing layer has one source, heads aligned."""
    num_layers = model.config.num_hidden_layers
    for choice in itertools.product(*([None, *((m, s) for m in modes for s in range(l))] for l in range(num_layers))):
        layers = tuple(None if one is None else one[1] for one in choice)
        shares = tuple(None if one is None else one[0] for one in choice)
        settings = SETTINGS if "keys" in shares else {}
        try:
            plan = mr.ReusePlan(layers, shares if any(shares) else "map", **settings)
        except ValueError:  # a source that reuses, or readers of two modes
            continue
        yield mr.align(model, plan, calibration(batches))


def test_a_search_over_share_modes_finds_the_best_of_all_plans(llama, tmp_path, savings):
    batches = random_batches(8)
    metric = hidden_state_error(llama, batches[1::4])
    errors = {plan: metric(converted(llama, plan, batches)) for plan in every_plan(llama, ("map", "keys"), batches)}
    assert len(errors) == 9

    def latency(plan):
        return 1 - sum(SAVINGS.get(plan.share_of(layer), 0) for layer in range(3))

    for limit in (0.95, 0.85, 0.65):
        options = {"latency": limit, "share": ("map", "keys"), "breadth": 9, "cache": tmp_path, **SETTINGS}
        found = mr.search(llama, batches, **options)
        for candidate in found:
            assert candidate.error == pytest.approx(errors[candidate.plan], abs=1e-5)
            assert candidate.latency == pytest.approx(latency(candidate.plan))
        best = min(error for plan, error in errors.items() if latency(plan) <= limit)
        within = [candidate.error for candidate in found if candidate.latency <= limit]
        assert within[0] == pytest.approx(best, abs=1e-5)
        assert found[0].plan.is_full


def test_a_budget_of_cache_bytes_is_met_by_sharing_maps_and_not_keys(llama, savings):
    batches = random_batches(8)
    found = mr.search(llama, batches, cache_bytes=0.85, share=("keys", "map"), **SETTINGS)
    shares = [found[-1].plan.share_of(layer) for layer in range(3)]
    assert sorted(filter(None, shares)) == ["map"]
    assert [one.cache_bytes for one in found] == [1.0, pytest.approx(5 / 6)]
    bytes_of = mr.cache_bytes(llama, found[-1].plan)
    assert found[-1].cache_bytes == sum(bytes_of.layers) / sum(bytes_of.unshared)


def test_by_heads_cache_bytes_are_a_budget_too(llama, savings):
    found = mr.search(llama, random_batches(8), cache_bytes=0.9, breadth=1)
    assert found[-1].cache_bytes <= 0.9 < found[0].cache_bytes


@pytest.mark.parametrize("padded", [False, True])
def test_the_error_of_reading_keys_is_that_of_the_layer_in_a_model(padded):
    model = build("llama")[0]
    batches = random_batches(3, size=2, length=20)
    if not padded:
        batches = [{"input_ids": batch["input_ids"].clamp(min=3)} for batch in batches]
    found = key_errors(model, {2: (0, 1), 3: (1,)}, batches, KeySettings(**SETTINGS))

    def outputs(plan, layer):
        shared, kept = mr.apply(copy.deepcopy(model), plan), []
        hook = shared.layers[layer].self_attn.register_forward_hook(
            lambda module, args, output: kept.append(output[0])
        )
        with torch.no_grad(), hook:
            for batch in batches:
                shared(**batch)
        rows = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool() for batch in batches]
        return torch.cat([one[chosen] for one, chosen in zip(kept, rows, strict=True)])

    for layer, source, error in ((2, 0, found[2][0]), (2, 1, found[2][1]), (3, 1, found[3][0])):
        sources = [source if one == layer else one for one in range(4)]
        own = outputs(mr.ReusePlan.full(4), layer)
        read = outputs(mr.ReusePlan(mr.ReusePlan.from_sources(sources).layers, "keys", **SETTINGS), layer)
        assert error == pytest.approx(float((read - own).square().sum() / own.square().sum()), rel=1e-3)
        assert error > 1e-3


def test_sources_have_readers_of_one_mode_and_layers_without_a_source_are_not_extended():
    model, batches = build("llama")[0], random_batches(4)
    error = hidden_state_error(model, batches)
    heuristic = ShareModeHeuristic(
        model, batches, PlanEvaluator(model, batches, error), share=("map", "keys"), **SETTINGS
    )
    both = frozenset({(1, "map"), (2, "keys")})
    with pytest.raises(ValueError, match=r"layer 2: no earlier layer of its kind computes its map for .* 'keys'"):
        heuristic.plan(both)
    extended = heuristic.extensions(frozenset({(1, "map")}))
    assert both not in extended
    assert frozenset({(1, "keys")}) in extended
    assert frozenset({(1, "map"), (3, "keys")}) in extended
    plan = heuristic.plan(frozenset({(1, "map"), (3, "keys")}))
    assert (plan.share_of(1), plan.share_of(3), plan.sources(3)) == ("map", "keys", (2,))


def test_corrected_scores_are_searched_too(llama, savings):
    found = mr.search(llama, random_batches(8), latency=0.9, share="corrected", rank=2, breadth=1)
    assert {found[-1].plan.share_of(layer) for layer in range(3)} == {None, "corrected"}
    assert found[-1].plan.rank == 2


def test_a_second_search_evaluates_no_plan_again_unless_the_share_modes_differ(llama, tmp_path, savings):
    evaluated, error = [], hidden_state_error(llama, random_batches(2, seed=1))

    def metric(model):
        evaluated.append(mr.plan_of(model))
        return error(model)

    def search(**options):
        evaluated.clear()
        options = {"error": 10.0, "share": "keys", "metric": metric, **SETTINGS, **options}
        return mr.search(llama, random_batches(8), cache=tmp_path, **options)

    first = search()
    number = len(evaluated)
    assert search() == first
    assert len(evaluated) == 2 < number  # the original, and the first plan, which identifies the metric
    other = search(keys=1)
    assert {one.plan.keys for one in other} <= {None, 1}


def test_perplexity_and_copying_are_those_of_the_model(llama):
    changed = mr.apply(copy.deepcopy(llama), mr.ReusePlan.parse("1x1,2x1"))
    (batch,) = random_batches(1)
    texts = [tokens[mask.bool()] for tokens, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]

    def losses(model, text, first):
        with torch.no_grad():
            logarithms = model(input_ids=text[None]).logits[0].log_softmax(-1)
        return [-logarithms[position - 1, text[position]] for position in range(first, len(text))]

    def ratio(texts, first):
        means = [
            torch.stack([one for text in texts for one in losses(model, text, first(text))]).mean()
            for model in (changed, llama)
        ]
        return float((means[0] - means[1]).exp()) - 1

    assert perplexity_error(llama, [batch])(changed) == pytest.approx(ratio(texts, lambda text: 1), rel=1e-4)
    repeated = [text[: len(text) // 2].repeat(2) for text in texts]
    expected = ratio(repeated, lambda text: len(text) // 2 + 1)
    assert copying_error(llama, [batch])(changed) == pytest.approx(expected, rel=1e-4)
    assert perplexity_error(llama, [batch])(llama) == 0


def test_the_metric_is_chosen_by_its_name(llama, savings):
    batches = random_batches(8)
    by_name = mr.search(llama, batches, latency=0.9, share="keys", metric="copying", breadth=1, **SETTINGS)
    metric = copying_error(llama, batches[1::4])
    assert by_name == mr.search(llama, batches, latency=0.9, share="keys", metric=metric, breadth=1, **SETTINGS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_bytes": 0.8, "error": 0.1}, "give exactly one budget: .* got cache_bytes, error"),
        ({"cache_bytes": 0.0}, "cache_bytes, relative to the original's, must be"),
        ({"cache_bytes": 0.1}, r"no plan has cache bytes of 0\.1 times the original's: the minimum is 0\.67"),
        ({"cache_bytes": 0.9, "share": "keys"}, r"no plan has cache bytes of 0\.9 .* the minimum is 1\.00"),
        ({"error": 0.1, "share": ("map", "values")}, "share must be one of map, keys, corrected, got 'values'"),
        ({"error": 0.1, "share": ()}, "share needs at least one mode"),
        ({"error": 0.1, "share": "keys", "keys": 0}, "keys must be an integer of at least 1, got 0"),
        ({"error": 0.1, "keys": 8}, 'keys=8 is a setting of share="keys"'),
        ({"error": 0.1, "metric": "bleu"}, "metric must be one of cosine, perplexity, copying or a function"),
    ],
)
def test_bad_budgets_share_modes_and_metrics_are_refused_in_one_line(llama, savings, options, message):
    with pytest.raises(ValueError, match=message) as refusal:
        mr.search(llama, random_batches(8), **options)
    assert "\n" not in str(refusal.value)


def test_an_encoder_is_refused_a_budget_of_cache_bytes_and_metrics_of_language_models(savings):
    bert = build("bert")[0]
    with pytest.raises(ValueError, match="BertModel keeps no cache; give a budget of latency or error"):
        mr.search(bert, random_batches(8), cache_bytes=0.8)
    with pytest.raises(ValueError, match="BertModel returns no logits, which the metric needs"):
        mr.search(bert, random_batches(8), error=0.1, metric="perplexity")
    assert all(one.cache_bytes is None for one in mr.search(bert, random_batches(8), error=0.0, share="keys"))


def test_a_share_mode_that_a_family_cannot_serve_is_refused_before_maps_are_compared(savings, monkeypatch):
    monkeypatch.setattr("mapreuse.conversion._share_mode_heuristic.output_errors", None)
    model, batch = build("deepseek-v3")
    batches = [batch] * 8
    with pytest.raises(Unsupported, match='share mode "corrected" needs values that are outputs of one projection'):
        mr.search(model, batches, error=0.1, share=("keys", "corrected"))


def test_a_budget_in_text_names_the_cache():
    assert parse_budget("cache_bytes<=0.9") == {"cache_bytes": 0.9}
