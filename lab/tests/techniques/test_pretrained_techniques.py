"""Techniques on pretrained models against their definitions: a dense map, made by hand for one sequence."""

import copy
import math

import pytest
import torch
import transformers as tf
from mapreuse_lab.study._recovery import recover
from mapreuse_lab.techniques import PretrainedStack, parse, pretrained_techniques
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import mapreuse as mr
from mapreuse.measure import use_attention

LAYERS, HEADS, WIDTH, DIM, LENGTH = 4, 4, 32, 8, 21


def peaked(model):
    """Random weights, large enough for maps that are far from uniform."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name.lower():
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def bert():
    config = tf.BertConfig(
        vocab_size=50, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48,
    )  # fmt: skip
    return peaked(tf.BertModel(config))


def llama():
    config = tf.LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2,
        intermediate_size=48,
    )  # fmt: skip
    return peaked(tf.LlamaForCausalLM(config))


def moonshine():
    config = tf.MoonshineConfig(
        vocab_size=50, hidden_size=24, encoder_num_hidden_layers=LAYERS, decoder_num_hidden_layers=LAYERS,
        encoder_num_attention_heads=HEADS, decoder_num_attention_heads=HEADS, intermediate_size=48,
        pad_head_dim_to_multiple_of=8,
    )  # fmt: skip
    return peaked(tf.MoonshineForConditionalGeneration(config)).get_encoder()


MAKERS = {"bert": bert, "llama": llama, "moonshine": moonshine}


def inputs_of(model, length=LENGTH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, tf.PreTrainedModel) and model.main_input_name == "input_values":
        return {"input_values": torch.randn(1, 384 * (length + 1), generator=generator)}
    return {"input_ids": torch.randint(1, 50, (1, length), generator=generator)}


def batches_of(model, number=6):
    return [inputs_of(model, 40, seed) for seed in range(number)]


@torch.no_grad()
def output(model, inputs):
    found = model(**inputs)
    return found.logits if getattr(found, "logits", None) is not None else found.last_hidden_state


def converted(make, name):
    torch.manual_seed(1)
    model = make()
    technique = parse(name)
    technique.convert_pretrained(model, batches_of(model))
    technique.finish(model)
    return model


def by_definition(model, dense):
    """The model with attention `dense(query, key, values, causal, layer)` → context, of (heads, positions, dim)."""

    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        real = query.shape[-1] - getattr(module, "head_dim_padding", 0)
        times = query.shape[1] // key.shape[1]
        key, value = (part[0].repeat_interleave(times, 0)[..., :real] for part in (key, value))
        context = dense(query[0][..., :real] * scaling, key, value, bool(module.is_causal), module.layer_idx)
        return nn.functional.pad(context, (0, query.shape[-1] - real))[None].transpose(1, 2), None

    AttentionInterface.register("by_hand", attention)
    AttentionMaskInterface.register("by_hand", sdpa_mask)
    for index, one in enumerate(PretrainedStack(model).layers):
        one.attention.layer_idx = index
    use_attention(model, "by_hand")
    return model


def pairs(length, causal):
    """j − i, and True where query i may attend to key j."""
    places = torch.arange(length)
    apart = places[None] - places[:, None]
    return apart, (apart <= 0) if causal else torch.ones_like(apart, dtype=torch.bool)


def soft(scores, allowed):
    return torch.softmax(scores.masked_fill(~allowed, -math.inf), -1)


def full(query, key, values, causal, layer):
    return soft(query @ key.mT, pairs(len(query[0]), causal)[1]) @ values


def window(query, key, values, causal, layer):
    apart, allowed = pairs(len(query[0]), causal)
    return soft(query @ key.mT, allowed & (apart.abs() <= 3)) @ values


def window_and_global(query, key, values, causal, layer):
    apart, allowed = pairs(len(query[0]), causal)
    first = torch.arange(len(apart)) < 2
    return soft(query @ key.mT, allowed & ((apart.abs() <= 3) | first[None] | first[:, None])) @ values


def strided(query, key, values, causal, layer):
    return full(query, key, values, causal, layer)[:, torch.arange(len(query[0])) // 3 * 3]


def linear(query, key, values, causal, layer):
    features = [nn.functional.elu(part) + 1 for part in (query * math.sqrt(query.shape[-1]), key)]
    weights = (features[0] @ features[1].mT) * pairs(len(query[0]), causal)[1]
    return weights / weights.sum(-1, keepdim=True) @ values


def gaussian(query, key, values, causal, layer):
    apart, allowed = pairs(len(query[0]), causal)
    centres = torch.linspace(-6, 6, len(query))[:, None, None]
    weights = torch.exp(-((apart - centres) ** 2) / 8) * (apart.abs() <= 12) * allowed
    return weights / weights.sum(-1, keepdim=True) @ values


def diagonal(query, key, values, causal, layer):
    return values


def grouped(query, key, values, causal, layer):
    length, groups = query.shape[1], -(-query.shape[1] // 3)
    contexts = torch.zeros_like(values)
    for i in range(groups):
        scores = []
        for j in range(groups):
            places = [(3 * i + one, 3 * j + one) for one in range(3) if max(3 * i + one, 3 * j + one) < length]
            scores.append(sum((query[:, a] * key[:, b]).sum(-1) for a, b in places) / math.sqrt(3))
        weights = torch.softmax(torch.stack(scores, -1), -1)
        for one in range(3):
            if 3 * i + one < length:
                there = torch.arange(one, length, 3)
                contexts[:, 3 * i + one] = (weights[:, : len(there), None] * values[:, there]).sum(1)
    return contexts


def pooled(query, key, values, causal, layer):
    steps = range(0, key.shape[1], 3)
    key, values = (torch.stack([part[:, at : at + 3].mean(1) for at in steps], 1) for part in (key, values))
    return torch.softmax(query @ key.mT, -1) @ values


def sparse(query, key, values, causal, layer):
    length = query.shape[1]
    number = math.ceil(2 * math.log(length))
    sampled = torch.tensor([int((rank + 0.5) * length / number) for rank in range(number)])
    scores = query @ key[:, sampled].mT
    measure = scores.amax(-1) - scores.mean(-1)
    context = values.mean(1, keepdim=True).expand_as(values).clone()
    attended = full(query, key, values, causal, layer)
    for head, chosen in enumerate(measure.topk(number, -1).indices):
        context[head, chosen] = attended[head, chosen]
    return context


def shared_keys_and_values():
    kept = {}

    def dense(query, key, values, causal, layer):
        kept[layer] = key, values
        return full(query, *kept[layer - layer % 2], causal, layer)

    return dense


def shared_windows():
    kept = {}

    def dense(query, key, values, causal, layer):
        apart, allowed = pairs(len(query[0]), causal)
        kept[layer] = soft(query @ key.mT, allowed & (apart.abs() <= 3))
        return kept[layer - layer % 2] @ values

    return dense


DEFINITIONS = {
    "full": full,
    "window-3": window,
    "window-3-global-2": window_and_global,
    "strided-3": strided,
    "linear": linear,
    "gaussian-2": gaussian,
    "diagonal": diagonal,
    "grouped-3": grouped,
    "pool-3": pooled,
    "probsparse-2": sparse,
    "cla-2": shared_keys_and_values(),
}
NOT_CAUSAL = ("grouped-3", "pool-3", "probsparse-2")


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("family", MAKERS)
def test_outputs_are_those_of_the_dense_definition(family, name):
    make = MAKERS[family]
    if family == "llama" and name in NOT_CAUSAL:
        with pytest.raises(ValueError, match=f"{name} does not apply to LlamaForCausalLM: "):
            converted(make, name)
        return
    inputs = inputs_of(make())
    expected = output(by_definition(make(), DEFINITIONS[name]), inputs)
    torch.testing.assert_close(output(converted(make, name), inputs), expected, rtol=2e-4, atol=2e-4)


def test_shared_windows_have_the_maps_of_the_source_layer(monkeypatch):
    monkeypatch.setattr(mr, "align", lambda model, plan, batches: plan)  # heads by index
    inputs = inputs_of(llama())
    expected = output(by_definition(llama(), shared_windows()), inputs)
    torch.testing.assert_close(output(converted(llama, "window-3+reuse-2x2"), inputs), expected, rtol=2e-4, atol=2e-4)


def test_a_slot_of_linformer_is_at_first_the_mean_of_a_segment():
    def segments(query, key, values, causal, layer):
        key, values = (part.unflatten(1, (8, 32)).mean(2) for part in (key, values))
        return torch.softmax(query @ key.mT, -1) @ values

    inputs = inputs_of(bert(), 256)
    expected = output(by_definition(bert(), segments), inputs)
    torch.testing.assert_close(output(converted(bert, "linformer-8"), inputs), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "tolerance"), [("performer-4096", 0.3), ("nystrom-256", 1e-2)])
def test_an_approximation_with_many_features_or_landmarks_is_near_full_attention(name, tolerance):
    model, inputs = bert(), inputs_of(bert())
    with torch.no_grad():  # moderate scores, for which the random features' variance is small
        for layer in PretrainedStack(model).layers:
            layer.projection("query").weight.mul_(0.3)
    expected = output(model, inputs)
    original = output(parse("diagonal").convert_pretrained(copy.deepcopy(model), []), inputs)
    torch.manual_seed(1)
    found = output(parse(name).convert_pretrained(model, []), inputs)
    assert (found - expected).norm() < tolerance * (original - expected).norm()


def applicable(make):
    stack = PretrainedStack(make())
    return [one.name for one in pretrained_techniques(stack, 32) if not one.why_not(stack)]


CAUSAL = applicable(llama)


def test_enough_techniques_apply_to_encoders_and_to_causal_models():
    assert len(CAUSAL) > 8
    for make in (bert, moonshine):
        assert len(applicable(make)) > 14


@pytest.mark.parametrize("name", CAUSAL)
def test_a_later_token_changes_no_earlier_logits(name):
    model, inputs = converted(llama, name), inputs_of(llama())
    if name.startswith("int8"):
        pytest.skip("the scale of 8-bit activations is one for the whole input, by definition of quantize_dynamic")
    before = output(model, inputs)
    changed = inputs["input_ids"].clone()
    changed[0, 15] = (changed[0, 15] + 7) % 50
    after = output(model, {"input_ids": changed})
    torch.testing.assert_close(after[:, :15], before[:, :15], rtol=1e-4, atol=1e-4)
    assert (after[:, 15:] - before[:, 15:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", applicable(bert))
def test_padding_changes_no_output(name):
    if name.startswith("int8"):
        pytest.skip("the scale of 8-bit activations is one for the whole batch, by definition of quantize_dynamic")
    model, ids = converted(bert, name), torch.randint(1, 50, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    padded = output(model, {"input_ids": ids, "attention_mask": mask})
    for row, length in ((0, LENGTH), (1, 14)):
        alone = output(model, {"input_ids": ids[row : row + 1, :length]})
        torch.testing.assert_close(padded[row : row + 1, :length], alone, rtol=1e-3, atol=1e-3)


def zeroed(make, keep):
    """The model without the outputs of some heads: keep(layer, head)."""
    model = make()
    with torch.no_grad():
        for layer in PretrainedStack(model).layers:
            output = layer.projection("output")
            for head in range(layer.num_heads):
                if not keep(layer.index, head):
                    output.weight[:, head * layer.head_dim : (head + 1) * layer.head_dim] = 0
            if not any(keep(layer.index, head) for head in range(layer.num_heads)) and output.bias is not None:
                output.bias.zero_()
    return model


@pytest.mark.parametrize("family", MAKERS)
def test_the_heads_that_contribute_least_are_removed(family):
    make = MAKERS[family]
    original, inputs = make(), inputs_of(make())
    sizes = torch.zeros(LAYERS, HEADS)
    for batch in batches_of(original):
        rows = PretrainedStack(original).recorded(batch)
        for layer in PretrainedStack(original).layers:
            for head in range(HEADS):
                columns = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
                part = rows[layer.index]["context"][:, columns] @ layer.projection("output").weight[:, columns].mT
                sizes[layer.index, head] += part.square().sum(-1).mean()
    if family == "llama":  # two heads share each head of keys and values
        sizes = sizes.unflatten(1, (2, 2)).sum(-1).repeat_interleave(2, 1)
    kept = [set(row.topk(2).indices.tolist()) for row in sizes]
    expected = output(zeroed(make, lambda layer, head: head in kept[layer]), inputs)
    torch.testing.assert_close(output(converted(make, "heads-2"), inputs), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", MAKERS)
def test_skipped_layers_add_nothing_and_are_those_that_added_least(family):
    make = MAKERS[family]
    original, inputs = make(), inputs_of(make())
    sizes = torch.zeros(LAYERS)
    for batch in batches_of(original):
        for index, rows in enumerate(PretrainedStack(original).recorded(batch)):
            sizes[index] += rows["attention"].square().sum() / rows["input"].square().sum()
    skipped = set(sizes.argsort()[:2].tolist())
    expected = output(zeroed(make, lambda layer, head: layer not in skipped), inputs)
    torch.testing.assert_close(output(converted(make, "skip-2"), inputs), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", MAKERS)
def test_dropped_layers_are_identities(family):
    make = MAKERS[family]
    model, inputs = make(), inputs_of(make())
    influence = torch.zeros(LAYERS)
    for batch in batches_of(model):
        for index, rows in enumerate(PretrainedStack(model).recorded(batch)):
            influence[index] += 1 - nn.functional.cosine_similarity(rows["input"], rows["states"]).mean()
    dropped = set(influence.argsort()[:2].tolist())
    for layer in PretrainedStack(model).layers:
        if layer.index in dropped:
            layer.layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    found = converted(make, "layers-2")
    assert len(PretrainedStack(found).layers) == 2
    torch.testing.assert_close(output(found, inputs), output(model, inputs), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", MAKERS)
def test_merged_heads_of_keys_and_values_are_means(family):
    make = MAKERS[family]
    expected = make()
    with torch.no_grad():
        for layer in PretrainedStack(expected).layers:
            for role in ("key", "value"):
                for parameter in layer.projection(role).parameters():
                    heads = parameter.unflatten(0, (layer.num_key_heads, -1))
                    heads.copy_(heads.mean(0, keepdim=True).expand_as(heads))
    inputs = inputs_of(make())
    torch.testing.assert_close(
        output(converted(make, "gqa-1"), inputs), output(expected, inputs), rtol=2e-4, atol=2e-4
    )


def test_mapped_outputs_are_the_least_squares_solution():
    original, found = bert(), converted(bert, "outputs-2x2")
    rows = [PretrainedStack(original).recorded(batch) for batch in batches_of(original)]
    for layer in (1, 3):
        before, targets = (torch.cat([one[index]["attention"] for one in rows]) for index in (layer - 1, layer))
        before = nn.functional.pad(before.double(), (0, 1), value=1.0)
        best = torch.linalg.lstsq(before, targets.double()).solution
        mapped = found.encoder.layer[layer].attention.output.dense
        error = (before[:, :-1].float() @ mapped.weight.mT + mapped.bias - targets).square().sum()
        smallest = (before @ best - targets).square().sum()
        assert 0.99 * smallest <= error <= smallest + 1e-4 * targets.square().sum()


def test_low_rank_projections_keep_the_principal_directions_of_the_outputs():
    original, found = bert(), converted(bert, "low-rank-50")
    rows = [PretrainedStack(original).recorded(batch) for batch in batches_of(original)]
    hidden, values = (torch.cat([one[0][name] for one in rows]) for name in ("hidden", "value"))
    mean = values.mean(0)
    directions = torch.linalg.svd(values - mean, full_matrices=False).Vh[: WIDTH // 2]
    expected = (values - mean) @ directions.mT @ directions + mean
    projection = found.encoder.layer[0].attention.self.value
    assert [part.out_features for part in projection] == [WIDTH // 2, WIDTH]
    torch.testing.assert_close(projection(hidden), expected, rtol=1e-3, atol=1e-3)


def test_reuse_is_the_librarys_plan_and_int8_quantises_every_linear_layer():
    assert str(mr.plan_of(converted(bert, "reuse-2x2"))).count("\n") >= LAYERS
    assert mr.plan_of(converted(llama, "keys-4-window-4+reuse-1x2,2x1")).keys == 4
    assert mr.plan_of(converted(llama, "corrected-4+reuse-1x2,2x1")).rank == 4
    for name in ("int8", "int8+reuse-2x2"):
        model = converted(bert, name)
        kinds = {type(module) for module in model.encoder.layer.modules()}
        assert nn.Linear not in kinds
        reference = converted(bert, name.replace("int8+", "") if "+" in name else "full")
        inputs = inputs_of(model)
        expected = output(reference, inputs)
        assert (output(model, inputs) - expected).norm() < 0.1 * expected.norm()


def test_a_technique_of_pretrained_models_refuses_an_encoder_to_be_trained():
    with pytest.raises(ValueError, match="low-rank-50 changes pretrained models"):
        parse("low-rank-50").apply(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="wide-heads-1 does not apply to BertModel: trained heads"):
        converted(bert, "wide-heads-1")
    with pytest.raises(ValueError, match="the plan has 6 layers, but the model has 4"):
        converted(bert, "reuse-2x3")


@pytest.mark.parametrize("name", ["window-3", "layers-2", "low-rank-33", "gqa-1", "window-3+reuse-2x2"])
def test_recovery_brings_the_model_nearer_to_the_original(name):
    original, model = bert(), bert()
    batches = [inputs_of(original, 24, seed) for seed in range(16)]
    layers = [one.layer for one in PretrainedStack(model).layers]
    parse(name).convert_pretrained(model, batches)
    left = set(model.modules())
    pairs = [
        (one, other.layer) for one, other in zip(layers, PretrainedStack(original).layers, strict=True) if one in left
    ]
    before = {key: tensor.clone() for key, tensor in original.state_dict().items()}
    found = recover(model, original, pairs, batches, steps=60)
    assert found["after"] < found["before"]
    assert all(torch.equal(tensor, before[key]) for key, tensor in original.state_dict().items())


def merged_by_hand(model, inputs, percent):
    """The last hidden states of BERT on one sequence: lists of tokens, each a list of original places."""
    states = model.embeddings(**inputs)[0]
    tokens = [[place] for place in range(len(states))]
    for layer in model.encoder.layer:
        attention, norm = layer.attention.self, layer.attention.output
        query, key, value = (
            projection(states).unflatten(-1, (HEADS, -1)).transpose(0, 1)
            for projection in (attention.query, attention.key, attention.value)
        )
        sizes = torch.tensor([float(len(token)) for token in tokens])
        weights = torch.softmax(query @ key.mT / math.sqrt(DIM) + sizes.log(), -1)
        states = norm((weights @ value).transpose(0, 1).flatten(1)[None], states[None])[0]
        metric = key.mean(0)
        best = {}
        for i in range(0, len(tokens), 2):
            found = {j: torch.cosine_similarity(metric[i], metric[j], 0).item() for j in range(1, len(tokens), 2)}
            best[i] = max(found, key=found.get)
        order = sorted(best, key=lambda i: -torch.cosine_similarity(metric[i], metric[best[i]], 0).item())
        leaving = order[: len(tokens) * percent // 100]
        totals = [state * len(token) for state, token in zip(states, tokens, strict=True)]
        for i in leaving:
            totals[best[i]] = totals[best[i]] + totals[i]
            tokens[best[i]] = tokens[best[i]] + tokens[i]
        kept = [i for i in range(len(tokens)) if i not in leaving]
        # `totals` sums size × state, and a merged token has the sizes of all its parts.
        states = torch.stack([totals[i] / len(tokens[i]) for i in kept])
        tokens = [tokens[i] for i in kept]
        states = layer.feed_forward_chunk(states[None])[0]
    places = {place: row for row, token in enumerate(tokens) for place in token}
    return torch.stack([states[places[place]] for place in range(len(places))])


@torch.no_grad()
def test_tokens_are_merged_into_the_most_similar_and_count_by_their_size():
    inputs = inputs_of(bert())
    expected = merged_by_hand(bert(), inputs, 20)
    torch.testing.assert_close(output(converted(bert, "merge-20"), inputs)[0], expected, rtol=2e-4, atol=2e-4)
    with pytest.raises(ValueError, match="percent must be at most 50"):
        parse("merge-51")


def test_recovery_of_merged_tokens_compares_the_last_layer_alone_which_keeps_all_of_them():
    original, model = bert(), converted(bert, "merge-20")
    layers = [(one.layer, other.layer) for one, other in zip(*map(stack_layers, (model, original)), strict=True)]
    batches = [inputs_of(original, 24, seed) for seed in range(16)]
    found, expected = ([output(one, batch) for batch in batches[7::8]] for one in (model, original))
    errors = [(one - other).square().sum() / other.square().sum() for one, other in zip(found, expected, strict=True)]
    before = recover(model, original, layers, batches, steps=1)["before"]
    assert before == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def stack_layers(model):
    return PretrainedStack(model).layers
