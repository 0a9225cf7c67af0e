"""`drop_layers`: outputs are those of the original with the dropped layers replaced by the identity."""

import copy

import pytest
import torch
import transformers as tf
from families import FAMILIES, build
from torch import nn

import mapreuse as mr
from mapreuse.models import find_stack

SAMPLE = ["bert", "parakeet", "distilbert", "gpt2", "qwen2", "dinov2"]


def output(model, batch):
    with torch.no_grad():
        return model(**batch)[0]


def with_identities(model, layers):
    """A copy whose layers return the hidden states that they get, in the form of the layer's own output."""
    copied = copy.deepcopy(model)

    def unchanged(module, args, kwargs, found):
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *found[1:]) if isinstance(found, tuple) else states

    for layer in layers:
        find_stack(copied).layers[layer].layer.register_forward_hook(unchanged, with_kwargs=True)
    return copied


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.full) for name in FAMILIES],
)
def test_a_dropped_layer_is_an_identity_also_after_saving(family, tmp_path):
    model, batch = build(family)
    dropped = [1, 2]
    expected, before = output(with_identities(model, dropped), batch), output(model, batch)
    assert mr.drop_layers(model, dropped) is model
    torch.testing.assert_close(output(model, batch), expected)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert len(find_stack(model).layers) == 2

    model.save_pretrained(tmp_path)
    torch.testing.assert_close(output(type(model).from_pretrained(tmp_path).eval(), batch), expected)
    mr.apply(model, mr.ReusePlan.parse("2x1"))
    mr.save(model, tmp_path / "shared")
    torch.testing.assert_close(output(mr.load(tmp_path / "shared"), batch), output(model, batch))


def test_a_cache_still_finds_its_layers():
    model, batch = build("llama")
    mr.drop_layers(model, [0])
    ids = batch["input_ids"][:1]
    cached = model(ids[:, :5], use_cache=True)
    with torch.no_grad():
        step = model(ids[:, 5:6], past_key_values=cached.past_key_values).last_hidden_state
    torch.testing.assert_close(step, output(model, {"input_ids": ids[:, :6]})[:, 5:])


def test_a_part_of_a_model_and_a_torch_encoder_lose_layers_too():
    model, batch = build("bert")
    expected = output(with_identities(model, [3]), batch)
    mr.drop_layers(model.encoder, [3])
    torch.testing.assert_close(output(model, batch), expected)
    assert model.config.num_hidden_layers == 3

    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3).eval()
    states = torch.randn(2, 5, 16)
    two = nn.Sequential(encoder.layers[0], encoder.layers[2]).eval()
    with torch.no_grad():
        torch.testing.assert_close(mr.drop_layers(encoder, [1])(states), two(states))
    assert encoder.num_layers == 2


def test_halves_of_a_model_that_count_their_layers_apart_lose_layers_one_by_one():
    config = tf.MoonshineConfig(
        vocab_size=20, hidden_size=16, encoder_num_hidden_layers=3, decoder_num_hidden_layers=3,
        encoder_num_attention_heads=2, decoder_num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    model = tf.MoonshineModel(config).eval()
    mr.drop_layers(model.encoder, [1])
    assert (len(model.encoder.layers), len(model.decoder.layers)) == (2, 3)
    assert (model.config.encoder_num_hidden_layers, model.config.decoder_num_hidden_layers) == (2, 3)
    mr.drop_layers(model.decoder, [0, 2])
    assert (model.config.encoder_num_hidden_layers, model.config.decoder_num_hidden_layers) == (2, 1)


def inverse_index():
    return tf.GPT2Model(tf.GPT2Config(n_embd=32, n_layer=4, n_head=4, scale_attn_by_inverse_layer_idx=True))


@pytest.mark.parametrize(
    ("make", "layers", "message"),
    [
        (lambda: build("bert")[0], [4], r"layers must be indices from 0 to 3, such as \[1\], got 4"),
        (lambda: build("bert")[0], [-1], "got -1"),
        (lambda: build("bert")[0], [0, 1, 2, 3], "layers names all 4 layers; at least one must be left"),
        (lambda: mr.apply(build("bert")[0], mr.ReusePlan.parse("2x2")), [1], "drop layers of the original"),
        (lambda: build("modernbert")[0], [0], "its class builds another layers.0.attn_norm.weight; drop other"),
        (inverse_index, [1], "scales attention by the index of the layer"),
        (lambda: nn.Linear(2, 2), [0], "holds no list of layers"),
    ],
)
def test_what_cannot_be_dropped_is_refused_on_one_line_and_nothing_changes(make, layers, message):
    model = make()
    before = list(model.modules())
    with pytest.raises(ValueError, match=message) as raised:
        mr.drop_layers(model, layers)
    assert "\n" not in str(raised.value)
    assert before == list(model.modules())
