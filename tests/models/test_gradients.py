"""Training converted models: removed parameters, gradients, dropout, checkpointing, dropped layers."""

import gc
import logging
import weakref
from contextlib import contextmanager

import pytest
import torch
import transformers as tf
from agreement import PLANS, STORAGES
from families import FAMILIES, build
from oracle import defined_output, disagreement, softmax_follows, valid_rows
from torch import nn
from torch.nn import functional

import mapreuse as mr
from mapreuse.maps import DenseMap, SharedMaps, _blocked
from mapreuse.maps._softmax import BlockDropout
from mapreuse.models import find_stack

GROUPS = PLANS["groups of 2"]
SAMPLE = ["parakeet", "wav2vec2-conformer-relative", "bert", "modernbert", "gpt2", "llama"]
"""One family for each kind of adapter."""

QUERIES_AND_KEYS = {
    "parakeet": {"q_proj", "k_proj", "relative_k_proj", "bias_u", "bias_v"},
    "wav2vec2-conformer-relative": {"linear_q", "linear_k", "linear_pos", "pos_bias_u", "pos_bias_v"},
    "wav2vec2-conformer-rotary": {"linear_q", "linear_k"},
    "bert": {"query", "key"},
    "roberta": {"query", "key"},
    "electra": {"query", "key"},
    "distilbert": {"q_lin", "k_lin"},
    "wavlm": {"q_proj", "k_proj", "gru_rel_pos_linear", "gru_rel_pos_const"},
    "deberta-v2": {"query_proj", "key_proj", "pos_query_proj", "pos_key_proj"},
    "t5-encoder": {"q", "k"},
    "t5-decoder": {"q", "k"},
    "deepseek-v3": {"q_a_proj", "q_a_layernorm", "q_b_proj"},
}
FUSED = {
    "modernbert": ("Wqkv", 0),
    "gpt2": ("c_attn", 1),
    "gpt-neox": ("query_key_value", 0),
    "phi3": ("qkv_proj", 0),
}
"""The projection of queries, keys and values, and the dimension of its outputs."""
"""Names of the projections of queries, keys and positions; `q_proj` and `k_proj` in other families."""


def training(family, **settings):
    """A family's model in training mode, without any dropout."""
    model, batch = build(family, **settings)
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train(), batch


def set_attention_dropout(model, p):
    for module in model.modules():
        if "attention" in type(module).__name__.lower():
            for name in ("attention_dropout", "dropout", "attn_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, p)
                elif isinstance(getattr(module, name, None), nn.Dropout):
                    getattr(module, name).p = p


def backward(model, batch):
    """Gradients by name, and the output."""
    model.zero_grad()
    output = model(**batch)
    output.last_hidden_state[valid_rows(model, batch, output)].square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, output


@pytest.mark.sample(5)
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - FUSED))
def test_a_reusing_layer_loses_only_its_projections_of_queries_and_keys(family):
    model, _ = build(family)
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    mr.apply(model, GROUPS)
    after = {name: parameter.shape for name, parameter in model.named_parameters()}

    parts = QUERIES_AND_KEYS.get(family, {"q_proj", "k_proj"})
    gone = {
        name
        for name in before
        if parts & set(name.split("."))
        and not {"encoder_attn", "EncDecAttention"} & set(name.split("."))
        and next(part for part in name.split(".") if part.isdigit()) in ("1", "3")
    }
    assert len(gone) >= 4
    assert after == {name: shape for name, shape in before.items() if name not in gone}


@pytest.mark.parametrize("family", FUSED)
def test_a_fused_projection_of_a_reusing_layer_keeps_only_the_values(family):
    model, _ = build(family)
    mr.apply(model, GROUPS)
    fused, output_dim = FUSED[family]
    sizes = [p.shape[output_dim] for n, p in model.named_parameters() if n.endswith(f"{fused}.weight")]
    whole, values = (64, 16) if family == "phi3" else (96, 32)
    assert sizes == [whole, values, whole, values]


def test_the_number_of_removed_parameters_is_logged(caplog):
    model, _ = build("bert")
    before = sum(parameter.numel() for parameter in model.parameters())
    with caplog.at_level(logging.INFO, "mapreuse"):
        mr.apply(model, GROUPS)
    removed = 2 * 2 * (32 * 32 + 32)
    assert before - sum(parameter.numel() for parameter in model.parameters()) == removed
    assert caplog.messages == [f"2 of 4 layers reuse attention maps: {removed:,} of {before:,} parameters removed"]


@pytest.mark.parametrize(
    ("family", "projections", "rows"),
    [
        ("parakeet", ["q_proj", "k_proj", "relative_k_proj"], 16),
        ("clip-text", ["q_proj", "k_proj"], 16),
        ("whisper-encoder", ["q_proj", "k_proj"], 32),  # its forward works with one number of heads
    ],
)
def test_a_layer_that_computes_in_part_keeps_the_projections_of_those_heads(family, projections, rows):
    model, _ = build(family)
    mr.apply(model, mr.ReusePlan.from_sources([0, 0, 2, 3], heads={1: [None, 2, None, 0]}))
    attention = find_stack(model).layers[1].attention
    assert {getattr(attention, name).weight.shape for name in projections} == {(rows, 32)}
    assert attention.v_proj.weight.shape == (32, 32)


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", SAMPLE)
@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_parameters_stay_frozen(family, frozen):
    model, _ = build(family)
    model.requires_grad_(not frozen)
    mr.apply(model, PLANS["in part"])
    assert {parameter.requires_grad for parameter in model.parameters()} == {not frozen}


@pytest.mark.sample(5)
@pytest.mark.parametrize("plan", ["groups of 2", "all from one", "two sources", "in part"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", SAMPLE)
def test_gradients_are_those_of_the_definition(family, plan, storage):
    """In float64, for all parameters that are not removed."""
    model, batch = build(family)
    eager, _ = build(family, implementation="eager")
    batch = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    gradients, output = backward(mr.apply(model.double(), PLANS[plan], storage=storage), batch)

    rows = valid_rows(model, batch, output)
    defined_output(eager.double(), batch, PLANS[plan])[rows].square().mean().backward()
    compared = []
    for name, parameter in eager.named_parameters():
        found, expected = gradients.get(name), parameter.grad
        if found is None or expected is None or found.shape != expected.shape:
            continue
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-5)
        compared.append(name)
    assert sum("att" in name for name in compared) >= 4
    assert len(compared) >= 20


@pytest.mark.sample(5)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", SAMPLE)
def test_a_computing_layer_gets_gradients_from_the_layers_that_apply_its_map(monkeypatch, family, storage):
    """Its gradient changes if those layers get a detached map."""
    model, batch = training(family)
    mr.apply(model, PLANS["all from one"], storage=storage)
    names = ("q_proj.weight", "linear_q.weight", "query.weight", "Wqkv.weight", "c_attn.weight")
    whole, _ = backward(model, batch)
    name = next(name for name in whole if name.endswith(names))

    read = SharedMaps.read
    monkeypatch.setattr(SharedMaps, "read", lambda *asked: DenseMap(read(*asked).dense().detach()))
    own, _ = backward(model, batch)
    assert (whole[name] - own[name]).abs().max() > 1e-2 * whole[name].abs().max()


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", SAMPLE)
def test_every_layer_draws_its_own_dropout_of_the_map_before_dropout(monkeypatch, family):
    monkeypatch.setattr(_blocked, "_MAX_SHORT", 0)
    model, batch = training(family)
    set_attention_dropout(model, 0.5)
    mr.apply(model, GROUPS)
    original, drawn = functional.dropout, []

    def dropout(input, p=0.5, *args, **kwargs):
        dropped = original(input, p, *args, **kwargs)
        if p > 0 and input.dim() == 4 and input.shape[1] == 4 and input.shape[-1] == input.shape[-2]:
            drawn.append((input, dropped))
        return dropped

    factors_of, computed = BlockDropout.factors, {}

    def factors(self, like, numbers):
        found = factors_of(self, like, numbers)
        computed.setdefault(self, []).append((found == 0).float().mean().item())
        return found

    monkeypatch.setattr(functional, "dropout", dropout)
    monkeypatch.setattr(BlockDropout, "factors", factors)
    model(**batch)
    assert len(computed) == len(drawn) == 2, "computing and reusing layers"
    for shares in computed.values():
        assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.1)
    (one, one_dropped), (other, other_dropped) = drawn
    for whole in (one, other):
        mass = whole.sum(-1)
        torch.testing.assert_close(mass[mass > 0], torch.ones_like(mass[mass > 0]))
    assert ((one_dropped == 0) != (other_dropped == 0)).float().mean() > 0.1


def test_computing_layers_draw_dropout_of_short_maps():
    model, batch = training("parakeet")
    set_attention_dropout(model, 0.5)
    mr.apply(model, mr.ReusePlan.full(4))
    torch.manual_seed(0)
    first = model(**batch).last_hidden_state
    assert (model(**batch).last_hidden_state - first).abs().max() > 0.1
    torch.manual_seed(0)
    assert torch.equal(model(**batch).last_hidden_state, first)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_fused_attention_draws_dropout_in_every_layer(monkeypatch, family):
    model, batch = training(family)
    set_attention_dropout(model, 0.5)
    mr.apply(model, GROUPS, storage="recompute")
    original, drawn = functional.scaled_dot_product_attention, []

    def fused(*args, **kwargs):
        drawn.append(kwargs["dropout_p"])
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", fused)
    model(**batch)
    assert drawn == [0.5] * 4
    drawn.clear()
    model.eval()(**batch)
    assert drawn == [0.0] * 4


def checkpointed_model(family):
    model, batch = training(family)
    mr.apply(model, GROUPS)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model, batch


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("with_backward", [True, False])
def test_maps_are_freed_with_the_output(monkeypatch, checkpointed, with_backward):
    if checkpointed:
        model, batch = checkpointed_model("bert")
    else:
        model, batch = training("bert")
        mr.apply(model, GROUPS)
    published, publish = [], SharedMaps.publish

    def recording(maps, layer, attention_map):
        published.append(weakref.ref(attention_map.weights))
        publish(maps, layer, attention_map)

    monkeypatch.setattr(SharedMaps, "publish", recording)
    output = model(**batch).last_hidden_state
    if with_backward:
        output.square().mean().backward()
    assert published
    del output
    gc.collect()
    assert [reference() for reference in published] == [None] * len(published)


def test_checkpointed_layers_allow_a_second_backward_pass():
    model, batch = checkpointed_model("bert")
    loss = model(**batch).last_hidden_state.square().mean()
    parameters = list(model.encoder.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(once, again)


def test_a_backward_pass_after_the_output_was_deleted_is_refused():
    model, batch = checkpointed_model("bert")
    between = []
    model.encoder.layer[1].register_forward_hook(lambda layer, inputs, output: between.append(output))
    model(**batch)
    gc.collect()
    with pytest.raises(RuntimeError, match="keep the output until the backward pass is done"):
        between[0].square().mean().backward()


@pytest.mark.sample(5)
@pytest.mark.parametrize("family", ["parakeet", "wav2vec2", "hubert", "wav2vec2-conformer-relative"])
@pytest.mark.parametrize("plan", ["groups of 2", "all from one", "two sources", "in part"])
def test_a_plan_trains_with_dropped_layers(family, plan):
    model, batch = training(family)
    mr.apply(model, PLANS[plan])
    drop_layers(model, 0.5)
    for seed in range(6):
        torch.manual_seed(seed)
        gradients, output = backward(model, batch)
        assert output.last_hidden_state.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("family", ["parakeet", "wav2vec2", "hubert", "wav2vec2-conformer-relative"])
def test_a_layer_whose_source_was_dropped_attends_nothing(monkeypatch, family):
    """The definition has no layer 0, and zeros as the map of layer 1. An earlier pass's map would change outputs."""
    model, batch = training(family)
    eager, _ = training(family, implementation="eager")
    mr.apply(model, GROUPS)
    with torch.no_grad():
        model(**batch)
    drop_layers(model, 0.5)
    drop_layers(eager, 0.5)
    rand = torch.rand

    def dropping_layer_0():
        draws = iter([0.0, 1.0, 1.0, 1.0])
        return lambda *size, **kwargs: torch.tensor(next(draws)) if size == ([],) else rand(*size, **kwargs)

    monkeypatch.setattr(torch, "rand", dropping_layer_0())
    with torch.no_grad():
        output = model(**batch)
    monkeypatch.setattr(torch, "rand", dropping_layer_0())
    with torch.no_grad(), first_softmax_is_zero(), softmax_follows(mr.ReusePlan.from_sources([0, 1, 1])):
        expected = eager(**batch)
    monkeypatch.undo()
    rows = valid_rows(model, batch, output)
    assert disagreement(output.last_hidden_state, expected.last_hidden_state, rows) <= 1e-4


def drop_layers(model, probability):
    for module in model.modules():
        if isinstance(getattr(module, "layerdrop", None), float):
            module.layerdrop = probability
        if hasattr(getattr(module, "config", None), "layerdrop"):
            module.config.layerdrop = probability


@contextmanager
def first_softmax_is_zero():
    """While open, the first softmax of a forward returns zeros."""
    original, factors = nn.functional.softmax, iter([0.0])
    nn.functional.softmax = lambda *args, **kwargs: original(*args, **kwargs) * next(factors, 1.0)
    try:
        yield
    finally:
        nn.functional.softmax = original


def test_a_decoder_under_a_plan_returns_a_loss_with_the_arguments_of_a_trainer():
    model = tf.LlamaForCausalLM(build("llama")[0].config)
    _, batch = build("llama")
    mr.apply(model, GROUPS)
    loss = model(**batch, labels=batch["input_ids"], num_items_in_batch=torch.tensor(10)).loss
    loss.backward()
    assert max(p.grad.abs().max() for p in model.parameters()) > 0
