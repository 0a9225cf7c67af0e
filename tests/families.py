"""Tiny random models of every family, with peaked attention maps, and inputs of different lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

SIZE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
Built = tuple[nn.Module, dict[str, torch.Tensor]]


def _text(config: type, model: type, **more: Any) -> Built:
    settings = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    built = model(config(**SIZE, vocab_size=50, max_position_embeddings=40, **settings, **more))
    return built, _tokens()


def _tokens() -> dict[str, torch.Tensor]:
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 2 + [0] * 7])
    return {"input_ids": torch.randint(3, 50, (3, 9)) * mask, "attention_mask": mask}


def _image(config: type, model: type, **more: Any) -> Built:
    return model(config(**SIZE, image_size=16, patch_size=4, **more)), {"pixel_values": torch.randn(2, 3, 16, 16)}


def _speech(config: type, model: type, **more: Any) -> Built:
    front = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (4, 4), "num_feat_extract_layers": 2}
    rest = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    built = model(config(**SIZE, **front, **rest, vocab_size=20, layerdrop=0.0, **more))
    mask = torch.tensor([[1] * 400, [1] * 200 + [0] * 200])
    return built, {"input_values": torch.randn(2, 400) * mask, "attention_mask": mask}


def _parakeet() -> Built:
    config = tf.ParakeetEncoderConfig(
        **SIZE, num_mel_bins=16, subsampling_factor=4, subsampling_conv_channels=8, layerdrop=0.0
    )
    mask = torch.tensor([[1] * 90, [1] * 40 + [0] * 50])
    features = torch.randn(2, 90, 16) * mask[..., None]
    return tf.ParakeetEncoder(config), {"input_features": features, "attention_mask": mask}


def _distilbert() -> Built:
    config = tf.DistilBertConfig(
        dim=32, n_layers=4, n_heads=4, hidden_dim=64, vocab_size=50, max_position_embeddings=40
    )
    return tf.DistilBertModel(config), _tokens()


def _whisper() -> Built:
    config = tf.WhisperConfig(
        d_model=32,
        encoder_layers=4,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=50,
        num_mel_bins=8,
        max_source_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return tf.WhisperModel(config).encoder, {"input_features": torch.randn(2, 8, 40)}


def _moonshine() -> tf.MoonshineModel:
    """Heads of width 8 are padded to 12."""
    config = tf.MoonshineConfig(
        hidden_size=32,
        intermediate_size=64,
        encoder_num_hidden_layers=4,
        decoder_num_hidden_layers=4,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        vocab_size=50,
        max_position_embeddings=40,
        pad_head_dim_to_multiple_of=6,
        pad_token_id=0,
    )
    return tf.MoonshineModel(config)


def _ast() -> Built:
    patches = {"patch_size": 4, "frequency_stride": 4, "time_stride": 4}
    config = tf.ASTConfig(**SIZE, num_mel_bins=16, max_length=32, **patches)
    return tf.ASTModel(config), {"input_values": torch.randn(2, 32, 16)}


def _t5(stack: str) -> Built:
    config = tf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4, vocab_size=50)
    return getattr(tf.T5Model(config), stack), _tokens()


def _gpt2() -> Built:
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    config = tf.GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=50, n_positions=40, **ids)
    return tf.GPT2Model(config), _tokens()


FAMILIES: dict[str, Callable[[], Built]] = {
    "parakeet": _parakeet,
    "wav2vec2-conformer-relative": lambda: _speech(
        tf.Wav2Vec2ConformerConfig, tf.Wav2Vec2ConformerModel, position_embeddings_type="relative"
    ),
    "wav2vec2-conformer-rotary": lambda: _speech(
        tf.Wav2Vec2ConformerConfig, tf.Wav2Vec2ConformerModel, position_embeddings_type="rotary"
    ),
    "bert": lambda: _text(tf.BertConfig, tf.BertModel),
    "roberta": lambda: _text(tf.RobertaConfig, tf.RobertaModel),
    "distilbert": _distilbert,
    "electra": lambda: _text(tf.ElectraConfig, tf.ElectraModel, embedding_size=32),
    "modernbert": lambda: _text(
        tf.ModernBertConfig, tf.ModernBertModel, cls_token_id=1, sep_token_id=2, layer_types=["full_attention"] * 4
    ),
    "vit": lambda: _image(tf.ViTConfig, tf.ViTModel),
    "deit": lambda: _image(tf.DeiTConfig, tf.DeiTModel),
    "dinov2": lambda: _image(tf.Dinov2Config, tf.Dinov2Model),
    "wav2vec2": lambda: _speech(tf.Wav2Vec2Config, tf.Wav2Vec2Model),
    "hubert": lambda: _speech(tf.HubertConfig, tf.HubertModel),
    "wavlm": lambda: _speech(tf.WavLMConfig, tf.WavLMModel, num_buckets=8, max_bucket_distance=20),
    "whisper-encoder": _whisper,
    "moonshine-encoder": lambda: (_moonshine().encoder, {"input_values": torch.randn(2, 6400)}),
    "moonshine-decoder": lambda: (_moonshine().decoder, _tokens()),
    "ast": _ast,
    "clip-text": lambda: _text(tf.CLIPTextConfig, tf.CLIPTextModel),
    "clip-vision": lambda: _image(tf.CLIPVisionConfig, tf.CLIPVisionModel),
    "gpt2": _gpt2,
    "llama": lambda: _text(tf.LlamaConfig, tf.LlamaModel, num_key_value_heads=2),
    "t5-encoder": lambda: _t5("encoder"),
    "t5-decoder": lambda: _t5("decoder"),
    "deberta-v2": lambda: _text(
        *(tf.DebertaV2Config, tf.DebertaV2Model),
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=4,
        max_relative_positions=8,
    ),
    "gpt-neox": lambda: _text(tf.GPTNeoXConfig, tf.GPTNeoXModel),
    "phi3": lambda: _text(tf.Phi3Config, tf.Phi3Model, num_key_value_heads=2),
    "olmo": lambda: _text(tf.OlmoConfig, tf.OlmoModel, clip_qkv=4.0),
    "gemma2": lambda: _text(
        *(tf.Gemma2Config, tf.Gemma2Model),
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        layer_types=["full_attention"] * 4,
    ),
    "gpt-oss": lambda: _text(
        *(tf.GptOssConfig, tf.GptOssModel),
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=2,
        experts_implementation="eager",
        layer_types=["full_attention"] * 4,
    ),
    "deepseek-v3": lambda: _text(
        *(tf.DeepseekV3Config, tf.DeepseekV3Model),
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=4,
    ),
    "qwen2": lambda: _text(tf.Qwen2Config, tf.Qwen2Model, num_key_value_heads=2),
}


def build(family: str, *, seed: int = 0, implementation: str = "sdpa") -> Built:
    """A model of this family whose maps are peaked, in evaluation mode, and a batch with padding."""
    torch.manual_seed(seed)
    model, batch = FAMILIES[family]()
    if implementation == "eager" or model._supports_sdpa:
        model.set_attn_implementation(implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name.lower():
                nn.init.normal_(parameter, std=0.35 if "emb" in name or "conv" in name else 0.45)
    return model.eval(), batch
