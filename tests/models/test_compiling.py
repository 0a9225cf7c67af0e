"""Compiled and exported models give the same output, or are refused.

The checks of shapes in a test run cannot be traced, so the models run in another process, as
`python test_compiling.py`.
"""

import functools
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


@functools.cache
def results(*names):
    """Printed results by name: how far an output is from that of the model run as it is, or "refused"."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, __file__, *names], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("family", ["parakeet", pytest.param("llama", marks=pytest.mark.full)])
def test_a_compiled_or_exported_model_gives_the_same_output_within_its_memory_budget(family):
    found = results("parakeet", "torch") if family == "parakeet" else results(family)
    for way in ("compiled", "compiled in training", "exported"):
        assert float(found[f"{family} {way}"]) < 1e-4
    assert found[f"{family} over its budget"] == "refused"


def test_an_encoder_of_torch_is_compiled_in_parts_and_refused_as_a_whole_graph():
    found = results("parakeet", "torch")
    assert float(found["torch compiled in parts"]) <= 1e-5
    assert found["torch compiled whole"] == found["torch exported"] == "refused"


@torch.no_grad()
def difference(model, expected, batch):
    return (model(**batch).last_hidden_state - expected).abs().max().item()


def run_family(family):
    model, batch = build(family)
    mr.apply(model, PLANS["two sources"])
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    print(family, "compiled", difference(compiled, expected, batch))
    output = compiled(**batch).last_hidden_state
    output.square().mean().backward()
    print(family, "compiled in training", (output - expected).abs().max().item())
    with torch.no_grad():
        exported = torch.export.export(model, (), batch, strict=False).module()
    print(family, "exported", difference(exported, expected, batch))
    short = mr.apply(build(family)[0], PLANS["two sources"], memory_budget=1)
    with torch.no_grad():
        print(
            family,
            "over its budget",
            refusal(lambda: torch.compile(short, backend="eager")(**batch), "memory_budget=1:"),
        )


def run_torch_encoder():
    model, src = mr.apply(encoder(batch_first=True), PLANS["groups of 2"]), torch.randn(2, 9, 32)
    with torch.no_grad():
        print("torch compiled in parts", (torch.compile(model, backend="eager")(src) - model(src)).abs().max().item())
    torch._dynamo.reset()
    message = "torch.compile and torch.export cannot follow"
    whole = torch.compile(model, backend="eager", fullgraph=True)
    print("torch compiled whole", refusal(lambda: whole(src), message))
    print("torch exported", refusal(lambda: torch.export.export(model, (src,)), message))


def refusal(run, message):
    """ "refused" if `run` raises an error with this message, alone or as the cause of another."""
    try:
        run()
    except Exception as error:
        return "refused" if message in f"{error}{error.__cause__}" else f"{error!r}".replace(" ", "_")
    return "ran"


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # from the compiler
    for name in sys.argv[1:]:
        run_torch_encoder() if name == "torch" else run_family(name)
