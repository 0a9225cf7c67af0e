"""Attention that passes no keyword arguments on: `torch.nn.TransformerEncoder` and timm's style."""

import copy
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from agreement import PLANS
from oracle import disagreement
from packed_encoders import HEADS, LAYERS, WIDTH, encoder, peaked
from torch import nn
from vision_blocks import Attention, Block, MaskedTransformer, OldAttention, VisionTransformer

import mapreuse as mr
from mapreuse.models import MapRecorder, _torch_encoder, find_stack

REUSING = {name: plan for name, plan in PLANS.items() if name != "full"}
POSITIONS = 9
PADDING = torch.tensor([[False] * 9, [False] * 5 + [True] * 4, [False] * 2 + [True] * 7])


def inputs(seed=1, batch_first=True):
    torch.manual_seed(seed)
    src = torch.randn(3, POSITIONS, WIDTH)
    return src if batch_first else src.transpose(0, 1)


def defined(model: nn.TransformerEncoder, src, plan, mask=None, padding=None):
    """The definition, written out: every layer's own map from its packed projection, then replaced as the plan says.

    Nothing of the library and nothing of `MultiheadAttention.forward` is used.
    """
    first = model.layers[0].self_attn.batch_first
    x = src if first else src.transpose(0, 1)
    own = []
    for index, layer in enumerate(model.layers):
        attention = layer.self_attn
        normed = layer.norm1(x) if layer.norm_first else x
        packed = nn.functional.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in packed.chunk(3, -1))
        scores = query @ key.mT / (WIDTH / HEADS) ** 0.5
        if mask is not None:
            shaped = mask if mask.dim() == 2 else mask.unflatten(0, (-1, HEADS))
            scores = scores.masked_fill(shaped, float("-inf")) if mask.dtype == torch.bool else scores + shaped
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None], float("-inf"))
        own.append(scores.softmax(-1))
        heads = [
            own[-1][:, head] if source is None else own[source[0]][:, source[1]]
            for head, source in enumerate(plan.heads(index, HEADS))
        ]
        context = (torch.stack(heads, 1) @ value).transpose(1, 2).flatten(2)
        attended = attention.out_proj(context)
        feed = lambda h, layer=layer: layer.linear2(layer.activation(layer.linear1(h)))  # noqa: E731
        if layer.norm_first:
            x = x + attended
            x = x + feed(layer.norm2(x))
        else:
            x = layer.norm1(x + attended)
            x = layer.norm2(x + feed(x))
    x = x if model.norm is None else model.norm(x)
    return x if first else x.transpose(0, 1)


def rows(output, batch_first):
    """The rows that are not padding, batch first."""
    return (output if batch_first else output.transpose(0, 1))[~PADDING]


CAUSAL = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).triu(1)
MASKS = {"none": None, "boolean": CAUSAL, "additive": torch.zeros(9, 9).masked_fill(CAUSAL, float("-inf")) - 0.5}
SHAPES = {
    "batch first": {"batch_first": True},
    "positions first": {"batch_first": False},
    "norm first": {"batch_first": True, "norm_first": True},
    "gelu, no bias, no last norm": {"batch_first": True, "activation": "gelu", "bias": False, "norm": False},
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_encoder_agrees_with_the_definition(shape, mask, plan):
    model, src = encoder(**SHAPES[shape]), inputs(batch_first=SHAPES[shape]["batch_first"])
    first = SHAPES[shape]["batch_first"]
    converted = mr.apply(copy.deepcopy(model), PLANS[plan])
    # torch wants both masks of one kind
    padding = PADDING if mask != "additive" else torch.zeros(3, 9).masked_fill(PADDING, float("-inf"))
    with torch.no_grad():
        ours = converted(src, mask=MASKS[mask], src_key_padding_mask=padding)
        reference = defined(model, src, PLANS[plan], MASKS[mask], PADDING)
        moved = defined(model, src, PLANS["full"], MASKS[mask], PADDING)
    every = torch.ones(int((~PADDING).sum()), dtype=torch.bool)
    assert ours.shape == src.shape
    assert ours.isfinite().all()
    assert disagreement(rows(ours, first), rows(reference, first), every) <= (1e-5 if plan == "full" else 1e-4)
    if plan != "full":
        assert disagreement(rows(moved, first), rows(reference, first), every) > 1e-1


@pytest.mark.parametrize("shape", SHAPES)
def test_the_definition_of_an_encoder_without_a_plan_is_the_encoder(shape):
    model, src = encoder(**SHAPES[shape]), inputs(batch_first=SHAPES[shape]["batch_first"])
    first = SHAPES[shape]["batch_first"]
    model.use_nested_tensor = False
    with torch.no_grad():
        untouched = model(src, src_key_padding_mask=PADDING)
        reference = defined(model, src, PLANS["full"], None, PADDING)
    every = torch.ones(int((~PADDING).sum()), dtype=torch.bool)
    assert disagreement(rows(reference, first), rows(untouched, first), every) <= 1e-5


def test_a_mask_of_every_head_follows_the_heads_that_compute():
    model, src = encoder(batch_first=True), inputs()
    torch.manual_seed(2)
    mask = (torch.rand(3 * HEADS, POSITIONS, POSITIONS) < 0.3) & ~torch.eye(POSITIONS, dtype=torch.bool)
    for name, plan in REUSING.items():
        with torch.no_grad():
            ours = mr.apply(copy.deepcopy(model), plan)(src, mask=mask)
            reference = defined(model, src, plan, mask)
        assert disagreement(ours, reference, ~torch.zeros_like(PADDING)) <= 1e-4, name


@pytest.mark.parametrize("storage", ["dense", "recompute"])
def test_an_encoder_trains_with_the_gradients_of_the_definition(storage):
    model, src = encoder(batch_first=True).train(), inputs()
    plan = PLANS["in part"]
    converted = mr.apply(copy.deepcopy(model), plan, storage=storage)
    ours, theirs = src.clone().requires_grad_(), src.clone().requires_grad_()
    weight = torch.randn_like(src).masked_fill(PADDING[..., None], 0.0)
    (converted(ours, src_key_padding_mask=PADDING) * weight).sum().backward()
    (defined(model, theirs, plan, None, PADDING) * weight).sum().backward()
    assert disagreement(ours.grad, theirs.grad, ~PADDING) <= 1e-3
    for name in ("linear1.weight", "norm1.weight", "self_attn.out_proj.bias"):
        for one, other in zip(converted.layers, model.layers, strict=True):
            mine, reference = one.get_parameter(name).grad, other.get_parameter(name).grad
            assert disagreement(mine, reference, torch.ones(len(mine), dtype=torch.bool)) <= 1e-3


def test_dropout_of_an_encoder_is_drawn_in_training_only():
    model, src = encoder(dropout=0.5, batch_first=True), inputs()
    converted = mr.apply(model, PLANS["groups of 2"])
    assert torch.equal(converted(src), converted(src))
    converted.train()
    assert not torch.equal(converted(src), converted(src))
    for layer in converted.layers:
        layer.dropout.p = layer.dropout1.p = layer.dropout2.p = 0.0
    assert not torch.equal(converted(src), converted(src)), "attention dropout is drawn too"


def test_the_fast_path_is_never_taken(monkeypatch):
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


def test_reusing_layers_of_an_encoder_hold_values_only():
    model = encoder(batch_first=True)
    before = sum(parameter.numel() for parameter in model.parameters())
    mr.apply(model, PLANS["groups of 2"])
    outputs = [layer.self_attn.in_proj.out_features for layer in model.layers]
    assert outputs == [3 * WIDTH, WIDTH, 3 * WIDTH, WIDTH]
    assert before - sum(parameter.numel() for parameter in model.parameters()) == 2 * 2 * WIDTH * (WIDTH + 1)
    assert mr.plan_of(model) == PLANS["groups of 2"]


def test_the_encoder_inside_a_larger_model_is_found_and_the_decoder_is_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Transformer(WIDTH, HEADS, LAYERS, 1, 64, batch_first=True).eval()
    decoder = copy.deepcopy(model.decoder)
    mr.apply(model.encoder, PLANS["groups of 2"])
    memory, target = torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH)
    assert torch.equal(model.decoder(target, memory), decoder(target, memory))
    assert model(memory, target).shape == target.shape


def test_what_an_encoder_cannot_be_served_with_is_refused_and_leaves_it_as_it_was():
    class OtherLayer(nn.TransformerEncoderLayer):
        pass

    class OtherAttention(nn.MultiheadAttention):
        pass

    def changed(change):
        model = encoder(batch_first=True)
        change(model)
        return model

    def key_bias(model):
        model.layers[1].self_attn.add_zero_attn = True

    def replaced(model):
        model.layers[1].self_attn.forward = model.layers[1].self_attn.forward

    def quantised(model):
        model.layers[2].self_attn.out_proj.weight = QuantisedTensor(torch.zeros(WIDTH, WIDTH))

    class QuantisedTensor(nn.Parameter):
        pass

    problems = [
        (lambda m: setattr(m.layers[0], "__class__", OtherLayer), r"layer 0 \(OtherLayer, MultiheadAttention\)"),
        (lambda m: setattr(m.layers[3].self_attn, "__class__", OtherAttention), r"layer 3 .*OtherAttention"),
        (key_bias, r"layer 1 .*add_zero_attn"),
        (replaced, r"layer 1 .*its forward was replaced"),
        (quantised, r"layer 2 \(MultiheadAttention\): out_proj is .* not a plain projection"),
    ]
    for change, problem in problems:
        model = changed(change)
        before = [(name, type(module)) for name, module in model.named_modules()]
        with pytest.raises(ValueError, match=problem) as error:
            mr.apply(model, PLANS["groups of 2"])
        assert "\n" not in str(error.value)
        assert before == [(name, type(module)) for name, module in model.named_modules()]
        assert mr.plan_of(model) is None


def test_a_plan_that_does_not_fit_leaves_an_encoder_as_it_was():
    model, src = encoder(batch_first=True), inputs()
    with torch.no_grad():
        expected, nested = model(src), model.use_nested_tensor
        with pytest.raises(ValueError, match="plan has 3 layers, but TransformerEncoder has 4"):
            mr.apply(model, mr.ReusePlan.grouped(3, 2))
        assert nested is model.use_nested_tensor is True
        assert torch.equal(model(src), expected)
    assert {type(layer.self_attn) for layer in model.layers} == {nn.MultiheadAttention}


def test_a_forward_of_torch_that_has_changed_is_refused(monkeypatch):
    monkeypatch.setitem(_torch_encoder._FINGERPRINTS, nn.TransformerEncoderLayer, ("0" * 12,))
    with pytest.raises(ValueError, match="TransformerEncoderLayer: its forward has changed"):
        mr.apply(encoder(batch_first=True), PLANS["groups of 2"])


def test_what_is_not_a_padded_batch_is_refused():
    model = mr.apply(encoder(batch_first=True), PLANS["groups of 2"])
    with pytest.raises(ValueError, match="takes a padded batch"):
        model(torch.randn(POSITIONS, WIDTH))
    with pytest.raises(ValueError, match="pass the mask as well"):
        model(inputs(), is_causal=True)


def test_torch_attention_elsewhere_is_refused_by_name():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    with pytest.raises(ValueError, match=r"MultiheadAttention: .* inside a plain torch.nn.TransformerEncoder"):
        mr.apply(nn.Sequential(Layer(), Layer(), Layer(), Layer()), PLANS["groups of 2"])


STYLES = {
    "as it is": {},
    "queries and keys normed": {"qk_norm": True},
    "by hand": {"fused_attn": False, "qk_norm": True},
    "as it was": {"attention": OldAttention},
}


def followed(model, plan, *args, **kwargs):
    """The definition: attention written out, its softmax replaced as the plan says, block by block."""
    own = []

    def attend(attention, x, attn_mask=None):
        layer = len(own)
        query, key, value = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in attention.qkv(x).chunk(3, -1)
        )
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        scores = query @ key.mT * attention.scale
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        own.append(scores.softmax(-1))
        heads = [
            own[-1][:, head] if source is None else own[source[0]][:, source[1]]
            for head, source in enumerate(plan.heads(layer, HEADS))
        ]
        context = (torch.stack(heads, 1) @ value).transpose(1, 2).flatten(2)
        return attention.proj(attention.norm(context) if hasattr(attention, "norm") else context)

    model = copy.deepcopy(model)
    for block in model.blocks:
        block.attn.forward = lambda x, attn_mask=None, attention=block.attn: attend(attention, x, attn_mask)
    output = model(*args, **kwargs)
    assert len(own) == len(model.blocks)
    return output


@pytest.mark.sample(5)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("style", STYLES)
def test_blocks_in_a_sequence_agree_with_the_definition(style, plan):
    model = peaked(VisionTransformer(**STYLES[style]))
    torch.manual_seed(3)
    pixel_values = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        untouched = model(pixel_values)
        reference = followed(model, PLANS[plan], pixel_values)
        ours = mr.apply(copy.deepcopy(model), PLANS[plan])(pixel_values)
    every = torch.ones(2, 17, dtype=torch.bool)
    assert disagreement(ours, reference, every) <= (1e-5 if plan == "full" else 1e-4)
    if plan == "full":
        assert disagreement(ours, untouched, every) <= 1e-5
    else:
        assert disagreement(untouched, reference, every) > 1e-1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("plan", ["full", "other heads", "in part"])
def test_blocks_in_a_loop_with_padding_agree_with_the_definition(plan, fused):
    model = peaked(MaskedTransformer(fused_attn=fused))
    mask = ~PADDING[:, None, None].expand(3, 1, POSITIONS, POSITIONS)
    with torch.no_grad():
        reference = followed(model, PLANS[plan], inputs(), attn_mask=mask)
        ours = mr.apply(copy.deepcopy(model), PLANS[plan])(inputs(), attn_mask=mask)
    assert ours.isfinite().all()
    assert disagreement(ours, reference, ~PADDING) <= 1e-4


def test_a_norm_of_the_context_forbids_other_heads_and_nothing_else():
    model = peaked(VisionTransformer(scale_norm=True))
    pixel_values = torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match="no plain output projection directly after its context"):
        mr.apply(model, PLANS["other heads"])
    with torch.no_grad():
        reference = followed(model, PLANS["groups of 2"], pixel_values)
        ours = mr.apply(model, PLANS["groups of 2"])(pixel_values)
    assert disagreement(ours, reference, torch.ones(2, 17, dtype=torch.bool)) <= 1e-4


def test_blocks_train_with_the_gradients_of_the_definition():
    model = peaked(VisionTransformer(qk_norm=True)).train()
    converted = mr.apply(copy.deepcopy(model), PLANS["in part"])
    torch.manual_seed(4)
    ours = torch.randn(2, 3, 16, 16)
    theirs = ours.clone().requires_grad_()
    ours.requires_grad_()
    weight = torch.randn(2, 17, 32)
    (converted(ours) * weight).sum().backward()
    (followed(model, PLANS["in part"], theirs) * weight).sum().backward()
    assert disagreement(ours.grad, theirs.grad, torch.ones(2, 3, 16, dtype=torch.bool)) <= 1e-3
    assert converted.blocks[1].attn.qkv.weight.grad.abs().max() > 0


class GatedAttention(Attention):
    def forward(self, x):
        return super().forward(x) * x.sigmoid()


class WrongMask(Attention):
    pass


def test_attention_that_only_looks_like_timms_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="GatedAttention: its modules resemble those of timm's Attention"):
        mr.apply(VisionTransformer(attention=GatedAttention), PLANS["groups of 2"])
    model = VisionTransformer()
    model.blocks[2].attn.scale = 0.5
    with pytest.raises(ValueError, match=r"Attention: its scale is 0.5, but its fused attention uses 0.35"):
        mr.apply(model, PLANS["groups of 2"])
    monkeypatch.setitem(Attention.forward.__globals__, "maybe_add_mask", lambda scores, mask=None: scores)
    with pytest.raises(ValueError, match="Attention: its functions on masks are not those of timm"):
        mr.apply(VisionTransformer(), PLANS["groups of 2"])


def test_blocks_that_are_called_outside_their_sequence_are_refused():
    model = mr.apply(VisionTransformer(), PLANS["groups of 2"])
    with pytest.raises(ValueError, match=r"layer 0 .* was called by itself"):
        model.blocks[0](torch.randn(1, 4, 32))


def test_a_sequence_of_different_classes_is_no_stack():
    class OtherBlock(Block):
        pass

    with pytest.raises(ValueError, match="holds no list of layers"):
        mr.apply(nn.Sequential(Block(32, 4), OtherBlock(32, 4)), mr.ReusePlan.grouped(2, 2))


def pictures(seed):
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


COMPILING = """
import warnings
import torch
import mapreuse as mr
from torch import nn
warnings.simplefilter("ignore")
layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
model = mr.apply(nn.TransformerEncoder(layer, 4).eval(), mr.ReusePlan.grouped(4, 2))
src = torch.randn(2, 9, 32)
print((torch.compile(model, backend="eager")(src) - model(src)).abs().max().item())
torch._dynamo.reset()
for run in (torch.compile(model, backend="eager", fullgraph=True), lambda src: torch.export.export(model, (src,))):
    try:
        run(src)
        print("ran")
    except Exception as error:
        print("refused", "torch.compile and torch.export cannot follow" in f"{error}{error.__cause__}")
"""


def test_compiled_parts_around_borne_maps_agree_and_whole_graphs_are_refused():
    """In a process of its own: the checks of annotations in this one cannot be traced."""
    run = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True, check=True)
    difference, whole, exported = run.stdout.splitlines()
    assert float(difference) <= 1e-5
    assert whole.startswith("refused")
    assert exported.startswith("refused")


def test_recorded_values_of_positions_that_come_first_lie_as_others_do():
    first, second = encoder(batch_first=True), encoder(batch_first=False)
    second.load_state_dict(first.state_dict())
    mine = MapRecorder(first)({"src": inputs()}).values
    theirs = MapRecorder(second)({"src": inputs(batch_first=False)}).values
    for one, other in zip(mine, theirs, strict=True):
        assert one.shape == (3, HEADS, POSITIONS, WIDTH // HEADS)
        assert (one - other).abs().max() <= 1e-4 * one.abs().max()


MODELS = {
    "encoder": (lambda: encoder(batch_first=True), inputs),
    "vision": (lambda: peaked(VisionTransformer()), pictures),
}


@pytest.mark.parametrize("kind", MODELS)
class TestBorneMaps:
    def test_the_stack_is_found_again_under_a_plan(self, kind):
        make, _ = MODELS[kind]
        model = make()
        before = find_stack(model)
        after = find_stack(mr.apply(model, PLANS["groups of 2"]))
        assert (after.path, after.list_name, len(after.layers)) == (before.path, before.list_name, LAYERS)

    def test_a_recorder_returns_every_map(self, kind):
        make, sample = MODELS[kind]
        recorded = MapRecorder(make())({"src" if kind == "encoder" else "pixel_values": sample(1)})
        assert len(recorded.maps) == LAYERS
        for weights in recorded.maps:
            assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)

    def test_two_threads_may_run_one_model(self, kind):
        make, sample = MODELS[kind]
        model = mr.apply(make(), PLANS["two sources"])
        batches = [sample(seed) for seed in range(1, 5)]
        with torch.no_grad():
            expected = [model(batch) for batch in batches]
        wrong = []

        def work(index):
            with torch.no_grad():
                wrong.extend(index for _ in range(20) if not torch.equal(model(batches[index]), expected[index]))

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))
        assert not wrong

    def test_copies_and_pickles_give_the_same_and_share_nothing(self, kind):
        make, sample = MODELS[kind]
        model = mr.apply(make(), PLANS["in part"])
        batch = sample(1)
        with torch.no_grad():
            expected = model(batch)
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert mr.plan_of(other) == PLANS["in part"]
                assert torch.equal(other(batch), expected)
                for parameter in other.parameters():
                    parameter.zero_()
            assert torch.equal(model(batch), expected)

    def test_no_map_is_left_on_the_model(self, kind):
        make, sample = MODELS[kind]
        model = mr.apply(make(), PLANS["groups of 2"])
        before = {name: set(vars(module)) for name, module in model.named_modules()}
        model(sample(1))
        assert before == {name: set(vars(module)) for name, module in model.named_modules()}

    def test_hooks_see_the_modules_of_the_model_run(self, kind):
        make, sample = MODELS[kind]
        model = mr.apply(make(), PLANS["groups of 2"])
        seen = []
        layers = model.layers if kind == "encoder" else model.blocks
        for layer in layers:
            layer.register_forward_hook(lambda module, args, output: seen.append(output))
        model(sample(1))
        assert len(seen) == LAYERS

    def test_saving_is_refused_in_one_line(self, kind, tmp_path):
        make, _ = MODELS[kind]
        model = mr.apply(make(), PLANS["groups of 2"])
        with pytest.raises(
            ValueError, match="only a whole model of a class that transformers defines can be saved"
        ) as error:
            mr.save(model, tmp_path)
        assert "\n" not in str(error.value)
        assert not list(tmp_path.iterdir())

    def test_weights_travel_by_state_dict(self, kind):
        make, sample = MODELS[kind]
        model = mr.apply(make(), PLANS["in part"])
        other = mr.apply(make(), PLANS["in part"])
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(sample(1)), model(sample(1)))
