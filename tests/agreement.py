"""Plans for the families, and how far each family under a plan is from the definition."""

from __future__ import annotations

import copy
import functools

import torch
from families import build
from oracle import defined_output, disagreement, valid_rows
from torch import nn

import mapreuse as mr

NUM_LAYERS, NUM_HEADS = 4, 4

PLANS = {
    "full": mr.ReusePlan.full(NUM_LAYERS),
    "groups of 2": mr.ReusePlan.grouped(NUM_LAYERS, 2),
    "all from one": mr.ReusePlan.grouped(NUM_LAYERS, NUM_LAYERS),
    "other heads": mr.ReusePlan.from_sources([0, 0, 2, 2], heads={1: [3, 1, 1, 0], 3: [2, 2, 2, 2]}),
    "in part": mr.ReusePlan.from_sources([0, 0, 2, 2], heads={1: [None, 2, None, 0], 3: [1, None, 1, 3]}),
    "two sources": mr.ReusePlan((None, None, ((1, 0), (0, 3), (1, 2), (0, 0)), ((0, 1), None, (1, 1), (1, 1)))),
}
STORAGES = ("dense", "recompute")
"""The storages that are exact."""
IMPLEMENTATIONS = ("eager", "sdpa")


@torch.no_grad()
def randomize_biases(model: nn.Module) -> None:
    """Give the biases of projections random values, because most families start them at zero."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter.dim() == 1 and "norm" not in name.lower():
            nn.init.normal_(parameter, std=0.3)


@functools.cache
def _built(family: str, implementation: str):
    model, batch = build(family, implementation=implementation)
    randomize_biases(model)
    return model, batch


@functools.cache
@torch.no_grad()
def errors(family: str, plan: mr.ReusePlan) -> tuple[dict[tuple[str, str], float], float]:
    """Errors relative to the definition, by (implementation, storage), and how far the plan moves the output."""
    eager, batch = _built(family, "eager")
    untouched = eager(**batch)
    rows = valid_rows(eager, batch, untouched)
    reference = defined_output(eager, batch, plan)
    found = {}
    for implementation in IMPLEMENTATIONS:
        for storage in STORAGES:
            model = mr.apply(copy.deepcopy(_built(family, implementation)[0]), plan, storage=storage)
            output = model(**batch).last_hidden_state
            assert output.isfinite().all(), "padding rows must be finite"
            found[implementation, storage] = disagreement(output, reference, rows)
    return found, disagreement(untouched.last_hidden_state, reference, rows)


@torch.no_grad()
def rounding(family: str) -> float:
    """Error of the original model in float32 relative to itself in float64."""
    model, batch = _built(family, "eager")
    output = model(**batch)
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    reference = defined_output(copy.deepcopy(model).double(), exact, PLANS["full"])
    return disagreement(output.last_hidden_state.double(), reference, valid_rows(model, batch, output))
