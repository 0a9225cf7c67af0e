"""`bench_kernels`: the attention kernels of one layer, compared with the matrix products that they have to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mapreuse.console import Table
from mapreuse.maps import DenseMap, RelativePositions, Scores, attend
from mapreuse.measure import (
    Latency,
    cpu_threads,
    disagreement,
    latency_text,
    machine,
    ratio_text,
    time_interleaved,
)
from mapreuse_lab.benchmarks._encoder_bench import DTYPES
from mapreuse_lab.models import conformer_m, speech_like_features

BLOCKS = (64, 128, 256)
"""Block sizes, in rows, of the products of a computing kernel. The fastest one counts."""

_REUSING, _PRODUCT = "reusing kernel", "map × values"
_COMPUTING = ("computing kernel", "computing kernel, map kept")
_FUSED = "fused attention without relative positions"
_PRODUCTS = ("content scores", "positional scores", "map × values in blocks")
_MIN_TURN, _MIN_LENGTH = 4000, 100
_MAX_CHECKED_LENGTH = 2000
_TOLERANCE = 1e-4


def bench_kernels(
    lengths: Sequence[int] = (),
    *,
    threads: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    repeats: int = 15,
) -> dict[str, Any]:
    """Time the kernels of one Conformer-M layer (4 heads × 64, relative positions, batch 1) and its matrix products.

    The products of a computing kernel are timed block by block, as the kernel does them, so that the results (and for
    map × values, the map) stay in the cache. The positional product of a block covers T + rows − 1 distances. The
    fastest block size counts. At short lengths, one turn consists of several calls.

    Args:
        lengths: encoder frames T; empty for 500, 1000, 2000, 4000 and 8000.
        threads: CPU threads; None for PyTorch's default.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
        repeats: number of timed turns.

    Returns:
        JSON-compatible results: `machine`, `config`, `signal`, `agreement` (distance from the attention of
        `transformers`) and, in `lengths`, `kernels` (seconds per call) and `ratios`: reusing kernel ÷ one product,
        and computing kernels ÷ sum of products. `growth` is time(2T) ÷ time(T) if both were measured.

    Raises:
        ValueError: if an argument is invalid, or the output of a kernel differs from that of `transformers`.
    """
    lengths = tuple(lengths) or (500, 1000, 2000, 4000, 8000)
    if dtype not in DTYPES or device not in ("cpu", "cuda") or min(*lengths, repeats, threads or 1) < 1:
        raise ValueError("--lengths, --repeats and --threads must be positive, --dtype and --device names of types")
    with cpu_threads(threads), torch.inference_mode():
        inputs = _Inputs(max(lengths), device, DTYPES[dtype])
        agreement = inputs.check(min(_MAX_CHECKED_LENGTH, max(lengths)))
        calls: dict[tuple[int, str], Callable[[], object]] = {
            (length, name): partial(_repeat, call, _calls_per_turn(length))
            for length in lengths
            for name, call in inputs.calls(length).items()
        }
        measured = time_interleaved(
            {f"{length} {name}": call for (length, name), call in calls.items()},
            repeats=repeats,
            device=device,
            title="Timing kernels",
        )
        described_machine = machine()
    by_length = {
        length: {name: _per_call(measured[f"{length} {name}"], length) for (at, name) in calls if at == length}
        for length in lengths
    }
    return {
        "schema": 2,
        "machine": described_machine,
        "config": {
            "lengths": lengths,
            "threads": threads,
            "dtype": dtype,
            "device": device,
            "repeats": repeats,
        },
        "signal": "one Conformer-M layer with random weights on log-mel-like features",
        "agreement": agreement,
        "lengths": {str(length): _summary(kernels) for length, kernels in by_length.items()},
        "growth": {
            f"{length} → {2 * length}": {
                name: by_length[2 * length][name].median / kernels[name].median
                for name in (_REUSING, _PRODUCT, *_COMPUTING)
            }
            for length, kernels in by_length.items()
            if 2 * length in by_length
        },
    }


def kernel_tables(results: dict[str, Any]) -> list[Table]:
    """Ratios of kernels to their matrix products, growth with the length, and latencies."""
    lengths, growth = results["lengths"], results["growth"]
    header = ["", *(f"T = {length}" for length in lengths)]
    first = next(iter(lengths.values()))
    ratios = [[name, *(ratio_text(one["ratios"][name]) for one in lengths.values())] for name in first["ratios"]]
    names = dict.fromkeys(name for measured in lengths.values() for name in measured["kernels"])
    times = [
        [name, *(latency_text(one["kernels"][name]) if name in one["kernels"] else "" for one in lengths.values())]
        for name in names
    ]
    times.append(["sum of products", *(latency_text(one["sum of products"]) for one in lengths.values())])
    config = results["config"]
    place = (
        results["machine"]["gpu"] if config["device"] == "cuda" else f"{results['machine']['threads']} CPU threads"
    )
    note = f"Kernels agree with the attention of transformers to {results['agreement']:.0e}."
    title = f"Kernels ÷ their matrix products: one layer, 4 heads × 64, batch 1, {config['dtype']}, {place}"
    tables = [Table(title, header, ratios, [note]), Table("Latency of one call", header, times)]
    if growth:
        kernels = next(iter(growth.values()))
        rows = [[name, *(f"{one[name]:.2f}" for one in growth.values())] for name in kernels]
        tables.insert(1, Table("Growth: time(2T) ÷ time(T)", ["", *growth], rows))
    return tables


class _Inputs:
    """Scores and values of a Conformer-M layer, for any length up to a maximum."""

    def __init__(self, max_length: int, device: str, dtype: torch.dtype) -> None:
        self.encoder: Any = conformer_m(num_layers=1).to(device, dtype)
        self.encoder.set_attn_implementation("eager")
        features = speech_like_features(max_length, 1).to(device, dtype)
        self.hidden = self.encoder.layers[0].norm_self_att(self.encoder.subsampling(features))

    def check(self, length: int) -> float:
        """Maximum distance of a kernel from the attention of `transformers`; `ValueError` if it is too large."""
        attention, (scores, values) = self.encoder.layers[0].self_attn, self.scores(length)
        positions = self.encoder.encode_positions(self.hidden[:, :length])
        expected = attention(self.hidden[:, :length], position_embeddings=positions)[0]
        context, weights = attend(scores, values, keep=True)
        assert weights is not None
        outputs = (context, DenseMap(weights).apply(values), attend(scores, values, keep=False)[0])
        found = max(disagreement(attention.o_proj(output.transpose(1, 2).flatten(2)), expected) for output in outputs)
        tolerance = max(_TOLERANCE, 4 * torch.finfo(expected.dtype).eps)
        if found > tolerance:
            raise ValueError(
                f"a kernel differs from the attention of transformers by {found:.1e}, more than {tolerance:.1e}"
            )
        return found

    def scores(self, length: int) -> tuple[Scores, Float[Tensor, "1 heads length dim"]]:
        attention, hidden = self.encoder.layers[0].self_attn, self.hidden[:, :length]

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        query = heads(attention.q_proj(hidden))
        distances = attention.relative_k_proj(self.encoder.encode_positions(hidden))
        scores = Scores(
            query=query + attention.bias_u[:, None],
            key=heads(attention.k_proj(hidden)),
            scaling=attention.scaling,
            relative=RelativePositions(query=query + attention.bias_v[:, None], key=heads(distances)),
        )
        return scores, heads(attention.v_proj(hidden))

    def calls(self, length: int) -> dict[str, Callable[[], object]]:
        """The timed calls of one length, by name."""
        scores, values = self.scores(length)
        weights = attend(scores, values, keep=True)[1]
        assert weights is not None
        assert scores.relative is not None
        bare, flat_values = weights[0], values[0].contiguous()
        buffer, out = torch.empty_like(weights), torch.empty_like(flat_values)
        calls: dict[str, Callable[[], object]] = {
            _REUSING: partial(DenseMap(weights).apply, values),
            _PRODUCT: partial(torch.bmm, bare, flat_values, out=out),
            _COMPUTING[0]: partial(attend, scores, values, keep=False),
            _COMPUTING[1]: partial(attend, scores, values, keep=True, buffer=buffer),
            _FUSED: partial(
                functional.scaled_dot_product_attention, scores.query, scores.key, values, scale=scores.scaling
            ),
        }
        operands = (
            scores.query[0].contiguous(),
            scores.key[0].contiguous(),
            scores.relative.query[0].contiguous(),
            scores.relative.key[0].contiguous(),
        )
        for block in BLOCKS:
            if block <= max(length, BLOCKS[0]):
                rows = min(block, length)
                products = _block_products(operands, bare, flat_values, rows)
                calls |= {f"{name}, {block} rows": call for name, call in zip(_PRODUCTS, products, strict=True)}
        return calls


def _block_products(
    operands: tuple[Tensor, Tensor, Tensor, Tensor], weights: Tensor, values: Tensor, rows: int
) -> tuple[Callable[[], object], ...]:
    """The three products of a computing kernel, a block of rows at a time: content, positional, map × values."""
    query, key, positional_query, distances = operands
    heads, length, _ = query.shape
    starts = range(0, length, rows)
    content = query.new_empty(heads, rows, length)
    positional = query.new_empty(heads, rows, length + rows - 1)
    context = torch.empty_like(values)
    block_of_map = weights[:, :rows].contiguous()

    def content_scores() -> None:
        for start in starts:
            stop = min(start + rows, length)
            torch.bmm(query[:, start:stop], key.mT, out=content[:, : stop - start])

    def positional_scores() -> None:
        for start in starts:
            stop = min(start + rows, length)
            size = stop - start
            window = distances[:, length - stop : 2 * length - 1 - start]
            torch.bmm(positional_query[:, start:stop], window.mT, out=positional[:, :size, : length + size - 1])

    def map_times_values() -> None:
        for start in starts:
            stop = min(start + rows, length)
            torch.bmm(block_of_map[:, : stop - start], values, out=context[:, start:stop])

    return content_scores, positional_scores, map_times_values


def _summary(kernels: dict[str, Latency]) -> dict[str, Any]:
    fastest = {
        name: min((k for k in kernels if k.startswith(f"{name},")), key=lambda k: kernels[k].median)
        for name in _PRODUCTS
    }
    products = Latency(tuple(map(sum, zip(*(kernels[name].seconds for name in fastest.values()), strict=True))))
    ratios = {f"{_REUSING} ÷ {_PRODUCT}": kernels[_PRODUCT].speed_up_over(kernels[_REUSING])}
    ratios |= {f"{kernel} ÷ sum of its products": products.speed_up_over(kernels[kernel]) for kernel in _COMPUTING}
    return {
        "kernels": {name: latency.data() for name, latency in kernels.items()},
        "sum of products": products.data() | {"blocks": list(fastest.values())},
        "ratios": ratios,
    }


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _calls_per_turn(length: int) -> int:
    """Short calls are repeated: the clock is too coarse for one, and the first one finds cold caches."""
    return max(1, _MIN_TURN // max(length, _MIN_LENGTH)) ** 2


def _per_call(measured: Latency, length: int) -> Latency:
    return Latency(tuple(seconds / _calls_per_turn(length) for seconds in measured.seconds))
