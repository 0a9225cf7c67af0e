"""Comparison of saved models with what was saved."""

import torch
import transformers as tf
from families import SIZE, build

from mapreuse.models._apply import applied_plans


def plans_in(model):
    return {path: (one.plan, one.storage, one.memory_budget) for path, one in applied_plans(model).items()}


def assert_same_model(loaded, model, batch=None):
    """The models have the same plans, classes, parameters and buffers bit by bit, and output for `batch`."""
    assert not loaded.training
    assert [str(type(module)) for module in loaded.modules()] == [str(type(module)) for module in model.modules()]
    assert plans_in(loaded) == plans_in(model)
    for named in ("named_parameters", "named_buffers"):
        found, expected = dict(getattr(loaded, named)()), dict(getattr(model, named)())
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name
    if batch is not None:
        with torch.no_grad():
            assert torch.equal(loaded(**batch)[0], model(**batch)[0])


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def task_head(name):
    """A model with a head around its stack."""
    torch.manual_seed(0)
    if name == "ParakeetForCTC":
        encoder = build("parakeet")[0].config.to_dict()
        return tf.ParakeetForCTC(tf.ParakeetCTCConfig(vocab_size=20, pad_token_id=19, encoder_config=encoder)).eval()
    cls = getattr(tf, name)
    family = "gpt2" if "GPT2" in name else "bert" if "Bert" in name else "llama"
    config = build(family)[0].config
    config.tie_word_embeddings = name != "LlamaForCausalLM"
    return cls(config).eval()


def clip():
    """A model with two stacks, which have configurations of their own."""
    torch.manual_seed(0)
    return tf.CLIPModel(
        tf.CLIPConfig(text_config=SIZE, vision_config=SIZE | {"image_size": 16, "patch_size": 4})
    ).eval()


def sequence_to_sequence(name):
    """Whisper or BART with a head, and a batch with labels."""
    torch.manual_seed(0)
    layers = {"encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 50}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    labels = torch.randint(3, 50, (4, 5))
    if name == "whisper":
        config = tf.WhisperConfig(**layers, **sizes, **tokens, num_mel_bins=8, max_source_positions=20)
        batch = {"input_features": torch.randn(4, 8, 40), "labels": labels}
        return tf.WhisperForConditionalGeneration(config).eval(), batch
    config = tf.BartConfig(**layers, **sizes, **tokens, max_position_embeddings=64, forced_eos_token_id=None)
    batch = {"input_ids": torch.randint(3, 50, (4, 12)), "labels": labels}
    return tf.BartForConditionalGeneration(config).eval(), batch
