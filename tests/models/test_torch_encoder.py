"""`torch.nn.TransformerEncoder` under a plan: results, gradients, refusals."""

import copy
import warnings

import pytest
import torch
from agreement import PLANS
from oracle import defined_packed_output, disagreement
from packed_encoders import HEADS, LAYERS, WIDTH, encoder
from torch import nn

import mapreuse as mr
from mapreuse.models import MapRecorder, _torch_encoder

GROUPS = PLANS["groups of 2"]
POSITIONS = 9
PADDING = torch.tensor([[False] * 9, [False] * 5 + [True] * 4, [False] * 2 + [True] * 7])
CAUSAL = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).triu(1)
MASKS = {"none": None, "boolean": CAUSAL, "additive": torch.zeros(9, 9).masked_fill(CAUSAL, float("-inf")) - 0.5}
ENCODERS = {
    "batch first": {"batch_first": True},
    "positions first": {"batch_first": False},
    "norm first": {"batch_first": True, "norm_first": True},
    "gelu, no bias, no last norm": {"batch_first": True, "activation": "gelu", "bias": False, "norm": False},
}


def inputs(batch_first=True):
    torch.manual_seed(1)
    src = torch.randn(3, POSITIONS, WIDTH)
    return src if batch_first else src.transpose(0, 1)


@pytest.mark.sample(5)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("settings", ENCODERS.values(), ids=ENCODERS)
def test_an_encoder_agrees_with_the_definition(settings, mask, plan):
    model, src = encoder(**settings), inputs(settings["batch_first"])
    # torch accepts two masks only if both are boolean or both additive
    padding = PADDING if mask != "additive" else torch.zeros(3, 9).masked_fill(PADDING, float("-inf"))
    masks = {"mask": MASKS[mask], "src_key_padding_mask": padding}
    with torch.no_grad():
        expected = defined_packed_output(model, PLANS[plan], src, **masks)
        without_plan = defined_packed_output(model, PLANS["full"], src, **masks)
        found = mr.apply(model, PLANS[plan])(src, **masks)
    assert found.shape == src.shape
    assert found.isfinite().all()
    if not settings["batch_first"]:
        found, expected, without_plan = (x.transpose(0, 1) for x in (found, expected, without_plan))
    assert disagreement(found, expected, ~PADDING) <= (1e-5 if plan == "full" else 1e-4)
    assert plan == "full" or disagreement(without_plan, expected, ~PADDING) > 1e-1


@pytest.mark.parametrize("settings", ENCODERS.values(), ids=ENCODERS)
def test_the_definition_of_an_encoder_without_a_plan_is_the_encoder(settings):
    model, src = encoder(**settings), inputs(settings["batch_first"])
    with torch.no_grad():
        expected = model(src, mask=MASKS["boolean"], src_key_padding_mask=PADDING)
        found = defined_packed_output(model, PLANS["full"], src, mask=MASKS["boolean"], src_key_padding_mask=PADDING)
    if not settings["batch_first"]:
        found, expected = found.transpose(0, 1), expected.transpose(0, 1)
    assert disagreement(found, expected, ~PADDING) <= 1e-5


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_mask_may_differ_from_head_to_head(plan):
    model, src = encoder(batch_first=True), inputs()
    torch.manual_seed(2)
    mask = (torch.rand(3 * HEADS, POSITIONS, POSITIONS) < 0.3) & ~torch.eye(POSITIONS, dtype=torch.bool)
    with torch.no_grad():
        expected = defined_packed_output(model, plan, src, mask=mask)
        found = mr.apply(model, plan)(src, mask=mask)
    assert disagreement(found, expected, torch.ones_like(PADDING)) <= 1e-4


@pytest.mark.parametrize("storage", ["dense", "recompute"])
def test_an_encoder_trains_with_the_gradients_of_the_definition(storage):
    model, src = encoder(batch_first=True).train(), inputs()
    plan = PLANS["in part"]
    converted = mr.apply(copy.deepcopy(model), plan, storage=storage)
    found, expected = src.clone().requires_grad_(), src.clone().requires_grad_()
    weight = torch.randn_like(src).masked_fill(PADDING[..., None], 0.0)
    (converted(found, src_key_padding_mask=PADDING) * weight).sum().backward()
    (defined_packed_output(model, plan, expected, src_key_padding_mask=PADDING) * weight).sum().backward()
    assert disagreement(found.grad, expected.grad, ~PADDING) <= 1e-3
    for name in ("linear1.weight", "norm1.weight", "self_attn.out_proj.bias"):
        for one, other in zip(converted.layers, model.layers, strict=True):
            one, other = one.get_parameter(name).grad, other.get_parameter(name).grad
            assert disagreement(one, other, torch.ones(len(one), dtype=torch.bool)) <= 1e-3


def test_an_encoder_draws_attention_dropout_in_training_only():
    model, src = mr.apply(encoder(dropout=0.5, batch_first=True), GROUPS), inputs()
    for layer in model.layers:
        layer.dropout.p = layer.dropout1.p = layer.dropout2.p = 0.0
    assert torch.equal(model(src), model(src))
    model.train()
    assert not torch.equal(model(src), model(src))


def test_an_encoder_under_a_plan_never_takes_the_fast_path(monkeypatch):
    model, src = encoder(batch_first=True), inputs()
    fast = []
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: fast.append(args) or args[0])
    monkeypatch.setattr(torch, "_nested_tensor_from_mask", lambda *args, **kwargs: fast.append(args) or args[0])
    with torch.no_grad():
        model(src)
        assert fast, "the original takes it"
        fast.clear()
        mr.apply(model, PLANS["full"])(src, src_key_padding_mask=PADDING)
        model(src)
    assert not fast


def test_reusing_layers_of_an_encoder_keep_only_the_projection_of_values():
    model = mr.apply(encoder(batch_first=True), GROUPS)
    shapes = [tuple(layer.self_attn.in_proj.weight.shape) for layer in model.layers]
    assert shapes == [(3 * WIDTH, WIDTH), (WIDTH, WIDTH)] * 2
    assert [len(layer.self_attn.in_proj.bias) for layer in model.layers] == [3 * WIDTH, WIDTH] * 2


def test_the_decoder_beside_an_encoder_under_a_plan_stays_as_it_is():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about nested tensors
        model = nn.Transformer(WIDTH, HEADS, LAYERS, 1, 64, batch_first=True).eval()
    decoder = copy.deepcopy(model.decoder)
    mr.apply(model.encoder, GROUPS)
    memory, target = torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH)
    assert torch.equal(model.decoder(target, memory), decoder(target, memory))
    assert model(memory, target).shape == target.shape


class OtherLayer(nn.TransformerEncoderLayer):
    pass


class OtherAttention(nn.MultiheadAttention):
    pass


class QuantisedTensor(nn.Parameter):
    pass


CHANGES = {
    "a subclass of the layer": (
        lambda layers: setattr(layers[0], "__class__", OtherLayer),
        r"layer 0 \(OtherLayer, MultiheadAttention\)",
    ),
    "a subclass of attention": (
        lambda layers: setattr(layers[3].self_attn, "__class__", OtherAttention),
        r"layer 3 .*OtherAttention",
    ),
    "an additional key": (
        lambda layers: setattr(layers[1].self_attn, "add_zero_attn", True),
        r"layer 1 .*add_zero_attn",
    ),
    "a patched forward": (
        lambda layers: setattr(layers[1].self_attn, "forward", layers[1].self_attn.forward),
        r"layer 1 .*its forward was replaced",
    ),
    "a quantised weight": (
        lambda layers: setattr(layers[2].self_attn.out_proj, "weight", QuantisedTensor(torch.zeros(WIDTH, WIDTH))),
        r"layer 2 \(MultiheadAttention\): out_proj is .* not a plain projection",
    ),
}


@pytest.mark.parametrize(("change", "problem"), CHANGES.values(), ids=CHANGES)
def test_an_unusual_encoder_is_refused_and_stays_as_it_was(change, problem):
    model = encoder(batch_first=True)
    change(model.layers)
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=problem) as error:
        mr.apply(model, GROUPS)
    assert "\n" not in str(error.value)
    assert before == [(name, type(module)) for name, module in model.named_modules()]
    assert mr.plan_of(model) is None


def test_a_plan_that_does_not_fit_leaves_an_encoder_as_it_was():
    model, src = encoder(batch_first=True), inputs()
    with torch.no_grad():
        expected = model(src)
        with pytest.raises(ValueError, match="plan has 3 layers, but TransformerEncoder has 4"):
            mr.apply(model, mr.ReusePlan.grouped(3, 2))
        assert model.use_nested_tensor
        assert torch.equal(model(src), expected)


def test_a_changed_forward_of_torch_is_refused(monkeypatch):
    monkeypatch.setitem(_torch_encoder._FINGERPRINTS, nn.TransformerEncoderLayer, ("0" * 12,))
    with pytest.raises(ValueError, match="TransformerEncoderLayer: its forward has changed"):
        mr.apply(encoder(batch_first=True), GROUPS)


def test_an_encoder_under_a_plan_refuses_a_single_sequence_and_a_causal_hint_without_a_mask():
    model = mr.apply(encoder(batch_first=True), GROUPS)
    with pytest.raises(ValueError, match="takes a padded batch"):
        model(torch.randn(POSITIONS, WIDTH))
    with pytest.raises(ValueError, match="pass the mask as well"):
        model(inputs(), is_causal=True)


def test_torch_attention_outside_an_encoder_is_refused_by_name():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    with pytest.raises(ValueError, match=r"MultiheadAttention: .* inside a plain torch.nn.TransformerEncoder"):
        mr.apply(nn.Sequential(Layer(), Layer(), Layer(), Layer()), GROUPS)


def test_recorded_values_have_the_batch_first_whatever_the_order_of_the_input():
    first, second = encoder(batch_first=True), encoder(batch_first=False)
    second.load_state_dict(first.state_dict())
    recorded = [MapRecorder(first)({"src": inputs()}), MapRecorder(second)({"src": inputs(batch_first=False)})]
    for one, other in zip(*(recording.values for recording in recorded), strict=True):
        assert one.shape == (3, HEADS, POSITIONS, WIDTH // HEADS)
        assert (one - other).abs().max() <= 1e-4 * one.abs().max()
