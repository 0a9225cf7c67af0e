"""Copies of a model that take no memory for weights."""

import copy
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def copy_with_same_weights(model: Model) -> Model:
    """A copy whose parameters are the model's own, not copies of them.

    Modules, hooks and buffers are the copy's, so that `apply` and `optimize`, which put new parameters in the place of
    those that they change, leave the model as it is; what changes parameters in place does not.
    """
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
