"""One attention layer with relative positions in OpenVINO, in several forms of the graph: milliseconds by length.

    python lab/experiments/exported_forms.py [LENGTHS]

4 heads of 64, one thread, float32; medians of turns. All forms are compared with the first one.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import openvino
import torch
from torch import Tensor, nn
from torch.nn import functional

from mapreuse.exporting import LIBRARY, build_library

HEADS, DIM, WIDTH, BLOCK = 4, 64, 256, 128


def distances(last: int, first: int) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
    angles = torch.arange(last, first - 1, -1)[:, None] * frequencies
    return angles.sin(), angles.cos()


class Shifted(nn.Module):
    """Scores of all 2 T - 1 distances, shifted by pad and reshape: the form of a default export."""

    def forward(self, query: Tensor, key: Tensor, values: Tensor, position: Tensor, weight: Tensor) -> Tensor:
        relative = query @ (position @ weight).transpose(-2, -1)
        rows, columns = relative.shape[-2:]
        flat = functional.pad(relative, (0, 1)).flatten(-2)[..., rows - 1 : rows - 1 + rows * columns]
        scores = query @ key.transpose(-2, -1) + flat.view(1, HEADS, rows, columns)[..., :rows]
        return (scores * DIM**-0.5).softmax(-1) @ values


class Gathered(Shifted):
    """The same, shifted by a gather."""

    def forward(self, query: Tensor, key: Tensor, values: Tensor, position: Tensor, weight: Tensor) -> Tensor:
        relative = query @ (position @ weight).transpose(-2, -1)
        places = torch.arange(query.shape[2])
        index = query.shape[2] - 1 - places[:, None] + places
        scores = query @ key.transpose(-2, -1) + relative.gather(-1, index.expand(1, HEADS, -1, -1))
        return (scores * DIM**-0.5).softmax(-1) @ values


class Biased(Shifted):
    """The shifted scores as the bias of fused attention."""

    def forward(self, query: Tensor, key: Tensor, values: Tensor, position: Tensor, weight: Tensor) -> Tensor:
        relative = query @ (position @ weight).transpose(-2, -1)
        rows, columns = relative.shape[-2:]
        flat = functional.pad(relative, (0, 1)).flatten(-2)[..., rows - 1 : rows - 1 + rows * columns]
        bias = flat.view(1, HEADS, rows, columns)[..., :rows] * DIM**-0.5
        return functional.scaled_dot_product_attention(query, key, values, attn_mask=bias, scale=DIM**-0.5)


class Folded(Shifted):
    """Positions in queries and keys, by sin(i - j) = sin i cos j - cos i sin j; fused attention needs no bias."""

    def forward(self, query: Tensor, key: Tensor, values: Tensor, position: Tensor, weight: Tensor) -> Tensor:
        of_sin, of_cos = (query @ weight.transpose(-2, -1)).chunk(2, -1)
        sin, cos = position[..., position.shape[-2] // 2 :, :].flip(-2).chunk(2, -1)  # of distances 0 ... T - 1
        sin, cos = (-sin).flip(-2), cos.flip(-2)
        rotated = torch.cat([of_sin * sin + of_cos * cos, of_cos * sin - of_sin * cos], -1)
        places = torch.cat([cos, sin], -1).expand(1, HEADS, -1, -1)
        return functional.scaled_dot_product_attention(
            torch.cat([query, rotated], -1), torch.cat([key, places], -1), values, scale=DIM**-0.5
        )


def inputs(length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, values = torch.randn(3, 1, HEADS, length, DIM, generator=generator)
    weight = torch.randn(1, HEADS, WIDTH, DIM, generator=generator) / 16
    position = torch.cat(distances(length - 1, -(length - 1)), -1)[None, None]
    return {"query": query, "key": key, "values": values, "position": position, "weight": weight}


def operator(core: openvino.Core, directory: Path) -> openvino.CompiledModel:
    """mapreuse's operator, after the projection of the positions."""
    import onnx
    from onnx import TensorProto, helper

    build_library(openvino, directory / LIBRARY)
    core.add_extension(directory / LIBRARY)
    options = {"parts": "1100", "scaling": DIM**-0.5, "causal": 0, "keeps": 0, "int8": 0}
    nodes = [helper.make_node("MatMul", ["position", "weight"], ["projected"])]
    nodes += [
        helper.make_node("Transpose", [name], [f"{name}_t"], perm=[0, 2, 1, 3])
        for name in ("query", "key", "values", "projected")
    ]
    names = [f"{name}_t" for name in ("query", "key", "values", "query", "projected")]
    nodes.append(helper.make_node("Attention", names, ["context_t"], domain="mapreuse", **options))
    nodes.append(helper.make_node("Transpose", ["context_t"], ["context"], perm=[0, 2, 1, 3]))
    shapes = {name: [*tensor.shape[:2], None, tensor.shape[3]] for name, tensor in inputs(5).items()}
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    out = helper.make_tensor_value_info("context", TensorProto.FLOAT, [1, HEADS, None, DIM])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mapreuse", 1)]
    file = directory / "operator.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "layer", made, [out]), opset_imports=opsets), file)
    return core.compile_model(core.read_model(file), "CPU", OPTIONS)


OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}


def main() -> None:
    lengths = [int(length) for length in (sys.argv[1] if len(sys.argv) > 1 else "250,1000,2000").split(",")]
    core, compiled = openvino.Core(), {}
    for form in (Shifted, Gathered, Biased, Folded):
        example = inputs(40)
        model = openvino.convert_model(form(), example_input=tuple(example.values()))
        shapes = [[*tensor.shape[:2], -1, tensor.shape[3]] for tensor in example.values()]
        model.reshape(dict(zip(model.inputs, shapes, strict=True)))
        compiled[form.__name__] = core.compile_model(model, "CPU", OPTIONS)
    with tempfile.TemporaryDirectory() as directory:
        compiled["operator"] = operator(core, Path(directory))
    for length in lengths:
        batch = [tensor.numpy() for tensor in inputs(length).values()]
        found = {name: one(batch)[0].copy() for name, one in compiled.items()}
        times: dict[str, list[float]] = {name: [] for name in compiled}
        for _ in range(7):
            for name, one in compiled.items():
                started = time.perf_counter()
                one(batch)
                times[name].append(1000 * (time.perf_counter() - started))
        for name, each in times.items():
            difference = abs(found[name] - found["Shifted"]).max()
            print(f"{length:5} {name:10} {statistics.median(each):8.1f} ms   difference {difference:.1e}", flush=True)


if __name__ == "__main__":
    main()
