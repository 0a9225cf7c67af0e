"""A model that cannot share maps is refused by name, before anything is changed."""

import copy
import sys

import pytest
import torch
import torch.nn.utils.prune
import transformers as tf
from agreement import PLANS
from families import FAMILIES, SIZE, build
from oracle import defined_output, disagreement
from packed_encoders import WIDTH, encoder, peaked
from torch import nn
from vision_blocks import VisionTransformer

import mapreuse as mr
from mapreuse.models import find_stack, output_projection

GROUPS = PLANS["groups of 2"]
TEXT = {"vocab_size": 50, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def assert_unchanged(model, before):
    """The model has the classes, attributes, hooks and parameters of `before`, a list of its modules' state."""
    for (path, *old), (name, *new) in zip(before, state(model), strict=True):
        assert path == name
        assert old[:3] == new[:3], path
        assert old[3].keys() == new[3].keys()
        assert all(torch.equal(value, new[3][key]) for key, value in old[3].items()), path


def state(model):
    """Everything that `apply` could change: classes, attributes, hooks, parameters."""
    return [
        (
            path,
            type(module),
            set(vars(module)),
            [list(hooks) for name, hooks in vars(module).items() if "_hooks" in name and hooks is not None],
            {
                name: tensor.clone()
                for name, tensor in (module._parameters | module._buffers).items()
                if tensor is not None
            },
        )
        for path, module in model.named_modules()
    ]


def assert_refused(model, plan, problem, **settings):
    """The refusal is one line with the problem, and the model stays as it was."""
    before = state(model)
    with pytest.raises(ValueError, match=problem) as error:
        mr.apply(model, plan, **settings)
    assert "\n" not in str(error.value)
    assert_unchanged(model, before)
    assert mr.plan_of(model) is None


def test_applying_twice_is_refused():
    model, _ = build("bert")
    mr.apply(model, GROUPS)
    before = state(model)
    for part in (model, model.encoder):
        with pytest.raises(ValueError, match="shares attention maps already"):
            mr.apply(part, GROUPS)
    assert_unchanged(model, before)


@pytest.mark.parametrize("changes", [0, 2])
@pytest.mark.parametrize("family", ["bert", "parakeet", "modernbert", "llama"])
def test_a_failure_in_the_middle_of_the_conversion_leaves_the_model_as_it_was(monkeypatch, family, changes):
    """The conversion fails at a projection; `changes` others are changed already."""
    model, batch = build(family)
    before, expected = state(model), model(**batch).last_hidden_state
    index_select, calls = torch.Tensor.index_select, []

    def failing(*args):
        calls.append(args)
        if len(calls) > changes:
            raise MemoryError("out of memory")
        return index_select(*args)

    monkeypatch.setattr(torch.Tensor, "index_select", failing)
    with pytest.raises(MemoryError):
        mr.apply(model, PLANS["in part"])
    monkeypatch.undo()
    assert len(calls) == changes + 1
    assert_unchanged(model, before)
    assert torch.equal(model(**batch).last_hidden_state, expected)
    mr.apply(model, PLANS["in part"])


@pytest.mark.sample(3)
@pytest.mark.parametrize("step", ["replace", "_map_counts", "register_forward_hook"])
@pytest.mark.parametrize("family", ["parakeet", "bert", "timm", "torch"])
def test_a_failure_after_the_conversion_leaves_the_model_as_it_was(monkeypatch, family, step):
    if family in FAMILIES:
        model, batch = build(family)
    elif family == "torch":
        model, batch = encoder(batch_first=True), {"src": torch.randn(2, 9, WIDTH)}
    else:
        model, batch = peaked(VisionTransformer()), {"pixel_values": torch.randn(2, 3, 16, 16)}

    def outputs():
        found = model(**batch)
        return found if isinstance(found, torch.Tensor) else found.last_hidden_state

    expected, before = outputs(), state(model)
    owner = nn.Module if step == "register_forward_hook" else sys.modules[mr.apply.__module__]
    original = getattr(owner, step)

    def failing(*args, **kwargs):
        original(*args, **kwargs)
        raise MemoryError("out of memory")

    monkeypatch.setattr(owner, step, failing)
    with pytest.raises(MemoryError):
        mr.apply(model, GROUPS)
    monkeypatch.undo()
    assert_unchanged(model, before)
    assert torch.equal(outputs(), expected)
    mr.apply(model, GROUPS)
    outputs()


def test_a_hook_registered_before_a_failure_can_still_be_removed(monkeypatch):
    model, batch = build("bert")
    seen = []
    handle = model.encoder.register_forward_hook(lambda *args: seen.append(1))

    def failing(*args, **kwargs):
        raise MemoryError("out of memory")

    monkeypatch.setattr(sys.modules[mr.apply.__module__], "replace", failing)
    with pytest.raises(MemoryError):
        mr.apply(model, GROUPS)
    model(**batch)
    handle.remove()
    model(**batch)
    assert seen == [1]


def changed(family, change):
    """A function that makes a family's model with its parts changed by `change`."""

    def make():
        model, _ = build(family)
        change(model)
        return model

    return make


def reconfigured(family, **settings):
    """A function that makes a family's model with these settings in its configuration."""

    def make():
        model, _ = build(family)
        config = copy.deepcopy(model.config)
        for name, value in settings.items():
            setattr(config, name, value)
        return type(model)(config)

    return make


def clip():
    vision = SIZE | {"image_size": 16, "patch_size": 4}
    return tf.CLIPModel(tf.CLIPConfig(text_config=SIZE | TEXT, vision_config=vision))


def second_attention(model):
    model.encoder.layer[2].second = copy.deepcopy(model.encoder.layer[2].attention)


def one_layer_twice(model):
    model.encoder.layer[3] = model.encoder.layer[2]


def tied_values(model):
    model.layers[3].self_attn.v_proj.weight = model.layers[1].self_attn.v_proj.weight


def head_dim(value):
    return changed("llama", lambda model: setattr(model.layers[1].self_attn, "head_dim", value))


def implementation(name):
    return changed("bert", lambda model: setattr(model.config, "_attn_implementation_internal", name))


REFUSED = {
    "two stacks": (
        lambda: tf.WhisperModel(build("whisper-encoder")[0].config),
        "several stacks of layers: 'encoder', 'decoder'; pass the module",
    ),
    "two towers": (clip, "several stacks of layers: 'text_model.encoder', 'vision_model.encoder'"),
    "no layers": (lambda: nn.Sequential(nn.Linear(2, 2)), "Sequential holds no list of layers with attention"),
    "two self-attentions": (
        changed("bert", second_attention),
        r"layer 2 \(BertLayer\) holds 2 self-attentions \(attention.self, second.self\)",
    ),
    "one layer twice": (changed("bert", one_layer_twice), "layer 2: .* is tied"),
    "tied values": (
        changed("llama", tied_values),
        r"layer 1: v_proj.weight is tied \(layers.1.self_attn.v_proj.weight, layers.3.self_attn.v_proj.weight\)",
    ),
    "other heads in one layer": (head_dim(16), "layer 1 cannot reuse the map of layer 0: .*2 heads.*4"),
    "widths that make no heads": (
        head_dim(7),
        "layer 1 .*: queries of width 32 and values of width 16 do not make heads of 7",
    ),
    "no head dimension": (head_dim(None), "layer 1 .* names no head dimension"),
    "flash_attention_2": (
        implementation("flash_attention_2"),
        r"BertSelfAttention\) runs attention as 'flash_attention_2'.*'sdpa' or 'eager'",
    ),
    "no implementation": (implementation(None), r"BertSelfAttention\) runs attention as None"),
    "grouped keys of Parakeet": (
        reconfigured("parakeet", num_key_value_heads=2),
        "ParakeetEncoderAttention: grouped keys",
    ),
    "upcast attention of GPT-2": (
        reconfigured("gpt2", reorder_and_upcast_attn=True),
        "GPT2Attention: reorder_and_upcast_attn=True",
    ),
    "layers of ALBERT": (
        lambda: tf.AlbertModel(tf.AlbertConfig(**SIZE | TEXT, embedding_size=16)),
        "AlbertModel runs the layers .* perhaps more than once",
    ),
}


@pytest.mark.parametrize(("make", "problem"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_cannot_share_maps_is_refused_with_the_reason(make, problem):
    assert_refused(make(), GROUPS, problem)


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (mr.ReusePlan.grouped(5, 2), "the plan has 5 layers, but BertEncoder has 4"),
        (mr.ReusePlan.grouped(3, 2), "the plan has 3 layers, but BertEncoder has 4"),
        (
            mr.ReusePlan.from_sources([0, 0, 2, 2], {3: [1, 0]}),
            r"layer 3 \(BertSelfAttention\) has 4 heads, but the plan assigns 2",
        ),
    ],
)
def test_a_plan_of_another_size_is_refused(plan, problem):
    assert_refused(build("bert")[0], plan, problem)


def test_an_unknown_storage_is_refused():
    assert_refused(build("bert")[0], GROUPS, "recompute and auto, got 'sparse'", storage="sparse")


def test_a_local_layer_cannot_reuse_the_map_of_a_global_one():
    """By default, every third layer of ModernBERT is global."""
    model = tf.ModernBertModel(tf.ModernBertConfig(**SIZE | TEXT, cls_token_id=1, sep_token_id=2))
    assert_refused(model, GROUPS, r"layer 1 \(\w+='?\w+'?\) cannot reuse the map of layer 0 .*masks or positions")
    mr.apply(model, mr.ReusePlan.from_sources([0, 1, 1, 0]))


def test_layers_of_a_decoder_share_maps_only_with_layers_of_their_type():
    types = {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2}
    sliding = {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4}
    model = tf.Qwen2Model(tf.Qwen2Config(**SIZE | TEXT, **sliding, **types))
    assert_refused(model, mr.ReusePlan.from_sources([0, 0, 0, 3]), "layer 2 .*cannot reuse the map of layer 0")
    mr.apply(model, GROUPS)


def wrapped_output(model):
    output = model.encoder.layer[1].attention.output
    output.dense = WrappedLinear(output.dense)


def tied_output(model):
    layers = model.encoder.layer
    layers[1].attention.output.dense.weight = layers[0].attention.output.dense.weight


BY_HEADS = {
    "a wrapped output projection": (changed("bert", wrapped_output), "other heads"),
    "a tied output projection": (changed("bert", tied_output), "other heads"),
    "a norm of the context": (
        lambda: tf.BitNetModel(tf.BitNetConfig(**SIZE | TEXT, num_key_value_heads=2)),
        "other heads",
    ),
    "a norm that spans all heads": (lambda: tf.Olmo2Model(tf.Olmo2Config(**SIZE | TEXT)), "in part"),
}


@torch.no_grad()
@pytest.mark.parametrize(("make", "plan"), BY_HEADS.values(), ids=BY_HEADS)
def test_a_model_shares_heads_whatever_follows_the_context_or_normalises_queries(make, plan):
    model = peaked(make())
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    _, batch = build("bert")
    reference = defined_output(eager, batch, PLANS[plan])
    output = mr.apply(model, PLANS[plan])(**batch).last_hidden_state
    assert disagreement(output, reference, batch["attention_mask"].bool()) <= 1e-4


def test_a_norm_of_the_context_leaves_no_output_projection():
    model = tf.BitNetModel(tf.BitNetConfig(**SIZE | TEXT, num_key_value_heads=2))
    with pytest.raises(ValueError, match="BitNetAttention: no plain output projection directly after its context"):
        output_projection(find_stack(model).layers[0])


class WrappedLinear(nn.Module):
    """Wrapped as in PEFT."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x)


class Int8Linear(nn.Linear):
    """Quantised as in bitsandbytes: a subclass of the plain projection."""


class QuantisedTensor(nn.Parameter):
    """Quantised as in torchao: a plain projection whose weight is of another class."""


def int8(linear):
    linear.__class__ = Int8Linear
    return linear


def quantised_weight(linear):
    linear.weight = QuantisedTensor(linear.weight.detach())
    return linear


def offloaded(linear):
    """As under a device map."""
    linear.forward = lambda x: nn.functional.linear(x, linear.weight, linear.bias)
    return linear


WRAPPINGS = {
    "wrapped": (WrappedLinear, "WrappedLinear, not a plain projection"),
    "int8": (int8, "Int8Linear, not a plain projection"),
    "torchao": (quantised_weight, "is stored as QuantisedTensor"),
    "weight norm": (nn.utils.parametrizations.weight_norm, "is computed from other parameters; make it permanent"),
    "pruned": (lambda m: nn.utils.prune.l1_unstructured(m, "weight", 2), "is computed from .*prune.remove"),
    "device map": (offloaded, "not a plain projection"),
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("projection", ["q_proj", "v_proj", "o_proj"])
def test_a_projection_that_is_not_plain_is_refused_by_name(wrapping, projection):
    wrap, problem = WRAPPINGS[wrapping]
    model, _ = build("llama")
    attention = model.layers[2].self_attn
    setattr(attention, projection, wrap(getattr(attention, projection)))
    assert_refused(model, GROUPS, f"layer 2: (the weight of )?{projection} is .*{problem}|layer 2: .*{problem}")


def test_wrapped_layers_outside_attention_are_accepted():
    model, batch = build("llama")
    model.layers[2].mlp.up_proj = WrappedLinear(model.layers[2].mlp.up_proj)
    mr.apply(model, GROUPS)
    model(**batch)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_a_dynamically_quantised_model_is_refused_by_name():
    model, _ = build("bert")
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert_refused(quantised, GROUPS, "layer 0: query is a torch.ao.nn.quantized.*Linear, not a plain projection")


@pytest.fixture
def bert():
    """A BERT under a plan, and its batch."""
    model, batch = build("bert")
    return mr.apply(model, GROUPS), batch


def test_an_implementation_switched_after_apply_is_refused_at_the_next_pass(bert):
    model, batch = bert
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="BertEncoder makes masks for 'flash_attention_2'"):
        model(**batch)


def test_a_mask_of_two_dimensions_is_refused(bert):
    model, batch = bert
    model.encoder.layer[0].register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0], batch["attention_mask"], *args[2:]), kwargs), with_kwargs=True
    )
    with pytest.raises(ValueError, match=r"expected a mask of shape \(batch, 1, query, key\), got \(3, 9\)"):
        model(**batch)


@pytest.mark.parametrize("family", ["bert", "parakeet", "gpt2"])
def test_an_argument_that_could_change_the_map_is_refused(family):
    model, batch = build(family)
    mr.apply(model, GROUPS)
    with pytest.raises(ValueError, match="was given softcap, which may change its attention map"):
        model(**batch, softcap=30.0)


def test_encoder_states_that_could_reach_a_planned_attention_are_refused(bert):
    with pytest.raises(ValueError, match="cannot take encoder_hidden_states"):
        bert[0].encoder(torch.randn(2, 9, 32), encoder_hidden_states=torch.randn(2, 7, 32))


def test_a_layer_cannot_run_outside_its_stack(bert):
    with pytest.raises(ValueError, match="layer 1 of a model that shares attention maps was called by itself"):
        bert[0].encoder.layer[1](torch.randn(1, 3, 32))


def test_a_source_that_does_not_run_is_an_error_outside_training(bert):
    model, batch = bert
    model.encoder.layer[0].forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(RuntimeError, match="layer 1 reuses layer 0's map, but layer 0 did not run"):
        model(**batch)
