"""Tools that record, transform or watch a forward pass.

Add a watcher as one entry of `WATCHERS`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import pickle
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.export import Dim
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from watched import FAMILIES, HEADS, LAYERS, LONGEST, PLANS, WIDTH, Defined, Watched

import mapreuse as mr
from mapreuse.models import Layer, find_stack

Tensors = tuple[Tensor, ...]
Found = dict[str, Tensor]
"""What a run gives: "output", or gradients by the names of parameters."""
Run = Callable[[Tensors], Found]


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


@dataclasses.dataclass(frozen=True)
class Case:
    """One tool, one model, and the number of positions of the inputs that it is run with."""

    watcher: str
    family: str
    plan: str
    storage: str
    length: int

    def __str__(self) -> str:
        return f"{self.watcher}-{self.family}-{self.plan}-{self.storage}-{self.length}"


def output(model: Callable[..., Tensor], tensors: Tensors) -> Found:
    with torch.no_grad():
        return {"output": model(*tensors)}


def loss(model: Callable[..., Tensor], tensors: Tensors) -> Tensor:
    """A sum of the outputs with different weights; after a norm, the sum of their squares would be constant."""
    outputs = model(*tensors)
    return (outputs * torch.arange(outputs.numel()).view_as(outputs).cos()).mean()


def gradients(model: Watched, tensors: Tensors, run: Callable[..., Tensor] | None = None) -> Found:
    model.zero_grad()
    loss(model if run is None else run, tensors).backward()
    return comparable(model, {name: parameter.grad for name, parameter in model.named_parameters()})


def changed_by_plans(layer: Layer) -> list[nn.Parameter]:
    """The parameters of a layer that a plan removes or orders anew."""
    beside = [
        one for name, one in layer.layer.named_parameters() if name.startswith("attention.output.dense")
    ]  # BERT
    return [*layer.attention.parameters(), *beside]


def comparable(model: Watched, slopes: dict[str, Tensor | None]) -> Found:
    """Gradients of the parameters that no plan changes, and norms of the others."""
    norms: Found = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, layer in enumerate(find_stack(model.model).layers):
        inner = [slopes.pop(names[id(parameter)], None) for parameter in changed_by_plans(layer)]
        squares = [slope.square().sum() for slope in inner if slope is not None]
        norms[f"attention of layer {index}"] = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
    return norms | {name: slope for name, slope in slopes.items() if slope is not None}


def outside_attention(model: Watched) -> dict[str, nn.Parameter]:
    """The parameters of the layers that no plan changes."""
    layers = find_stack(model.model).layers
    inner = {id(parameter) for layer in layers for parameter in changed_by_plans(layer)}
    outer = {id(parameter) for layer in layers for parameter in layer.layer.parameters()} - inner
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in outer}


def directions(parameters: dict[str, nn.Parameter]) -> Found:
    return {name: (10 * parameter.detach()).sin() / 10 for name, parameter in parameters.items()}


def loss_of(model: Watched, tensors: Tensors) -> Callable[[Found], Tensor]:
    return lambda parameters: loss(functools.partial(functional_call, model, parameters), (tensors,))


def second(model: Watched, tensors: Tensors) -> Found:
    """The gradient of the squared norm of all gradients, for one parameter of the first layer."""
    name, parameter = next(iter(outside_attention(model).items()))
    with sdpa_kernel(SDPBackend.MATH):
        learned = [one for one in model.parameters() if one.requires_grad]
        slopes = torch.autograd.grad(loss(model, tensors), learned, create_graph=True, allow_unused=True)
        penalty = torch.stack([slope.square().sum() for slope in slopes if slope is not None]).sum()
        return {name: torch.autograd.grad(penalty, [parameter])[0]}


def hessian_product(model: Watched, tensors: Tensors) -> Found:
    parameters = outside_attention(model)
    names, vectors = list(parameters), tuple(directions(parameters).values())

    def function(*values: Tensor) -> Tensor:
        return loss_of(model, tensors)(dict(zip(names, values, strict=True)))

    with sdpa_kernel(SDPBackend.MATH):
        _, products = torch.autograd.functional.hvp(function, tuple(parameters.values()), vectors)
    return dict(zip(names, products, strict=True))


def directional(model: Watched, tensors: Tensors) -> Found:
    parameters = outside_attention(model)
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    function = functools.partial(functional_call, model, args=tensors)
    with sdpa_kernel(SDPBackend.MATH):
        outputs, slopes = torch.func.jvp(function, (values,), (directions(parameters),))
    return {"output": outputs, "slopes": slopes}


def attentions(model: Watched, tensors: Tensors) -> Found:
    with torch.no_grad():
        if isinstance(model, Defined):
            model(*tensors)
            maps = model.maps
        else:
            batch = dict(zip(model.names, tensors[:-1], strict=True))
            maps = model.model(**batch, output_attentions=True).attentions
    return {f"layer {layer}": one * tensors[-1][:, None] for layer, one in enumerate(maps)}


def flops(model: Watched, tensors: Tensors) -> Found:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*tensors)
    return {"flops": torch.tensor([float(counter.get_total_flops())])}


def saved_flops(case: Case, batch: int, length: int) -> int:
    """FLOPs of the queries, keys and scores that reusing heads do not compute.

    Of the scores of relative positions, the original computes those of all 2·T − 1 distances for each query, and the
    kernels, which serve long inputs and compressed maps, only those of T. The forward of Whisper has a fixed number
    of heads: a layer in which some heads compute projects the queries and keys of all.
    """
    saved, dim, key_heads = 0, WIDTH // HEADS, 2 if case.family == "Llama" else HEADS
    distances = 2 * length - 1 if case.family in ("Wav2Vec2-Conformer", "Parakeet") else 0
    copies = batch if case.family == "Parakeet" else 1  # of the distances, in the original
    for layer in range(LAYERS):
        own = [head for head, source in enumerate(PLANS[case.plan].heads(layer, HEADS)) if source is None]
        keys = len({head * key_heads // HEADS for head in own})
        reusing = HEADS - len(own)
        if case.family == "Whisper encoder" and own:
            reusing, keys = 0, key_heads
        is_compressed = case.storage in ("dense16", "dense8") and PLANS[case.plan].readers(layer)
        computed_distances = min(distances, length) if length > 90 or is_compressed else distances
        saved += (
            2
            * WIDTH
            * dim
            * (batch * length * (reusing + key_heads - keys) + distances * (copies * HEADS - len(own)))
        )
        scores = HEADS * (length + distances)
        scores -= (HEADS if case.storage == "recompute" else len(own)) * (length + computed_distances)
        saved += 2 * batch * length * dim * scores
    return saved


def plainly(compute: Callable[[Watched, Tensors], Found]) -> Callable[..., Run]:
    """A watcher that records nothing."""
    return lambda model, case, example: functools.partial(compute, model)


def within(context: Callable[[], Any]) -> Callable[..., Run]:
    """The output while a context is open."""

    def compute(model: Watched, tensors: Tensors) -> Found:
        with torch.no_grad(), context():
            return {"output": model(*tensors)}

    return plainly(compute)


def traced(model: Watched, case: Case, example: Tensors, with_gradients: bool = False, save: bool = False) -> Run:
    with torch.set_grad_enabled(with_gradients):
        run = torch.jit.trace(model, example, check_trace=False)
        for _ in range(2):  # TorchScript optimises the second run, which some original models do not survive
            run(*example)
    if save:
        buffer = io.BytesIO()
        torch.jit.save(run, buffer)
        buffer.seek(0)
        run = torch.jit.load(buffer)
    return lambda tensors: gradients(model, tensors, run) if with_gradients else output(run, tensors)


def dynamic_shapes(case: Case, example: Tensors, named: bool = False) -> tuple[dict[int, Any], ...]:
    """Of each input, the sizes that change from call to call."""
    stretch = FAMILIES[case.family].stretch
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=2, max=LONGEST)
    if not named:
        return tuple({0: Dim.AUTO, 1: Dim.AUTO} if stretch else {0: Dim.AUTO} for _ in example)
    if not stretch:
        return tuple({0: batch} for _ in example)
    inner = length if stretch == 1 else stretch * length
    return (*({0: batch, 1: inner} for _ in example[:-1]), {0: batch, 1: length})


def exported(model: Watched, case: Case, example: Tensors, named: bool = False) -> Run:
    with torch.no_grad():
        shapes = (dynamic_shapes(case, example, named),)
        run = torch.export.export(model, example, dynamic_shapes=shapes, strict=False).module()
    return functools.partial(output, run)


def in_onnxruntime(model: Watched, case: Case, example: Tensors, dynamo: bool) -> Run:
    import onnxruntime

    names, file = [*model.names, "rows"], io.BytesIO()
    if dynamo:
        shapes = (dynamic_shapes(case, example),)
        torch.onnx.export(model, example, file, input_names=names, dynamo=True, dynamic_shapes=shapes, verbose=False)
    else:
        axes = {name: list(one) for name, one in zip(names, dynamic_shapes(case, example), strict=True)}
        with torch.no_grad():
            torch.onnx.export(model, example, file, input_names=names, dynamo=False, dynamic_axes=axes)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    taken = {one.name for one in session.get_inputs()}

    def run(tensors: Tensors) -> Found:
        arrays = {name: one.numpy() for name, one in zip(names, tensors, strict=True) if name in taken}
        return {"output": torch.from_numpy(session.run(None, arrays)[0])}

    return run


def compiled(model: Watched, case: Case, example: Tensors, in_training: bool = False, **settings: Any) -> Run:
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", **settings)
    one = functools.partial(gradients, model, run=run) if in_training else functools.partial(output, run)
    one(example)
    return one


def graph(model: Watched, case: Case, example: Tensors) -> Run:
    with torch.no_grad():
        return functools.partial(output, make_fx(model)(*example))


def symbolic_trace(model: Watched, case: Case, example: Tensors) -> Run:
    model.model = torch.fx.symbolic_trace(model.model)
    return functools.partial(output, model)


def one_by_one(model: Watched, tensors: Tensors) -> Found:
    with torch.no_grad():
        return {"output": torch.func.vmap(lambda *one: model(*(part[None] for part in one))[0])(*tensors)}


def several_models(model: Watched, tensors: Tensors) -> Found:
    """The output of the first of two models, whose parameters differ."""
    pairs = {name: torch.stack([one.detach(), 0.9 * one.detach()]) for name, one in model.named_parameters()}
    with torch.no_grad():
        return {"output": torch.func.vmap(lambda one: functional_call(model, one, tensors))(pairs)[0]}


def functional_gradients(model: Watched, tensors: Tensors) -> Found:
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return comparable(model, torch.func.grad(loss_of(model, tensors))(values))


def dual_numbers(model: Watched, tensors: Tensors) -> Found:
    parameters = outside_attention(model)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        tangents = directions(parameters)
        duals = {name: forward_ad.make_dual(one.detach(), tangents[name]) for name, one in parameters.items()}
        outputs, slopes = forward_ad.unpack_dual(functional_call(model, duals, tensors))
    return {"output": outputs, "slopes": torch.zeros_like(outputs) if slopes is None else slopes}


def checkpointed(model: Watched, case: Case, example: Tensors, kind: CheckpointImpl) -> Run:
    wrapped = copy.deepcopy(model)
    stack = find_stack(wrapped.model)
    layers = stack.module.get_submodule(stack.list_name)
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer, kind)

    def run(tensors: Tensors) -> Found:
        wrapped.zero_grad()
        loss(wrapped, tensors).backward()
        slopes = {
            name.replace("_checkpoint_wrapped_module.", ""): one.grad for name, one in wrapped.named_parameters()
        }
        return comparable(model, slopes)

    return run


def checkpointed_by_transformers(model: Watched, case: Case, example: Tensors, use_reentrant: bool) -> Run:
    settings = {"use_reentrant": use_reentrant}
    model.model.train().activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return functools.partial(gradients, model)


class NotQuantised(Exception):
    """A linear layer was left as it is."""


def quantised(model: Watched, case: Case, example: Tensors) -> Run:
    changed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    left = [
        name
        for name, module in changed.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    ]
    if left:
        raise NotQuantised(f"{len(left)} linear layers are not quantised, such as {left[0]}")
    return functools.partial(output, changed)


def in_mixed_precision(model: Watched, case: Case, example: Tensors) -> Run:
    def run(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(*tensors)

    return lambda tensors: gradients(model, tensors, run)


def counted(model: Watched, case: Case, example: Tensors) -> Run:
    def run(tensors: Tensors) -> Found:
        saved = 0 if mr.plan_of(model.model) is None else saved_flops(case, *tensors[-1].shape[:2])
        return {"flops": flops(model, tensors)["flops"] + saved}

    return run


def in_two_processes(model: Watched, case: Case, example: Tensors) -> Run:
    def run(tensors: Tensors) -> Found:
        halves = [tuple(one[rank::2] for one in tensors) for rank in range(2)]
        started = [
            process.submit(_gradients_of_rank, model, half) for process, half in zip(_ranks(), halves, strict=True)
        ]
        found, _ = (one.result() for one in started)
        return comparable(model, {name: torch.from_numpy(slope) for name, slope in found.items()})

    return run


@functools.cache
def _ranks() -> list[ProcessPoolExecutor]:
    """Two processes that form a group."""
    file, context = tempfile.mktemp(), get_context("spawn")
    return [ProcessPoolExecutor(1, context, initializer=_join, initargs=(rank, file)) for rank in range(2)]


def end_processes() -> None:
    """End the two processes, which would keep the process that started them from ending."""
    for process in _ranks():
        process.shutdown()
    _ranks.cache_clear()


def _join(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)


def _gradients_of_rank(model: Watched, tensors: Tensors) -> dict[str, Any]:
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    loss(parallel, tensors).backward()
    return {name: one.grad.numpy() for name, one in model.named_parameters() if one.grad is not None}


def subclassed(kind: type[Tensor]) -> Callable[..., Run]:
    def compute(model: Watched, tensors: Tensors) -> Found:
        with torch.no_grad():
            found = model(*(kind(one) if kind is Wrapper else one.as_subclass(kind) for one in tensors))
        return {"output": found.inner if isinstance(found, Wrapper) else found.as_subclass(Tensor)}

    return plainly(compute)


class Subclass(Tensor):
    """A tensor of another class with the same memory."""


class Wrapper(Tensor):
    """A tensor without memory of its own, around another one."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, strides=inner.stride(), storage_offset=inner.storage_offset()
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda one: one.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, function(*args, **kwargs))


class Recorder(TorchDispatchMode):
    """Passes every operator on."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **kwargs or {})


def copied(copy_of: Callable[[Watched], Watched]) -> Callable[..., Run]:
    return lambda model, case, example: functools.partial(output, copy_of(model))


def is_of_transformers(family: str) -> bool:
    return FAMILIES[family].is_of_transformers


PARALLEL = "DistributedDataParallel"
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
    PARALLEL: Watcher("two processes, gloo; gradients compared", in_two_processes, gradients),
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
