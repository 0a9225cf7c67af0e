"""A decoder whose layers reuse maps attends its encoder states as it did."""

import copy

import pytest
import torch
import transformers as tf
from agreement import PLANS
from families import build
from oracle import disagreement, softmax_follows
from torch import nn

import mapreuse as mr


def whisper_decoder(implementation="sdpa"):
    encoder, _ = build("whisper-encoder")
    config = copy.deepcopy(encoder.config)
    config.decoder_layers = 4
    torch.manual_seed(0)
    model = tf.WhisperModel(config).decoder.eval()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.35 if "embed" in name else 0.45)
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (2, 9))
    return model, {"input_ids": ids, "encoder_hidden_states": torch.randn(2, 7, 32), "use_cache": False}


@pytest.mark.parametrize("plan", ["full", "other heads", "in part"])
def test_a_decoder_attends_its_encoder_states_as_before(plan):
    eager, batch = whisper_decoder("eager")
    attentions = [layer.self_attn for layer in eager.layers]
    model = mr.apply(whisper_decoder()[0], PLANS[plan])
    with torch.no_grad():
        with softmax_follows(PLANS[plan], attentions):
            reference = eager(**batch).last_hidden_state
        ours = model(**batch).last_hidden_state
        other = model(**batch | {"encoder_hidden_states": -batch["encoder_hidden_states"]}).last_hidden_state
    every = torch.ones(2, 9, dtype=torch.bool)
    assert disagreement(ours, reference, every) <= 1e-4
    assert disagreement(other, ours, every) > 1e-1


def test_encoder_states_that_could_reach_a_planned_attention_are_refused():
    model, _ = build("bert")
    mr.apply(model, PLANS["groups of 2"])
    with pytest.raises(ValueError, match="cannot take encoder_hidden_states"):
        model.encoder(torch.randn(2, 9, 32), encoder_hidden_states=torch.randn(2, 7, 32))
