"""Where does attention live in this model family, and how is it made to share maps?"""

from mapreuse.models import _fused, _packed, _parakeet, _wav2vec2_conformer  # noqa: F401  registers their adapters
from mapreuse.models._adapters import output_projection
from mapreuse.models._apply import applied_to, apply, plan_of, with_projections
from mapreuse.models._checks import possible_sources
from mapreuse.models._copying import copy_with_same_weights
from mapreuse.models._files import load, save, transformer_directory
from mapreuse.models._optimize import optimize, optimized
from mapreuse.models._projections import ValueProjection, value_projection
from mapreuse.models._recording import MapRecorder, Recording, check_batch, not_padding, recorded_states
from mapreuse.models._sharing import ARGUMENT, observing_inputs
from mapreuse.models._source import Unsupported
from mapreuse.models._stack import Layer, find_stack

__all__ = [
    "ARGUMENT",
    "Layer",
    "MapRecorder",
    "Recording",
    "Unsupported",
    "ValueProjection",
    "applied_to",
    "apply",
    "check_batch",
    "copy_with_same_weights",
    "find_stack",
    "load",
    "not_padding",
    "observing_inputs",
    "optimize",
    "optimized",
    "output_projection",
    "plan_of",
    "possible_sources",
    "recorded_states",
    "save",
    "transformer_directory",
    "value_projection",
    "with_projections",
]
