"""Perplexity of SmolLM2-135M exported with its cache, in float32 and with weights of 8 bits.

    python lab/experiments/exported_language.py openvino
    python lab/experiments/exported_language.py onnx

Prints one table: perplexity of windows of essays and of Python's language reference, in PyTorch and in the runtime,
without and with sharing. Nothing is trained.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

from mapreuse_lab.models import ExportedModule, LanguageModel, essays, perplexity, python_reference, text_windows
from torch import nn

import mapreuse as mr
from mapreuse.console import Table, show_tables
from mapreuse.exporting import open_exported

LENGTH, WINDOWS = 256, 4
PLAN = "1x20,2x5"


def main() -> None:
    runtime = sys.argv[1] if len(sys.argv) > 1 else "openvino"
    original = LanguageModel(num_calibration=1)
    (example,) = original.calibration()
    example = {name: tensor[:, :16] for name, tensor in example.items()}
    texts = {"essays": essays(), "Python": python_reference()}
    windows = {name: text_windows(original.tokenizer, text, LENGTH, WINDOWS) for name, text in texts.items()}

    def row(name: str, model: nn.Module, error: float | None) -> list[str]:
        found = [perplexity(model, some, f"{name}, {text}").value for text, some in windows.items()]
        return [name, *(f"{value:.3f}" for value in found), "" if error is None else f"{error:.4f}"]

    rows = []
    for plan in (None, PLAN):
        model = original.model
        if plan is not None:
            model = mr.apply(copy.deepcopy(model), mr.ReusePlan.parse(plan))
        rows.append(row(f"{plan or 'original'}, PyTorch", model, None))
        for precision in (None, "weights"):
            with tempfile.TemporaryDirectory() as folder:
                found = mr.export(model, Path(folder) / "out", example, runtime=runtime, int8=precision)
                error = found["difference"] if precision is None else found["int8_error"]["logits"]
                name = f"{plan or 'original'}, {runtime}, {found['precision']}"
                rows.append(row(name, ExportedModule(open_exported(Path(folder) / "out"), ["input_ids"]), error))
    notes = [f"{WINDOWS} windows of {LENGTH} tokens of each text.", "Error: of the logits, relative to PyTorch."]
    show_tables(
        [Table("Exported SmolLM2-135M", ["model", *(f"perplexity, {one}" for one in texts), "error"], rows, notes)]
    )


if __name__ == "__main__":
    main()
