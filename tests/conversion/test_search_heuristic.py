"""Predicted errors of plans, against least squares on recorded maps and values."""

import copy

import pytest
import torch
from families import build
from packed_encoders import peaked
from text_batches import random_batches

import mapreuse as mr
from mapreuse.conversion import PlanEvaluator, SearchHeuristic, hidden_state_error
from mapreuse.conversion._align import output_errors
from mapreuse.conversion._search_heuristic import RefitErrors
from mapreuse.models import MapRecorder, find_stack, output_projection


def least_squares(model, batches, layer, applied):
    """Relative error of a layer's output with the best output projection."""
    recorder = MapRecorder(model)
    projection = output_projection(find_stack(model).layers[layer])
    weight = (projection.weight if type(projection).__name__ == "Conv1D" else projection.weight.T).detach().double()
    own, given = [], []
    for batch in batches:
        maps, valid, values = recorder(batch)
        repeated = values[layer].repeat_interleave(len(applied) // values[layer].shape[1], 1)
        sources = [(layer, head) if source is None else source for head, source in enumerate(applied)]
        pairs = [(maps[layer][:, head], maps[l][:, h]) for head, (l, h) in enumerate(sources)]
        for contexts, which in ((own, 0), (given, 1)):
            found = [pair[which] @ repeated[:, head] for head, pair in enumerate(pairs)]
            contexts.append(torch.cat(found, -1)[valid].double())
    targets, given = torch.cat(own) @ weight, torch.cat(given)
    given = torch.cat([given, torch.ones(len(given), 1)], 1)
    left = targets - given @ torch.linalg.lstsq(given, targets, driver="gelsd").solution
    return float(left.square().sum() / targets.square().sum())


@pytest.mark.parametrize("family", [pytest.param("bert", marks=pytest.mark.full), "llama", "gpt2"])
def test_the_error_after_a_refit_is_that_of_least_squares(family):
    torch.manual_seed(0)
    model, batch = build(family)
    peaked(model)
    batches = [batch | {"input_ids": torch.randint_like(batch["input_ids"], 3, 30)} for _ in range(20)]
    sources = {2: (0, 1)}
    errors = output_errors(model, sources, batches)
    refit_errors = RefitErrors(model, errors, sources, batches)
    nearest = [divmod(int(errors[2][..., head].flatten().argmin()), 4) for head in range(4)]
    for applied in (nearest, [*nearest[:2], None, None], [None, None, None, nearest[3]]):
        expected = least_squares(model, batches, 2, applied)
        assert refit_errors(2, applied) == pytest.approx(expected, rel=0.02, abs=0.004)
    assert refit_errors(2, [None] * 4) == 0


def test_a_map_that_was_not_tried_for_a_head_counts_as_zero():
    torch.manual_seed(0)
    model, batch = build("bert")
    sources = {3: (0, 1, 2)}
    errors = output_errors(model, sources, [batch])
    last = divmod(int(errors[3][..., 0].flatten().argmax()), 4)
    found = RefitErrors(model, errors, sources, [batch])(3, [last, None, None, None])
    silent = copy.deepcopy(model)
    silent.encoder.layer[3].attention.output.dense.weight.data[:, :8] = 0
    assert found > RefitErrors(model, errors, sources, [batch])(3, [None, None, None, None])
    assert RefitErrors(silent, errors, sources, [batch])(3, [last, None, None, None]) == pytest.approx(0, abs=1e-3)


def test_heads_whose_maps_exist_in_an_earlier_layer_have_the_least_error():
    """Some heads have uniform maps, which the first of them computes for all."""
    torch.manual_seed(0)
    model = peaked(build("bert")[0])
    planted = {0: {2}, 1: {0}, 2: {1, 3}}
    for layer, heads in planted.items():
        query = model.encoder.layer[layer].attention.self.query
        for rows in (slice(head * query.out_features // 4, (head + 1) * query.out_features // 4) for head in heads):
            query.weight.data[rows], query.bias.data[rows] = 0, 0
    batches = random_batches(8)
    heuristic = SearchHeuristic(model, batches, PlanEvaluator(model, batches, hidden_state_error(model, batches)))
    for layer in (1, 2):
        costs = {head: heuristic.predicted(frozenset({(layer, head)})) for head in range(4)}
        assert set(sorted(costs, key=costs.get)[: len(planted[layer])]) == planted[layer]
        assert all(
            costs[head] < 0.2 * costs[other] for head in planted[layer] for other in set(range(4)) - planted[layer]
        )


def test_growing_adds_the_head_with_the_least_predicted_error_and_no_head_without_a_source():
    model, _ = build("bert")
    batches = random_batches(8)
    heuristic = SearchHeuristic(model, batches, PlanEvaluator(model, batches, hidden_state_error(model, batches)))
    reusing = frozenset({(2, 1)})
    one, two = heuristic.grown(reusing, 1), heuristic.grown(reusing, 2)
    assert two > one > reusing
    assert heuristic.predicted(two) == min(heuristic.predicted(one | {other}) for other in heuristic.all - one)
    assert heuristic.grown(reusing, 100) == heuristic.all
    with pytest.raises(ValueError, match="layer 0, head 2: no head of an earlier layer of its kind computes its map"):
        heuristic.plan(heuristic.all | {(0, 2)})
    assert heuristic.plan(frozenset()) == mr.ReusePlan.full(4)
