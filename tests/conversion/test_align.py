"""Head assignment from similarity, against brute force."""

import itertools

import pytest
import torch
from families import build

import mapreuse as mr
from mapreuse.conversion import align_by, group_by, output_errors
from mapreuse.measure import Similarity, similarity
from mapreuse.models import MapRecorder, find_stack, output_projection
from mapreuse.plan import ReusePlan


def random_similarity(seed, layers=6, heads=3):
    generator = torch.Generator().manual_seed(seed)
    return Similarity(torch.rand(layers, heads, layers, heads, generator=generator), 100)


@pytest.mark.parametrize("seed", range(3))
def test_one_to_one_assignment_is_the_best_permutation(seed):
    measured = random_similarity(seed)
    plan = align_by(measured, ReusePlan.grouped(6, 2), mode="one-to-one")
    for layer in (1, 3, 5):
        heads = [pair[1] for pair in plan.heads(layer, 3)]
        alike = measured.heads[layer - 1, :, layer]
        best = max(itertools.permutations(range(3)), key=lambda p: sum(alike[p[h], h].item() for h in range(3)))
        assert heads == list(best)


@pytest.mark.parametrize("seed", range(3))
def test_best_assignment_takes_the_most_similar_head_for_each_head(seed):
    measured = random_similarity(seed)
    plan = align_by(measured, ReusePlan.from_sources([0, 0, 2, 2, 2, 5]))
    for layer, source in ((1, 0), (3, 2), (4, 2)):
        for head, (from_layer, from_head) in enumerate(plan.heads(layer, 3)):
            alike = measured.heads[source, :, layer, head]
            assert from_layer == source
            assert alike[from_head] == alike.max()


def test_layers_planned_head_by_head_keep_their_heads():
    plan = ReusePlan.from_sources([0, 0, 0, 3, 3, 3], heads={2: [2, None, 0]})
    aligned = align_by(random_similarity(0), plan)

    assert aligned.layers[2] == plan.layers[2]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("num_groups", [1, 2, 3, 6])
def test_grouping_by_similarity_finds_the_best_of_all_partitions(seed, num_groups):
    measured = random_similarity(seed)

    def total(plan):
        return sum(measured.layers[plan.sources(m)[0], m].item() for m in range(6) if plan.reuses(m))

    partitions = []
    for starts in itertools.combinations(range(1, 6), num_groups - 1):
        firsts = [0, *starts]
        partitions.append(ReusePlan.from_sources([max(f for f in firsts if f <= m) for m in range(6)]))

    found = group_by(measured, num_groups)

    assert total(found) == pytest.approx(max(map(total, partitions)))
    assert sum(not found.reuses(layer) for layer in range(6)) == num_groups


def test_a_layer_with_its_sources_heads_in_another_order_is_aligned_without_error():
    """Layer 2 computes the maps of layer 1 with its heads shuffled, on the same input."""
    model, batch = build("bert")
    plan = ReusePlan.from_sources([0, 1, 1, 3])
    shuffle = [2, 0, 3, 1]
    rows = [8 * head + row for head in shuffle for row in range(8)]
    first, second = model.encoder.layer[1], model.encoder.layer[2]
    with torch.no_grad():
        for projection in ("query", "key"):
            for kind in ("weight", "bias"):
                source = getattr(getattr(first.attention.self, projection), kind)
                getattr(getattr(second.attention.self, projection), kind).copy_(source[rows])
        for norm in (first.attention.output, first.output):  # layer 1 passes its input on, but for its norms
            norm.dense.weight.zero_()
            norm.dense.bias.zero_()
        original = model(**batch).last_hidden_state
        aligned = mr.convert(model, mr.align(model, plan, [batch]))
        by_index = mr.convert(model, plan)
        scale = original.abs().max()
        valid = batch["attention_mask"].bool()

        assert ((aligned(**batch).last_hidden_state - original)[valid].abs().max() / scale) < 1e-4
        assert ((by_index(**batch).last_hidden_state - original)[valid].abs().max() / scale) > 1e-1
    assert [pair[1] for pair in mr.plan_of(aligned).heads(2, 4)] == shuffle


def test_align_takes_the_most_similar_heads_or_those_with_the_least_error():
    model, batch = build("llama")
    plan = ReusePlan.grouped(4, 2)
    assert mr.align(model, plan, [batch], mode="best") == align_by(similarity(model, [batch]), plan)
    by_error = mr.align(model, plan, [batch])
    for layer in (1, 3):
        errors = output_errors(model, {layer: (layer - 1,)}, [batch])[layer][0]
        assert [pair[1] for pair in by_error.heads(layer, 4)] == errors.argmin(0).tolist()


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "parakeet"])
def test_the_error_of_an_assignment_is_the_change_of_the_layers_output(family):
    """By definition, from recorded maps and values, head by head; also with grouped and fused values."""
    model, batch = build(family)
    errors = output_errors(model, {1: (0,)}, [batch, batch])[1]
    maps, valid, values = MapRecorder(model)(batch)
    num_heads = maps[1].shape[1]
    projection = output_projection(find_stack(model).layers[1])
    weight = projection.weight if type(projection).__name__ == "Conv1D" else projection.weight.T
    parts = weight.detach().view(num_heads, -1, weight.shape[-1])
    repeated = values[1].repeat_interleave(num_heads // values[1].shape[1], 1)
    seen = []
    handle = projection.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    whole = sum(maps[1][:, h] @ repeated[:, h] @ parts[h] for h in range(num_heads))
    bias = 0 if projection.bias is None else projection.bias.detach()
    torch.testing.assert_close((whole + bias)[valid], seen[0][valid], atol=1e-4, rtol=1e-3)

    assert errors.shape == (1, num_heads, num_heads)
    for source in range(num_heads):
        for head in range(num_heads):
            moved = (maps[0][:, source] - maps[1][:, head]) @ repeated[:, head] @ parts[head]
            own = sum(((maps[1][:, h] @ repeated[:, h] @ parts[h])[valid] ** 2).sum() for h in range(num_heads))
            assert errors[0, source, head].item() == pytest.approx(
                (moved[valid].square().sum() / own).item(), rel=1e-3
            )


def test_a_plan_for_another_depth_and_an_impossible_number_of_groups_are_refused():
    with pytest.raises(ValueError, match="plan has 4 layers, but the model has 6"):
        align_by(random_similarity(0), ReusePlan.full(4))
    with pytest.raises(ValueError, match="num_groups must be between 1 and"):
        group_by(random_similarity(0), 7)


@pytest.mark.parametrize("mode", ["error", "best"])
def test_a_converted_model_another_depth_and_empty_batches_are_refused(mode):
    model, batch = build("bert")
    plan = mr.ReusePlan.grouped(4, 2)
    with pytest.raises(ValueError, match="the plan has 3 layers, but the model has 4"):
        mr.align(model, mr.ReusePlan.full(3), [batch], mode=mode)
    with pytest.raises(ValueError, match="the model shares attention maps already"):
        mr.align(mr.convert(model, plan), plan, [batch], mode=mode)
    padding = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
    for batches, message in (([padding], "or only padding"), ([], "no calibration"), (batch, "a str")):
        with pytest.raises(ValueError, match=message):
            mr.align(model, plan, iter(batches), mode=mode)
