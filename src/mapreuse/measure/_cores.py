"""`bench_kernels`: one layer's attention core, between the projections, beside the matrix products it cannot avoid."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mapreuse.maps import DenseMap, RelativePositions, Scores, attend
from mapreuse.measure._bench import described, disagreement, paired_ratio
from mapreuse.measure._config import DTYPES, Progress, check_settings, command_of, threads_set
from mapreuse.measure._encoders import conformer_m, speech_like_features
from mapreuse.measure._latency import Latency, time_interleaved
from mapreuse.measure._machine import machine

BLOCKS = (64, 128, 256)
"""Rows at a time in which the products of a computing core are timed; the fastest block counts."""

_REUSING, _PRODUCT = "reusing core", "map × values"
_COMPUTING = ("computing core", "computing core, map kept")
_FUSED = "fused attention without relative positions"
_PRODUCTS = ("content scores", "positional scores", "map × values in blocks")
_SHORTEST_TURN, _FEWEST_FRAMES = 4000, 100
_CHECKED_LENGTH = 2000
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class KernelsConfig:
    """What `bench_kernels` measures: one layer of Conformer-M (4 heads × 64, relative positions), batch 1.

    Attributes:
        lengths: encoder frames.
        threads: of the CPU; None for as many as PyTorch uses.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
        repeats: rounds that count.

    Raises:
        ValueError: naming the option, where a value is not one of these.
    """

    lengths: tuple[int, ...] = (500, 1000, 2000, 4000, 8000)
    threads: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    repeats: int = 15

    def __post_init__(self) -> None:
        check_settings(self.lengths, self.threads, self.dtype, self.device, self.repeats)

    @property
    def command(self) -> str:
        """The command that measures the same again."""
        return command_of("mapreuse bench --kernels", self)


def bench_kernels(config: KernelsConfig, progress: Progress = lambda doing, done, total: None) -> dict[str, Any]:
    """Time the cores of one computing and one reusing layer, and bare matrix products; all lengths in one run.

    The products of a computing core are timed as it meets them: a block of rows at a time, so that their result (or,
    for map × values, the map) is in cache. The positional ones span the T + rows − 1 distances of a block. The block
    size that is fastest counts. At short lengths a turn is several calls.

    Returns:
        What JSON can hold: `machine`, `config`, `command`, `signal`, `agreement` (with `transformers`' own attention)
        and, in `lengths`, for each length `seconds` per call of everything and `ratios`: reusing core ÷ one product,
        computing cores ÷ sum of products. `growth` holds time(2T) ÷ time(T) wherever both were measured.

    Raises:
        ValueError: where a core's output is not that of `transformers`' attention.
    """
    with threads_set(config.threads), torch.inference_mode():
        inputs = _Inputs(config)
        agreement = inputs.check(min(_CHECKED_LENGTH, max(config.lengths)))
        calls: dict[tuple[int, str], Callable[[], object]] = {
            (length, name): partial(_repeat, call, _turns(length))
            for length in config.lengths
            for name, call in inputs.calls(length).items()
        }
        total = len(calls) * (1 + config.repeats)
        done = itertools.count(1)
        measured = time_interleaved(
            {f"{length} {name}": call for (length, name), call in calls.items()},
            repeats=config.repeats,
            device=config.device,
            advance=lambda: progress("timing cores", next(done), total),
        )
        described_machine = machine()
    by_length = {
        length: {name: _per_call(measured[f"{length} {name}"], length) for (at, name) in calls if at == length}
        for length in config.lengths
    }
    return {
        "schema": 1,
        "command": config.command,
        "machine": described_machine,
        "config": asdict(config),
        "signal": "one Conformer-M layer with random weights on log-mel-like features, as `mapreuse bench` has them",
        "agreement": agreement,
        "lengths": {str(length): _summary(cores) for length, cores in by_length.items()},
        "growth": {
            f"{length} → {2 * length}": {
                name: by_length[2 * length][name].median / cores[name].median
                for name in (_REUSING, _PRODUCT, *_COMPUTING)
            }
            for length, cores in by_length.items()
            if 2 * length in by_length
        },
    }


class _Inputs:
    """Scores and values of a Conformer-M layer, for any length up to the greatest."""

    def __init__(self, config: KernelsConfig) -> None:
        self.encoder: Any = conformer_m(num_layers=1, implementation="eager").to(config.device, DTYPES[config.dtype])
        features = speech_like_features(max(config.lengths), 1).to(config.device, DTYPES[config.dtype])
        self.hidden = self.encoder.layers[0].norm_self_att(self.encoder.subsampling(features))

    def check(self, length: int) -> float:
        """Greatest disagreement of a core with `transformers`' attention; `ValueError` where it is too great."""
        attention, (scores, values) = self.encoder.layers[0].self_attn, self.scores(length)
        positions = self.encoder.encode_positions(self.hidden[:, :length])
        expected = attention(self.hidden[:, :length], position_embeddings=positions)[0]
        context, weights = attend(scores, values, keep=True)
        assert weights is not None
        outputs = (context, DenseMap(weights).apply(values), attend(scores, values, keep=False)[0])
        found = max(disagreement(attention.o_proj(output.transpose(1, 2).flatten(2)), expected) for output in outputs)
        tolerance = max(_TOLERANCE, 4 * torch.finfo(expected.dtype).eps)
        if found > tolerance:
            raise ValueError(f"a core is {found:.1e} away from transformers' attention, more than {tolerance:.1e}")
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
        """Everything that is timed at one length, by name."""
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
    """The three products of a computing core, as many rows at a time: content, positional, map × values."""
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


def _summary(cores: dict[str, Latency]) -> dict[str, Any]:
    fastest = {
        name: min((c for c in cores if c.startswith(f"{name},")), key=lambda c: cores[c].median) for name in _PRODUCTS
    }
    products = Latency(tuple(map(sum, zip(*(cores[name].seconds for name in fastest.values()), strict=True))))
    ratios = {f"{_REUSING} ÷ {_PRODUCT}": paired_ratio(cores[_REUSING], cores[_PRODUCT])}
    ratios |= {f"{core} ÷ sum of its products": paired_ratio(cores[core], products) for core in _COMPUTING}
    return {
        "cores": {name: described(latency) for name, latency in cores.items()},
        "sum of products": described(products) | {"blocks": list(fastest.values())},
        "ratios": ratios,
    }


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _turns(length: int) -> int:
    """Calls in one turn: short ones are over before the clock can tell, and the first finds cold what others left."""
    return max(1, _SHORTEST_TURN // max(length, _FEWEST_FRAMES)) ** 2


def _per_call(measured: Latency, length: int) -> Latency:
    return Latency(tuple(seconds / _turns(length) for seconds in measured.seconds))
