"""The techniques that the study compares."""

from __future__ import annotations

from mapreuse_lab.techniques._technique import Technique, parse


def study_techniques(num_layers: int) -> list[Technique]:
    """The techniques of the study's default table, for an encoder of 4 heads and utterances of a few seconds.

    Layers share maps in groups of 2, 4, 8 and all layers.

    Raises:
        ValueError: fewer than 4 layers.
    """
    if num_layers < 4:
        raise ValueError(f"the study needs at least 4 layers, got {num_layers}")
    half, rest = num_layers // 2, num_layers - num_layers // 2
    in_pairs = _groups(num_layers, 2)
    reuse = [in_pairs, *(_groups(num_layers, size) for size in (4, 8, num_layers))]
    reuse += [f"1x{half},{rest}x1", f"{half}x1,1x{rest}"]
    names = [
        "full",
        *(f"reuse-{plan}" for plan in dict.fromkeys(reuse)),
        f"reuse-{in_pairs}-partial-2",
        "heads-2",
        "wide-heads-1",
        "qk-dim-8",
        "gqa-1",
        "gqa-2",
        "cla-2",
        "window-16",
        "window-64",
        "window-16-global-1",
        "grouped-3",
        "strided-3",
        "pool-4",
        "linformer-32",
        "linear",
        "performer-64",
        "nystrom-32",
        "probsparse-5",
        f"skip-{rest}",
        "gaussian-2",
        "diagonal",
        f"layers-{half}",
        f"window-16+reuse-{in_pairs}",
        f"heads-2+reuse-{in_pairs}",
    ]
    return [parse(name) for name in names]


def _groups(num_layers: int, size: int) -> str:
    """The notation of groups of `size` layers; the last may be smaller."""
    groups = [f"{size}x{num_layers // size}"] if num_layers >= size else []
    return ",".join(groups + ([f"{num_layers % size}x1"] if num_layers % size else []))
