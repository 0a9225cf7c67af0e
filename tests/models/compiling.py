"""`python compiling.py FAMILY…`: how far compiled and exported models are from the same model run as it is."""

import sys
import warnings

import torch
from agreement import PLANS
from families import build

import mapreuse as mr


def main(family: str) -> None:
    warnings.simplefilter("ignore")  # of the compiler's own
    model, batch = build(family)
    mr.apply(model, PLANS["two sources"])
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        print(family, "compiled", (compiled(**batch).last_hidden_state - expected).abs().max().item())
    output = compiled(**batch).last_hidden_state
    output.square().mean().backward()
    print(family, "compiled-training", (output - expected).abs().max().item())
    with torch.no_grad():
        exported = torch.export.export(model, (), batch, strict=False).module()
        print(family, "exported", (exported(**batch).last_hidden_state - expected).abs().max().item())
    short = mr.apply(build(family)[0], PLANS["two sources"], memory_budget=1)
    try:
        with torch.no_grad():
            torch.compile(short, backend="eager")(**batch)
    except ValueError as error:
        print(family, "over-budget", float("memory_budget=1:" not in str(error)))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(name)
