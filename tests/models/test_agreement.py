"""Every family, under every kind of plan, against the original model with its softmax replaced."""

import copy

import agreement
import pytest
import torch
import transformers as tf
from agreement import PLANS, STORAGES
from families import FAMILIES, SIZE, build
from oracle import defined_output, disagreement, softmax_follows, valid_rows
from torch import nn

import mapreuse as mr
from mapreuse.maps import _attend, _blocked

REUSING = {name: plan for name, plan in PLANS.items() if name != "full"}


def peaked(model, seed=0):
    """The model in evaluation mode, with weights that make peaked maps."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.35 if "emb" in name else 0.45)
    agreement.randomize_biases(model)
    return model.eval()


@torch.no_grad()
def assert_agrees(family, plan, batch=None, *, given=None, storage="dense"):
    """The output of a family's model for `given` is the defined output for `batch`; padding is ignored."""
    eager, default = build(family, implementation="eager")
    batch = default if batch is None else batch
    model = mr.apply(build(family)[0], plan, storage=storage)
    reference, output = defined_output(eager, batch, plan), model(**given or batch)
    masked = batch.get("attention_mask") is not None and batch["attention_mask"].dim() == 2
    rows = valid_rows(eager, batch if masked else {}, output)
    assert disagreement(output.last_hidden_state, reference, rows) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_that_reuses_nothing_changes_no_output(family):
    errors, _ = agreement.errors(family, PLANS["full"])
    assert max(errors.values()) <= max(1e-5, agreement.rounding(family)), errors


@pytest.mark.sample(3)
@pytest.mark.parametrize("plan", REUSING)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_under_a_plan_is_the_original_with_its_maps_replaced(family, plan):
    errors, moved = agreement.errors(family, REUSING[plan])
    assert moved > 1e-1, "maps must be peaked, so that reuse changes the output"
    assert max(errors.values()) <= 1e-4, errors


@pytest.mark.sample(5)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["parakeet", "wav2vec2-conformer-relative", "bert", "llama"])
def test_the_kernels_for_long_inputs_agree(monkeypatch, family, plan):
    """These short inputs are treated as long ones."""
    monkeypatch.setattr(_blocked, "_MAX_SHORT", 0)
    monkeypatch.setattr(_attend, "_MIN_SCORES", 0)
    monkeypatch.setattr(_attend, "_kernel_is_faster", lambda threads, dim: True)
    errors, _ = agreement.errors.__wrapped__(family, PLANS[plan])
    assert max(errors.values()) <= (1e-5 if plan == "full" else 1e-4), errors


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_definition_without_a_plan_is_the_original_model(family):
    model, batch = build(family, implementation="eager")
    with torch.no_grad():
        untouched = model(**batch).last_hidden_state
        assert torch.equal(defined_output(model, batch, mr.ReusePlan.full(4)), untouched)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("storage", STORAGES)
def test_padding_on_the_left_is_not_attended(family, storage):
    _, batch = build(family)
    flipped = {name: tensor.flip(1) for name, tensor in batch.items()}
    assert_agrees(family, PLANS["two sources"], flipped, storage=storage)


@pytest.mark.parametrize("family", ["parakeet", "bert", "modernbert", "llama"])
def test_one_sequence_without_a_mask_agrees(family):
    _, batch = build(family)
    one = {name: tensor[:1] for name, tensor in batch.items() if name != "attention_mask"}
    assert_agrees(family, PLANS["in part"], one)


@pytest.mark.sample(3)
@pytest.mark.parametrize("plan", ["other heads", "in part"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "modernbert"])
@pytest.mark.parametrize("is_boolean", [True, False])
def test_a_mask_may_differ_from_head_to_head(family, plan, is_boolean):
    _, batch = build(family)
    rows, positions = batch["input_ids"].shape
    torch.manual_seed(0)
    allowed = torch.rand(rows, 4, positions, positions) < 0.5
    allowed |= torch.eye(positions, dtype=torch.bool)
    additive = torch.zeros_like(allowed, dtype=torch.float).masked_fill(~allowed, torch.finfo(torch.float).min)
    given = batch | {"attention_mask": allowed if is_boolean else additive}
    assert_agrees(family, PLANS[plan], batch | {"attention_mask": additive}, given=given)


@pytest.mark.parametrize("plan", ["groups of 2", "in part"])
def test_an_input_longer_than_one_block_of_rows_agrees(plan):
    """130 frames: blocks of 64 query rows, and a last block of 2."""
    torch.manual_seed(0)
    mask = torch.tensor([[1] * 520, [1] * 300 + [0] * 220])
    batch = {"input_features": torch.randn(2, 520, 16) * mask[..., None], "attention_mask": mask}
    assert_agrees("parakeet", PLANS[plan], batch)


TEXT = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"d_model": 32, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
T5_SIZE = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4, "vocab_size": 50}


def modernbert(layer_type):
    special = TEXT | {"cls_token_id": 1, "sep_token_id": 2}
    return tf.ModernBertModel(tf.ModernBertConfig(**SIZE | special, local_attention=4, layer_types=[layer_type] * 4))


MODELS = {
    "Qwen3": lambda: tf.Qwen3Model(tf.Qwen3Config(**SIZE | TEXT, num_key_value_heads=2, head_dim=8)),
    "Bart": lambda: tf.BartModel(tf.BartConfig(**WIDE | TEXT, decoder_layers=1)).encoder,
    "Esm": lambda: tf.EsmModel(tf.EsmConfig(**SIZE | TEXT, max_position_embeddings=40, mask_token_id=3)),
    "UMT5": lambda: tf.UMT5EncoderModel(tf.UMT5Config(**T5_SIZE)),
    "ModernBert, global": lambda: modernbert("full_attention"),
    "ModernBert, local": lambda: modernbert("sliding_attention"),
    "BLOOM": lambda: tf.BloomModel(tf.BloomConfig(hidden_size=32, n_layer=4, n_head=4, vocab_size=50)),
    "GPT-J": lambda: tf.GPTJModel(
        tf.GPTJConfig(n_embd=32, n_layer=4, n_head=4, n_positions=40, rotary_dim=4, vocab_size=50)
    ),
    "MPNet": lambda: tf.MPNetModel(tf.MPNetConfig(**SIZE, vocab_size=50, max_position_embeddings=40)),
    "OLMo 2, whose norms span all heads": lambda: tf.Olmo2Model(tf.Olmo2Config(**SIZE | TEXT)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("plan", ["groups of 2", "other heads"])
def test_models_without_an_adapter_agree(name, plan):
    model = peaked(MODELS[name]())
    for parameter in model.parameters():
        if parameter.dim() == 1 and "norms" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.set_attn_implementation("eager")
    mask = torch.tensor([[1] * 20, [1] * 12 + [0] * 8])
    batch = {"input_ids": torch.randint(4, 50, (2, 20)) * mask, "attention_mask": mask}
    with torch.no_grad():
        untouched = model(**batch).last_hidden_state
        reference = defined_output(model, batch, PLANS[plan])
        assert disagreement(untouched, reference, mask.bool()) > 1e-1
        for storage in STORAGES:
            output = mr.apply(copy.deepcopy(model), PLANS[plan], storage=storage)(**batch).last_hidden_state
            assert disagreement(output, reference, mask.bool()) <= 1e-4


@pytest.mark.parametrize("plan", ["full", "other heads", "in part"])
def test_the_cross_attention_of_a_decoder_stays_as_it_is(plan):
    config = copy.deepcopy(build("whisper-encoder")[0].config)
    config.decoder_layers = 4
    model = peaked(tf.WhisperModel(config).decoder)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    attentions = [layer.self_attn for layer in eager.layers]
    states = torch.randn(2, 7, 32)
    batch = {"input_ids": torch.randint(3, 50, (2, 9)), "encoder_hidden_states": states, "use_cache": False}
    mr.apply(model, PLANS[plan])
    with torch.no_grad():
        with softmax_follows(PLANS[plan], attentions):
            reference = eager(**batch).last_hidden_state
        output = model(**batch).last_hidden_state
        other = model(**batch | {"encoder_hidden_states": -states}).last_hidden_state
    every = torch.ones(2, 9, dtype=torch.bool)
    assert disagreement(output, reference, every) <= 1e-4
    assert disagreement(other, output, every) > 1e-1


def loss_of_precision(output, exact, rows):
    output, exact = output[rows], exact[rows]
    return ((output - exact).abs().mean() / exact.abs().mean()).item()


@pytest.mark.parametrize("family", ["parakeet", "bert", "llama"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_half_precision_model_stays_near_full_precision(family, storage):
    model, batch = build(family)
    mr.apply(model, PLANS["in part"], storage=storage)
    with torch.no_grad():
        exact = model(**batch)
        model.bfloat16()
        batch = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
        half = model(**batch).last_hidden_state
    assert half.dtype == torch.bfloat16
    assert loss_of_precision(half, exact.last_hidden_state, valid_rows(model, batch, exact)) < 0.1


FALCONS = {
    "one head of values": {"multi_query": True},
    "as many heads of values as of queries": {"multi_query": False},
    "two heads of values": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "ALiBi": {"multi_query": False, "alibi": True},
}


@pytest.mark.parametrize("kind", FALCONS)
@pytest.mark.parametrize("plan", ["full", "in part"])
@torch.no_grad()
def test_every_kind_of_falcon_agrees(kind, plan):
    """Its implementation is fixed at construction. With ALiBi, its eager outputs differ from those of sdpa."""
    config = tf.FalconConfig(num_hidden_layers=4, hidden_size=32, num_attention_heads=4, **TEXT, **FALCONS[kind])
    eager, sdpa = (
        peaked(tf.FalconModel._from_config(copy.deepcopy(config), attn_implementation=implementation))
        for implementation in ("eager", "sdpa")
    )
    mask = torch.tensor([[1] * 20, [1] * 12 + [0] * 8])
    batch = {"input_ids": torch.randint(4, 50, (2, 20)) * mask, "attention_mask": mask}
    reference, original = defined_output(eager, batch, PLANS[plan]), sdpa(**batch).last_hidden_state
    output, of_sdpa = (mr.apply(model, PLANS[plan])(**batch).last_hidden_state for model in (eager, sdpa))
    assert disagreement(output, reference, mask.bool()) <= 1e-4
    if plan == "full":
        assert disagreement(of_sdpa, original, mask.bool()) <= 1e-4
    elif kind != "ALiBi":
        assert disagreement(of_sdpa, reference, mask.bool()) <= 1e-4
