"""The techniques that the study compares on pretrained models."""

from __future__ import annotations

from mapreuse_lab.techniques._pretrained import PretrainedStack
from mapreuse_lab.techniques._technique import Technique, parse


def pretrained_techniques(stack: PretrainedStack, length: int) -> list[Technique]:
    """The techniques of the study for a pretrained model, also those that do not apply to it.

    Encoders share maps in groups of 2 and 3 layers. In causal models the first third of the layers computes, because
    sharing from the first layer on loses most there. Windows span an eighth and a quarter of the typical length to
    either side; slots, landmarks and shared keys are as few.

    Args:
        stack: the model.
        length: typical number of positions.
    """
    layers, heads, key_heads = len(stack.layers), stack.num_heads, stack.layers[0].num_key_heads
    third, eighth, quarter = max(1, layers // 3), max(2, length // 8), max(2, length // 4)
    plans = [f"1x{layers - 2 * third},2x{third}"] if stack.causal else [_groups(layers, 2), _groups(layers, 3)]
    first = plans[0]
    kept_heads = max(1, key_heads * 2 // 3) * (heads // key_heads)
    names = [
        "full",
        *(f"reuse-{plan}" for plan in plans),
        f"reuse-{first}-partial-{heads // 2}",
        f"keys-{eighth}-window-{eighth}+reuse-{first}",
        f"corrected-16+reuse-{first}",
        f"heads-{kept_heads}",
        "wide-heads-1",
        "qk-dim-16",
        f"gqa-{max(1, key_heads // 2) if key_heads % 2 == 0 else 1}",
        "cla-2",
        f"window-{eighth}",
        f"window-{quarter}",
        f"window-{eighth}-global-4",
        "grouped-2",
        "strided-2",
        "pool-2",
        "merge-10",
        f"linformer-{quarter}",
        "linear",
        "performer-64",
        f"nystrom-{quarter}",
        "probsparse-2",
        "gaussian-2",
        "diagonal",
        f"skip-{third}",
        f"layers-{layers - max(1, layers // 6)}",
        f"layers-{layers - third}",
        f"outputs-{first}",
        "low-rank-50",
        "low-rank-33",
        "int8",
        f"int8+reuse-{first}",
        f"window-{quarter}+reuse-{first}",
    ]
    return [parse(name) for name in dict.fromkeys(names)]


def _groups(layers: int, size: int) -> str:
    """The notation of groups of `size` layers; the first layers compute if they do not fit."""
    return ",".join([f"1x{layers % size}"] * (layers % size > 0) + [f"{size}x{layers // size}"])
