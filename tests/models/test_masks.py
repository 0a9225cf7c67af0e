"""Masks of every type and shape: what the original gives, or one line that says what is accepted."""

import copy

import pytest
import torch
import transformers as tf
from families import SIZE
from oracle import defined_output
from torch import nn

import mapreuse as mr

PLANS = {"full": mr.ReusePlan.full(4), "2x2": mr.ReusePlan.grouped(4, 2)}
LENGTHS = [12, 90, 91, 150, 300]
"""On both sides of the lengths at which blocks and the C kernel begin."""


@pytest.fixture(scope="module")
def models():
    """A BERT and a Llama with peaked maps; their attention is eager, which adds masks of any floating-point type."""
    torch.manual_seed(0)
    sizes = SIZE | {"vocab_size": 50, "max_position_embeddings": 300, "attn_implementation": "eager"}
    built = {"bert": tf.BertModel(tf.BertConfig(**sizes)), "llama": tf.LlamaModel(tf.LlamaConfig(**sizes))}
    with torch.no_grad():
        for parameter in (one for model in built.values() for one in model.parameters() if one.dim() > 1):
            nn.init.normal_(parameter, std=0.4)
    return {name: model.eval() for name, model in built.items()}


def inputs(length, batch=2):
    """Tokens, and for each query of each head the keys that it may attend to, itself among them."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(3, 50, (batch, length), generator=generator)
    allowed = torch.rand(batch, 4, length, length, generator=generator) < 0.7
    return tokens, allowed | torch.eye(length, dtype=torch.bool)


@pytest.mark.sample(13)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("shape", ["all heads", "one head", "one query", "one item"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_mask_of_any_type_has_the_effect_that_it_has_in_the_original(models, name, plan, dtype, shape, length):
    tokens, allowed = inputs(length)
    index = {"all heads": (), "one head": (slice(None), slice(1)), "one item": (slice(1),)}
    allowed = allowed[:, :1, :1] if shape == "one query" else allowed[index[shape]]
    lowest = torch.finfo(torch.float16).min
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, lowest)
    batch = {"input_ids": tokens, "attention_mask": additive}
    expected = defined_output(models[name], batch, PLANS[plan])
    model = mr.apply(copy.deepcopy(models[name]), PLANS[plan])
    model.set_attn_implementation("sdpa" if dtype == torch.bool else "eager")
    given = allowed if dtype == torch.bool else additive.to(dtype)
    with torch.no_grad():
        found = model(input_ids=tokens, attention_mask=given).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [12, 91])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: mask.long(), r"booleans \(True attends\) or of floats .* got torch.int64 on cpu"),
        (lambda mask: mask.to(torch.uint8), "got torch.uint8 on cpu"),
        (lambda mask: mask.to("meta"), "got torch.bool on meta"),
        (lambda mask: mask.repeat(2, 1, 1, 1), r"expected a mask of shape \(2, 4, (\d+), \1\), .* got \(4, "),
        (lambda mask: mask[..., :-1], "or 1 in place of a number, got "),
        (lambda mask: torch.cat([mask, mask], -1), "or 1 in place of a number, got "),
        (lambda mask: mask[:, :2], "or 1 in place of a number, got "),
    ],
)
def test_a_mask_that_attention_cannot_take_is_refused_in_one_line(models, change, message, length):
    tokens, allowed = inputs(length)
    for name, plan in (("bert", "2x2"), ("llama", "full")):
        model = mr.apply(copy.deepcopy(models[name]), PLANS[plan])
        model.set_attn_implementation("sdpa")
        with torch.no_grad(), pytest.raises(ValueError, match=message) as refused:
            model(input_ids=tokens, attention_mask=change(allowed))
        assert "\n" not in str(refused.value)


def test_a_boolean_mask_is_refused_where_the_original_would_add_it_as_0_and_1(models):
    tokens, allowed = inputs(12)
    for name in models:
        model = mr.apply(copy.deepcopy(models[name]), PLANS["2x2"])
        with torch.no_grad(), pytest.raises(ValueError, match="eager attention would add a mask of booleans"):
            model(input_ids=tokens, attention_mask=allowed)
