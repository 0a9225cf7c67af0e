"""Every family, under every kind of plan, against the original model with its softmax replaced."""

import copy

import agreement
import pytest
import torch
import transformers as tf
from agreement import PLANS
from families import FAMILIES, SIZE, build
from oracle import defined_output, disagreement, valid_rows

import mapreuse as mr
from mapreuse.maps import _attend, _blocked

REUSING = {name: plan for name, plan in PLANS.items() if name != "full"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_that_reuses_nothing_changes_no_output(family):
    errors, _ = agreement.errors(family, PLANS["full"])
    assert max(errors.values()) <= max(1e-5, agreement.rounding(family)), errors


@pytest.mark.sample(5)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["parakeet", "wav2vec2-conformer-relative", "bert", "llama"])
def test_the_cores_of_long_inputs_agree_too(monkeypatch, family, plan):
    """These inputs are so short that their maps are computed in one product, unless none counts as short."""
    monkeypatch.setattr(_blocked, "_MAX_SHORT", 0)
    monkeypatch.setattr(_attend, "_MIN_SCORES", 0)
    monkeypatch.setattr(_attend, "_kernel_is_faster", lambda threads, dim: True)
    errors, _ = agreement.errors.__wrapped__(family, PLANS[plan])
    assert max(errors.values()) <= (1e-5 if plan == "full" else 1e-4), errors


@pytest.mark.sample(3)
@pytest.mark.parametrize("plan", REUSING)
@pytest.mark.parametrize("family", FAMILIES)
def test_reuse_is_the_original_with_its_maps_replaced(family, plan):
    errors, moved = agreement.errors(family, REUSING[plan])
    assert moved > 1e-1, "maps must be so peaked that reuse shows"
    assert max(errors.values()) <= 1e-4, errors


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_definition_without_a_plan_is_the_untouched_model(family):
    """Of the oracle itself: wrapping softmax changes nothing by itself."""
    model, batch = build(family, implementation="eager")
    with torch.no_grad():
        untouched = model(**batch).last_hidden_state
        assert torch.equal(defined_output(model, batch, mr.ReusePlan.full(4)), untouched)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("storage", agreement.STORAGES)
def test_padding_on_the_left_is_not_attended(family, storage):
    eager, batch = build(family, implementation="eager")
    batch = {name: tensor.flip(1) for name, tensor in batch.items()}
    model = mr.apply(build(family)[0], PLANS["two sources"], storage=storage)
    with torch.no_grad():
        rows = valid_rows(eager, batch, eager(**batch))
        reference = defined_output(eager, batch, PLANS["two sources"])
        assert disagreement(model(**batch).last_hidden_state, reference, rows) <= 1e-4


@pytest.mark.parametrize("family", ["parakeet", "bert", "modernbert", "llama"])
def test_one_sequence_without_a_mask_agrees_too(family):
    eager, batch = build(family, implementation="eager")
    batch = {name: tensor[:1] for name, tensor in batch.items() if name != "attention_mask"}
    model = mr.apply(build(family)[0], PLANS["in part"])
    with torch.no_grad():
        ours = model(**batch).last_hidden_state
        reference = defined_output(eager, batch, PLANS["in part"])
        assert disagreement(ours, reference, torch.ones(ours.shape[:2], dtype=torch.bool)) <= 1e-4


@pytest.mark.parametrize("family", ["parakeet", "wav2vec2-conformer-relative", "bert", "modernbert", "gpt2", "llama"])
def test_gradients_enabled_or_not_outputs_agree(family):
    model, batch = build(family)
    mr.apply(model, PLANS["in part"])
    with torch.no_grad():
        without = model(**batch)
    rows = valid_rows(model, batch, without)
    assert disagreement(model(**batch).last_hidden_state, without.last_hidden_state, rows) <= 1e-5


@pytest.mark.sample(3)
@pytest.mark.parametrize("plan", ["other heads", "in part"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "modernbert"])
@pytest.mark.parametrize("is_boolean", [True, False])
def test_a_mask_may_differ_from_head_to_head(family, plan, is_boolean):
    eager, batch = build(family, implementation="eager")
    positions = batch["input_ids"].shape[1]
    torch.manual_seed(0)
    allowed = torch.rand(len(batch["input_ids"]), 4, positions, positions) < 0.5
    allowed |= torch.eye(positions, dtype=torch.bool)
    additive = torch.zeros_like(allowed, dtype=torch.float).masked_fill(~allowed, torch.finfo(torch.float).min)
    model = mr.apply(build(family)[0], PLANS[plan])
    with torch.no_grad():
        reference = defined_output(eager, batch | {"attention_mask": additive}, PLANS[plan])
        mask = allowed if is_boolean else additive
        ours = model(**batch | {"attention_mask": mask}).last_hidden_state
        assert disagreement(ours, reference, torch.ones(ours.shape[:2], dtype=torch.bool)) <= 1e-4


def test_a_longer_input_than_one_block_of_rows_agrees():
    """130 frames: blocks of 64 query rows, and a last block of 2."""
    eager, _ = build("parakeet", implementation="eager")
    torch.manual_seed(0)
    mask = torch.tensor([[1] * 520, [1] * 300 + [0] * 220])
    batch = {"input_features": torch.randn(2, 520, 16) * mask[..., None], "attention_mask": mask}
    for name in ("groups of 2", "in part"):
        model = mr.apply(build("parakeet")[0], PLANS[name])
        with torch.no_grad():
            rows = valid_rows(eager, batch, eager(**batch))
            assert rows.shape == (2, 130)
            reference = defined_output(eager, batch, PLANS[name])
            assert disagreement(model(**batch).last_hidden_state, reference, rows) <= 1e-4


@pytest.mark.parametrize("layer_types", [["full_attention"] * 4, ["sliding_attention"] * 4])
def test_local_layers_share_with_local_layers(layer_types):
    def modernbert():
        torch.manual_seed(0)
        config = tf.ModernBertConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=50,
            local_attention=4, layer_types=layer_types, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            cls_token_id=1, sep_token_id=2,
        )  # fmt: skip
        model = tf.ModernBertModel(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.45)
        return model

    eager, model = modernbert(), mr.apply(modernbert(), PLANS["in part"])
    eager.set_attn_implementation("eager")
    mask = torch.tensor([[1] * 20, [1] * 12 + [0] * 8])
    batch = {"input_ids": torch.randint(3, 50, (2, 20)) * mask, "attention_mask": mask}
    with torch.no_grad():
        reference = defined_output(eager, batch, PLANS["in part"])
        assert disagreement(model(**batch).last_hidden_state, reference, mask.bool()) <= 1e-4


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", ["parakeet", "wav2vec2-conformer-relative", "bert", "modernbert", "llama"])
@pytest.mark.parametrize("implementation", agreement.IMPLEMENTATIONS)
@pytest.mark.parametrize("storage", agreement.STORAGES)
@pytest.mark.parametrize("grad_mode", [True, False])
def test_mixed_precision_stays_near_full_precision(family, implementation, storage, grad_mode):
    """Under autocast, sums and rotations come in float32 and projections in bfloat16."""
    model, batch = build(family, implementation=implementation)
    untouched = lost_in_mixed_precision(model, batch, grad_mode)
    if untouched > 0.1:
        pytest.skip(f"on this processor, mixed precision moves the untouched model by {untouched:.0%}")
    mr.apply(model, PLANS["in part"], storage=storage)
    assert lost_in_mixed_precision(model, batch, grad_mode) < 0.1


def lost_in_mixed_precision(model, batch, grad_mode):
    with torch.no_grad():
        exact = model(**batch)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad_mode):
        mixed = model(**batch).last_hidden_state.detach()
    assert mixed.isfinite().all()
    rows = valid_rows(model, batch, exact)
    return ((mixed - exact.last_hidden_state)[rows].abs().mean() / exact.last_hidden_state[rows].abs().mean()).item()


@pytest.mark.parametrize("family", ["parakeet", "bert", "llama"])
@pytest.mark.parametrize("storage", agreement.STORAGES)
def test_a_half_precision_model_stays_near_full_precision(family, storage):
    model, batch = build(family)
    mr.apply(model, PLANS["in part"], storage=storage)
    with torch.no_grad():
        exact = model(**batch)
        model.bfloat16()
        batch = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
        half = model(**batch).last_hidden_state
    assert half.dtype == torch.bfloat16
    rows = valid_rows(model, batch, exact)
    typical = (half - exact.last_hidden_state)[rows].abs().mean() / exact.last_hidden_state[rows].abs().mean()
    assert typical < 0.1


TEXT = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"d_model": 32, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
UNSEEN = {
    "Qwen3": lambda: tf.Qwen3Model(tf.Qwen3Config(**SIZE | TEXT, num_key_value_heads=2, head_dim=8)),
    "Bart": lambda: tf.BartModel(tf.BartConfig(**WIDE | TEXT, decoder_layers=1)).encoder,
    "Esm": lambda: tf.EsmModel(tf.EsmConfig(**SIZE | TEXT, max_position_embeddings=40, mask_token_id=3)),
    "UMT5": lambda: tf.UMT5EncoderModel(
        tf.UMT5Config(d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4, vocab_size=50)
    ),
}


@pytest.mark.parametrize("family", UNSEEN)
@pytest.mark.parametrize("plan", ["groups of 2", "other heads"])
def test_families_that_nobody_wrote_a_line_for_agree_too(family, plan):
    torch.manual_seed(0)
    model = UNSEEN[family]().eval()
    model.set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.35 if "emb" in name else 0.45)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    batch = {"input_ids": torch.randint(4, 50, (2, 9)) * mask, "attention_mask": mask}
    with torch.no_grad():
        untouched = model(**batch).last_hidden_state
        reference = defined_output(model, batch, PLANS[plan])
        assert disagreement(untouched, reference, mask.bool()) > 1e-1
        for storage in agreement.STORAGES:
            ours = mr.apply(copy.deepcopy(model), PLANS[plan], storage=storage)(**batch).last_hidden_state
            assert disagreement(ours, reference, mask.bool()) <= 1e-4


def test_the_table_of_errors_names_every_family(capsys):
    """What `python tests/agreement.py` prints."""
    print(agreement.table())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(FAMILIES)
    print("\n".join(lines))
