"""Reads Moonshine's int8 graphs of ONNX Runtime into the model class of transformers.

An `.ort` file is a flatbuffer of an optimised ONNX graph. Matrices are 8-bit integers with a scale and a zero point,
and have lost their names. The nodes that multiply by them have kept theirs:

    /layers.0/self_attn/q_proj/MatMul_quant   →   layers.0.self_attn.q_proj.weight
    weight = (integers − zero point) · scale
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.InferenceSession import InferenceSession
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import (
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    PreTrainedTokenizerFast,
    Wav2Vec2FeatureExtractor,
)

_ONNX_TYPES: dict[int, Any] = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64}
_MATRIX_INPUTS = {"MatMulIntegerToFloat": (1, 3, 5), "DynamicQuantizeMatMul": (1, 2, 3)}
"""Operators with an 8-bit matrix: which inputs are the matrix, its scale and its zero point."""

_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
_MAX_TOKENS = 194


def convert_moonshine(folder: Path, out: Path) -> None:
    """Write the model, tokenizer and feature extractor of Moonshine tiny for `from_pretrained`, in float32.

    Args:
        folder: has `encoder_model.ort`, `decoder_model_merged.ort` and `tokenizer.bin`.
        out: the directory to write.
    """
    weights = _weights((folder / "encoder_model.ort").read_bytes(), "model.encoder.")
    weights |= _weights((folder / "decoder_model_merged.ort").read_bytes(), "")
    config = MoonshineConfig(pad_head_dim_to_multiple_of=8, max_position_embeddings=_MAX_TOKENS, pad_token_id=2)
    model = MoonshineForConditionalGeneration(config)
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights.items()})
    model.generation_config.update(max_length=_MAX_TOKENS, pad_token_id=2, bos_token_id=1, eos_token_id=2)
    model.eval().save_pretrained(out)
    _tokenizer(list(_tokens((folder / "tokenizer.bin").read_bytes()))).save_pretrained(out)
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(out)


def _weights(data: bytes, prefix: str) -> dict[str, np.ndarray]:
    """Weights of an `.ort` file by the names of `transformers`; the file's own names lack the prefix."""
    arrays: dict[str, np.ndarray] = {}
    nodes: list[Any] = []
    for graph in _graphs(InferenceSession.GetRootAs(data, 0).Model().Graph()):
        tensors = (graph.Initializers(i) for i in range(graph.InitializersLength()))
        arrays |= {one.Name().decode(): _array(one) for one in tensors if one.RawDataLength()}
        nodes += [graph.Nodes(i) for i in range(graph.NodesLength())]

    def dequantised(names: list[str]) -> np.ndarray:
        matrix, scale, zero_point = (arrays[name].astype(np.float32) for name in names)
        return (matrix - zero_point) * scale

    # Norms, biases and convolutions keep their names, but for marks of the optimiser.
    plain = {re.sub(r"_merged_\d+$|_add_tensor$", "", name): array for name, array in arrays.items()}
    found = {name: array for name, array in plain.items() if re.fullmatch(r"[a-z][\w.]*\.(weight|bias)", name)}
    for node in nodes:
        operator, name = node.OpType().decode(), node.Name().decode()
        inputs = [node.Inputs(i).decode() for i in range(node.InputsLength())]
        if operator in _MATRIX_INPUTS:
            module = name.removeprefix("/").removesuffix("/MatMul_quant").replace("/", ".")
            matrix = dequantised([inputs[i] for i in _MATRIX_INPUTS[operator]])
            found[f"{module}.weight"] = matrix.T  # the graph multiplies by the transpose
        elif name.endswith("embed_tokens/Gather"):
            stem = inputs[0].removesuffix("_quantized")
            parts = [f"{stem}_{part}" for part in ("quantized", "scale", "zero_point")]
            found["model.decoder.embed_tokens.weight"] = dequantised(parts)
        elif name in ("/groupnorm/Mul", "/groupnorm/Add"):
            found["groupnorm." + {"Mul": "weight", "Add": "bias"}[name[-3:]]] = arrays[inputs[1]].reshape(-1)
    return {prefix + name: array for name, array in found.items() if array.dtype == np.float32}


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and the branches of its conditions."""
    yield graph
    for node in (graph.Nodes(i) for i in range(graph.NodesLength())):
        for branch in (node.Attributes(i).G() for i in range(node.AttributesLength())):
            if branch is not None:
                yield from _graphs(branch)


def _array(tensor: Any) -> np.ndarray:
    shape = [tensor.Dims(i) for i in range(tensor.DimsLength())]
    return np.frombuffer(tensor.RawDataAsNumpy().tobytes(), _ONNX_TYPES[tensor.DataType()]).reshape(shape)


def _tokens(data: bytes) -> Iterator[bytes]:
    """The tokens of `tokenizer.bin`: a length and as many bytes; lengths from 128 on take two bytes, low first."""
    at = 0
    while at < len(data):
        length, at = data[at], at + 1
        if length >= 128:
            length, at = length - 128 + 128 * data[at], at + 1
        yield data[at : at + length]
        at += length


def _tokenizer(tokens: list[bytes]) -> PreTrainedTokenizerFast:
    """A tokenizer like Llama's: byte-pair encoding that falls back to bytes. Earlier tokens are merged first."""
    names = [token.decode("utf-8", "replace") for token in tokens]
    names[len(_SPECIAL_TOKENS) : len(_SPECIAL_TOKENS) + 256] = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary: dict[str, int] = {}
    for number, name in enumerate(names):
        vocabulary.setdefault(name or f"<empty {number}>", number)
    merges: list[tuple[str, str]] = []
    for name in sorted(vocabulary, key=lambda name: vocabulary[name]):
        if not re.fullmatch("<.*>", name):
            halves = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
            known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
            merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    unknown, begin, end = _SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        additional_special_tokens=[name for name in vocabulary if re.fullmatch(r"<<ST_\d+>>", name)],
        model_max_length=_MAX_TOKENS,
    )
