"""What reusing heads should cost, against least squares on recorded maps and values."""

import copy

import pytest
import torch
from families import build
from packed_encoders import peaked
from text_batches import random_batches

import mapreuse as mr
from mapreuse.convert import Ranking, RefitErrors, hidden_state_error, output_errors
from mapreuse.models import MapRecorder, find_stack, output_projection


def least_squares(model, batches, layer, applied):
    """What is left of a layer's output, by its best output projection, head by head."""
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
    wanted, given = torch.cat(own) @ weight, torch.cat(given)
    given = torch.cat([given, torch.ones(len(given), 1)], 1)
    left = wanted - given @ torch.linalg.lstsq(given, wanted, driver="gelsd").solution
    return float(left.square().sum() / wanted.square().sum())


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_what_a_refitted_layer_loses_is_what_least_squares_leaves(family):
    torch.manual_seed(0)
    model, batch = build(family)
    batches = [batch]
    sources = {2: (0, 1)}
    errors = output_errors(model, sources, batches)
    refit_errors = RefitErrors(model, errors, sources, batches)
    nearest = [divmod(int(errors[2][..., head].flatten().argmin()), 4) for head in range(4)]
    for applied in (nearest, [*nearest[:2], None, None], [None, None, None, nearest[3]]):
        expected = least_squares(model, batches, 2, applied)
        assert refit_errors(2, applied) == pytest.approx(expected, rel=0.1, abs=0.02)
    assert refit_errors(2, [None] * 4) == 0


def test_a_map_that_its_head_was_not_tried_by_counts_as_nothing():
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


def test_heads_whose_maps_an_earlier_layer_has_reuse_first():
    """Four heads attend everywhere alike; the first of them has the only map that the others need."""
    torch.manual_seed(0)
    model = peaked(build("bert")[0])
    planted = {(2, 1), (2, 3), (1, 0)}
    for layer, head in {(0, 2), *planted}:
        query = model.encoder.layer[layer].attention.self.query
        rows = slice(head * query.out_features // 4, (head + 1) * query.out_features // 4)
        query.weight.data[rows], query.bias.data[rows] = 0, 0
    batches = random_batches(8)
    ranking = Ranking(model, batches, hidden_state_error(model, batches))
    grown = ranking.grown(frozenset(), 3)

    assert grown == planted
    assert ranking.predicted(grown) == pytest.approx(0, abs=2e-3)
    assert ranking.predicted(grown | {(3, 0)}) > ranking.predicted(grown)
    assert ranking.grown(frozenset(), 100) == ranking.all


def test_a_head_without_a_source_that_computes_is_refused():
    model, batch = build("bert")
    ranking = Ranking(model, [batch] * 4, hidden_state_error(model, [batch]))
    with pytest.raises(ValueError, match="layer 0, head 2: no head of an earlier layer of its kind computes its map"):
        ranking.plan(ranking.all | {(0, 2)})
    assert ranking.plan(frozenset()) == mr.ReusePlan.full(4)
