"""What each tool makes of a watched model: a function that runs it on other inputs."""

from __future__ import annotations

import copy
import functools
import io
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from measured import (
    Case,
    Found,
    Run,
    Tensors,
    comparable,
    directions,
    flops,
    gradients,
    loss,
    loss_of,
    output,
    outside_attention,
    saved_flops,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.export import Dim
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from watched import FAMILIES, LONGEST, Watched

import mapreuse as mr
from mapreuse.models import find_stack


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


def in_two_processes(model: Watched, case: Case, example: Tensors, sharded: bool = False) -> Run:
    def run(tensors: Tensors) -> Found:
        halves = [tuple(one[rank::2] for one in tensors) for rank in range(2)]
        started = [
            process.submit(_gradients_of_rank, model, half, sharded)
            for process, half in zip(_ranks(), halves, strict=True)
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


def _gradients_of_rank(model: Watched, tensors: Tensors, sharded: bool) -> dict[str, Any]:
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for layer in find_stack(model.model).layers:
            fully_shard(layer.layer, mesh=mesh)
        parallel: Any = fully_shard(model, mesh=mesh)
    else:
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    loss(parallel, tensors, torch.distributed.get_rank(), 2).backward()
    slopes = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {name: (one.full_tensor() if sharded else one).numpy() for name, one in slopes.items()}


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
