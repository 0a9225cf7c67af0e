"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelName = Annotated[str, typer.Argument(help="directory of the original model, as save_pretrained wrote it")]
CalibrationData = Annotated[
    str,
    typer.Option(
        help="sample inputs, similar to those that the model will see: a text file with one sentence per line, a "
        "folder of wav, flac, png or jpg files, or a datasets directory"
    ),
]
Stack = Annotated[
    str, typer.Option(help="path of the stack of layers, if the model has several, such as model.encoder")
]
Float32 = Annotated[
    bool, typer.Option("--float32", help="load the weights in float32; needed if they are stored in half precision")
]
MaxBatches = Annotated[
    int, typer.Option(help="use at most this many batches of calibration data, with 8 samples each")
]
TimedBatches = Annotated[
    int, typer.Option("--max-batches", help="number of batches to time, at quantiles of the data's lengths")
]
BatchSize = Annotated[int, typer.Option(help="sequences per batch")]
Plans = Annotated[
    str,
    typer.Option(
        help="plans to compare: full (no sharing), or parts SIZExNUMBER such as 2x3; parts make up one plan until "
        "all layers are used, so full,2x3,1x2,2x2 are three plans. Default: full, groups of 2 and 4, and two groups"
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads; default: for bench, the faster of one and all; for breakdown, PyTorch's choice"),
]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="file for all results as JSON")]
Storage = Annotated[
    str, typer.Option(help="how shared maps are stored: some of dense, dense16, dense8, recompute, auto")
]
Memory = Annotated[bool, typer.Option("--memory", help="measure peak memory too, in separate processes")]
Training = Annotated[bool, typer.Option("--training", help="time a training step: forward and backward")]
Contestants = Annotated[
    str,
    typer.Option(
        help="what to time: eager and sdpa (the attention of transformers) and mapreuse, each also with +optimize "
        "(faster convolutions and linear layers), +int8 (quantize_dynamic), +optimize+int8, +compile "
        "(torch.compile), +openvino, +onnx, +openvino+int8 or +onnx+int8; mapreuse also with +openvino+kernels or "
        "+openvino+kernels+int8 (its attention as operators of OpenVINO). Default: all for which packages are "
        "installed"
    ),
]
MaxSeconds = Annotated[
    float, typer.Option(help="a contestant of which one run takes longer is run once, and not on longer batches")
]
ExportsDirectory = Annotated[
    Path | None, typer.Option("--exports", help="directory that keeps exported models for the next run")
]
PngFile = Annotated[Path | None, typer.Option("--png", help="file for a bar chart of the speed-ups")]
ProfiledContestants = Annotated[
    str, typer.Option(help="what to measure: some of eager, sdpa, mapreuse, each also with +optimize")
]
ProfiledCalls = Annotated[int, typer.Option("--repeats", help="number of profiled calls")]
Budget = Annotated[
    str | None,
    typer.Option(
        help="search for the best plan: 'latency<=0.7' for 70 % of the original's latency (both without "
        "mapreuse.optimize), 'cache_bytes<=0.9' for 90 % of a decoder's bytes per cached token, or 'error<=0.02' for "
        "a maximum error, 1 − cosine of the last hidden states unless --metric says otherwise"
    ),
]
Plan = Annotated[
    str | None,
    typer.Option(
        help="use this plan instead of a search: 2x3 for three groups of two layers, [0,1,1,3] for the source of "
        "each layer, or full to share nothing and only use the kernels of mapreuse"
    ),
]
Share = Annotated[
    str,
    typer.Option(
        help="what a layer shares: map, keys or corrected; with --budget also several, such as map,keys, among which "
        "the search chooses for each layer"
    ),
]
Metric = Annotated[
    str,
    typer.Option(help="error: cosine of the last hidden states, or, for language models, perplexity or copying"),
]
Keys = Annotated[int | None, typer.Option(help="for share mode keys: number of keys of a block; default: 128")]
KeyWindow = Annotated[
    int | None, typer.Option(help="for share mode keys: keys less than so many positions away; default: 64")
]
Block = Annotated[int | None, typer.Option(help="for share mode keys: number of queries of a block; default: 16")]
Rank = Annotated[int | None, typer.Option(help="for share mode corrected: width of queries and keys; default: 16")]
Window = Annotated[
    int | None,
    typer.Option(
        help="for language models: take the text as a whole, cut into windows of so many tokens, as many as the "
        "inputs will have"
    ),
]
DistillSeconds = Annotated[
    float | None, typer.Option(help="then train the converted model to match the original for this long")
]
