"""Shared keys, compared with the definition in `maps/reference.py`."""

from dataclasses import replace

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from map_cases import cases, defined_map, make_case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mapreuse.maps import KeySettings, Scores, _gathered, compute_keys, reference

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SETTINGS = KeySettings(keys=3, window=2, block=4)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of blocks, also for short attentions."""
    monkeypatch.setattr(_gathered, "_CHUNK_SCORES", 1 << 10)


def allowed_by(scores: Scores) -> Tensor:
    batch, heads, num_queries, num_keys = scores.shape
    allowed = scores.allowed()
    if allowed is None:
        allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    return allowed.expand(batch, heads, num_queries, num_keys)


def defined_context(source: Scores, reader: Scores, values: Tensor, settings: KeySettings) -> Tensor:
    """The context of a reader by the definition. Heads of the keys may be fewer than heads of the queries."""
    per_head = source.query.shape[1] // source.key.shape[1]
    source, reader = (replace(one, key=one.key.repeat_interleave(per_head, 1)) for one in (source, reader))
    mask = reference.shared_keys(defined_map(source), allowed_by(source).any(1), **vars(settings))
    limited = replace(reader, mask=mask & allowed_by(reader), is_causal=False)
    return defined_map(limited) @ values.repeat_interleave(per_head, 1)


@st.composite
def key_settings(draw):
    return KeySettings(*(draw(st.sampled_from(numbers)) for numbers in ((1, 3, 200), (1, 2, 9), (1, 4, 16))))


def another(scores: Scores, seed: int = 0) -> Scores:
    """Scores of a later layer: other queries and keys, the same mask."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(one.shape, generator=generator).to(one.dtype) for one in (scores.query, scores.key))
    return replace(scores, query=query, key=key)


@given(cases(), key_settings(), st.booleans())
def test_a_reader_attends_to_the_published_keys_its_window_and_the_first_key(case, settings, grad_mode):
    scores, reader = case.scores, another(case.scores)
    with torch.set_grad_enabled(grad_mode):
        context, shared = compute_keys(scores, case.values, settings)
        found = shared.attend(reader, case.values)
    torch.testing.assert_close(context, case.context, **CLOSE)
    torch.testing.assert_close(found, defined_context(scores, reader, case.values, settings), **CLOSE)


@given(cases(lengths=(1, 7, 64, 130)), key_settings(), st.sampled_from([2, 3]))
def test_heads_of_the_queries_may_share_heads_of_the_keys(case, settings, per_head):
    query = torch.cat([case.scores.query * (1 + number) for number in range(per_head)], 1)
    mask = None if case.scores.mask is None else case.scores.mask[:, :1]
    bias = None if case.scores.bias is None else case.scores.bias[:, :1]
    scores = replace(case.scores, query=query, mask=mask, bias=bias, relative=None, sinks=None)
    reader = another(scores)
    context, shared = compute_keys(scores, case.values, settings)
    found = shared.attend(reader, case.values)
    whole = replace(scores, key=scores.key.repeat_interleave(per_head, 1))
    torch.testing.assert_close(context, defined_map(whole) @ case.values.repeat_interleave(per_head, 1), **CLOSE)
    torch.testing.assert_close(found, defined_context(scores, reader, case.values, settings), **CLOSE)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [7, 21, 22, 23, 64, 65, 130])
def test_padded_items_of_different_lengths_match_the_definition(length, is_causal, padding):
    case = make_case(batch=3, num_queries=length, num_keys=length)
    valid = torch.ones(3, length, dtype=torch.bool)
    for item, padded in ((1, length // 3), (2, length - 1)):
        valid[item, slice(padded) if padding == "left" else slice(length - padded, length)] = False
    mask = (valid[:, None, :, None] & valid[:, None, None, :]) if padding == "left" else valid[:, None, None]
    scores = replace(case.scores, mask=mask, is_causal=is_causal)
    reader = another(scores)
    found = compute_keys(scores, case.values, SETTINGS)[1].attend(reader, case.values)
    torch.testing.assert_close(found, defined_context(scores, reader, case.values, SETTINGS), **CLOSE)


@pytest.mark.parametrize("length", [1, 2, 22, 130])
def test_a_step_of_decoding_attends_to_the_keys_that_its_query_published(length):
    case = make_case(batch=2, num_queries=1, num_keys=length)
    mask = torch.ones(2, 1, 1, length, dtype=torch.bool)
    mask[1, ..., : length // 2] = False
    for scores in (case.scores, replace(case.scores, mask=mask)):
        reader = another(scores)
        found = compute_keys(scores, case.values, SETTINGS)[1].attend(reader, case.values)
        torch.testing.assert_close(found, defined_context(scores, reader, case.values, SETTINGS), **CLOSE)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [7, 64, 130])
def test_as_many_keys_as_there_are_make_full_attention(length, is_causal):
    case = make_case(num_queries=length, num_keys=length, is_causal=is_causal)
    shared = compute_keys(case.scores, case.values, KeySettings(keys=length, window=1, block=4))[1]
    torch.testing.assert_close(shared.attend(case.scores, case.values), case.context, **CLOSE)


def test_gradients_of_any_order_are_those_of_attention_with_the_same_mask():
    case = make_case(num_queries=30, num_keys=30, is_causal=True, bias="heads", dtype=torch.float64)
    shared = compute_keys(case.scores, case.values, SETTINGS)[1]

    def context(query: Tensor, key: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return shared.attend(replace(case.scores, query=query, key=key, bias=bias), values)

    leaves = [case.scores.query, case.scores.key, case.values, case.scores.bias]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    assert "attend_to_keys" in context(*leaves).grad_fn.name()
    assert torch.autograd.gradcheck(context, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(context, leaves, fast_mode=True)


def test_neither_layer_stores_a_map():
    """Of all tensors that are made, none has as many elements as one head of the map."""
    length = 600
    case = make_case(batch=1, heads=2, num_queries=length, num_keys=length, is_causal=True)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            sizes.extend(one.numel() for one in tree_leaves(output) if isinstance(one, Tensor))
            return output

    with torch.no_grad(), Sizes():
        compute_keys(case.scores, case.values, SETTINGS)[1].attend(case.scores, case.values)
    assert max(sizes) < length * length


class Layers(torch.nn.Module):
    """A source layer and a reader; the sum of their contexts."""

    def forward(self, query: Tensor, key: Tensor, values: Tensor) -> Tensor:
        scores = Scores(query, key, 0.7, is_causal=True)
        context, shared = compute_keys(scores, values, SETTINGS)
        return context + shared.attend(replace(scores, query=query.flip(-1)), values)


def inputs(length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    case = make_case(heads=2, num_queries=length, num_keys=length, seed=seed)
    return case.scores.query, case.scores.key, case.values


WATCHERS = {
    "trace": lambda: torch.jit.trace(Layers(), inputs(90), check_trace=False),
    "export": lambda: torch.export.export(
        Layers(), inputs(90), dynamic_shapes=({2: torch.export.Dim("length", min=16, max=256)},) * 3
    ).module(),
    "compile": lambda: torch.compile(Layers(), backend="aot_eager", dynamic=True),
}


@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.filterwarnings("ignore")  # of the tools themselves
def test_recorded_passes_are_right_at_other_lengths(watcher, monkeypatch):
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", watcher == "compile"
    )  # the compiler follows the checks
    with torch.no_grad():
        recorded = WATCHERS[watcher]()
        for length in (90, 130, 40):
            torch.testing.assert_close(recorded(*inputs(length)), Layers()(*inputs(length)), **CLOSE)


def test_vmap_gives_the_same_as_a_loop():
    stacked = [torch.stack(parts) for parts in zip(inputs(90, 0), inputs(90, 1), strict=True)]
    with torch.no_grad():
        found = torch.func.vmap(Layers())(*stacked)
        for index in range(2):
            torch.testing.assert_close(found[index], Layers()(*inputs(90, index)), **CLOSE)


def test_flops_of_a_reader_are_those_of_its_gathered_keys():
    length, heads, dim, value_dim = 128, 2, 4, 5
    query, key, values = inputs(length)
    shared = compute_keys(Scores(query, key, 0.7, is_causal=True), values, SETTINGS)[1]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shared.attend(Scores(query, key, 0.7, is_causal=True), values)
    gathered_keys = 1 + SETTINGS.keys + SETTINGS.window - 1 + SETTINGS.block
    assert counter.get_total_flops() == 2 * 2 * heads * length * gathered_keys * (dim + value_dim)
