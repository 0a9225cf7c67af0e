"""Search: candidates have the error of a conversion by hand, and no plan beats another."""

import copy
import itertools
import json

import pytest
import torch
from families import build
from packed_encoders import LAYERS, WIDTH, encoder, peaked
from text_batches import random_batches
from torch.nn import functional

import mapreuse as mr
from mapreuse.conversion import (
    PlanEvaluator,
    SearchHeuristic,
    _evaluation,
    _search,
    hidden_state_error,
    relative_latencies,
)
from mapreuse.conversion._kept_work import identity_of
from mapreuse.conversion._search import _CostModel, _extensions
from mapreuse.measure import Latency


@pytest.fixture(scope="module")
def bert():
    return build("bert")[0]


def test_candidates_have_the_error_and_weights_of_a_conversion_by_hand(bert, regular_times):
    batches = random_batches(12)
    found = mr.search(bert, batches, error=0.4, breadth=1)

    assert len(found) > 2
    assert found[0].plan.is_full
    for one, other in itertools.permutations(found, 2):
        assert one.error < other.error or one.latency < other.latency, "no plan beats another"
    for candidate in found:
        model = mr.apply(copy.deepcopy(bert), candidate.plan)
        if not candidate.plan.is_full:
            mr.refit(model, bert, [batch for index, batch in enumerate(batches) if index % 4 != 1])
        cosines = []
        with torch.no_grad():
            for batch in batches[1::4]:
                rows = batch["attention_mask"].bool()
                actual, target = (m(**batch).last_hidden_state[rows] for m in (model, bert))
                cosines.append(functional.cosine_similarity(actual, target, dim=-1))
        assert candidate.error == pytest.approx(1 - torch.cat(cosines).mean().item(), abs=1e-5)
        assert candidate.error <= 0.4
        assert candidate.latency == pytest.approx(candidate.predicted_latency)
        assert candidate.parameters == sum(p.numel() for p in model.parameters())
        for name, weight in candidate.build().state_dict().items():
            torch.testing.assert_close(weight, model.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_a_second_search_evaluates_no_plan_again(bert, tmp_path, regular_times):
    evaluated = []
    error = hidden_state_error(bert, random_batches(2, seed=1))

    def metric(model):
        evaluated.append(mr.plan_of(model))
        return error(model)

    first = mr.search(bert, random_batches(8), error=0.05, breadth=2, metric=metric, cache=tmp_path)
    (cache,) = tmp_path.glob("*/plans.jsonl")
    number = len(cache.read_text().splitlines())
    assert len(evaluated) == number + 1  # and the original
    cache.write_text("".join(line + "\n" for line in cache.read_text().splitlines()[: number - 1]))
    evaluated.clear()
    second = mr.search(bert, random_batches(8), error=0.05, breadth=2, metric=metric, cache=tmp_path)

    assert second == first
    assert len(evaluated) == 3  # the original, the first plan, which identifies the metric, and the forgotten one
    other = mr.search(bert, random_batches(8, seed=5), error=0.05, breadth=2, metric=metric, cache=tmp_path)
    assert [c.error for c in other] != [c.error for c in first]


@pytest.fixture(scope="module")
def heuristic(bert):
    batches = random_batches(4)
    return SearchHeuristic(bert, batches, PlanEvaluator(bert, batches, hidden_state_error(bert, batches)))


def test_the_cost_model_counts_the_heads_that_reuse(bert, heuristic, regular_times):
    costs = _CostModel(bert, random_batches(1)[0], heuristic, precision=0.05)
    for heads in ([(2, 0)], [(1, 1), (1, 3)], [(3, 0), (3, 1), (3, 2)], [(2, head) for head in range(4)]):
        assert costs.of(frozenset(heads)) == pytest.approx(1 - len(heads) / 20)


def test_a_latency_budget_is_met(bert, regular_times):
    found = mr.search(bert, random_batches(8), latency=0.65, breadth=2)
    latencies = [candidate.latency for candidate in found]
    assert latencies == sorted(latencies, reverse=True)
    assert latencies[-1] <= 0.65 < latencies[0]


def test_heads_whose_source_starts_to_reuse_get_a_source_that_still_computes(heuristic):
    smaller = frozenset((3, head) for head in range(4))
    larger = smaller | {(2, head) for head in range(4)} | {(1, 0), (1, 1)}
    for reusing in (smaller, larger):
        plan = heuristic.plan(reusing)
        assert {(l, h) for l in range(4) for h, s in enumerate(plan.heads(l, 4)) if s is not None} == reusing
        assert heuristic.predicted(larger) >= heuristic.predicted(smaller)


def test_extensions_add_a_whole_layer_or_half_as_many_heads(bert, heuristic, regular_times):
    costs = _CostModel(bert, random_batches(1)[0], heuristic, precision=0.05)
    start = frozenset((2, head) for head in range(4))
    found = _extensions(heuristic, start, costs.of)

    assert all(extension > start for extension in found)
    assert {len(extension) - len(start) for extension in found} == {2, 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one budget"),
        ({"error": 0.1, "latency": 0.5}, "give exactly one budget"),
        ({"latency": 1.5}, r"between 0 and 1, got 1\.5"),
        ({"error": float("nan")}, "error must be a finite number, at least 0, got nan"),
        ({"error": 0.1, "breadth": 0}, "breadth must be a whole number, at least 1, got 0"),
        ({"error": 0.1, "batches": random_batches(3)}, "search needs at least 8 calibration batches, got 3"),
        ({"error": 0.1, "batches": iter(["input_ids"] * 8)}, "got a str"),
        ({"error": 0.1, "metric": lambda model: float("nan")}, "the metric must be finite, got nan"),
    ],
)
def test_bad_budgets_batches_and_metrics_are_refused(bert, options, message):
    with pytest.raises(ValueError, match=message):
        mr.search(**{"original": bert, "batches": random_batches(8)} | options)


def test_models_in_half_precision_or_with_nan_are_refused(bert):
    with pytest.raises(ValueError, match="in bfloat16 on the CPU"):
        mr.search(copy.deepcopy(bert).bfloat16(), random_batches(8), error=0.1)
    spoilt = copy.deepcopy(bert)
    with torch.no_grad():
        next(spoilt.encoder.layer[1].parameters())[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        mr.search(spoilt, random_batches(8), error=0.1)


@pytest.mark.parametrize("content", [b"{}\n", b'{"a": 1}', b'{"a": 1,\n "b": 2}', b"\xff\xfe\x00"])
def test_a_file_as_cache_and_a_damaged_cache_are_refused_and_not_changed(bert, tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="file' is a file: choose a directory"):
        mr.search(bert, random_batches(8), error=0.1, cache=tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    damaged = tmp_path / identity_of(bert, random_batches(8)) / "plans.jsonl"
    damaged.parent.mkdir()
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"not an evaluated plan; delete|is damaged .*; delete it") as refusal:
        mr.search(bert, random_batches(8), error=0.1, cache=tmp_path)
    assert "\n" not in str(refusal.value)
    assert damaged.read_bytes() == content


def test_an_unreachable_latency_is_refused_before_any_refit(bert, regular_times, monkeypatch):
    monkeypatch.setattr(_evaluation, "refit_layers", None)
    message = r"no plan has a latency of 0\.1 times the original's: the minimum is 0\.\d"
    with pytest.raises(ValueError, match=message):
        mr.search(bert, random_batches(8), latency=0.1)


@pytest.mark.full
def test_batches_may_hold_settings(bert):
    batches = [{"output_attentions": False, **batch} for batch in random_batches(8)]
    assert mr.search(bert, batches, error=1.0, breadth=1)


@pytest.mark.full
def test_cached_errors_with_other_rounding_are_used(bert, tmp_path, regular_times):
    batches = random_batches(8)
    found = mr.search(bert, batches, error=0.2, breadth=2, cache=tmp_path)
    (cache,) = tmp_path.glob("*/plans.jsonl")
    entries = [json.loads(line) for line in cache.read_text().splitlines()]
    for entry in entries:
        entry["first"][1] *= 1 + 1e-3
    cache.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert mr.search(bert, batches, error=0.2, breadth=2, cache=tmp_path) == found
    assert len(cache.read_text().splitlines()) == len(entries), "no plan evaluated again"


@pytest.mark.full
def test_cached_errors_of_another_metric_or_other_batches_are_not_used(bert, tmp_path, regular_times):
    batches = random_batches(8)
    mr.search(bert, batches, error=0.2, breadth=2, cache=tmp_path)
    others = [random_batches(8, seed=3)[i] if i % 4 == 1 else batch for i, batch in enumerate(batches)]
    for options in (
        {"batches": others},
        {"batches": batches, "metric": lambda model: 0.0 if plan_is_full(model) else 0.1},
        {"batches": batches, "metric": lambda model: 1e-3 * hidden_state_error(bert, batches[1::4])(model)},
    ):
        afresh = mr.search(bert, error=0.2, breadth=2, **options)
        assert mr.search(bert, error=0.2, breadth=2, cache=tmp_path, **options) == afresh


def plan_is_full(model):
    plan = mr.plan_of(model)
    return plan is None or plan.is_full


@pytest.mark.full
def test_a_latency_budget_is_met_by_measurement_if_the_cost_model_is_optimistic(bert, monkeypatch):
    def times(models, batch, **options):
        """As the cost model predicts, but 0.1 more for the candidates."""
        found = {}
        for name, model in models.items():
            plan = mr.plan_of(model)
            saved = 0.0 if plan is None else sum(plan.reuses(layer) for layer in range(plan.num_layers)) / 10
            found[name] = 1 - saved + (0.1 if name.isdigit() and saved else 0.0)
        return found

    monkeypatch.setattr(_search, "_times", times)
    found = mr.search(bert, random_batches(8), latency=0.85, breadth=8)
    assert min(candidate.latency for candidate in found) <= 0.85


def test_a_latency_budget_that_the_cost_model_barely_misses_is_measured(bert, monkeypatch):
    (timed,) = random_batches(1, seed=7)

    def times(models, batch, **options):
        """Sharing all maps takes 0.93 in the cost model and 0.89 in the candidate."""
        assert batch is timed
        shares = {"all": 0.93, "half": 0.965}
        return {name: 0.89 if name.isdigit() else shares.get(name, 1.0) for name in models}

    monkeypatch.setattr(_search, "_times", times)
    found = mr.search(bert, random_batches(8), latency=0.9, breadth=1, timed=timed)
    assert min(candidate.latency for candidate in found) == 0.89


def test_a_latency_that_deviates_from_the_prediction_by_more_than_10_percent_is_logged(bert, monkeypatch, caplog):
    def times(models, batch, **options):
        """5 % less for each reusing layer; candidates take 15 % more than that."""
        found = {}
        for name, model in models.items():
            plan = mr.plan_of(model)
            saved = 0.0 if plan is None else sum(plan.reuses(layer) for layer in range(plan.num_layers)) / 20
            found[name] = (1 - saved) * (1.15 if name.isdigit() else 1.0)
        return found

    monkeypatch.setattr(_search, "_times", times)
    with caplog.at_level("WARNING", logger="mapreuse"):
        mr.search(bert, random_batches(8), error=1.0, breadth=1)
    assert "predicted latency of a plan: 0.85 times the original's; measured: 0.98" in caplog.text


def test_reported_latencies_are_precise(bert, monkeypatch):
    """Those of candidates and of `relative_latencies`; the cost model needs less precision."""
    asked = []

    def timed(calls, **options):
        asked.append((options["precision"], len(calls)))
        return dict.fromkeys(calls, Latency((1.0,)))

    monkeypatch.setattr(_search, "time_interleaved", timed)
    found = mr.search(bert, random_batches(8), error=0.0, breadth=1)
    relative_latencies(bert, {"again": bert}, random_batches(8))
    assert [one.plan.is_full for one in found] == [True]
    assert asked == [(0.05, 4), (0.02, 4), (0.02, 2)], (
        "the original and the cost model's three, one of which was found"
    )


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of the original, which is timed, too
def test_a_torch_encoder_is_searched_without_its_padding(regular_times):
    model = peaked(encoder(batch_first=True))
    generator = torch.Generator().manual_seed(0)
    padding = torch.tensor([[False] * 9, [False] * 5 + [True] * 4, [False] * 2 + [True] * 7])
    batches = [
        {"src": torch.randn(3, 9, WIDTH, generator=generator), "src_key_padding_mask": padding} for _ in range(8)
    ]
    plan = mr.ReusePlan.from_sources([0, *[0] * (LAYERS - 1)])
    with torch.no_grad():
        cosines = []
        changed = mr.apply(copy.deepcopy(model), plan)
        for batch in batches:
            actual, target = changed(**batch), mr.apply(copy.deepcopy(model), mr.ReusePlan.full(LAYERS))(**batch)
            cosines.append(functional.cosine_similarity(actual[~padding], target[~padding], dim=-1))
    expected = 1 - torch.cat(cosines).mean().item()

    assert hidden_state_error(model, batches)(changed) == pytest.approx(expected, abs=1e-5)
    assert expected > 1e-3
    found = mr.search(model, batches, error=2.0, breadth=1)
    assert found[0].error == pytest.approx(0, abs=1e-6)
    assert len(found) > 1


def test_the_original_keeps_its_training_mode_also_after_errors(bert):
    model = copy.deepcopy(bert).train()
    model.embeddings.eval()
    beyond = {"input_ids": torch.full((2, 4), 999)}
    for given in ({"batches": [beyond] * 8}, {"batches": random_batches(8), "timed": beyond}):
        with pytest.raises(IndexError):
            mr.search(model, error=0.1, **given)
        assert model.training
        assert model.encoder.training
        assert not model.embeddings.training


def test_hidden_states_that_are_not_finite_are_refused(bert):
    converted = mr.apply(copy.deepcopy(bert), mr.ReusePlan.grouped(4, 2))
    with torch.no_grad():
        next(converted.encoder.layer[3].output.parameters())[0] = float("nan")
    with pytest.raises(ValueError, match="last hidden states are not finite"):
        hidden_state_error(bert, random_batches(2))(converted)
