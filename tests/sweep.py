"""Builds a tiny random model of each type of `transformers`, and compares it with the definition of shared maps.

The sizes in its configuration are reduced, by the names of the fields. Each stack runs inside the smallest model
around it that accepts one of the inputs.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import re
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from oracle import disagreement, softmax_follows
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import logging

import mapreuse as mr
from mapreuse.models import Unsupported, find_stack

LAYERS, HEADS, WIDTH, VOCABULARY, POSITIONS = 4, 4, 32, 64, 9
FULL_TOLERANCE, REUSE_TOLERANCE = 1e-5, 1e-4
FLOAT64_TOLERANCE = 1e-10
"""Allowed in float64, where float32 exceeds the other two: a difference by rounding vanishes, an error does not."""
MAX_PARAMETERS = 40_000_000

_SIZES: dict[str, int | float] = {
    r"(.*_)?(num_hidden_layers|num_layers|n_layers?|num_blocks|depth)|(encoder|decoder)_layers|layers": LAYERS,
    r"(.*_)?(attention_heads|num_heads|n_heads?)": HEADS,
    r"(.*_)?(num_key_value_heads|num_kv_heads)": HEADS // 2,
    r"(.*_)?hidden_size|d_model|embed_dim|n_embd|dim|emb_dim|embedding_size|hidden_dim|output_dim": WIDTH,
    r"(.*_)?projection_dim|embedding_dim|out_hidden_size|d_embed": WIDTH,
    r"(.*_)?(intermediate_size|ffn_dim|mlp_dim|d_ff|ffn_hidden_size|dff)|n_inner": 2 * WIDTH,
    r"head_dim|d_kv|v_head_dim|attention_head_(dim|size)": WIDTH // HEADS,
    r"(.*_)?vocab_size": VOCABULARY,
    r"max_position_embeddings|n_positions|max_(source|target)_positions|max_seq_len|n_ctx": 64,
    r"image_size": 16,
    r"patch_size": 4,
    r"num_mel_bins|feature_projection_input_dim": 16,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_tok|moe_k|top_k": 2,
    r"n_group|topk_group": 1,
    r"q_lora_rank|kv_lora_rank": 16,
    r"qk_rope_head_dim|qk_nope_head_dim": 8,
    r"(.*_)?layerdrop|mask_time_prob|apply_spec_augment": 0.0,
}
"""Values of configuration fields, by their names."""

_UNLESS_NONE = {HEADS // 2, WIDTH // HEADS}
"""Sizes that a field gets even if its default is None: key/value heads and head dimensions."""

_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8] * 4,
    "depths": [1] * 4,
    "out_features": ["stage4"],
}
"""A backbone of `transformers` in place of one of timm."""

_SETTINGS: dict[str, dict[str, Any]] = {
    "detr": {"backbone_config": _RESNET},
    "table-transformer": {"backbone_config": _RESNET},
    "conditional_detr": {"backbone_config": _RESNET},
    "moonshine": {
        "encoder_num_key_value_heads": HEADS,
        "decoder_num_key_value_heads": HEADS,
        "pad_head_dim_to_multiple_of": 6,
    },
    "switch_transformers": {"num_decoder_layers": LAYERS},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global"], LAYERS]]},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 2},
    "esmc": {"num_key_value_heads": HEADS},
    "xmod": {"default_language": "en_XX"},
    "granite_speech5_encoder": {"context_size": 16},
    "informer": {"prediction_length": 4, "context_length": 8},
    "autoformer": {"prediction_length": 4, "context_length": 8},
    "time_series_transformer": {"prediction_length": 4, "context_length": 8},
    "swin": {"embed_dim": 24, "depths": [4, 4], "num_heads": [3, 6], "window_size": 2},
    "dots1": {"n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["full_attention"] * LAYERS},
    "maskformer-swin": {"embed_dim": 24, "depths": [4, 4], "num_heads": [3, 6], "window_size": 2},
    "donut-swin": {"embed_dim": 24, "depths": [4, 4], "num_heads": [3, 6], "window_size": 2},
    "swinv2": {"embed_dim": 24, "depths": [4, 4], "num_heads": [3, 6], "window_size": 2},
}
"""Further settings of single types."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The result for one stack of one model type.

    Attributes:
        status: "exact", "inexact", "refused" or "not built" (no tiny model or no input could be made).
        stack: path of the module that holds the layers ("" for the model itself).
        attention: name of the attention class.
        reason: why it is refused, not built or inexact.
        full: relative error with respect to the original model, under a plan that reuses nothing.
        reuse: relative error with respect to the definition, under a plan that reuses maps.
        moved: relative change of the output by that plan.
    """

    status: str
    stack: str = ""
    attention: str = ""
    reason: str = ""
    full: float = 0.0
    reuse: float = 0.0
    moved: float = 0.0


def sweep(model_type: str) -> list[Result]:
    """Build a tiny model of this type and test each of its stacks."""
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about deprecated families and unusual settings
        try:
            model = _built(model_type)
        except Exception as error:  # constructors fail in many ways; the error is the reason
            return [Result("not built", reason=_one_line(error))]
        found = [_measured(model, path) for path in _stack_paths(model)]
    return found or [Result("refused", reason=f"{type(model).__name__} holds no list of layers with attention in it")]


def _built(model_type: str) -> PreTrainedModel:
    config_class = CONFIG_MAPPING[model_type]
    cls = _model_class(config_class)
    if cls is None:
        raise ValueError("it has no model of its own, only a part in others")
    config = _tiny(config_class)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError("it stays large however its configuration is shrunk")
    torch.manual_seed(0)
    return cls(config).eval()


def _tiny(config_class: type) -> Any:
    settings = _tiny_settings(config_class) | _SETTINGS.get(config_class.model_type, {})
    if config_class.sub_configs:
        default = config_class()
        for name in config_class.sub_configs:
            if name not in settings and getattr(default, name, None) is not None:
                settings[name] = _tiny(type(getattr(default, name)))
    config = config_class(**settings)
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in {*rope, *getattr(config, "ignore_keys_at_rope_validation", ())}:
        pairs = int(getattr(config, "head_dim", WIDTH // HEADS) * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    return config


def _tiny_settings(config_class: type) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        name, default = field.name, field.default
        number = isinstance(default, int | float) and not isinstance(default, bool)
        if re.fullmatch(r".*_token_(id|index)", name) and number and default >= VOCABULARY:
            settings[name] = 3 + zlib.crc32(name.encode()) % 50
            continue
        if name == "image_size" and isinstance(default, list | tuple):
            settings[name] = [16] * len(default)
            continue
        for pattern, size in _SIZES.items():
            known = number or default is dataclasses.MISSING or (default is None and size in _UNLESS_NONE)
            if known and re.fullmatch(pattern, name):
                settings[name] = size
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = HEADS  # each head has keys and values of its own, made from the latent
    return settings


def _model_class(config_class: type) -> type[PreTrainedModel] | None:
    """The model class of a configuration: by the mapping of `transformers`, else the first one in its module."""
    if config_class in MODEL_MAPPING:
        mapped = MODEL_MAPPING[config_class]
        return mapped[0] if isinstance(mapped, tuple) else mapped
    package = config_class.__module__.rpartition(".")[0]
    try:
        module = importlib.import_module(f"{package}.modeling_{package.rpartition('.')[2]}")
    except ImportError:
        return None
    classes = [
        one
        for one in vars(module).values()
        if inspect.isclass(one)
        and issubclass(one, PreTrainedModel)
        and getattr(one, "config_class", None) is config_class
        and not one.__name__.endswith("PreTrainedModel")
    ]
    return min(classes, key=lambda c: not c.__name__.endswith(("Model", "Encoder", "Transformer")), default=None)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = re.sub(r"/\S*/site-packages/", "", text)  # the location of packages
    return text if isinstance(error, Unsupported | ValueError) else f"{type(error).__name__}: {text}"


def _stack_paths(model: nn.Module) -> list[str]:
    """Paths of the modules that hold a list of layers, each with a module named attention."""
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 1
        and all(any("attention" in type(m).__name__.lower() for m in layer.modules()) for layer in module)
    ]
    innermost = [name for name in lists if not any(other.startswith(f"{name}.") for other in lists)]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in innermost))


def _measured(model: PreTrainedModel, path: str) -> Result:
    part = model.get_submodule(path)
    attention = ""
    try:
        stack = find_stack(part)
        attention = type(stack.layers[0].attention).__name__
        mr.apply(copy.deepcopy(part), mr.ReusePlan.full(len(stack.layers)))
    except ValueError as error:
        return Result("refused", path, attention, _one_line(error))
    found: list[Result] = []
    refused: Result | None = None
    obstacle = "no input could be made for it"
    for owner, inner in _owners(model, path):
        for batch in _batches(owner):
            for stds in _STDS:
                try:
                    eager, sdpa = _original(owner, "eager", stds), _original(owner, "sdpa", stds)
                    reference, other = _run(eager, inner, batch), _run(sdpa, inner, batch)
                except Exception:  # forwards fail in many ways on an unsuitable input
                    break
                rows = _rows(reference, batch)
                if not disagreement(other, reference, rows) <= FULL_TOLERANCE / 3:
                    obstacle = "its own eager and sdpa outputs differ"
                    continue
                result = _compared(path, attention, eager, sdpa, inner, batch)
                if result.status == "inexact" and not result.reason:
                    batch = {name: _in_float64(value) for name, value in batch.items()}
                    result = _compared(path, attention, eager.double(), sdpa.double(), inner, batch)
                if result.status == "refused":
                    refused = result  # another input may be accepted
                    break
                found.append(result)
                if found[-1].status != "exact" or found[-1].moved > 0.1:
                    return found[-1]
            if found:
                return max(found, key=lambda result: result.moved)
    return refused or Result("not built", path, attention, obstacle)


_STDS = ((0.45, 0.35, 0.35), (0.45, 0.35, 0.05), (0.22, 0.18, 0.05), (0.11, 0.09, 0.05))
"""Standard deviations of weights, embeddings and convolutions: first for peaked maps, then for milder ones."""


def _owners(model: PreTrainedModel, path: str) -> Iterator[tuple[PreTrainedModel, str]]:
    """The models around a stack, from the smallest to the largest, and the path of the stack in each."""
    names = path.split(".") if path else []
    for length in range(len(names), -1, -1):
        owner = model.get_submodule(".".join(names[:length]))
        if isinstance(owner, PreTrainedModel):
            yield owner, ".".join(names[length:])


def _original(owner: PreTrainedModel, implementation: str, stds: tuple[float, float, float]) -> PreTrainedModel:
    model = copy.deepcopy(owner)
    if implementation == "eager" or model._supports_sdpa:
        model.set_attn_implementation(implementation)
        model.config._attn_implementation = implementation  # Falcon refuses the change, but follows its configuration
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name.lower():
                nn.init.normal_(parameter, std=stds[1 if "emb" in name else 2 if "conv" in name else 0])
    return model


def _batches(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Inputs of every kind that the model's forward names; it may reject some of them."""
    parameters = inspect.signature(model.forward).parameters
    size = _Sizes(model.config)
    torch.manual_seed(0)
    mask = torch.tensor([[1] * POSITIONS, [1] * 5 + [0] * (POSITIONS - 5)])
    ids = torch.randint(3, 50, (2, POSITIONS)) * mask
    more: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    masked = more | ({"attention_mask": mask} if "attention_mask" in parameters else {})
    if "input_ids" in parameters:
        beside = masked
        if "bbox" in parameters:
            beside = masked | {"bbox": torch.randint(0, 16, (2, POSITIONS, 4)).sort(-1).values}
        if "decoder_input_ids" in parameters:
            yield {"input_ids": ids, "decoder_input_ids": ids.clamp(min=3), **beside}
        if "encoder_hidden_states" in parameters:
            states = torch.randn(2, 7, size("hidden_size", "d_model", "embed_dim", default=WIDTH))
            yield {"input_ids": ids, "encoder_hidden_states": states, **beside}
        yield {"input_ids": ids, **beside}
        yield {"input_ids": ids, **more}
    channels, side = size("num_channels", "in_channels", default=3), size("image_size", "input_size", default=16)
    frames = size("num_frames", "frames_per_clip", default=4)
    for name in ("pixel_values", "pixel_values_videos"):
        if name in parameters:
            yield {name: torch.randn(2, channels, side, side), **more}
            yield {name: torch.randn(2, frames, channels, side, side), **more}
    if "spatial_shapes" in parameters:
        patches = torch.randn(2, 16, channels * size("patch_size", default=4) ** 2)
        shapes = torch.tensor([[4, 4], [2, 4]])
        kept = torch.arange(16) < shapes.prod(-1, keepdim=True)
        yield {"pixel_values": patches, "pixel_attention_mask": kept.long(), "spatial_shapes": shapes, **more}
    mel = size("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", default=16)
    length = size("max_length", default=80)
    for name in ("input_features", "input_values", "features"):
        if name in parameters:
            shapes = [(length, mel), (mel, length), (128, mel), (mel, 128), (mel, 3000), (400,), (6400,), (1, 6400)]
            yield from ({name: torch.randn(2, *shape), **more} for shape in shapes)
    for name in ("inputs_embeds", "hidden_states"):
        if name in parameters:
            embedded = torch.randn(2, POSITIONS, size("hidden_size", "d_model", "embed_dim", default=WIDTH))
            yield {name: embedded, **masked}
            yield {name: embedded, **more}


class _Sizes:
    """Looks up a size in a configuration and its sub-configurations, under one of several names."""

    def __init__(self, config: Any) -> None:
        inner = [getattr(config, name, None) for name in config.sub_configs or ()]
        self._configs = [config, *(one for one in inner if one is not None)]

    def __call__(self, *names: str, default: int) -> int:
        found = [getattr(config, name, None) for config in self._configs for name in names]
        size = next((one for one in found if one is not None), default)
        return size[0] if isinstance(size, list | tuple) else size


@torch.no_grad()
def _run(model: PreTrainedModel, inner: str, batch: dict[str, Any]) -> Tensor:
    """The output of the stack at `inner` in a forward of the whole model. The stack must run once."""
    outputs: list[Any] = []
    torch.manual_seed(0)
    with model.get_submodule(inner).register_forward_hook(lambda *call: outputs.append(call[-1])):
        model(**batch)
    (output,) = outputs
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def _in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _rows(output: Tensor, batch: dict[str, Any]) -> Tensor:
    """True for each row of the output that is not padding."""
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == output.shape[:2]:
        return mask.bool()
    return torch.ones(output.shape[:2], dtype=torch.bool)


def _plans(num_layers: int, num_heads: int) -> Iterator[mr.ReusePlan]:
    """Plans that reuse maps: by other heads, by the same heads, then by each pair of layers."""
    pairs = [layer - layer % 2 for layer in range(num_layers)]
    backwards = list(range(num_heads))[::-1]
    yield mr.ReusePlan.from_sources(pairs, heads={layer: backwards for layer in range(1, num_layers, 2)})
    yield mr.ReusePlan.from_sources(pairs)
    for layer in range(1, num_layers):
        for source in range(layer):
            yield mr.ReusePlan.from_sources([*range(layer), source, *range(layer + 1, num_layers)])


def _compared(
    path: str, attention: str, eager: PreTrainedModel, sdpa: PreTrainedModel, inner: str, batch: dict[str, Any]
) -> Result:
    layers = find_stack(eager.get_submodule(inner)).layers
    attentions = [layer.attention for layer in layers]
    reference = _run(eager, inner, batch)
    rows = _rows(reference, batch)
    is_float64 = reference.dtype == torch.float64
    allowed = (FLOAT64_TOLERANCE, FLOAT64_TOLERANCE) if is_float64 else (FULL_TOLERANCE, REUSE_TOLERANCE)

    def converted(plan: mr.ReusePlan) -> Tensor:
        model = copy.deepcopy(sdpa)
        mr.apply(model.get_submodule(inner), plan)
        return _run(model, inner, batch)

    def defined(plan: mr.ReusePlan) -> tuple[Tensor, int]:
        with softmax_follows(plan, attentions) as weights:
            return _run(eager, inner, batch), weights[0].shape[1]

    try:
        nothing = mr.ReusePlan.full(len(layers))
        full = disagreement(converted(nothing), reference, rows)
        untouched, num_heads = defined(nothing)
        same = disagreement(untouched, reference, rows) <= FULL_TOLERANCE / 3
        assert same, "the definition without reuse must equal the original output"
        refusal = ""
        for plan in _plans(len(layers), num_heads):
            try:
                output = converted(plan)
            except ValueError as error:
                refusal = refusal or _one_line(error)
                continue
            definition, _ = defined(plan)
            reuse, moved = disagreement(output, definition, rows), disagreement(definition, reference, rows)
            exact = full <= allowed[0] and reuse <= allowed[1] and bool(output.isfinite().all())
            return Result("exact" if exact else "inexact", path, attention, "", full, reuse, moved)
        return Result("refused", path, attention, refusal, full)
    except ValueError as error:
        return Result("refused", path, attention, _one_line(error))
    except Exception as error:  # the original runs; the failure is reported
        return Result("inexact", path, attention, _one_line(error))
