"""Every storage holds the same map, exactly or within its precision; time and memory choose among them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from map_cases import cases, defined_map, make_case
from oracle import size_of

from mapreuse.maps import (
    STORAGES,
    MapCounts,
    RelativePositions,
    Scores,
    SharedMaps,
    StorageChoice,
    compute,
    plain_operators,
)
from mapreuse.maps._storage_choice import StorageCost, choose_storage
from mapreuse.maps.reference import attention_map

TOLERANCE = {"dense": 1e-5, "recompute": 1e-5, "dense16": 2**-11, "dense8": 1 / 509}
"""Maximum error of a weight, relative to the maximum of its row."""


@given(cases(), st.sampled_from(STORAGES), st.data())
def test_a_stored_map_matches_the_definition_within_its_precision(case, storage, data):
    batch, heads, _, num_keys = case.scores.shape
    with torch.no_grad():
        context, stored = compute(case.scores, case.values, storage)
    torch.testing.assert_close(context, case.context, atol=1e-5, rtol=1e-5)
    dense, exact = stored.dense(), case.map
    torch.testing.assert_close(dense.sum(-1), exact.sum(-1), atol=1e-5, rtol=0)
    off = dense / dense.amax(-1, keepdim=True).clamp(min=1e-9) - exact / exact.amax(-1, keepdim=True).clamp(min=1e-9)
    assert off.abs().max() <= TOLERANCE[storage]

    pair = st.tuples(st.integers(0, heads - 1), st.integers(0, 1))
    pairs = data.draw(st.none() | st.lists(pair, min_size=1, max_size=5).map(tuple))
    values = torch.randn(batch, num_keys, 2 if pairs else heads, 3).transpose(1, 2)
    with torch.no_grad():
        applied = stored.apply(values, pairs)
    met = pairs or tuple((head, head) for head in range(heads))
    expected = torch.stack([stored.dense()[:, m] @ values[:, v] for m, v in met], 1)
    torch.testing.assert_close(applied, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("storage", ["dense", "dense16", "dense8"])
@pytest.mark.parametrize("pairs", [((0, 0), (1, 1), (2, 2)), ((0, 0), (0, 1), (0, 2)), ((2, 0), (0, 2))])
def test_padding_is_never_applied(storage, pairs):
    """Two items with valid lengths 9 and 4; values after them may be NaN."""
    case = make_case(batch=2, num_queries=9, num_keys=9)
    real = torch.arange(9) < torch.tensor([[9], [4]])
    scores = replace(case.scores, mask=real[:, None, :, None] & real[:, None, None, :])
    values = case.values.clone()
    values[1, :, 4:] = float("nan")
    with torch.no_grad():
        applied = compute(scores, case.values, storage)[1].apply(values, pairs)
    exact = defined_map(scores)
    expected = torch.stack([exact[:, m] @ case.values[:, v] for m, v in pairs], 1)
    torch.testing.assert_close(applied, expected, atol=1e-5 if storage == "dense" else 0.02, rtol=0)
    assert (applied[1, :, 4:] == 0).all()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("pairs", [None, ((0, 0), (0, 1), (1, 2))])
def test_every_call_draws_its_own_dropout(storage, grad_mode, pairs):
    """If the values are ones, the context is the sum of the weights that are not dropped."""
    case = make_case(batch=1, num_queries=40, num_keys=40)
    ones = torch.ones(1, 3, 40, 1)
    with torch.set_grad_enabled(grad_mode):
        stored = compute(case.scores, case.values, storage)[1]
        before = stored.dense().clone()
        torch.manual_seed(0)
        draws = torch.stack([stored.apply(ones, pairs, dropout_p=0.5) for _ in range(20)])
    assert (draws[0] - draws[1]).abs().mean() > 0.1
    assert (draws[:, :, 0] - draws[:, :, 1]).abs().mean() > 0.1, "heads that share a product draw separately"
    assert draws.mean() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(stored.dense(), before), "the map does not change"


def test_weights_are_rounded_to_the_nearest_number_in_half_precision():
    """The weights of one query span the whole range of half precision."""
    logits = torch.linspace(0, -17, 400)
    scores = Scores(torch.ones(1, 1, 100, 1), logits.view(1, 1, 400, 1), 1.0)
    with torch.no_grad():
        levels = compute(scores, torch.randn(1, 1, 400, 3), "dense16")[1].weights[0, 0, 0].double()
    exact = logits.double().exp()
    spacing = torch.maximum(2.0 ** torch.floor(exact.log2()), torch.tensor(2.0**-14)) * 2**-10
    assert ((levels - exact).abs() <= 0.502 * spacing).all()


@pytest.mark.parametrize("storage", ["dense16", "dense8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_long_rows_of_even_weights_are_stored_in_half_precision(storage, dtype):
    """600 similar weights, as uint8, add up to more than the maximum of float16."""
    case = make_case(batch=1, num_queries=90, num_keys=600)
    scores = Scores(0.1 * case.scores.query.to(dtype), case.scores.key.to(dtype), case.scores.scaling)
    values = (case.values + 1).to(dtype)
    exact = attention_map(scores.query.float(), scores.key.float(), scaling=scores.scaling) @ values.float()
    with torch.no_grad():
        found = compute(scores, values, storage)[1].apply(values)
    assert found.dtype == dtype
    assert (found.float() - exact).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("storage", STORAGES)
def test_nan_reaches_the_readers(storage):
    case = make_case(batch=1, num_queries=100, num_keys=100)
    case.scores.query[0, 0, 3] = float("nan")
    with torch.no_grad():
        context, stored = compute(case.scores, case.values, storage)
        applied = stored.apply(case.values)
    for found in (context, applied):
        assert found[0, 0, 3].isnan().all()
        assert not found[0, 0, 4].isnan().any()


def test_compressed_maps_need_half_and_a_quarter_of_the_memory():
    case = make_case(batch=1, heads=2, num_queries=130, num_keys=130)
    with torch.no_grad():
        sizes = {storage: size_of(compute(case.scores, case.values, storage)[1]) for storage in STORAGES}
    weights = 2 * 130 * 130
    assert sizes["dense"] == 4 * weights
    assert sizes["dense16"] == 2 * weights + 4 * 2 * 130
    assert sizes["dense8"] == weights + 4 * 2 * 130
    assert sizes["recompute"] == case.scores.nbytes


@pytest.mark.parametrize("storage", ["dense16", "dense8"])
def test_with_gradients_weights_are_not_compressed(storage):
    case = make_case()
    query = case.scores.query.clone().requires_grad_()
    _, stored = compute(replace(case.scores, query=query), case.values, storage)
    assert stored.weights.dtype == torch.float32
    stored.apply(case.values).sum().backward()
    assert query.grad is not None


@pytest.mark.parametrize(("storage", "stored"), [("auto", "dense"), ("dense8", "dense"), ("recompute", "recompute")])
def test_a_recorded_pass_does_not_try_storages_and_names_the_budget_it_needs(storage, stored, monkeypatch):
    case = make_case(num_queries=70, num_keys=70)
    monkeypatch.setattr("mapreuse.maps._shared_maps.choose_storage", None)
    needed = {"dense": 4 * 2 * 3 * 70 * 70, "recompute": case.scores.nbytes}[stored]
    with torch.no_grad(), plain_operators():
        for budget in (needed, None):
            maps = SharedMaps(storage=storage, counts=MapCounts(1, 1, 3, 3), budget=budget)
            assert maps.storage(case.scores, case.values) in (stored, storage)
        short = SharedMaps(storage=storage, counts=MapCounts(1, 1, 3, 3), budget=needed - 1)
        with pytest.raises(ValueError, match=f"recorded pass stores shared maps as {stored}, .*={needed}, but got"):
            short.storage(case.scores, case.values)


def costs_of(**costs):
    return tuple(StorageCost(name, seconds, nbytes) for name, (seconds, nbytes) in costs.items())


def test_dense8_is_chosen_only_if_memory_requires_it():
    costs = costs_of(dense=(0.2, 100), dense8=(0.1, 25))
    assert StorageChoice(costs, budget=100).storage == "dense"
    assert StorageChoice(costs, budget=99).storage == "dense8"


def test_the_fastest_storage_that_fits_is_chosen_and_explained():
    three = costs_of(dense=(1.0, 1000), dense8=(2.0, 250), recompute=(3.0, 10))
    assert StorageChoice(three, 1000).storage == "dense"
    assert StorageChoice(three, 999).storage == "dense8"
    assert StorageChoice(three, 10).storage == "recompute"
    assert str(StorageChoice(three, 999_999)).startswith("dense is the fastest storage of shared maps within 1.0 MB")
    assert "dense 1000.0 ms, 0.0 MB (too large)" in str(StorageChoice(three, 999))


def test_if_no_storage_fits_the_smallest_sufficient_budget_is_named():
    with pytest.raises(ValueError, match="memory_budget=9: the smallest is recompute, which needs memory_budget=10"):
        _ = StorageChoice(costs_of(dense=(1.0, 1000), recompute=(3.0, 10)), 9).storage


@pytest.mark.parametrize("relative", [True, False])
def test_sizes_match_the_maps_and_times_scale_with_them(relative):
    case = make_case(batch=1, heads=2, num_queries=130, num_keys=130, relative=relative)
    few, many = (
        choose_storage(case.scores, case.values, MapCounts(1, 3, 4, alive), budget=10**9) for alive in (2, 4)
    )
    with torch.no_grad():
        for one, two in zip(few.costs, many.costs, strict=True):
            used = size_of(compute(case.scores, case.values, one.storage)[1])
            assert (one.nbytes, two.nbytes) == (used, 2 * used)
            assert one.seconds == two.seconds > 0
    relative = case.scores.relative
    if relative is not None:
        relative = RelativePositions(relative.query.repeat(3, 1, 1, 1), relative.key)
    tripled = Scores(*(t.repeat(3, 1, 1, 1) for t in (case.scores.query, case.scores.key)), 0.7, relative=relative)
    thrice = choose_storage(tripled, case.values.repeat(3, 1, 1, 1), MapCounts(1, 3, 4, 2), budget=10**9)
    for one, three in zip(few.costs, thrice.costs, strict=True):
        assert three.seconds == pytest.approx(3 * one.seconds)


def test_the_storage_of_a_pass_is_chosen_once_and_has_gradients_in_training(monkeypatch):
    case = make_case(num_queries=70, num_keys=70)
    with torch.no_grad():
        roomy = SharedMaps(storage="auto", counts=MapCounts(1, 1, 3, 3), budget=10**9)
        chosen = roomy.storage(case.scores, case.values)
        assert chosen in STORAGES
        short = SharedMaps(storage="auto", counts=MapCounts(1, 1, 3, 3), budget=case.scores.nbytes)
        assert short.storage(case.scores, case.values) == "recompute"
    monkeypatch.setattr("mapreuse.maps._shared_maps.choose_storage", None)
    assert roomy.storage(case.scores, case.values) == chosen
    monkeypatch.undo()
    training = SharedMaps(storage="auto", counts=MapCounts(1, 1, 3, 3), budget=2 * 3 * 70 * 70 * 4 - 1)
    assert training.storage(case.scores, case.values) == "recompute", (
        "compressed maps would fit, but have no gradients"
    )
