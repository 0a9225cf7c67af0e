"""Compiled and exported models give the same output, or are refused.

The checks of shapes in a test run cannot be traced, so the models run in another process, as
`python test_compiling.py`.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from agreement import PLANS
from families import build
from packed_encoders import encoder

import mapreuse as mr

SAMPLE = ["parakeet compiled in training", "parakeet exported", "torch compiled", "torch exported"]
REST = ["parakeet compiled", "parakeet over its budget", "torch compiled whole", "llama compiled",
        "llama compiled in training", "llama exported", "llama over its budget"]  # fmt: skip
REFUSED = ["parakeet over its budget", "llama over its budget", "torch compiled whole", "torch exported"]


@pytest.mark.parametrize("names", [SAMPLE, pytest.param(REST, marks=pytest.mark.full)], ids=["sample", "rest"])
def test_a_compiled_or_exported_model_gives_the_same_output_or_is_refused(names):
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, __file__, *names], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    results = dict(zip(names, done.stdout.splitlines(), strict=True))
    assert [name for name, result in results.items() if result == "refused"] == [n for n in names if n in REFUSED]
    assert all(float(result) < 1e-4 for result in results.values() if result != "refused"), results


def difference(family, way):
    """The maximum difference of a model that runs in this way to the same model run as it is."""
    if family == "torch":
        model, batch = mr.apply(encoder(batch_first=True), PLANS["groups of 2"]), {"src": torch.randn(2, 9, 32)}
    else:
        model, batch = build(family)
        budget = 1 if way == "over its budget" else None
        mr.apply(model, PLANS["two sources"], memory_budget=budget)
    mr.optimize(model)
    # The encoder of torch and the error about a budget stay outside graphs.
    whole = way == "compiled whole" or (family != "torch" and "budget" not in way)
    with torch.set_grad_enabled(way == "compiled in training"):
        if way == "exported":
            other = torch.export.export(model, (), batch, strict=False).module()
        else:
            other = torch.compile(model, backend="aot_eager", fullgraph=whole)
        output, expected = other(**batch), model(**batch)
        if family != "torch":
            output, expected = output.last_hidden_state, expected.last_hidden_state
        if way == "compiled in training":
            output.square().mean().backward()
    return (output - expected).abs().max().item()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # from the compiler
    for name in sys.argv[1:]:
        torch._dynamo.reset()
        try:
            print(difference(*name.split(" ", 1)))
        except Exception as error:
            message = "memory_budget=1:" if "budget" in name else "torch.compile and torch.export cannot follow"
            if message not in f"{error}{error.__cause__}":
                raise
            print("refused")
