"""Tiny models of the families that watchers are tried on, inputs of any length, and their definition under a plan."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from agreement import randomize_biases
from families import SIZE
from oracle import (
    as_it_is,
    defined_packed_output,
    in_eight_bits,
    in_sixteen_bits,
    softmax_follows,
    unpack_projections,
)
from torch import Tensor, nn
from vision_blocks import MaskedTransformer

import mapreuse as mr

WIDTH, HEADS, LAYERS, LONGEST = 32, 4, 4, 300
PLANS = {
    "full": mr.ReusePlan.full(LAYERS),
    "2x2, other heads": mr.ReusePlan.from_sources([0, 0, 2, 2], heads={1: [3, 1, 0, 2], 3: [1, 0, 3, 2]}),
    "by heads": mr.ReusePlan.from_sources([0, 0, 2, 2], heads={1: [None, 2, None, 0], 3: [1, None, 1, 3]}),
}
LENGTHS = (12, 90, 91, 150, 300)


@dataclasses.dataclass(frozen=True)
class Family:
    """How to build one family.

    Attributes:
        make: makes a model for inputs of this many positions.
        inputs: makes its arguments from the rows (batch, positions) that are not padding.
        stretch: number of samples, frames or tokens of an input that make one position, or 0 if a model takes inputs
            of one length only.
        has_padding: its inputs can be padded.
        is_of_transformers: its model is a class of `transformers`.
    """

    make: Callable[[int], nn.Module]
    inputs: Callable[[Tensor], dict[str, Tensor]]
    stretch: int = 1
    has_padding: bool = True
    is_of_transformers: bool = True


def _text(config: type, model: type, **more: Any) -> Family:
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 50}
    settings = SIZE | special | {"max_position_embeddings": LONGEST + 10} | more
    return Family(lambda length: model(config(**settings)), _tokens)


def _tokens(rows: Tensor) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 50, rows.shape) * rows, "attention_mask": rows.long()}


def _gpt2(length: int) -> nn.Module:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 50, "use_cache": False}
    return tf.GPT2Model(tf.GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=LONGEST, **ids))


def _conformer(length: int) -> nn.Module:
    front = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (4, 4), "num_feat_extract_layers": 2}
    rest = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    positions = {"position_embeddings_type": "relative", "max_source_positions": LONGEST}
    config = tf.Wav2Vec2ConformerConfig(**SIZE, **front, **rest, **positions, vocab_size=20, layerdrop=0.0)
    return tf.Wav2Vec2ConformerModel(config)


def _samples(rows: Tensor) -> dict[str, Tensor]:
    mask = rows.long().repeat_interleave(16, 1)
    return {"input_values": torch.randn(mask.shape) * mask, "attention_mask": mask}


def _parakeet(length: int) -> nn.Module:
    front = {"num_mel_bins": 16, "subsampling_factor": 4, "subsampling_conv_channels": 8}
    return tf.ParakeetEncoder(tf.ParakeetEncoderConfig(**SIZE, **front, layerdrop=0.0))


def _frames(rows: Tensor) -> dict[str, Tensor]:
    mask = rows.long().repeat_interleave(4, 1)
    return {"input_features": torch.randn(*mask.shape, 16) * mask[..., None], "attention_mask": mask}


def _whisper(length: int) -> nn.Module:
    encoder = {"encoder_layers": LAYERS, "encoder_attention_heads": HEADS, "encoder_ffn_dim": 64}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": HEADS, "decoder_ffn_dim": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "vocab_size": 50}
    config = tf.WhisperConfig(d_model=WIDTH, **encoder, **decoder, **ids, num_mel_bins=8, max_source_positions=length)
    return tf.WhisperModel(config).encoder


def _vit(length: int) -> nn.Module:
    return tf.ViTModel(tf.ViTConfig(**SIZE, image_size=(4, 4 * (length - 1)), patch_size=4), add_pooling_layer=False)


def _torch_encoder(length: int) -> nn.Module:
    # With ReLU, rounding can move a value across the kink, and derivatives there are not comparable.
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH))


FAMILIES = {
    "BERT": _text(tf.BertConfig, tf.BertModel),
    "RoBERTa": _text(tf.RobertaConfig, tf.RobertaModel),
    "ModernBERT": _text(
        tf.ModernBertConfig, tf.ModernBertModel, cls_token_id=1, sep_token_id=2, layer_types=["full_attention"] * 4
    ),
    "GPT-2": Family(_gpt2, _tokens),
    "Llama": _text(tf.LlamaConfig, tf.LlamaModel, num_key_value_heads=2, use_cache=False),
    "Wav2Vec2-Conformer": Family(_conformer, _samples, stretch=16),
    "Parakeet": Family(_parakeet, _frames, stretch=4),
    "Whisper encoder": Family(
        _whisper, lambda rows: {"input_features": torch.randn(len(rows), 8, 2 * rows.shape[1])}, 0, False
    ),
    "ViT": Family(
        _vit, lambda rows: {"pixel_values": torch.randn(len(rows), 3, 4, 4 * (rows.shape[1] - 1))}, 0, False
    ),
    "torch.nn.TransformerEncoder": Family(
        _torch_encoder,
        lambda rows: {"src": torch.randn(*rows.shape, WIDTH), "src_key_padding_mask": ~rows},
        is_of_transformers=False,
    ),
    "timm's attention": Family(
        lambda length: MaskedTransformer(),
        lambda rows: {"x": torch.randn(*rows.shape, WIDTH)},
        has_padding=False,
        is_of_transformers=False,
    ),
}


def build(family: str, length: int, implementation: str) -> nn.Module:
    """A model of this family with peaked maps and without dropout, in evaluation mode."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about nested tensors
        model = FAMILIES[family].make(length).eval()
    if isinstance(model, tf.PreTrainedModel):
        model.set_attn_implementation(implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name.lower():
                nn.init.normal_(parameter, std=0.35 if "emb" in name or "conv" in name else 0.3)
    randomize_biases(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def inputs(family: str, batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    """The arguments of a model in order, some of them padded, then 1.0 for each position that is not padding."""
    torch.manual_seed(seed)
    rows = torch.ones(batch, length, dtype=torch.bool)
    if FAMILIES[family].has_padding:
        valid = torch.randint(2, length, (batch - 1, 1))
        rows[1:] = torch.arange(length) < valid
    return *FAMILIES[family].inputs(rows).values(), rows.float()[..., None]


class Watched(nn.Module):
    """A model that is called with `inputs` and returns its last hidden states, with padding set to zero."""

    def __init__(self, family: str, model: nn.Module) -> None:
        super().__init__()
        self.names = list(FAMILIES[family].inputs(torch.ones(1, 12, dtype=torch.bool)))
        self.model = model

    def forward(self, *tensors: Tensor) -> Tensor:
        *tensors, rows = tensors
        return self.output(dict(zip(self.names, tensors, strict=True))) * rows

    def output(self, batch: dict[str, Tensor]) -> Tensor:
        output = self.model(**batch)
        return output if isinstance(output, Tensor) else output.last_hidden_state


class Defined(Watched):
    """The definition: an original model with eager attention, where reusing heads apply the maps of their sources."""

    def __init__(self, family: str, length: int, plan: str, storage: str = "dense") -> None:
        super().__init__(family, build(family, length, "eager"))
        unpack_projections(self.model)
        self.plan = PLANS[plan]
        self.stored = {"dense8": in_eight_bits, "dense16": in_sixteen_bits}.get(storage, as_it_is)
        self.maps: list[Tensor] = []

    def output(self, batch: dict[str, Tensor]) -> Tensor:
        if not isinstance(self.model, tf.PreTrainedModel):
            return defined_packed_output(self.model, self.plan, stored=self.stored, **batch)
        with softmax_follows(self.plan, stored=self.stored) as self.maps:
            return super().output(batch)


def original(family: str, length: int, implementation: str) -> Watched:
    return Watched(family, build(family, length, implementation))


def converted(family: str, length: int, plan: str, storage: str, implementation: str = "sdpa") -> Watched:
    return Watched(family, mr.apply(build(family, length, implementation), PLANS[plan], storage=storage))
