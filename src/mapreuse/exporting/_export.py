"""`export`: a model as files for another runtime, checked against PyTorch."""

from __future__ import annotations

import ast
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from mapreuse import maps, models
from mapreuse.console import check_new_directory, refused_in_one_line
from mapreuse.exporting._decoders import WithFlatCache, decoder_difference
from mapreuse.exporting._runtimes import (
    DESCRIPTION,
    RUNTIMES,
    Calibration,
    Run,
    open_exported,
    required,
    weight_bits,
)
from mapreuse.plan import ReusePlan

logger = logging.getLogger("mapreuse")

MAX_DIFFERENCE = 1e-4
"""Maximum of |exported − PyTorch| / max |PyTorch| of a float32 export."""

Batch = Mapping[str, Tensor]


def export(
    model: nn.Module,
    path: str | Path,
    example: Batch,
    *,
    runtime: str = "openvino",
    int8: Sequence[Batch] | Literal["weights"] | None = None,
    own_attention: bool = False,
    kernels: bool = False,
) -> dict[str, Any]:
    """Write an encoder or a language model, with or without a plan, for OpenVINO or ONNX Runtime.

    The files need neither PyTorch nor mapreuse to run. Batch size and lengths are dynamic. Inputs have the names of
    `example`, outputs those of the model's output (`last_hidden_state`, `logits`, …). After writing, the export is
    compared with PyTorch at three other shapes, two of them with padding if the model takes an `attention_mask`.

    A language model is a decoder with a cache and a head. In ONNX, the cache consists of inputs
    `past_key_values.0.key` (batch, heads, past length, head_dim), `past_key_values.0.value`, … and outputs
    `present.0.key`, …. In OpenVINO, the model is stateful: a request keeps the cache, and the input `beam_idx` gives,
    for each text, the index of the text whose cache it continues. Layers that reuse a map have values only. The
    inputs `input_ids`, `attention_mask` (which covers the cache as well) and `position_ids` remain. Steps of decoding
    are compared with PyTorch, too. `mapreuse.exporting.open_decoder` opens either kind.

    The directory contains the files of the runtime under the names that optimum and sentence-transformers look for,
    `config.json` of the original model, and `mapreuse_export.json` with the plan and the differences.

    Args:
        model: an encoder of `transformers`, the encoder of an encoder–decoder, or a decoder with a language-model
            head. It is not changed.
        path: a new directory.
        example: keyword arguments of the model's forward: tensors, as a tokenizer or feature extractor makes them.
        runtime: "openvino" or "onnx".
        int8: calibration batches like `example`: weights and activations are quantised to 8 bits by NNCF. "weights":
            only the weights are, as is usual for language models; this needs no data.
        own_attention: write the model's own attention, as other exporters do, if it has no plan. It is there to
            compare with.
        kernels: attention by the kernels of mapreuse, for OpenVINO on Linux: the directory also contains the library
            `mapreuse_kernels.so`, which a C++ compiler makes for the installed version of OpenVINO and which must be
            loaded by `openvino.Core().add_extension(path)`. With int8, its products have 8 bits, too. Otherwise the
            export consists of standard operators.

    Returns:
        The contents of `mapreuse_export.json`. "difference" is the maximum, over the compared shapes, of
        abs(exported − PyTorch) / max(abs(PyTorch)). "weight_bits" is 8, or 7 on x86 processors without VNNI, where
        8-bit products overflow. "int8_error" is ‖int8 − float32‖ / ‖float32‖ of each output on
        the calibration batches, or on the example.

    Raises:
        ValueError: if an argument is invalid, the model is a decoder without a head or with cross-attention, an
            operator cannot be exported, or a float32 export differs from PyTorch by more than 1e-4. Nothing is then
            left in `path`.
        ModuleNotFoundError: if a package is missing; the message says which and how to install it.
    """
    path = Path(path)
    check_runtime(runtime, int8=int8 is not None, kernels=kernels)
    target = RUNTIMES[runtime]
    is_decoder = _check_model(model, kernels)
    batches = None if isinstance(int8, str) else int8
    if isinstance(int8, str) and int8 != "weights":
        raise ValueError(f'int8 must be calibration batches, "weights" or None, got {int8!r}')
    _check_batches(example, batches)
    if is_decoder and not {"input_ids"} <= example.keys() <= {"input_ids", "attention_mask"}:
        raise ValueError(
            f"a decoder is exported with input_ids and attention_mask; the example has {', '.join(example)}"
        )
    with _new_directory(path) as directory, _evaluation(model, own_attention) as original:
        decoder = WithFlatCache(original) if is_decoder else None
        part: nn.Module = decoder or original
        inputs = _with_several_items(example) if decoder is None else decoder.step(_with_several_items(example))
        dims = _dynamic_dims(inputs) if decoder is None else decoder.dynamic_dims(inputs)
        with maps.runtime_operators("float32" if int8 is None else "int8") if kernels else nullcontext():
            program, names = _exported(part, inputs, dims)
        _write_onnx(program, list(inputs), names, directory / "program.onnx")
        quantised: Calibration | Literal["weights"] | None = "weights" if isinstance(int8, str) else None
        if batches is not None:
            calibration = batches if decoder is None else [decoder.step(batch) for batch in batches]
            quantised = Calibration(calibration, _sensitive(directory / "program.onnx", part))
        description: dict[str, Any] = {
            "runtime": runtime,
            "precision": "float32" if int8 is None else "int8 weights" if isinstance(int8, str) else "int8",
            **({"weight_bits": weight_bits()} if batches is not None else {}),
            "kernels": kernels,
            "cache": is_decoder,
            "model": type(model).__name__,
            "plan": _plan(model),
        }
        _write_description(directory, description)
        with refused_in_one_line(f"{runtime} cannot run this {type(model).__name__}: "):
            target.write(directory / "program.onnx", directory, quantised, kernels=kernels)
            run = open_exported(directory)
        for file in directory.glob("program.onnx*"):
            file.unlink()
        with refused_in_one_line("the exported model cannot run with another shape: "):
            description["difference"] = (
                max(_difference(original, run, batch) for batch in _other_shapes(original, program, example))
                if decoder is None
                else decoder_difference(decoder, target.open_decoder(directory, None), example)
            )
        if int8 is None and not description["difference"] <= MAX_DIFFERENCE:
            raise ValueError(
                f"the exported {type(model).__name__} differs from PyTorch by {description['difference']:.1e}, more "
                f"than {MAX_DIFFERENCE}; export it for another runtime, or report this"
            )
        if int8 is not None:
            compared = partial(_compared, original, run) if decoder is None else partial(decoder.compared, run)
            description["int8_error"] = _int8_error(map(compared, batches or [example]))
        for name in ("config", "generation_config"):
            if isinstance(config := getattr(model, name, None), PreTrainedConfig | GenerationConfig):
                config.save_pretrained(directory)
        _write_description(directory, description)
    logger.info("%s: difference to PyTorch %.1e", path, description["difference"])
    return description


def _write_description(directory: Path, description: dict[str, Any]) -> None:
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def check_runtime(runtime: str, *, int8: bool = False, kernels: bool = False) -> None:
    """Check a runtime for `export`.

    Raises:
        ValueError: if there is no such runtime, or it cannot have kernels on this machine.
        ModuleNotFoundError: if one of its packages is missing.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, got {runtime!r}")
    required("onnx", "onnxscript", *RUNTIMES[runtime].packages, *(["nncf"] if int8 else []))
    if kernels:
        RUNTIMES[runtime].check_kernels()


class _Outputs(nn.Module):
    """A model and the outputs of it that are exported: floating-point tensors, not lists of layers or masks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def named(self, batch: Batch) -> dict[str, Tensor]:
        """The outputs by name."""
        output = self.model(**batch)
        if isinstance(output, Tensor):
            return {"last_hidden_state": output}
        if not isinstance(output, Mapping):
            return {"last_hidden_state": output[0]}
        return {
            name: value for name, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()
        }


def _check_model(model: nn.Module, kernels: bool) -> bool:
    """Whether the model is a decoder.

    Raises:
        ValueError: if it cannot be exported.
    """
    name = type(model).__name__
    stack = models.find_stack(model)
    is_decoder = any(getattr(layer.attention, "is_causal", False) for layer in stack.layers)
    if is_decoder:
        _check_decoder(model, kernels)
    has_decoder = any(name.rpartition(".")[2] == "decoder" for name, _ in model.named_modules())
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and has_decoder:
        raise ValueError(
            f"{name} has an encoder and a decoder, and export writes one stack; export model.get_encoder()"
        )
    for path, weights in model.named_parameters():
        if weights.dtype != torch.float32 or weights.device.type != "cpu":
            dtype = str(weights.dtype).removeprefix("torch.")
            raise ValueError(
                f"{path} is {dtype} on {weights.device}, but export needs float32 on the CPU: model.float().cpu()"
            )
    return is_decoder


def _check_decoder(model: nn.Module, kernels: bool) -> None:
    name, plan = type(model).__name__, models.plan_of(model)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(f"{name} is a decoder with cross-attention, which export cannot write; use it in PyTorch")
    if not isinstance(model, PreTrainedModel) or not models.keeps_cache(model):
        raise ValueError(f"{name} is a decoder without a cache, which export cannot write; use it in PyTorch")
    if model.get_output_embeddings() is None:
        raise ValueError(f"{name} is a decoder without a language-model head; export the …ForCausalLM model")
    if kernels:
        raise ValueError(f"{name} is a decoder, and the kernels are for encoders; use kernels=False")
    shared = {plan.share_of(layer) for layer in range(plan.num_layers)} - {None, "map"} if plan is not None else set()
    if shared:
        raise ValueError(
            f"{name} shares {', '.join(map(str, shared))}, and export writes decoders that share maps only"
        )


def _check_batches(example: Batch, int8: Sequence[Batch] | None) -> None:
    if int8 is not None and not int8:
        raise ValueError("int8 needs at least one calibration batch, better some dozens")
    first, batches = example, [example, *(int8 or [])]
    for batch in batches:
        if not (isinstance(batch, Mapping) and batch and all(isinstance(one, Tensor) for one in batch.values())):
            raise ValueError("example and int8 batches must be dictionaries of tensors, such as a tokenizer returns")
        if batch.keys() != first.keys() or any(batch[name].dim() != first[name].dim() for name in first):
            raise ValueError(
                f"int8 batches must have the inputs of the example, {', '.join(first)}, with as many dimensions; got "
                f"{ {name: tuple(tensor.shape) for name, tensor in batch.items()} }"
            )


@contextmanager
def _evaluation(model: nn.Module, own_attention: bool) -> Iterator[nn.Module]:
    """A copy of the model in evaluation mode, without gradients. Without a plan, it gets one that shares nothing.

    Its computing layers then consist of operators that every exporter knows. With `own_attention` it gets none.
    """
    copied = models.copy_with_same_weights(model).eval()
    models.with_integer_lengths(copied)
    if models.plan_of(copied) is None and not own_attention:
        models.apply(copied, ReusePlan.full(len(models.find_stack(copied).layers)))
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about their own internals
            yield copied
    finally:
        exporter.setLevel(level)


def _with_several_items(example: Batch) -> dict[str, Tensor]:
    """The example with a batch size of at least two: exporters take a size of one for a constant."""
    size = len(next(iter(example.values())))
    return {
        name: torch.cat([tensor] * 2) if size == 1 and len(tensor) == 1 else tensor
        for name, tensor in example.items()
    }


def _exported(
    model: nn.Module, example: Batch, dims: Mapping[str, tuple[int, ...]]
) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The model as a graph of PyTorch's own operators with dynamic shapes, and the names of its outputs."""

    class Positional(_Outputs):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.named(dict(zip(example, tensors, strict=True))).values())

    # The exporters name the inputs of the graph after these parameters.
    parameters = [Parameter(name.replace(".", "_"), Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *example)]
    Positional.forward.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    names = list(_Outputs(model).named(example))
    shapes = tuple(dict.fromkeys(dims[name], torch.export.Dim.AUTO) for name in example)
    with refused_in_one_line(f"torch.export cannot export {type(model).__name__}: "):
        program = torch.export.export(Positional(model), tuple(example.values()), dynamic_shapes=shapes, strict=False)
    return program, names


def _dynamic_dims(example: Batch) -> dict[str, tuple[int, ...]]:
    """The dimensions of each input that may change: the batch size, and the length if the inputs have one.

    The length is that of the attention mask, or else of the first input, unless it is an image.
    """
    main = example.get("attention_mask", next(iter(example.values())))
    if main.dim() not in (2, 3):
        return dict.fromkeys(example, (0,))
    length = main.shape[1]
    found = {}
    for name, tensor in example.items():
        dims = [dim for dim in range(1, tensor.dim()) if tensor.shape[dim] == length]
        found[name] = (0, *dims[:1])
    return found


def _write_onnx(
    program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], file: Path
) -> None:
    with refused_in_one_line("torch.onnx cannot export this model: "):
        exported = torch.onnx.export(
            program, dynamo=True, input_names=list(inputs), output_names=list(outputs), verbose=False
        )
        assert exported is not None
        _name_operators(exported.model.graph)
        exported.save(file)


def _name_operators(graph: Iterable[Any]) -> None:
    """Put the path of its module before the name of each operator, such as "encoder.layer.0.output/node_MatMul_9".

    Profilers of the runtimes show these names.
    """
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        path = scopes[-2].removeprefix("model").removeprefix(".") if len(scopes) > 1 else ""
        node.name = f"{path}/{node.name}"


def _sensitive(file: Path, model: nn.Module) -> list[str]:
    """Names of the products that stay in float: those before the stack's layers, and those of shared maps.

    All layers read what a front end makes, such as a subsampling of audio, so its rounding errors cost most. The
    longer the input, the smaller the weights of a map: 8 bits with one scale for all lengths lose them, and each
    layer that applies a shared map adds to the error.
    """
    (onnx,) = required("onnx")
    first = models.find_stack(model).layers[0].layer
    layers = next(f"model.{name}" for name, module in model.named_modules() if module is first).rpartition(".")[0]
    nodes = onnx.load(file, load_external_data=False).graph.node
    found = []
    for node in nodes:
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        scopes = next((one.value for one in node.metadata_props if one.key == "pkg.torch.onnx.name_scopes"), layers)
        if f"{layers}." in scopes:
            break
        found.append(node.name)
    maps, products = dict[str, set[str]](), dict[str, list[str]]()
    for node in nodes:
        read = set().union(*(maps.get(name, set()) for name in node.input))
        if node.op_type == "MatMul":
            for one in read:
                products.setdefault(one, []).append(node.name)
        elif node.op_type == "Softmax" or read:
            maps |= dict.fromkeys(node.output, {node.name} if node.op_type == "Softmax" else read)
    return [*found, *dict.fromkeys(one for names in products.values() if len(names) > 1 for one in names)]


def _other_shapes(
    model: nn.Module, program: torch.export.ExportedProgram, example: Batch
) -> Iterator[dict[str, Tensor]]:
    """Three batches of other shapes, cut or repeated from the example; in two of them, items are padded.

    Only dimensions that are dynamic in the program change. Lengths that the model does not accept stay the example's.
    """
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"][-len(example) :]
    sizes = [node.meta["val"].shape for node in placeholders]

    def resized(items: int, factor: float) -> dict[str, Tensor]:
        batch = {}
        for (name, tensor), symbols in zip(example.items(), sizes, strict=True):
            for dim, size in enumerate(symbols):
                if isinstance(size, torch.SymInt):
                    length = items if dim == 0 else max(1, math.ceil(factor * tensor.shape[dim]))
                    tensor = tensor.index_select(dim, torch.arange(length) % tensor.shape[dim])
            batch[name] = tensor.contiguous()
        return batch

    for items, factor, padding in ((1, 0.5, 0.0), (2, 0.75, 0.3), (3, 1.0, 0.5)):
        batch = resized(items, factor)
        try:
            model(**batch)
        except (RuntimeError, ValueError):
            batch = resized(items, 1.0)
        if padding and (mask := batch.get("attention_mask")) is not None and mask.dim() == 2:
            batch["attention_mask"] = mask = mask.clone()
            mask[-1, math.ceil((1 - padding) * mask.shape[1]) :] = 0
        yield batch


def _difference(model: nn.Module, run: Run, batch: Batch) -> float:
    """max |exported − PyTorch| / max |PyTorch|, without padding, over all outputs."""
    largest = 0.0
    for name, (exported, expected) in _compared(model, run, batch).items():
        if exported.shape != expected.shape:
            raise ValueError(f"the exported {name} has shape {tuple(exported.shape)}, not {tuple(expected.shape)}")
        difference = ((exported - expected).abs().max() / expected.abs().max()).item()
        largest = max(largest, math.inf if math.isnan(difference) else difference)
    return largest


def _compared(model: nn.Module, run: Run, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """Each output and what it should be, without the positions that are padding."""
    found = run(batch)
    with models.recorded_states(model) as (states, masks):
        expected = _Outputs(model).named(batch)
    valid = models.not_padding(masks[0], states[-1])
    pairs = {}
    for name, tensor in expected.items():
        both = found[name], tensor
        has_positions = both[0].shape[:2] == tensor.shape[:2] == valid.shape
        pairs[name] = (both[0][valid], both[1][valid]) if has_positions else both
    return pairs


def _int8_error(compared: Iterable[dict[str, tuple[Tensor, Tensor]]]) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for pairs in compared:
        for name, (exported, expected) in pairs.items():
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += (exported - expected).square().sum().item()
            total[1] += expected.square().sum().item()
    return {name: math.sqrt(error / max(size, 1e-30)) for name, (error, size) in sums.items()}


def _plan(model: nn.Module) -> dict[str, Any] | None:
    plan = models.plan_of(model)
    return None if plan is None else json.loads(plan.to_json())


@contextmanager
def _new_directory(path: Path) -> Iterator[Path]:
    """A directory that becomes `path` if the code inside succeeds."""
    check_new_directory(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".exporting-") as scratch:
        written = Path(scratch) / "written"
        written.mkdir()
        yield written
        if path.exists():
            path.rmdir()
        written.rename(path)
