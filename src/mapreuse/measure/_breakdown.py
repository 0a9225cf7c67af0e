"""Where does a forward pass of a Parakeet encoder spend its time, FLOPs and bytes?"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn
from transformers import ParakeetEncoder

from mapreuse.measure._attribution import Spent, profiled_pass
from mapreuse.measure._config import Progress, check_settings, one_of, threads_set
from mapreuse.measure._contestants import plan_of_notation, split_plans
from mapreuse.measure._encoders import NUM_MEL_BINS, SUBSAMPLING, speech_like_features
from mapreuse.measure._flops import PARTS, Work, encoder_work
from mapreuse.measure._latency import Latency, time_interleaved
from mapreuse.models import apply, optimize, plan_of
from mapreuse.plan import ReusePlan

CONTESTANTS = ("sdpa", "eager", "ours")
"""Ways to run an encoder that can be taken apart: `transformers` with fused and with eager attention, and ours."""


@dataclass(frozen=True)
class BreakdownConfig:
    """How `breakdown` measures.

    Attributes:
        lengths: encoder frames T.
        batch: inputs of that length, side by side.
        threads: of the CPU; None for as many as PyTorch uses.
        device: "cpu" or "cuda".
        repeats: rounds that count.

    Raises:
        ValueError: naming the option, where a value is not one of these.
    """

    lengths: tuple[int, ...] = (500, 1000, 2000, 3000)
    batch: int = 1
    threads: int | None = None
    device: str = "cpu"
    repeats: int = 5

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("--lengths needs at least one length")
        check_settings(self.lengths, self.threads, "float32", self.device, self.repeats)
        if self.batch < 1:
            raise ValueError(f"--batch must be at least 1, got {self.batch}")


@dataclass(frozen=True)
class PartCost:
    """What one part of a forward pass costs.

    Attributes:
        seconds: time of the part.
        flops: of its matrix products and convolutions.
        nbytes: that its operators read and write.
    """

    seconds: float
    flops: int
    nbytes: int


@dataclass(frozen=True)
class LayerBreakdown:
    """The mean of the layers of one kind.

    Attributes:
        kind: "computing", "reusing", or "partly reusing".
        count: how many layers of this kind the encoder has.
        parts: mean cost of each part in one of them.
    """

    kind: str
    count: int
    parts: dict[str, PartCost]


@dataclass(frozen=True)
class Breakdown:
    """Where one encoder spends one forward pass at one length.

    Attributes:
        name: who runs the encoder, such as "transformers sdpa" or "ours 4x4".
        frames: encoder frames T.
        batch: inputs of this length, side by side.
        whole: latency of the pass as it is, without hooks or profiler.
        coverage: seconds of all parts together over those of the pass as it is, of the same round; the median over
            rounds. It says how true the attribution is.
        parts: cost of each part, over the whole encoder; medians over repeats.
        layers: the same for one layer of each kind that the encoder has.
    """

    name: str
    frames: int
    batch: int
    whole: Latency
    coverage: float
    parts: dict[str, PartCost]
    layers: tuple[LayerBreakdown, ...]

    @property
    def attributed(self) -> float:
        """Seconds of all parts together."""
        return sum(part.seconds for part in self.parts.values())


def breakdown(
    encoders: Mapping[str, ParakeetEncoder],
    config: BreakdownConfig,
    progress: Progress = lambda doing, done, total: None,
) -> list[Breakdown]:
    """Time, FLOPs and bytes of every part of each encoder's forward pass, at each length.

    Each encoder runs as it is, by the clock, and then once under the profiler, by parts; encoders take turns, for one
    round that does not count and `config.repeats` that do. Inputs are `speech_like_features`, without padding.

    Args:
        encoders: the encoders, by name; see `encoders_to_compare`. They are moved to the device.
        config: at which lengths, on which device, how often.
        progress: told what is being done.

    Raises:
        ValueError: where an encoder's attention is of a kind that cannot be taken apart.
    """
    for encoder in encoders.values():
        encoder_work(encoder, frames=1)  # refuses what it has no formulas for, before anything is measured
        encoder.to(config.device).eval()
    total = sum(map(_rough_seconds, config.lengths))
    done = 0.0
    found = []
    for frames in config.lengths:
        step = _rough_seconds(frames) / (2 * len(encoders) * (1 + config.repeats))

        def advance(frames: int = frames, step: float = step) -> None:
            nonlocal done
            done += step
            progress(f"T = {frames}", done, total)

        with threads_set(config.threads):
            found += _at_length(encoders, frames, config, advance)
    return found


def encoders_to_compare(
    model: nn.Module, contestants: Sequence[str] = CONTESTANTS, plans: str = ""
) -> dict[str, ParakeetEncoder]:
    """Copies of a model's Parakeet encoder, by the name of who runs each.

    A model that reuses maps already is taken as it is, alone, under the name "as saved".

    Args:
        model: a model that holds one Parakeet encoder, or is one.
        contestants: some of `CONTESTANTS`.
        plans: for ours, notations in one line, such as "full,4x4,1x4,4x3"; empty for full and groups of 4.

    Raises:
        ValueError: where the model holds no Parakeet encoder, there is no such contestant, or a plan does not fit.
    """
    if not contestants:
        raise ValueError(f"--contestants must name some of {', '.join(CONTESTANTS)}")
    encoder = _encoder(model)
    if plan_of(encoder) is not None:
        if plans:
            raise ValueError("the model reuses attention maps already; leave the plans out, or give the original one")
        return {"as saved": encoder}
    num_layers = len(encoder.layers)
    notations = split_plans(plans or _default_plans(num_layers), num_layers)
    compared: dict[str, ParakeetEncoder] = {}
    for kind in contestants:
        one_of("--contestants", kind, CONTESTANTS)
        if kind != "ours":
            compared[f"transformers {kind}"] = original = copy.deepcopy(encoder)
            original.set_attn_implementation(kind)
            continue
        for notation in notations:
            plan = plan_of_notation(notation, num_layers)
            compared[f"ours {notation}"] = optimize(apply(copy.deepcopy(encoder), plan))
    return compared


def _default_plans(num_layers: int) -> str:
    return "full" if num_layers % 4 else f"full,4x{num_layers // 4}"


def _at_length(
    encoders: Mapping[str, ParakeetEncoder], frames: int, config: BreakdownConfig, advance: Callable[[], object]
) -> list[Breakdown]:
    profiles: dict[str, list[Spent]] = {name: [] for name in encoders}
    contestants: dict[str, Callable[[], object]] = {}
    for name, encoder in encoders.items():
        features = _features(encoder, frames, config.batch).to(config.device, encoder.dtype)
        contestants[name] = partial(encoder, input_features=features)
        contestants[f"{name}, by parts"] = partial(_keep_profile, profiles[name], encoder, features)
    measured = time_interleaved(contestants, repeats=config.repeats, warmup=1, device=config.device, advance=advance)
    return [
        # Of the calls that are timed: one to warm up, then every second one.
        _summarised(name, encoder, frames, config.batch, measured[name], profiles[name][2::2])
        for name, encoder in encoders.items()
    ]


def _keep_profile(profiles: list[Spent], encoder: ParakeetEncoder, features: Tensor) -> None:
    profiles.append(profiled_pass(encoder, features))


def _features(encoder: ParakeetEncoder, frames: int, batch: int) -> Float[Tensor, "batch inputs mels"]:
    """`speech_like_features` that make this many encoder frames, with as many bins as the encoder takes."""
    inputs, mels = frames * encoder.config.subsampling_factor, encoder.config.num_mel_bins
    features = speech_like_features(math.ceil(inputs / SUBSAMPLING), batch)
    return features[:, :inputs].repeat(1, 1, math.ceil(mels / NUM_MEL_BINS))[..., :mels]


def _rough_seconds(frames: int) -> float:
    """For the progress bar: how long a pass may take, beside that of another length."""
    return (frames / 1000) ** 2 + frames / 2000


def _summarised(
    name: str, encoder: ParakeetEncoder, frames: int, batch: int, whole: Latency, profiles: list[Spent]
) -> Breakdown:
    outside, in_layers = encoder_work(encoder, frames, batch)
    num_layers = len(in_layers)
    kinds = [_kind(plan_of(encoder), layer) for layer in range(num_layers)]
    layers = []
    for kind in dict.fromkeys(kinds):
        members = [layer for layer in range(num_layers) if kinds[layer] == kind]
        parts = _parts(profiles, [(layer, in_layers[layer]) for layer in members], len(members))
        layers.append(LayerBreakdown(kind, len(members), parts))
    everything: list[tuple[int | None, dict[str, Work]]] = [(None, outside), *enumerate(in_layers)]
    rounds = zip(profiles, whole.seconds, strict=True)
    coverage = statistics.median(sum(spent.values()) / seconds for spent, seconds in rounds)
    return Breakdown(name, frames, batch, whole, coverage, _parts(profiles, everything, 1), tuple(layers))


def _parts(
    profiles: list[Spent], places: Sequence[tuple[int | None, dict[str, Work]]], among: int
) -> dict[str, PartCost]:
    """Cost of each part over some places (layers, or None for what is outside), divided among so many."""
    costs = {}
    for part in PARTS:
        seconds = statistics.median(sum(spent.get((place, part), 0.0) for place, _ in places) for spent in profiles)
        work = sum((work.get(part, Work()) for _, work in places), Work())
        costs[part] = PartCost(seconds / among, work.flops // among, work.nbytes // among)
    return costs


def _kind(plan: ReusePlan | None, layer: int) -> str:
    if plan is None or not plan.reuses(layer):
        return "computing"
    return "partly reusing" if plan.computes(layer) else "reusing"


def _encoder(model: nn.Module) -> ParakeetEncoder:
    found = [module for module in model.modules() if isinstance(module, ParakeetEncoder)]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} Parakeet encoders; breakdown takes a model with one"
        )
    return found[0]
