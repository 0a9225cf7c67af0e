"""Breakdown: the time, the FLOPs and the bytes of a pass belong to the parts that took them."""

import copy
import json
import time

import pytest
import torch
from families import build
from tiny_models import SENTENCES, save_bert
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import mapreuse as mr
from mapreuse import cli
from mapreuse.maps import KERNEL_RANGE, _blocked
from mapreuse.measure import PARTS, Contestant, breakdown, breakdown_tables, part_of_modules
from mapreuse.measure._attribution import Event, Range, Sizes, attribute, counted_pass
from mapreuse.measure._traffic import traffic

FRAMES = 48
SLEEP = 0.05
LAYERS = 4
ATTENTION = ("positional_scores", "scores", "softmax", "context", "fused")


def encoder():
    return build("parakeet")[0]


def features(frames=FRAMES):
    return {"input_features": torch.randn(1, 4 * frames, 16, generator=torch.Generator().manual_seed(0))}


@pytest.fixture(scope="module")
def results():
    batches = {"48": features(), "96": features(2 * FRAMES)}
    return breakdown(encoder(), batches, plans="full,4x1", kinds=("sdpa", "eager", "mapreuse"), repeats=1)


@pytest.fixture(scope="module")
def measured(results):
    return results["breakdowns"]


def broken_down(*given, **options):
    return breakdown(*given, **options)["breakdowns"]


def flops(found):
    return {part: cost["flops"] for part, cost in found["parts"].items() if cost["flops"]}


def test_the_flops_of_all_parts_are_those_of_the_whole_pass(measured):
    for found in measured:
        kind, _, plan = found["name"].partition(" ")
        model = Contestant(kind, plan or "full").build(encoder())
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**features(int(found["batch"])))
        assert sum(flops(found).values()) == counter.get_total_flops()


def test_flops_of_parakeets_parts_are_those_of_their_formulas(measured):
    eager, fused = (flops(next(one for one in measured if one["name"] == name)) for name in ("eager", "sdpa"))
    width, distances = 32, 2 * FRAMES - 1

    for part in ("query", "key", "value", "output"):
        assert eager[part] == LAYERS * 2 * FRAMES * width**2
    assert eager["positions"] == LAYERS * 2 * distances * width**2
    assert eager["positional_scores"] == LAYERS * 2 * FRAMES * distances * width
    assert eager["scores"] == eager["context"] == LAYERS * 2 * FRAMES**2 * width
    assert eager["feed_forward"] == LAYERS * 2 * (2 * 2 * FRAMES * width * 64)
    assert not {"softmax", "norms"} & eager.keys()
    assert fused["fused"] == eager["scores"] + eager["context"]


def test_bytes_are_the_sizes_of_inputs_and_outputs(monkeypatch):
    monkeypatch.setattr(_blocked, "_MAX_SHORT", 0)  # the kernels, in spite of the small maps
    width, heads, frames, distances = 32, 4, FRAMES, 2 * FRAMES - 1
    model = mr.apply(encoder(), mr.ReusePlan.parse("4x1"))
    with torch.inference_mode():
        _, found = counted_pass(model, features(), Sizes(FRAMES, width // heads))
    rows, one_map = frames * width, heads * frames * frames
    linear = 2 * rows + width * width + width

    for part in ("query", "key", "value", "output"):
        # "query" also adds two positional biases, each of which reads one and writes another tensor.
        assert found[0, part] == 4 * (linear + (part == "query") * 2 * (2 * rows + width))
    assert found[0, "scores"] == 4 * 2 * rows
    assert found[0, "positional_scores"] == 4 * (rows + distances * width)
    assert found[0, "softmax"] == 4 * one_map
    assert found[0, "context"] == 4 * 2 * rows + 16  # and the valid lengths
    assert found[3, "context"] == 4 * (one_map + 2 * rows) + 16
    assert (3, "scores") not in found


def test_bytes_of_views_of_expanded_tensors_and_of_overwritten_memory():
    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.total += sum(size for _, size in traffic(func, args, kwargs or {}, result, "rest"))
            return result

    row = torch.ones(1, 8)
    with Count() as count:
        torch.empty(8, 8).copy_(row.expand(8, 8).t()).add_(1.0)  # reads 8, writes 64; reads 64, writes 64
    assert count.total == 4 * (8 + 64 + 64 + 64)


def test_every_module_of_a_layer_belongs_to_a_part():
    parts = part_of_modules(mr.apply(encoder(), mr.ReusePlan.parse("4x1")))

    assert parts["layers.0.self_attn"] == (0, "attention")
    assert parts["layers.0.self_attn.q_proj"] == (0, "query")
    assert "layers.1.self_attn.q_proj" not in parts
    assert parts["layers.3.conv"] == (3, "convolution")
    assert parts["subsampling"] == (None, "subsampling")
    assert {part for _, part in parts.values()} - {"attention"} <= PARTS.keys()


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("bert", {"query", "key", "value", "embeddings"}),
        ("gpt2", {"projections", "embeddings"}),
        ("distilbert", {"query", "key", "value", "embeddings"}),
        pytest.param("wav2vec2", {"query", "key", "value"}, marks=pytest.mark.full),
        pytest.param("vit", {"query", "key", "value"}, marks=pytest.mark.full),
    ],
)
def test_other_families_have_the_same_parts_and_every_product_belongs_to_one(family, expected):
    model, batch = build(family)
    (original, shared) = broken_down(model, [batch], plans="4x1", repeats=1)
    parts = {part for part, cost in original["parts"].items() if cost["seconds"]}

    assert expected | {"output", "feed_forward", "norms"} <= parts
    assert original["layers"][0]["parts"]["rest"]["flops"] == 0
    assert sum(part["flops"] for part in original["parts"].values()) > sum(
        part["flops"] for part in shared["parts"].values()
    )
    _, reusing = shared["layers"]
    assert reusing["parts"]["value"]["seconds"] + reusing["parts"]["projections"]["seconds"] > 0
    assert not any(reusing["parts"][part]["seconds"] for part in ("query", "key", "scores", "softmax", "fused"))


def attention_events(*steps):
    """A pass of one attention module: its ranges, and its operators (name, shapes, nanoseconds) in order."""
    now, events = 10, []
    for name, shapes, duration in steps:
        events.append(Event(name, now, now + duration, shapes, device_time=duration // 2))
        now += duration
    return [Event("", 0, now + 5, range=RANGES[0]), Event("", 10, now, range=RANGES[1]), *events]


RANGES = [Range(None, "rest"), Range(3, "query", is_attention=True)]
BLOCK = (
    ("aten::add", [[4, 100, 8], [4, 1, 8]], 1),
    ("aten::bmm", [[4, 64, 8], [4, 8, 163], [4, 64, 163]], 20),
    ("aten::as_strided", [[4, 64, 163]], 2),
    ("aten::baddbmm", [[4, 64, 100], [4, 64, 8], [4, 8, 100], []], 30),
    ("aten::softmax", [[4, 64, 100]], 40),
    ("aten::mm", [[64, 100], [100, 8], [64, 8]], 50),
)


def nanoseconds(events, **settings):
    costs = attribute(events, Sizes(100, 8), **settings)
    return {key: round(seconds * 1e9) for key, seconds in costs.items()}


def test_a_phase_lasts_from_its_operator_to_the_next_one():
    assert nanoseconds(attention_events(*BLOCK, *BLOCK[1:])) == {
        (None, "rest"): 15,
        (3, "query"): 1,
        (3, "positional_scores"): 44,
        (3, "scores"): 60,
        (3, "softmax"): 80,
        (3, "context"): 100,
    }


def test_the_time_of_a_c_kernel_is_divided_as_the_kernel_measured_it():
    """Two threads ran at the same time, so that shares count, not seconds."""
    steps = [("aten::add", [[4, 100, 8], [4, 1, 8]], 1), (KERNEL_RANGE, [], 90), ("aten::view", [[4, 100, 8]], 3)]
    phases = {"positional_scores": 60e-9, "scores": 60e-9, "softmax": 30e-9, "context": 30e-9}
    assert nanoseconds(attention_events(*steps), kernels=[phases]) == {
        (None, "rest"): 15,
        (3, "query"): 1,
        (3, "positional_scores"): 30,
        (3, "scores"): 30,
        (3, "softmax"): 15,
        (3, "context"): 18,
    }


def test_c_kernels_have_phases(monkeypatch):
    monkeypatch.setattr(_blocked, "_MAX_SHORT", 0)
    (found,) = broken_down(encoder(), [features()], plans="4x1", kinds=("mapreuse",), repeats=1)
    computing, reusing = found["layers"]
    for part in ("positional_scores", "scores", "softmax", "context"):
        assert computing["parts"][part]["seconds"] > 0
        assert (reusing["parts"][part]["seconds"] > 0) == (part == "context")


def test_operators_inside_operators_count_once():
    outer = Event("aten::matmul", 10, 40, [[1, 4, 100, 8], [1, 4, 8, 199]])
    inner = [Event("aten::clone", 12, 20, [[1]]), Event("aten::bmm", 22, 38, [[4, 100, 8], [4, 8, 199]])]
    events = [Event("", 0, 50, range=RANGES[0]), Event("", 5, 45, range=RANGES[1]), outer, *inner]

    assert nanoseconds(events) == {(None, "rest"): 10, (3, "query"): 5, (3, "positional_scores"): 35}


def test_scores_and_context_differ_if_there_are_as_many_frames_as_dimensions():
    scores = ("aten::bmm", [[4, 8, 8], [4, 8, 8]], 3)
    steps = [("aten::bmm", [[4, 8, 8], [4, 8, 15]], 2), scores, ("aten::softmax", [[4, 8, 8]], 4), scores]
    costs = attribute(attention_events(*steps, ("aten::mm", [[8, 8], [8, 16]], 5)), Sizes(8, 8))

    assert {part: round(seconds * 1e9) for (_, part), seconds in costs.items() if seconds and part != "rest"} == {
        "positional_scores": 2,
        "scores": 3,
        "softmax": 4,
        "context": 8,
    }


@pytest.mark.parametrize("name", ["aten::scaled_dot_product_attention", "somewhere::one_kernel_for_everything"])
def test_an_operator_without_phases_is_fused(name):
    assert nanoseconds(attention_events(BLOCK[0], (name, [], 9)))[3, "fused"] == 9


def test_on_a_gpu_a_part_has_the_time_of_its_kernels():
    assert nanoseconds(attention_events(*BLOCK), on_device=True) == {
        (None, "rest"): 0,
        (3, "query"): 0,
        (3, "positional_scores"): 11,
        (3, "scores"): 15,
        (3, "softmax"): 20,
        (3, "context"): 25,
    }


SLOW = {
    "layers.0.self_attn.q_proj": "query",
    "layers.0.feed_forward2": "feed_forward",
    "subsampling": "subsampling",
    "layers.0": "rest",
}
MORE_SLOW = {
    "layers.0.self_attn.k_proj": "key",
    "layers.0.self_attn.v_proj": "value",
    "layers.0.self_attn.relative_k_proj": "positions",
    "layers.0.self_attn.o_proj": "output",
    "layers.0.conv": "convolution",
    "layers.0.norm_out": "norms",
}


@pytest.mark.parametrize(
    ("path", "part"), [*SLOW.items(), *(pytest.param(*pair, marks=pytest.mark.full) for pair in MORE_SLOW.items())]
)
def test_a_slow_module_is_found_within_ten_tries(path, part):
    """Other processes may take the processor in any pass."""
    model = encoder()
    module = model.get_submodule(path)
    forward = module.forward
    module.forward = lambda *args, **kwargs: (time.sleep(SLEEP), forward(*args, **kwargs))[1]
    for _ in range(10):
        (found,) = broken_down(model, [features()], kinds=("sdpa",), repeats=1)
        others = [cost["seconds"] for name, cost in found["parts"].items() if name != part]
        if max(others) < SLEEP:
            break
    assert max(others) < SLEEP <= found["parts"][part]["seconds"], found["parts"]


def test_a_reusing_layer_costs_values_context_and_output_alone(measured):
    found = next(one for one in measured if one["name"] == "mapreuse 4x1")
    computing, reusing = found["layers"]

    assert (computing["kind"], computing["count"], reusing["kind"], reusing["count"]) == (
        "computing",
        1,
        "reusing",
        3,
    )
    for part in ("query", "key", "positions", "positional_scores", "scores", "softmax"):
        assert (reusing["parts"][part]["seconds"], reusing["parts"][part]["flops"]) == (0, 0)
        assert computing["parts"][part]["seconds"] > 0
    assert all(reusing["parts"][part]["seconds"] > 0 for part in ("value", "context", "output", "feed_forward"))
    assert reusing["parts"]["value"]["flops"] == reusing["parts"]["output"]["flops"] == 2 * FRAMES * 32 * 32
    assert reusing["parts"]["context"]["flops"] == 2 * FRAMES * FRAMES * 32


def test_a_layer_with_heads_of_both_kinds_is_partly_reusing():
    plan = mr.ReusePlan.from_sources([0, 0, 2, 3], heads={1: [1, 1, 0, None]})
    (found,) = broken_down(mr.apply(encoder(), plan), [features()], repeats=1)

    assert found["name"] == "as saved"
    assert [layer["kind"] for layer in found["layers"]] == ["computing", "partly reusing"]
    assert all(layer["parts"]["softmax"]["seconds"] > 0 for layer in found["layers"])


def test_every_contestant_has_its_own_phases(measured):
    unfused = {"positional_scores", "scores", "softmax", "context"}

    for one in measured:
        phases = {part for part in ATTENTION if one["parts"][part]["seconds"] > 0}
        assert phases == ({"positional_scores", "fused"} if one["name"] == "sdpa" else unfused), one["name"]


def test_the_model_is_left_as_it_was():
    model = encoder()
    before = copy.deepcopy(model)
    breakdown(model, [features()], plans="4x1", repeats=1)

    assert mr.plan_of(model) is None
    assert model.config._attn_implementation == before.config._attn_implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_without_a_warm_up_each_contestant_runs_four_times():
    """To find sizes, to be timed, to be profiled, and to be counted."""
    passes = []
    model = encoder()
    model.register_forward_pre_hook(lambda *_: passes.append(None))
    (found,) = broken_down(model, [features()], kinds=("sdpa",), repeats=1, warmup=0)
    assert len(passes) == 4
    assert found["coverage"] == pytest.approx(found["attributed"] / found["whole"]["seconds"])


def test_json_holds_every_part_of_every_contestant_and_batch(results, measured):
    data = json.loads(json.dumps(results))

    assert data["parts"] == PARTS
    assert [(one["batch"], one["name"]) for one in data["breakdowns"]] == [
        (one["batch"], one["name"]) for one in measured
    ]
    for one in data["breakdowns"]:
        for parts in (one["parts"], *(layer["parts"] for layer in one["layers"])):
            assert list(parts) == list(PARTS)
            assert all(cost.keys() == {"seconds", "flops", "bytes"} for cost in parts.values())
        assert sum(cost["seconds"] for cost in one["parts"].values()) == pytest.approx(one["attributed"])
        assert one["coverage"] == pytest.approx(one["attributed"] / one["whole"]["seconds"])  # one repeat
        assert sum(layer["count"] for layer in one["layers"]) == LAYERS


def test_tables_show_every_contestant_of_each_batch(results):
    names = ["sdpa", "eager", "mapreuse full", "mapreuse 4x1"]
    tables = breakdown_tables(results)

    assert [table.title.partition(":")[0] for table in tables] == ["48"] * 4 + ["96"] * 4
    for table in tables:
        assert {len(row) for row in table.rows} == {len(table.header)}
        assert all(any(name in title for title in table.header) for name in names)


def test_parts_that_do_not_add_up_get_a_note(results, measured):
    wrong, right = (results | {"breakdowns": [measured[0] | {"coverage": coverage}]} for coverage in (0.833, 1.04))

    assert "83.3%" in breakdown_tables(wrong)[0].notes[0]
    assert not breakdown_tables(right)[0].notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "at least 1"),
        ({"warmup": -1}, "at least 0"),
        ({"kinds": ("no_such",)}, "no_such"),
        ({"kinds": ("sdpa+compile",)}, "compiled"),
        ({"plans": "2x1"}, "is for 2 layers"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        breakdown(encoder(), [features()], **options)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
def test_on_a_gpu_the_time_of_kernels_belongs_to_the_parts_that_launched_them():
    batch = {"input_features": features()["input_features"].cuda()}
    for found in broken_down(encoder().cuda(), [batch], plans="4x1", repeats=2):
        assert found["parts"]["feed_forward"]["seconds"] > 0
        assert found["parts"]["context"]["seconds"] + found["parts"]["fused"]["seconds"] > 0


def test_the_command_measures_a_saved_model_and_writes_json(tmp_path):
    save_bert(tmp_path / "model")
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES))
    words = ["breakdown", str(tmp_path / "model"), "--calibration", str(tmp_path / "sentences.txt"), "--plans", "3x1"]
    file = tmp_path / "out" / "breakdown.json"
    ran = CliRunner().invoke(cli.app, [*words, "--repeats", "1", "--json", str(file)])

    assert ran.exit_code == 0, ran.output
    assert "feed-forward" in ran.stdout
    assert [one["name"] for one in json.loads(file.read_text())["breakdowns"]] == ["sdpa", "mapreuse 3x1"]
