"""Head assignment: by definition, and where heads were shuffled."""

import pytest
import torch
from families import build
from text_batches import random_batches

import mapreuse as mr
from mapreuse.conversion._align import output_errors
from mapreuse.models import MapRecorder, find_stack, output_projection
from mapreuse.plan import ReusePlan


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


def test_align_takes_the_heads_with_the_least_error_and_keeps_layers_planned_head_by_head():
    model, batch = build("llama")
    plan = ReusePlan.from_sources([0, 0, 2, 2], heads={3: [2, None, 0, 0]})
    aligned = mr.align(model, plan, [batch])
    errors = output_errors(model, {1: (0,)}, [batch])[1][0]
    assert [pair[1] for pair in aligned.heads(1, 4)] == errors.argmin(0).tolist()
    assert aligned.layers[3] == plan.layers[3]


@pytest.mark.parametrize(
    ("family", "length"), [("bert", None), ("llama", None), ("gpt2", None), ("parakeet", None), ("llama", 150)]
)
def test_the_error_of_an_assignment_is_the_change_of_the_layers_output(family, length):
    """By definition, from recorded maps and values, head by head; also with grouped and fused values.

    Samples of more than 64 positions are compared at 64 evenly spaced ones.
    """
    model, batch = build(family)
    if length is not None:
        (batch,) = random_batches(1, length=length)
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

    if length is not None:
        compared = torch.zeros(length, dtype=torch.bool)
        compared[[round(number * (length - 1) / 63) for number in range(64)]] = True
        valid = valid & compared
    assert errors.shape == (1, num_heads, num_heads)
    for source in range(num_heads):
        for head in range(num_heads):
            moved = (maps[0][:, source] - maps[1][:, head]) @ repeated[:, head] @ parts[head]
            own = sum(((maps[1][:, h] @ repeated[:, h] @ parts[h])[valid] ** 2).sum() for h in range(num_heads))
            assert errors[0, source, head].item() == pytest.approx(
                (moved[valid].square().sum() / own).item(), rel=1e-3
            )


def test_a_converted_model_another_depth_and_empty_batches_are_refused():
    model, batch = build("bert")
    plan = mr.ReusePlan.grouped(4, 2)
    with pytest.raises(ValueError, match="the plan has 3 layers, but the model has 4"):
        mr.align(model, mr.ReusePlan.full(3), [batch])
    with pytest.raises(ValueError, match="the model shares attention maps already"):
        mr.align(mr.convert(model, plan), plan, [batch])
    padding = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
    for batches, message in (([padding], "or only padding"), ([], "no calibration"), (batch, "a str")):
        with pytest.raises(ValueError, match=message):
            mr.align(model, plan, iter(batches))
