"""The base class of all techniques, and the registry that finds one by its name."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar, dataclass_transform

from torch import Tensor, nn
from transformers import ParakeetEncoder
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention

from mapreuse.plan import ReusePlan
from mapreuse_lab.techniques._notation import fill, plan_notation, settings_in
from mapreuse_lab.techniques._pretrained import AttentionInputs, Core, PretrainedStack

Model = TypeVar("Model", bound=nn.Module)

TECHNIQUES: dict[str, type[Technique]] = {}
"""Every technique's class, by the notation of its names."""


@dataclass_transform(frozen_default=True)
@dataclass(frozen=True)
class Technique:
    """One way of compressing self-attention, of a Parakeet encoder to be trained or of a pretrained model.

    A subclass is a frozen dataclass of its settings, without a decorator:

        class Strided(Technique, notation="strided-{stride}", label="strided attention, stride {stride}", minimum=2):
            stride: int
            source = "Burchi & Vielzeuf, Efficient Conformer, ASRU 2021"
            attention = StridedAttention

    Class arguments:
        notation: template of the names, such as "window-{radius}[-global-{num_global}]". It registers the class.
        label: template of the name in tables.
        minimum: smallest value of the integer settings.
        from_scratch: False if it needs a pretrained model.

    Class attributes:
        source: the paper, for tables.
        attention: class of the module that replaces every layer's attention, made by `attention(original, technique,
            layer)`: a `CompressedAttention`, `ContentAttention` or `RelativeAttention`.

        not_pretrained: why it does not apply to pretrained models; empty if it does.
        not_causal: why it does not apply to causal models; empty if it does.

    On pretrained models it defines `attend`, or overrides `convert` if it changes projections or layers.

    It overrides `check` if its settings do not fit every encoder, and `change` if it does more than replace every
    layer's attention.

    To add a technique:

    1. Copy the file of the closest technique: `_linear.py` (without positions), `_query_key_dim.py` (with positions)
       or `_cross_layer.py` (layers share tensors). Write formula, shapes, cost and paper into the docstring on top.
    2. Import the class in `mapreuse_lab.techniques`, and add its name to `study_techniques`.
    3. In `lab/tests/techniques`, add one of its names to `VARIANTS` in `small_encoders.py`: all tests in
       `test_every_technique.py` then cover it (padding, gradients, dropout, mixed precision, saving, copying). Add
       its formula, written as plainly as possible, to `test_formulas.py`, and its cost to `test_costs.py`.

    4. For pretrained models, define `attend` or `convert`, and add a dense definition to
       `test_pretrained_techniques.py`.

    Symbols in the formulas: T encoder frames, C width, H heads, d head dimension, H·d = C. Costs are those of one
    layer's attention besides its query, key, value and output projections (2·T·C² each, unless the file says
    otherwise): FLOPs, two for a multiplication and addition, and numbers stored for a batch of one.
    """

    notation: ClassVar[str]
    label: ClassVar[str]
    minimum: ClassVar[int]
    attention: ClassVar[Any] = None
    from_scratch: ClassVar[bool]
    not_pretrained: ClassVar[str] = ""
    not_causal: ClassVar[str] = ""
    core: ClassVar[Any] = Core

    def __init_subclass__(cls, *, notation: str, label: str, minimum: int = 1, from_scratch: bool = True) -> None:
        dataclass(frozen=True)(cls)
        cls.notation, cls.label, cls.minimum, cls.from_scratch = notation, label, minimum, from_scratch
        TECHNIQUES[notation] = cls

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value != field.default and value < self.minimum:
                raise ValueError(f"{self.notation}: {field.name} must be at least {self.minimum}, got {value}")

    @property
    def source(self) -> str:
        """The paper, for tables."""
        raise NotImplementedError

    @property
    def positions(self) -> str:
        """How the technique treats the encoder's relative positions.

        "kept": they enter the scores. "dropped": scores depend on contents alone, and only the convolutions know the
        order of frames. "none": there are no scores.
        """
        return "kept" if self.attention is None else self.attention.positions

    @property
    def name(self) -> str:
        """Unique and stable; includes the settings, and `parse` reads it back."""
        return fill(self.notation, self._settings())

    @property
    def title(self) -> str:
        """The name in tables."""
        settings = self._settings()
        plan = getattr(self, "plan", None)
        if plan is not None and plan.num_heads is not None:
            settings["plan"] = "head by head"
        return fill(self.label, settings)

    @property
    def pretrained_title(self) -> str:
        """The name in tables of pretrained models."""
        return self.title

    def apply(self, model: Model) -> Model:
        """Give the encoder in `model` this attention, in place; returns the model.

        Weights that still have a place are kept. New ones are drawn from PyTorch's generator.

        Raises:
            ValueError: the technique does not fit. The model is then unchanged.
        """
        if not self.from_scratch:
            raise ValueError(f"{self.name} changes pretrained models; use convert_pretrained")
        encoder = _untouched_encoder(model)
        self.check(encoder)
        self.change(model, encoder)
        return model

    def check(self, encoder: ParakeetEncoder) -> None:
        """Raises `ValueError` if the settings do not fit `encoder`."""

    def change(self, model: nn.Module, encoder: ParakeetEncoder) -> None:
        """Change `encoder`, which is part of `model` and has passed `check`."""
        self.replace_attention(encoder)

    def replace_attention(self, encoder: ParakeetEncoder, *arguments: Any) -> None:
        """Put `attention(original, technique, layer, *arguments)` in the place of every layer's attention."""
        made = [self.attention(block.self_attn, self, i, *arguments) for i, block in enumerate(encoder.layers)]
        for block, attention in zip(encoder.layers, made, strict=True):
            block.self_attn = attention

    def why_not(self, stack: PretrainedStack) -> str:
        """Why the technique does not apply to a pretrained model; empty if it does."""
        return self.not_pretrained or (self.not_causal if stack.causal else "")

    def convert_pretrained(self, model: Model, batches: list[dict[str, Tensor]]) -> Model:
        """Give a pretrained model this attention, in place; returns the model.

        Args:
            model: an untouched model of transformers with one stack of layers.
            batches: calibration data, keyword arguments of the model.

        Raises:
            ValueError: the technique does not apply.
        """
        stack = PretrainedStack(model)
        if reason := self.why_not(stack):
            raise ValueError(f"{self.name} does not apply to {type(model).__name__}: {reason}")
        self.convert(stack, batches)
        return model

    def convert(self, stack: PretrainedStack, batches: list[dict[str, Tensor]]) -> None:
        """Change a pretrained stack, to which the technique applies, in place."""
        stack.use_interface()
        for layer in stack.layers:
            layer.use(self.core(self, layer))

    def finish(self, model: nn.Module) -> None:
        """Change a converted model after recovery, in place, if it must be trained in another form."""

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """The context of one layer of a pretrained model, (batch, heads, positions, dim)."""
        raise NotImplementedError

    def _settings(self) -> dict[str, str]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            setting: plan_notation(value) if isinstance(value, ReusePlan) else str(value or "")
            for setting, value in values.items()
        }


def parse(name: str) -> Technique:
    """The technique of this name.

    Raises:
        ValueError: in one line, for an unknown name or impossible settings.

    >>> parse("window-16-global-1")
    Window(radius=16, num_global=1, plan=None)
    """
    for notation, technique in TECHNIQUES.items():
        settings = settings_in(notation, name)
        if settings is not None:
            return technique(**settings)
    raise ValueError(f"no technique {name!r}; the forms are {', '.join(TECHNIQUES)}")


def wrong_depth(plan: ReusePlan, stack: PretrainedStack) -> str:
    """Why a plan does not fit a pretrained stack; empty if it does."""
    fits = plan.num_layers == len(stack.layers) and plan.num_heads in (None, stack.num_heads)
    return "" if fits else f"the plan has {plan.num_layers} layers, but the model has {len(stack.layers)}"


def check_plan(encoder: ParakeetEncoder, plan: ReusePlan, num_heads: int) -> None:
    """Raises `ValueError` if a plan does not fit an encoder whose layers have `num_heads` heads."""
    if plan.num_layers != len(encoder.layers):
        raise ValueError(f"the plan has {plan.num_layers} layers, but the encoder has {len(encoder.layers)}")
    if plan.num_heads not in (None, num_heads):
        raise ValueError(f"the plan has {plan.num_heads} heads, but the layers have {num_heads}")


def _untouched_encoder(model: nn.Module) -> ParakeetEncoder:
    """The Parakeet encoder in `model`; raises `ValueError` unless there is one, with its original attention."""
    encoders = [module for module in model.modules() if isinstance(module, ParakeetEncoder)]
    if len(encoders) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(encoders)} Parakeet encoders, and a technique changes one"
        )
    encoder = encoders[0]
    for index, block in enumerate(encoder.layers):
        if type(block.self_attn) is not ParakeetEncoderAttention:
            raise ValueError(
                f"layer {index} of {type(encoder).__name__} has another attention already "
                f"({type(block.self_attn).__name__}); apply a technique to the original model"
            )
    return encoder
