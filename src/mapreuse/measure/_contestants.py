"""Contestants of a benchmark: one model with different attention, plans, storages, optimizations and runtimes."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mapreuse.exporting import RUNTIMES, export, open_exported
from mapreuse.models import apply, check_batch, copy_with_same_weights, find_stack, optimize
from mapreuse.plan import ReusePlan

SHARING = "mapreuse"
OPTIMIZE, COMPILE, INT8, KERNELS = "+optimize", "+compile", "+int8", "+kernels"
_IN_RUNTIMES = tuple(f"+{runtime}{int8}" for runtime in RUNTIMES for int8 in ("", INT8))
_WITH_KERNELS = (f"+openvino{KERNELS}", f"+openvino{KERNELS}{INT8}")
SUFFIXES = (
    *("", OPTIMIZE, COMPILE, OPTIMIZE + COMPILE, INT8, OPTIMIZE + INT8),
    *_IN_RUNTIMES,
    *_WITH_KERNELS,
)
"""What a contestant can have in addition to its attention."""
ALL_KINDS = (
    "eager",
    *(kind + suffix for kind in ("sdpa", SHARING) for suffix in ("", OPTIMIZE, COMPILE, INT8, *_IN_RUNTIMES)),
    *(SHARING + suffix for suffix in _WITH_KERNELS),
)
"""What a user would choose from."""

Batch = Mapping[str, Any]

Attention = Callable[[nn.Module], object]
"""Changes the attention of a model in place."""


def use_attention(model: nn.Module, implementation: str) -> None:
    """Select an attention implementation of `transformers` in all configs of a model, in place."""
    configs: list[Any] = [
        module.config for module in model.modules() if isinstance(getattr(module, "config", None), PreTrainedConfig)
    ]
    if not configs and implementation != "sdpa":
        raise ValueError(f"{type(model).__name__} has no config that selects {implementation} attention")
    for config in configs:
        config._attn_implementation = implementation


ATTENTIONS: dict[str, Attention] = {name: partial(use_attention, implementation=name) for name in ("eager", "sdpa")}
"""The attention implementations of `transformers` that a model is compared with."""


@dataclass(frozen=True)
class Contestant:
    """One way to run a model.

    Attributes:
        kind: "eager", "sdpa", another attention implementation, or "mapreuse".
        plan: notation of the plan, or "full". Only "mapreuse" shares maps.
        storage: storage of shared maps.
        optimized: `optimize` was called on the model.
        compiled: the model runs under `torch.compile`.
        runtime: "openvino" or "onnx" if it runs there; "" for PyTorch.
        int8: it was quantised to 8 bits: for the runtime by NNCF, in PyTorch by `quantize_dynamic` (linear layers).
        kernels: the runtime has mapreuse's attention as operators, see `export`.
    """

    kind: str
    plan: str = "full"
    storage: str = "dense"
    optimized: bool = False
    compiled: bool = False
    runtime: str = ""
    int8: bool = False
    kernels: bool = False

    @property
    def name(self) -> str:
        """Name in tables, such as "sdpa", "mapreuse 4x4 recompute+optimize" or "mapreuse 4x4+openvino+int8"."""
        words = [self.kind]
        if self.kind == SHARING:
            words += [self.plan] if self.storage == "dense" else [self.plan, self.storage]
        suffixes = [OPTIMIZE] * self.optimized + [COMPILE] * self.compiled
        suffixes += [f"+{self.runtime}"] * bool(self.runtime) + [KERNELS] * self.kernels + [INT8] * self.int8
        return " ".join(words) + "".join(suffixes)

    @property
    def in_pytorch(self) -> Contestant:
        """The same attention, plan and storage in PyTorch, uncompiled."""
        return replace(self, compiled=False, runtime="", int8=False, kernels=False)

    def build(
        self,
        model: nn.Module,
        attentions: Mapping[str, Attention] = ATTENTIONS,
        exports: Exports | None = None,
    ) -> nn.Module:
        """A copy of `model` that runs as this contestant does, uncompiled. Weights are shared where possible.

        `exports` are needed if it runs in a runtime.
        """
        if self.runtime:
            assert exports is not None
            return exports.open(self, model, attentions)
        built = copy_with_same_weights(model)
        if self.kind == SHARING:
            apply(built, ReusePlan.parse(self.plan, len(find_stack(model).layers)), storage=self.storage)
        else:
            attentions[self.kind](built)
        if self.int8:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch will replace this by torchao
                built = torch.ao.quantization.quantize_dynamic(built, {nn.Linear}, inplace=True)
        return optimize(built) if self.optimized else built


@dataclass(frozen=True)
class Exports:
    """Exported contestants in a directory. Each is exported once.

    Attributes:
        directory: the directory.
        example: a batch for `export`.
        calibration: batches for int8.
        threads: CPU threads; None for the runtime's default.
    """

    directory: Path
    example: Batch
    calibration: Sequence[Batch]
    threads: int | None

    def open(self, contestant: Contestant, model: nn.Module, attentions: Mapping[str, Attention]) -> nn.Module:
        """The contestant as a module that runs in its runtime."""
        path = self.directory / _identity(model, contestant)
        if not path.exists():
            with redirect_stdout(io.StringIO()):  # NNCF shows progress bars
                export(
                    contestant.in_pytorch.build(model, attentions),
                    path,
                    self.example,
                    runtime=contestant.runtime,
                    int8=self.calibration if contestant.int8 else None,
                    own_attention=contestant.kind != SHARING,
                    kernels=contestant.kernels,
                )
        return InRuntime(open_exported(path, threads=self.threads))


def _identity(model: nn.Module, contestant: Contestant) -> str:
    """Sixteen hexadecimal digits for a contestant, the class and a sample of the weights of a model."""
    hashed = hashlib.sha256(f"{contestant.name} {type(model).__name__} {version('mapreuse')}".encode())
    for name, weights in model.state_dict().items():
        sample = weights.detach().flatten()[:: max(1, weights.numel() // 64)].double().cpu()
        hashed.update(f"{name} {tuple(weights.shape)}".encode() + sample.numpy().tobytes())
    return hashed.hexdigest()[:16]


class InRuntime(nn.Module):
    """An exported model in its runtime; its output is the first of the model."""

    def __init__(self, run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> None:
        super().__init__()
        self.run = run

    def forward(self, **batch: Tensor) -> Tensor:
        """The first output."""
        return next(iter(self.run(batch).values()))


def contestants(
    kinds: Sequence[str],
    plans: Sequence[str],
    storages: Sequence[str],
    attentions: Collection[str] = tuple(ATTENTIONS),
) -> list[Contestant]:
    """One contestant for each kind; of "mapreuse", one for each plan and storage.

    Uncompiled contestants come first, and those in PyTorch before those in runtimes.

    Raises:
        ValueError: if there is no such kind.
    """
    allowed = [
        kind + suffix
        for suffix in SUFFIXES
        for kind in (*attentions, SHARING)
        if kind == SHARING or KERNELS not in suffix
    ]
    found: list[Contestant] = []
    for name in kinds:
        if name not in allowed:
            raise ValueError(f"contestants must be some of {', '.join(allowed)}; got {name!r}")
        kind, *suffixes = name.split("+")
        runtime = next((suffix for suffix in suffixes if suffix in RUNTIMES), "")
        pairs = [("full", "dense")]
        if kind == SHARING:  # storage makes no difference to a plan without sharing, and runtimes have none
            pairs = [
                (plan, "dense" if plan == "full" or runtime else storage)
                for plan, storage in product(plans, storages)
            ]
        flags: dict[str, Any] = {
            "runtime": runtime,
            "optimized": OPTIMIZE in name,
            "compiled": COMPILE in name,
            "int8": INT8 in name,
            "kernels": KERNELS in name,
        }
        found += [Contestant(kind, *pair, **flags) for pair in pairs]
    return sorted(dict.fromkeys(found), key=lambda one: (one.compiled, one.runtime != "", one.int8))


def split_plans(text: str, num_layers: int) -> tuple[str, ...]:
    """The plans in a text, in which commas separate them; the default plans if it is empty.

    The notation of a plan may contain commas too: groups belong to one plan until they have `num_layers` layers. By
    default: no reuse, groups of 2 and 4, and two groups, if they divide the number of layers.

    Example:
        >>> split_plans("full,1x4,4x3,8x2", 16)
        ('full', '1x4,4x3', '8x2')

    Raises:
        ValueError: if a plan cannot be read, or does not have `num_layers` layers.
    """
    plans, begun = list[str](), ""
    for part in text.split(","):
        begun = ",".join(filter(None, (begun, part.strip())))
        if _has_all_layers(begun, num_layers):
            plans.append(begun)
            begun = ""
    for plan in filter(None, (*plans, begun)):
        ReusePlan.parse(plan, num_layers)
    sizes = [size for size in (2, 4, num_layers // 2) if size > 1 and num_layers % size == 0]
    return tuple(plans) or ("full", *dict.fromkeys(f"{size}x{num_layers // size}" for size in sizes))


def _has_all_layers(notation: str, num_layers: int) -> bool:
    try:
        return notation == "full" or ReusePlan.parse(notation).num_layers >= num_layers
    except ValueError:
        return False


def named_batches(batches: Iterable[Batch] | Mapping[str, Batch]) -> dict[str, Batch]:
    """Batches by name; if they have none, by the shape of their first tensor, such as "input_ids 8 × 128"."""
    if isinstance(batches, Mapping):
        return dict(batches)
    named: dict[str, Batch] = {}
    for batch in batches:
        check_batch(batch)
        name, tensor = next((name, value) for name, value in batch.items() if isinstance(value, Tensor))
        named.setdefault(f"{name} {' × '.join(map(str, tensor.shape))}", batch)
    return named
