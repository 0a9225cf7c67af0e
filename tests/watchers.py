"""Tools that record, transform or watch a forward pass.

Add a watcher as one entry of `WATCHERS`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable

import torch
from measured import (
    Case,
    Found,
    Run,
    Tensors,
    attentions,
    directional,
    flops,
    gradients,
    hessian_product,
    output,
    second,
)
from tools import (
    Recorder,
    Subclass,
    Wrapper,
    checkpointed,
    checkpointed_by_transformers,
    compiled,
    copied,
    counted,
    dual_numbers,
    exported,
    functional_gradients,
    graph,
    in_mixed_precision,
    in_onnxruntime,
    in_two_processes,
    one_by_one,
    plainly,
    quantised,
    several_models,
    subclassed,
    symbolic_trace,
    traced,
    within,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl
from watched import FAMILIES, Watched


@dataclasses.dataclass(frozen=True)
class Watcher:
    """One tool.

    Attributes:
        tried: how it was tried, for the page.
        record: takes a model and example inputs, and returns what runs it on others.
        expected: what a run must give, from the definition and the inputs.
        implementation: the attention that models are loaded with.
        is_slow: recording takes many seconds.
        is_lossy: numbers change by as much as when the tool is applied to the definition.
        applies: whether it can be tried on a family.
    """

    tried: str
    record: Callable[[Watched, Case, Tensors], Run]
    expected: Callable[[Watched, Tensors], Found]
    implementation: str = "sdpa"
    is_slow: bool = False
    is_lossy: bool = False
    applies: Callable[[str], bool] = lambda family: True


def is_of_transformers(family: str) -> bool:
    return FAMILIES[family].is_of_transformers


PARALLEL = ("DistributedDataParallel", "fully_shard")
"""Those that run in two processes."""
WATCHERS = {
    "torch.jit.trace": Watcher("without gradients", traced, output),
    "torch.jit.trace with gradients": Watcher(
        "recorded with gradients on; gradients compared",
        functools.partial(traced, with_gradients=True),
        gradients,
    ),
    "torch.jit.save and load": Watcher("a trace, saved and loaded", functools.partial(traced, save=True), output),
    "torch.export, automatic sizes": Watcher("`Dim.AUTO`, `strict=False`", exported, output, is_slow=True),
    "torch.export, named sizes": Watcher(
        "`Dim(…, min, max)` for batch and length", functools.partial(exported, named=True), output, is_slow=True
    ),
    "torch.onnx.export(dynamo=False)": Watcher(
        "run in ONNX Runtime", functools.partial(in_onnxruntime, dynamo=False), output, is_slow=True
    ),
    "torch.onnx.export(dynamo=True)": Watcher(
        "run in ONNX Runtime", functools.partial(in_onnxruntime, dynamo=True), output, is_slow=True
    ),
    "torch.compile": Watcher(
        "`fullgraph=True`, backend `aot_eager`", functools.partial(compiled, fullgraph=True), output, is_slow=True
    ),
    "torch.compile(dynamic=True)": Watcher(
        "backend `aot_eager`", functools.partial(compiled, dynamic=True), output, is_slow=True
    ),
    "torch.compile in training": Watcher(
        "backend `aot_eager`; gradients compared",
        functools.partial(compiled, in_training=True),
        gradients,
        is_slow=True,
    ),
    "make_fx": Watcher("of models loaded with eager attention", graph, output, implementation="eager"),
    "torch.fx.symbolic_trace": Watcher("", symbolic_trace, output),
    "autograd": Watcher("`loss.backward()`", plainly(gradients), gradients),
    "second derivatives": Watcher(
        "`autograd.grad(…, create_graph=True)`, then the gradient of a penalty for one parameter",
        plainly(second),
        second,
    ),
    "torch.autograd.functional.hvp": Watcher(
        "for all parameters outside attention", plainly(hessian_product), hessian_product
    ),
    "torch.func.vmap": Watcher(
        "over the items of a batch, for models loaded with eager attention",
        plainly(one_by_one),
        output,
        implementation="eager",
    ),
    "torch.func.vmap over models": Watcher(
        "`functional_call` with stacked parameters", plainly(several_models), output
    ),
    "torch.func.grad": Watcher("of a `functional_call`", plainly(functional_gradients), gradients),
    "torch.func.jvp": Watcher("of a `functional_call`", plainly(directional), directional),
    "torch.autograd.forward_ad": Watcher("dual numbers, under `no_grad`", plainly(dual_numbers), directional),
    "FlopCounterMode": Watcher("FLOPs of the original, less those that a formula says are saved", counted, flops),
    "torch.profiler": Watcher("", within(torch.profiler.profile), output),
    "checkpoint_wrapper": Watcher(
        "every layer wrapped, without reentrance; gradients compared",
        functools.partial(checkpointed, kind=CheckpointImpl.NO_REENTRANT),
        gradients,
    ),
    "checkpoint_wrapper, reentrant": Watcher(
        "every layer wrapped; gradients compared",
        functools.partial(checkpointed, kind=CheckpointImpl.REENTRANT),
        gradients,
    ),
    "gradient checkpointing": Watcher(
        "of `transformers`, with `use_reentrant=False`; gradients compared",
        functools.partial(checkpointed_by_transformers, use_reentrant=False),
        gradients,
        applies=is_of_transformers,
    ),
    "gradient checkpointing, reentrant": Watcher(
        "of `transformers`, with `use_reentrant=True`; gradients compared",
        functools.partial(checkpointed_by_transformers, use_reentrant=True),
        gradients,
        applies=is_of_transformers,
    ),
    "torch.autocast": Watcher(
        "bfloat16 on a CPU",
        within(functools.partial(torch.autocast, "cpu", torch.bfloat16)),
        output,
        is_lossy=True,
    ),
    "torch.autocast in training": Watcher(
        "bfloat16 on a CPU; gradients compared", in_mixed_precision, gradients, is_lossy=True
    ),
    "torch.ao.quantization.quantize_dynamic": Watcher(
        "every linear layer in 8 bits", quantised, output, is_lossy=True
    ),
    "DistributedDataParallel": Watcher("two processes, gloo; gradients compared", in_two_processes, gradients),
    "fully_shard": Watcher(
        "FSDP2: every layer sharded over two processes, gloo; gradients compared",
        functools.partial(in_two_processes, sharded=True),
        gradients,
    ),
    "TorchDispatchMode": Watcher("a mode that passes operators on", within(Recorder), output),
    "torch.inference_mode": Watcher("", within(torch.inference_mode), output),
    "tensor subclasses": Watcher("inputs of a subclass", subclassed(Subclass), output),
    "tensor wrappers": Watcher("inputs without memory of their own", subclassed(Wrapper), output),
    "output_attentions": Watcher("maps compared", plainly(attentions), attentions, applies=is_of_transformers),
    "copy.deepcopy": Watcher("", copied(copy.deepcopy), output),
    "pickle": Watcher("", copied(lambda model: pickle.loads(pickle.dumps(model))), output),
}

REFUSED = {
    "torch.onnx.export(dynamo=False)": (
        "cannot export relative positions for other lengths",
        "pass `dynamo=True`, or use `mapreuse.export`",
    ),
    "torch.fx.symbolic_trace": ("torch.fx.symbolic_trace cannot follow", "use `torch.export.export` or `make_fx`"),
    "checkpoint_wrapper, reentrant": ("use_reentrant=False", "use `CheckpointImpl.NO_REENTRANT`"),
    "gradient checkpointing, reentrant": ("use_reentrant=False", "pass `use_reentrant=False`"),
}
"""For watchers that are refused although the original model works: a part of the message, and the way out."""
