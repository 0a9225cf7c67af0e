"""Copies of a model that share its weights, and changes of a model that are undone if they fail."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def copy_with_same_weights(model: Model) -> Model:
    """A copy whose parameters are the model's own, so that it needs no memory for weights.

    Modules, hooks and buffers are copies. `apply` and `optimize` replace parameters instead of changing them in
    place, so calling them on the copy leaves the model unchanged. Changing parameters in place changes both.
    """
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Restore all modules of a model, including their hooks, if the code inside raises an exception."""
    saved = []
    for module in model.modules():
        contents = [(held, dict(held)) for held in vars(module).values() if type(held) in (dict, OrderedDict)]
        saved.append((module, module.__class__, dict(vars(module)), contents))
    try:
        yield
    except BaseException:
        for module, cls, attributes, contents in saved:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for held, content in contents:  # in place, because handles of hooks refer to these dictionaries
                held.clear()
                held.update(content)
        raise
