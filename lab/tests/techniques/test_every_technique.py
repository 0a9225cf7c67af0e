"""What holds for all techniques alike."""

import copy

import pytest
import torch
from mapreuse_lab.techniques import Technique, parse, study_techniques
from mapreuse_lab.techniques._technique import TECHNIQUES
from small_encoders import NUM_LAYERS, VARIANTS, batch, compressed, encoder, output, unchanged
from transformers import ParakeetCTCConfig, ParakeetForCTC

LENGTHS = (1, 2, 4, 33)
every_technique = pytest.mark.parametrize("name", VARIANTS)


@every_technique
def test_a_name_is_read_back_as_the_same_technique(name):
    technique = parse(name)
    assert technique.name == name
    assert isinstance(technique, Technique)
    assert technique.positions in ("kept", "dropped", "none")
    assert technique.title
    assert technique.source


def test_every_registered_technique_is_tested():
    from_scratch = {technique for technique in TECHNIQUES.values() if technique.from_scratch}
    assert from_scratch == {type(parse(name)) for name in VARIANTS}


@every_technique
def test_frames_do_not_depend_on_the_padding_after_them(name):
    model, lengths = unchanged(name), (21, 70, 5, 1)
    together = batch(*lengths)
    with torch.no_grad():
        padded = model(**together).last_hidden_state
        for item, frames in enumerate(lengths):
            alone = {key: tensor[item : item + 1, : frames * 4] for key, tensor in together.items()}
            expected = model(**alone).last_hidden_state[0]
            torch.testing.assert_close(padded[item, :frames], expected, rtol=1e-3, atol=1e-3)
    assert padded.isfinite().all()


@every_technique
def test_an_utterance_without_a_mask_is_one_without_padding(name):
    model = unchanged(name)
    with torch.no_grad():
        for frames in LENGTHS:
            inputs = batch(frames)
            masked = model(**inputs).last_hidden_state
            plain = model(input_features=inputs["input_features"]).last_hidden_state
            assert masked.isfinite().all()
            assert masked.shape[1] == frames
            torch.testing.assert_close(plain, masked, rtol=1e-3, atol=1e-3)


@every_technique
def test_every_parameter_that_remains_is_trained(name):
    model = compressed(name).train()
    hidden_states = model(**batch(21, 40)).last_hidden_state
    hidden_states[:, :21].square().mean().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        # A bias of keys moves all scores of a row alike, and a softmax does not see it.
        assert parameter.grad.abs().max() > 0 or path.endswith("k_proj.bias"), path


def test_a_recogniser_is_changed_through_its_encoder():
    config = ParakeetCTCConfig(vocab_size=7, pad_token_id=0, encoder_config=encoder().config)
    model = ParakeetForCTC(config).train()
    assert parse("window-3+reuse-2x2").apply(model) is model
    model(**batch(21, 40), labels=torch.randint(1, 7, (2, 5))).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@every_technique
def test_gradients_enabled_or_not_outputs_agree(name):
    with_gradients = unchanged(name)(**batch(21, 40)).last_hidden_state
    assert with_gradients.requires_grad
    torch.testing.assert_close(with_gradients, output(name), rtol=1e-3, atol=1e-3)


@every_technique
def test_mixed_precision_stays_near_full_precision(name):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = unchanged(name)(**batch(21, 40)).last_hidden_state
    assert (mixed - output(name)).abs().max() <= 0.3 * output(name).abs().max()


@every_technique
def test_weights_that_are_saved_and_loaded_give_the_same_outputs(name):
    torch.manual_seed(5)
    other = parse(name).apply(encoder())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)
        other.load_state_dict(unchanged(name).state_dict())
        assert torch.equal(other(**batch(21, 40)).last_hidden_state, output(name))


def test_weights_of_another_technique_are_refused():
    with pytest.raises(ValueError, match="weights of 'strided-3' do not belong in a model under 'pool-3'"):
        compressed("pool-3").load_state_dict(unchanged("strided-3").state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        encoder().load_state_dict(unchanged("strided-3").state_dict())


@every_technique
def test_a_copy_gives_the_same_outputs(name):
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(unchanged(name))(**batch(21, 40)).last_hidden_state, output(name))


@every_technique
def test_a_second_technique_is_refused(name):
    with pytest.raises(ValueError, match="apply a technique to the original model"):
        parse("linear").apply(unchanged(name))


@pytest.mark.parametrize("name", ["window-3+reuse-2x2", "cla-2", "reuse-2x2"])
def test_gradient_checkpointing_changes_no_gradient(name):
    gradients = []
    for checkpointing in (False, True):
        model = compressed(name).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model(**batch(21, 40)).last_hidden_state[:, :21].square().mean().backward()
        gradients.append({path: parameter.grad for path, parameter in model.named_parameters()})
    for path, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][path], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["window-3+reuse-2x2", "cla-2"])
def test_layers_that_share_refuse_reentrant_checkpointing_layer_drop_and_calls_outside_the_encoder(name):
    model = compressed(name).train()
    hidden_states = torch.randn(1, 5, 32)
    with pytest.raises(ValueError, match="call that whole"):
        model.layers[1].self_attn(hidden_states, model.encode_positions(hidden_states))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(**batch(21))
    model = encoder()
    model.layerdrop = 0.1
    with pytest.raises(ValueError, match=r"layerdrop=0\.0"):
        parse(name).apply(model)


@pytest.mark.parametrize(
    "name", ["qk-dim-3", "gqa-1", "window-3-global-2", "grouped-3", "strided-3", "pool-3", "probsparse-3"]
)
def test_encodings_of_positions_that_differ_by_item_are_used_item_by_item(name):
    """Dropout of the encodings makes them differ in training."""
    model = copy.deepcopy(unchanged(name))
    attention = model.layers[0].self_attn
    model.config.dropout_positions = 0.3
    attention.train()
    hidden_states = torch.randn(2, 21, 32)
    positions = model.encode_positions(hidden_states)
    positions = torch.stack([positions[0], 2 * positions[1]])
    with torch.no_grad():
        together, _ = attention(hidden_states, positions)
        for item in range(2):
            alone, _ = attention(hidden_states[item : item + 1], positions[item : item + 1])
            torch.testing.assert_close(together[item : item + 1], alone, rtol=1e-3, atol=1e-4)


DROPPING = [name for name in VARIANTS if parse(name).positions == "kept" or name.startswith("linformer")]


@pytest.mark.parametrize("name", DROPPING)
def test_attention_dropout_drops_in_training_only(name):
    model, inputs = compressed(name, dropout=0.4), batch(21)
    attention = model.layers[0].self_attn
    model.dropout = 0.0
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
        attention.train()
        first, second = (model(**inputs).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "no technique") for name in ("", "windows-3", "window-", "heads-x", "full-2", "Full")),
        ("reuse-2x2x", "character"),
        ("window-0", "radius must be at least 1"),
        ("heads-0", "num_heads must be at least 1"),
        ("cla-1", "size must be at least 2"),
        ("strided-1", "stride must be at least 2"),
        ("reuse-2x2-partial-0", "partial must be at least 1"),
    ],
)
def test_a_name_of_no_technique_is_refused_in_one_line(name, reason):
    with pytest.raises(ValueError, match=reason) as refusal:
        parse(name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("heads-4", "4 heads, no more than 4"),
        ("wide-heads-3", "cannot be made 3 equal ones"),
        ("heads-2+reuse-2x3", "6 layers, but the encoder has 4"),
        ("qk-dim-8", "8 dimensions, no more than 8"),
        ("gqa-3", "cannot be put in 3 equal groups"),
        ("window-3+reuse-2x3", "6 layers, but the encoder has 4"),
        ("reuse-2x2-partial-4", "4 heads, no more than 4"),
        ("skip-5", "only 4 layers"),
        ("layers-4", "only 4 layers"),
    ],
)
def test_a_technique_that_does_not_fit_leaves_the_model_as_it_was(name, reason):
    model = encoder()
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=reason):
        parse(name).apply(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[path], tensor) for path, tensor in before.items())
    parse("full").apply(model)


def test_a_model_without_an_encoder_of_this_kind_is_refused():
    with pytest.raises(ValueError, match="holds 0 Parakeet encoders"):
        parse("linear").apply(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("num_layers", [4, 6, 9, 16])
def test_the_studys_techniques_have_names_of_their_own(num_layers):
    techniques = study_techniques(num_layers)
    names = [technique.name for technique in techniques]
    assert len(set(names)) == len(names)
    assert [parse(name).name for name in names] == names
    from_scratch = {technique for technique in TECHNIQUES.values() if technique.from_scratch}
    assert {type(technique) for technique in techniques} == from_scratch


def test_the_study_shares_maps_in_groups_of_two_four_eight_and_all():
    named = {depth: {one.name for one in study_techniques(depth)} for depth in (6, 16)}
    assert {"reuse-2x8", "reuse-4x4", "reuse-8x2", "reuse-16x1"} <= named[16]
    assert {"reuse-2x3", "reuse-4x1,2x1", "reuse-6x1"} <= named[6]


def test_the_studys_techniques_fit_their_encoder():
    inputs = batch(21, 40)
    for technique in study_techniques(NUM_LAYERS):
        if technique.name == "qk-dim-8":  # as many as the small encoder's heads have
            continue
        with torch.no_grad():
            assert technique.apply(encoder())(**inputs).last_hidden_state.isfinite().all(), technique.name
