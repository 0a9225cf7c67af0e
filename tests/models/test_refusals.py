"""What cannot be served is refused by name, before anything is changed."""

import copy
import sys

import pytest
import torch
import transformers as tf
from agreement import PLANS
from families import FAMILIES, SIZE, build
from packed_encoders import WIDTH, encoder, peaked
from torch import nn
from transformers.pytorch_utils import Conv1D
from vision_blocks import VisionTransformer

import mapreuse as mr
from mapreuse.models import _conversion, find_stack, output_projection

GROUPS = PLANS["groups of 2"]
TEXT = {"vocab_size": 50, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def snapshot(model):
    """Everything that `apply` could change: classes, attributes, parameters bit by bit."""
    return [
        (
            path,
            type(module),
            set(vars(module)),
            {name: parameter.clone() for name, parameter in module._parameters.items() if parameter is not None},
            [list(module._forward_pre_hooks), list(module._forward_hooks), list(module._forward_hooks_with_kwargs)],
        )
        for path, module in model.named_modules()
    ]


def same(before, after):
    return len(before) == len(after) and all(
        a[:3] == b[:3]
        and a[4] == b[4]
        and a[3].keys() == b[3].keys()
        and all(torch.equal(a[3][name], b[3][name]) for name in a[3])
        for a, b in zip(before, after, strict=True)
    )


def packed(kind):
    """A model whose modules pass no keyword arguments on, and its inputs."""
    if kind == "torch encoder":
        return encoder(batch_first=True), {"src": torch.randn(2, 9, WIDTH)}
    return peaked(VisionTransformer()), {"pixel_values": torch.randn(2, 3, 16, 16)}


def assert_refused(model, plan, problem, **settings):
    """One line that says why, and the model as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=problem) as error:
        mr.apply(model, plan, **settings)
    assert "\n" not in str(error.value)
    assert same(before, snapshot(model))
    assert mr.plan_of(model) is None


def test_applying_twice_is_refused():
    model, _ = build("bert")
    mr.apply(model, GROUPS)
    before = snapshot(model)
    for part in (model, model.encoder):
        with pytest.raises(ValueError, match="shares attention maps already"):
            mr.apply(part, GROUPS)
    assert same(before, snapshot(model))


@pytest.mark.sample(5)
@pytest.mark.parametrize("family", ["bert", "parakeet", "modernbert", "llama"])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_failure_half_way_leaves_the_model_bit_identical(monkeypatch, family, layer):
    """The conversion of one layer fails after it has begun; the layers before it are done."""
    model, batch = build(family)
    before, expected = snapshot(model), model(**batch).last_hidden_state
    take_inputs, dispatched = _conversion.take_inputs, []

    def failing(projection, columns):
        take_inputs(projection, columns)
        dispatched.append(projection)
        if len(dispatched) > layer // 2:
            raise MemoryError("out of memory")

    monkeypatch.setattr(_conversion, "take_inputs", failing)
    with pytest.raises(MemoryError):
        mr.apply(model, PLANS["in part"])
    assert len(dispatched) == layer // 2 + 1
    assert same(before, snapshot(model))
    assert torch.equal(model(**batch).last_hidden_state, expected)
    monkeypatch.undo()
    mr.apply(model, PLANS["in part"])
    assert mr.plan_of(model) == PLANS["in part"]


LATER = ("refuse_save_pretrained", "_map_counts", "register_forward_hook")


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("family", "step"),
    [(family, step) for family in ("parakeet", "bert", "vision blocks", "torch encoder") for step in LATER]
    + [("vision blocks", "inject_maps"), ("torch encoder", "inject_maps")],
)
def test_a_failure_after_the_conversion_leaves_the_model_bit_identical(monkeypatch, family, step):
    model, batch = build(family) if family in FAMILIES else packed(family)

    def outputs():
        found = model(**batch)
        return found if isinstance(found, torch.Tensor) else found.last_hidden_state

    expected, before = outputs(), snapshot(model)
    owner = nn.Module if step == "register_forward_hook" else sys.modules[mr.apply.__module__]
    original = getattr(owner, step)

    def failing(*args, **kwargs):
        original(*args, **kwargs)
        raise MemoryError("out of memory")

    monkeypatch.setattr(owner, step, failing)
    with pytest.raises(MemoryError):
        mr.apply(model, GROUPS)
    monkeypatch.undo()
    assert same(before, snapshot(model))
    assert mr.plan_of(model) is None
    assert torch.equal(outputs(), expected)
    mr.apply(model, GROUPS)
    assert mr.plan_of(model) == GROUPS
    outputs()


def test_a_hook_that_was_there_before_a_failure_can_still_be_removed(monkeypatch):
    model, batch = build("bert")
    seen = []
    handle = model.encoder.register_forward_hook(lambda *args: seen.append(1))

    def failing(module):
        raise MemoryError("out of memory")

    monkeypatch.setattr(sys.modules[mr.apply.__module__], "refuse_save_pretrained", failing)
    with pytest.raises(MemoryError):
        mr.apply(model, GROUPS)
    model(**batch)
    handle.remove()
    model(**batch)
    assert seen == [1]


def test_a_model_of_several_stacks_is_refused_with_their_paths():
    whisper = tf.WhisperModel(build("whisper-encoder")[0].config)
    assert_refused(whisper, GROUPS, "several stacks of layers: 'encoder', 'decoder'; pass the module")
    clip = tf.CLIPModel(
        tf.CLIPConfig(text_config=SIZE | TEXT, vision_config=SIZE | {"image_size": 16, "patch_size": 4})
    )
    assert_refused(clip, GROUPS, "several stacks of layers: 'text_model.encoder', 'vision_model.encoder'")


def test_a_model_without_a_stack_of_attention_is_refused():
    assert_refused(nn.Sequential(nn.Linear(2, 2)), GROUPS, "Sequential holds no list of layers with attention")
    assert_refused(tf.ResNetModel(tf.ResNetConfig()), GROUPS, "ResNetModel holds no list of layers")


def test_a_layer_with_two_self_attentions_is_refused():
    model, _ = build("bert")
    model.encoder.layer[2].second = copy.deepcopy(model.encoder.layer[2].attention)
    assert_refused(model, GROUPS, r"layer 2 \(BertLayer\) holds 2 self-attentions \(attention.self, second.self\)")


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


def test_a_strategy_must_be_known():
    assert_refused(build("bert")[0], GROUPS, "recompute and auto, got 'sparse'", storage="sparse")


def modernbert(**settings):
    return tf.ModernBertModel(tf.ModernBertConfig(**SIZE | TEXT, cls_token_id=1, sep_token_id=2, **settings))


def test_a_local_layer_cannot_share_with_a_global_one():
    """ModernBERT by default: every third layer is global."""
    model = modernbert()
    assert_refused(model, GROUPS, r"layer 1 \(\w+='?\w+'?\) cannot reuse the map of layer 0 .*masks or positions")
    mr.apply(model, mr.ReusePlan.from_sources([0, 1, 1, 0]))


def test_layer_types_of_a_decoder_must_be_alike():
    config = tf.Qwen2Config(
        **SIZE | TEXT, num_key_value_heads=2, use_sliding_window=True, sliding_window=4,
        layer_types=["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
    )  # fmt: skip
    model = tf.Qwen2Model(config)
    assert_refused(model, mr.ReusePlan.from_sources([0, 0, 0, 3]), "layer 2 .*cannot reuse the map of layer 0")
    mr.apply(model, GROUPS)


def test_layers_of_other_heads_cannot_share():
    """Four heads of 8 read from two heads of 16: the widths fit, the heads do not."""
    model, _ = build("llama")
    model.layers[1].self_attn.head_dim = 16
    assert_refused(model, GROUPS, "layer 1 cannot reuse the map of layer 0: .*2 heads.*4")


def test_widths_must_make_heads():
    model, _ = build("llama")
    model.layers[1].self_attn.head_dim = 7
    assert_refused(model, GROUPS, "layer 1 .*: queries of width 32 and values of width 16 do not make heads of 7")
    model.layers[1].self_attn.head_dim = None
    assert_refused(model, GROUPS, "layer 1 .* names no head dimension")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
class TestDecoders:
    def test_a_cache_is_refused_in_one_line(self, family):
        model, batch = build(family)
        mr.apply(model, GROUPS)
        for arguments in ({"use_cache": True}, {"past_key_values": tf.DynamicCache()}):
            with pytest.raises(ValueError, match=r"keeps no cache.*use_cache=False") as error:
                model(**batch, **arguments)
            assert "\n" not in str(error.value)

    def test_a_cache_given_by_position_is_refused_too(self, family):
        model, batch = build(family)
        mr.apply(model, GROUPS)
        before = {"gpt2": (), "llama": (None, None), "qwen2": (None, None)}[family]
        with pytest.raises(ValueError, match="keeps no cache"):
            model(batch["input_ids"], *before, tf.DynamicCache())

    def test_without_a_word_about_caches_none_is_made(self, family):
        model, batch = build(family)
        mr.apply(model, GROUPS)
        assert model.config.use_cache
        assert model(**batch).past_key_values is None
        assert model(**batch, use_cache=False).past_key_values is None

    def test_generate_is_refused(self, family):
        cls = {"llama": tf.LlamaForCausalLM, "qwen2": tf.Qwen2ForCausalLM, "gpt2": tf.GPT2LMHeadModel}[family]
        model = cls(build(family)[0].config).eval()
        mr.apply(model, GROUPS)
        with pytest.raises(ValueError, match=r"keeps no cache.*use_cache=False"):
            model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)


class LoraLinear(nn.Module):
    """Wrapped as PEFT wraps: the projection inside, low-rank terms beside it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Int8Linear(nn.Linear):
    """Quantised as bitsandbytes does it: a subclass of the plain projection."""


class QuantisedTensor(nn.Parameter):
    """Quantised as torchao does it: a plain projection whose weight is another kind of tensor."""


def int8(linear):
    linear.__class__ = Int8Linear
    return linear


def quantised_weight(linear):
    linear.weight = QuantisedTensor(linear.weight.detach())
    return linear


def offloaded(linear):
    """As a device map leaves it."""
    linear.forward = lambda x: nn.functional.linear(x, linear.weight, linear.bias)
    return linear


WRAPPINGS = {
    "LoRA": (LoraLinear, "LoraLinear, not a plain projection"),
    "int8": (int8, "Int8Linear, not a plain projection"),
    "torchao": (quantised_weight, "is stored as QuantisedTensor"),
    "weight norm": (nn.utils.parametrizations.weight_norm, "ParametrizedLinear, not a plain projection"),
    "pruned": (lambda m: nn.utils.prune.l1_unstructured(m, "weight", 2), "is computed from other parameters"),
    "device map": (offloaded, "not a plain projection"),
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("projection", ["q_proj", "v_proj", "o_proj"])
def test_a_projection_that_is_not_plain_is_refused_by_name(wrapping, projection):
    import torch.nn.utils.prune  # noqa: F401

    wrap, problem = WRAPPINGS[wrapping]
    model, _ = build("llama")
    attention = model.layers[2].self_attn
    setattr(attention, projection, wrap(getattr(attention, projection)))
    assert_refused(model, GROUPS, f"layer 2: (the weight of )?{projection} is .*{problem}|layer 2: .*{problem}")


def test_a_model_with_wrapped_layers_only_outside_attention_is_served():
    model, batch = build("llama")
    model.layers[2].mlp.up_proj = LoraLinear(model.layers[2].mlp.up_proj)
    mr.apply(model, GROUPS)
    model(**batch)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_a_dynamically_quantised_model_is_refused_by_name():
    model, _ = build("bert")
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert_refused(quantised, GROUPS, "layer 0: query is a torch.ao.nn.quantized.*Linear, not a plain projection")


def test_an_output_projection_beside_the_attention_must_be_plain_where_heads_are_reordered():
    model, _ = build("bert")
    output = model.encoder.layer[1].attention.output
    output.dense = LoraLinear(output.dense)
    assert_refused(model, PLANS["other heads"], r"layer 1 \(BertSelfAttention\): no plain output projection")
    mr.apply(model, GROUPS)


def test_tied_projections_are_refused_by_name():
    model, _ = build("llama")
    model.layers[3].self_attn.v_proj.weight = model.layers[1].self_attn.v_proj.weight
    names = "layers.1.self_attn.v_proj.weight, layers.3.self_attn.v_proj.weight"
    assert_refused(model, GROUPS, rf"layer 1: v_proj.weight is tied \({names}\)")


def test_a_tied_output_projection_is_refused_where_its_columns_would_move():
    model, _ = build("bert")
    layers = model.encoder.layer
    layers[1].attention.output.dense.weight = layers[0].attention.output.dense.weight
    assert_refused(model, PLANS["other heads"], r"layer 1: weight is tied \(.*layer.0.*dense.weight, .*layer.1")
    mr.apply(model, GROUPS)


def test_layers_that_are_one_and_the_same_are_refused():
    model, _ = build("bert")
    model.encoder.layer[3] = model.encoder.layer[2]
    assert_refused(model, GROUPS, "layer 2: .* is tied")
    albert = tf.AlbertModel(tf.AlbertConfig(**SIZE | TEXT, embedding_size=16))
    assert_refused(albert, GROUPS, "AlbertModel runs the layers .* perhaps more than once")


def t5(**settings):
    return tf.T5EncoderModel(tf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4, vocab_size=50))


def wavlm():
    speech, _ = build("wav2vec2")
    keys = ("conv_dim", "conv_stride", "conv_kernel", "num_feat_extract_layers", "num_conv_pos_embeddings",
            "num_conv_pos_embedding_groups")  # fmt: skip
    return tf.WavLMModel(tf.WavLMConfig(**SIZE, **{key: getattr(speech.config, key) for key in keys}))


UNSUPPORTED = {
    "T5": (t5, "T5Attention: it returns .*position_bias"),
    "WavLM": (wavlm, "WavLMAttention: its forward does not go through transformers' attention interface"),
    "DeBERTa": (
        lambda: tf.DebertaV2Model(tf.DebertaV2Config(**SIZE | TEXT)),
        "DisentangledSelfAttention: .*interface",
    ),
    "Gemma2": (lambda: tf.Gemma2Model(tf.Gemma2Config(**SIZE | TEXT, head_dim=8)), "Gemma2Attention: .* softcap"),
    "gpt-oss": (
        lambda: tf.GptOssModel(
            tf.GptOssConfig(**SIZE | TEXT, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
        ),
        "GptOssAttention: .* s_aux",
    ),
    "Longformer": (
        lambda: tf.LongformerModel(tf.LongformerConfig(**SIZE | TEXT, attention_window=[4] * 4)),
        "LongformerSelfAttention: .*interface",
    ),
    "BigBird": (lambda: tf.BigBirdModel(tf.BigBirdConfig(**SIZE | TEXT)), "BigBirdBlockSparseAttention: .*interface"),
    "OLMo": (lambda: tf.OlmoModel(tf.OlmoConfig(**SIZE | TEXT)), "OlmoAttention: values are computed as .*clamp_"),
    "Phi3": (lambda: tf.Phi3Model(tf.Phi3Config(**SIZE | TEXT)), "Phi3Attention: values are computed as .*qkv_proj"),
    "MobileBERT": (
        lambda: tf.MobileBertModel(tf.MobileBertConfig(**SIZE | TEXT, embedding_size=32, intra_bottleneck_size=32)),
        "MobileBertSelfAttention: values are computed as self.value.value_tensor.",
    ),
    "Falcon": (lambda: tf.FalconModel(tf.FalconConfig(**SIZE, vocab_size=50)), "FalconAttention: .*interface"),
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_what_is_not_supported_is_refused_naming_class_and_reason(family):
    make, problem = UNSUPPORTED[family]
    assert_refused(make(), GROUPS, problem)


def test_partial_reuse_is_refused_where_a_norm_spans_all_heads():
    model = tf.Olmo2Model(tf.Olmo2Config(**SIZE | TEXT))
    assert_refused(model, PLANS["in part"], r"layer 1 \(Olmo2Attention\): [qk]_norm spans all heads")
    mr.apply(model, GROUPS)


def test_heads_are_not_reordered_before_a_norm_of_the_context():
    model = tf.BitNetModel(tf.BitNetConfig(**SIZE | TEXT, num_key_value_heads=2))
    with pytest.raises(ValueError, match="BitNetAttention: no plain output projection directly after its context"):
        output_projection(find_stack(model).layers[0])
    assert_refused(model, PLANS["other heads"], r"layer 1 \(BitNetAttention\): no plain output projection directly")
    mr.apply(model, GROUPS)


def test_grouped_keys_of_a_parakeet_are_refused():
    config = copy.deepcopy(build("parakeet")[0].config)
    config.num_key_value_heads = 2
    assert_refused(tf.ParakeetEncoder(config), GROUPS, "ParakeetEncoderAttention: grouped keys")


def test_gpt2_upcasting_its_attention_is_refused():
    config = copy.deepcopy(build("gpt2")[0].config)
    config.reorder_and_upcast_attn = True
    assert_refused(tf.GPT2Model(config), GROUPS, "GPT2Attention: reorder_and_upcast_attn=True")


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", None])
def test_other_implementations_of_attention_are_refused(implementation):
    model, _ = build("bert")
    model.config._attn_implementation_internal = implementation
    assert_refused(model, GROUPS, rf"BertSelfAttention\) runs attention as {implementation!r}.*'sdpa' or 'eager'")


def test_an_implementation_that_is_switched_afterwards_is_refused_at_the_next_pass():
    model, batch = build("bert")
    mr.apply(model, GROUPS)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="BertEncoder makes masks for 'flash_attention_2'"):
        model(**batch)


def test_a_mask_of_two_dimensions_is_refused():
    model, batch = build("bert")
    mr.apply(model, GROUPS)
    model.encoder.layer[0].register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0], batch["attention_mask"], *args[2:]), kwargs), with_kwargs=True
    )
    with pytest.raises(ValueError, match=r"expected a mask of shape \(batch, 1, query, key\), got \(3, 9\)"):
        model(**batch)


@pytest.mark.parametrize("family", ["bert", "parakeet", "gpt2"])
def test_an_argument_that_may_change_the_map_is_refused(family):
    model, batch = build(family)
    mr.apply(model, GROUPS)
    with pytest.raises(ValueError, match="was given softcap, which may change its attention map"):
        model(**batch, softcap=30.0)


def test_a_layer_cannot_run_outside_its_stack():
    model, _ = build("bert")
    mr.apply(model, GROUPS)
    with pytest.raises(ValueError, match="layer 1 of a model that shares attention maps was called by itself"):
        model.encoder.layer[1](torch.randn(1, 3, 32))


def test_a_source_that_does_not_run_is_an_error_outside_training():
    model, batch = build("bert")
    mr.apply(model, GROUPS)
    model.encoder.layer[0].forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(RuntimeError, match="layer 1 reuses layer 0's map, but layer 0 did not run"):
        model(**batch)


def test_a_transposed_projection_keeps_its_kind():
    """GPT-2's Conv1D stores (inputs, outputs)."""
    model, _ = build("gpt2")
    mr.apply(model, GROUPS)
    projection = model.h[1].attn.c_attn
    assert type(projection) is Conv1D
    assert projection.weight.shape == (32, 32)
    assert projection.nf == 32
