"""Bytes that operators read and write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

_PART_OF_OPERAND = {
    "query": "scores",
    "key": "scores",
    "relative_query": "positional_scores",
    "relative_key": "positional_scores",
    "mask": "softmax",
    "bias": "softmax",
    "map": "softmax",
    "scales": "softmax",
}
"""Parts that the operands of a computing layer's kernel belong to. The others are values and contexts."""

_WRITE_ONLY = ("aten::copy_", "aten::fill_", "aten::zero_")
"""Operators that overwrite their first operand without reading it."""


def traffic(
    operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, part: str
) -> Iterator[tuple[str, int]]:
    """Parts, and the bytes that an operator reads and writes there: its inputs and outputs, each once.

    Views and uninitialised memory are free. An expanded tensor counts as the memory that it occupies. What a kernel
    reads again, or keeps in a cache, is not known.

    Args:
        operator: the operator, as a dispatch mode sees it.
        args, kwargs: its arguments.
        result: its result.
        part: the part that it belongs to. Kernels of this package are divided by their operands.
    """
    schema = operator._schema
    name = schema.name
    if getattr(operator, "is_view", False) or "empty" in name:
        return
    given = list(zip(schema.arguments, args, strict=False))
    given += [(one, kwargs[one.name]) for one in schema.arguments if one.name in kwargs]
    inside = name.startswith("mapreuse::")
    parts = {} if name == "mapreuse::apply_map" else _PART_OF_OPERAND
    read: set[int] = set()
    for argument, value in given:
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        is_input = not (is_written and (argument.kwarg_only or inside or name in _WRITE_ONLY))
        of_operand = parts.get(argument.name, "context") if inside else part
        for tensor in _tensors(value):
            read.add(_memory(tensor))
            yield of_operand, _size(tensor) * (is_input + is_written)
    for value, output in zip(tree_leaves(result), _names(schema, result), strict=True):
        # Memory of an operand is a view, or was counted above.
        if isinstance(value, Tensor) and _memory(value) not in read:
            yield parts.get(output, "context") if inside else part, _size(value)


def _names(schema: Any, result: Any) -> list[str]:
    """The name of the output that each tensor of a result belongs to."""
    outputs = result if isinstance(result, tuple) else (result,)
    return [
        one.name for one, output in zip(schema.returns, outputs, strict=True) for _ in range(len(tree_leaves(output)))
    ]


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in tree_leaves(value) if isinstance(one, Tensor)]


def _size(tensor: Tensor) -> int:
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
