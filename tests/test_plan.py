"""Plans: notation, checks and queries."""

import doctest
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mapreuse import ReusePlan, plan


@st.composite
def sources(draw, max_layers=8, max_heads=4):
    """Valid plans: for each layer, a list of head sources that are earlier heads which compute."""
    num_heads = draw(st.integers(1, max_heads))
    layers = []
    for layer in range(draw(st.integers(1, max_layers))):
        computed = [(s, h) for s in range(layer) for h in range(num_heads) if layers[s][h] is None]
        layers.append([draw(st.sampled_from([None, *computed])) for _ in range(num_heads)])
    return layers


def test_the_first_layer_of_each_group_computes_and_the_last_group_may_be_shorter():
    assert ReusePlan.grouped(7, 3).layers == (None, 0, 0, None, 3, 3, None)
    assert ReusePlan.full(5).layers == (None,) * 5


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("4x4", [4, 4, 4, 4]),
        ("1x4,4x3", [1, 1, 1, 1, 4, 4, 4]),
        ("12x1", [12]),
        (" 2 × 1 , 3x2 ", [2, 3, 3]),
        ("[0, 0, 2, 2]", [2, 2]),
    ],
)
def test_notation_is_group_size_times_number_of_groups(text, sizes):
    layers = [offset for size in sizes for offset in range(size)]
    expected = [layer - offset for layer, offset in enumerate(layers)]
    assert ReusePlan.parse(text) == ReusePlan.from_sources(expected)


@pytest.mark.parametrize(
    ("text", "character"),
    [
        ("", 1),
        ("x4", 1),
        ("4", 1),
        ("4y4", 1),
        ("4x4,", 5),
        ("4x4,,4x4", 5),
        ("4x4;4x4", 4),
        ("4x4 4x4", 5),
        ("1x2,0x3", 5),
        ("1x2,3x0", 5),
        ("1x2,-1x3", 5),
        ("[0, 0, 2", 9),
        ("{'a': 1}", 2),
    ],
)
def test_a_notation_error_points_at_the_wrong_character(text, character):
    with pytest.raises(ValueError, match=rf"character {character}: ") as error:
        ReusePlan.parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[0, true]", "source layer of each layer"),
        ('[0, "0"]', "source layer of each layer"),
        ("[0, [0]]", "source layer of each layer"),
        ("{}", "not a plan"),
        ('{"format": "other"}', "not a plan"),
        ('{"format": "mapreuse-plan", "version": 3, "layers": [null]}', "version 3 is not supported"),
        ('{"format": "mapreuse-plan", "version": 1}', 'needs "layers"'),
        ('{"format": "mapreuse-plan", "version": 1, "layers": 3}', 'needs "layers"'),
        ('{"format": "mapreuse-plan", "version": 1, "layers": [null, "0"]}', "layer 1: expected None"),
        (
            '{"format": "mapreuse-plan", "version": 1, "layers": [null, [[0, 0, 0], null]]}',
            "layer 1, head 0: expected",
        ),
        (
            '{"format": "mapreuse-plan", "version": 1, "layers": [null, [null, [0, 1.5]]]}',
            "layer 1, head 1: expected",
        ),
        ('{"format": "mapreuse-plan", "version": 1, "layers": [null, []]}', "layer 1: expected"),
    ],
)
def test_json_that_is_not_a_plan_is_refused(text, problem):
    with pytest.raises(ValueError, match=problem):
        ReusePlan.from_json(text)


def test_a_plan_for_a_number_of_layers_may_be_full_and_has_no_other_number():
    assert ReusePlan.parse("full", num_layers=3) == ReusePlan.full(3)
    assert ReusePlan.parse("1x1,2x1", num_layers=3) == ReusePlan.parse("1x1,2x1")
    with pytest.raises(ValueError, match="plan '2x1' is for 2 layers, but the model has 3"):
        ReusePlan.parse("2x1", num_layers=3)
    with pytest.raises(ValueError, match="plan 'full', character 1"):
        ReusePlan.parse("full")


def test_a_head_assignment_selects_source_heads_or_lets_heads_compute():
    reuse = ReusePlan.from_sources([0, 0, 2, 2], heads={3: [1, 1, 0, None]})
    assert reuse.layers == (None, 0, None, ((2, 1), (2, 1), (2, 0), None))
    assert reuse.num_heads == 4


@pytest.mark.parametrize(
    ("heads", "problem"),
    [
        ({4: [0]}, "heads to layer 4, but the plan has layers 0–3"),
        ({-1: [0]}, "layer -1, but the plan has layers 0–3"),
        ({2: [0]}, "layer 2, but that layer computes its own map"),
        ({1: [0, 4, 0, 0]}, "layer 1, head 1 reuses head 4 of layer 0, but its heads are 0–3"),
        ({1: [0, -1]}, "layer 1, head 1 reuses head -1 of layer 0"),
    ],
)
def test_a_head_assignment_that_does_not_fit_is_refused(heads, problem):
    with pytest.raises(ValueError, match=problem):
        ReusePlan.from_sources([0, 0, 2, 2], heads=heads)


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ((), "at least one layer"),
        ((0,), "layer 0 reuses layer 0's map.*must compute"),
        ((None, 1), "layer 1 reuses layer 1's map.*earlier layer"),
        ((None, 7, None), r"layer 1 reuses layer 7's map.*earlier layer \(0–0\)"),
        ((None, -1), "layer 1 reuses layer -1's map"),
        ((None, 0, 1), "layer 2 reuses head 0 of layer 1.*does not compute.*reuses layer 0's"),
        ((None, ((0, 0), None), 1), "layer 2 reuses head 0 of layer 1.*does not compute"),
        ((None, (None, (0, 0)), 1), "layer 2 reuses head 1 of layer 1.*does not compute"),
        ((None, ((1, 0), None)), "layer 1, head 0 reuses layer 1's map"),
        ((None, (None, (0, 0)), (None, (1, 1))), "layer 2, head 1 reuses head 1 of layer 1.*does not compute"),
        ((None, 0, (None, (1, 0))), "layer 2, head 1 reuses head 0 of layer 1.*does not compute"),
        ((None, (None, (0, 0)), ((1, 2), None)), "layer 2, head 0 reuses head 2 of layer 1, but its heads are 0–1"),
        (
            (None, ((0, 1), None), ((1, 1), None, None)),
            "same number of heads, got 2 heads for layer 1, 3 heads for layer 2",
        ),
        ((None, True), "layer 1: expected None"),
    ],
)
def test_a_source_must_be_an_earlier_head_that_computes(layers, problem):
    with pytest.raises(ValueError, match=problem):
        ReusePlan(layers)


@pytest.mark.parametrize(("num_layers", "group_size"), [(0, 1), (4, -2)])
def test_grouped_needs_positive_integers(num_layers, group_size):
    with pytest.raises(ValueError, match=f"integers from 1 to 10000, got {num_layers} and {group_size}"):
        ReusePlan.grouped(num_layers, group_size)


def test_plans_with_the_same_sources_are_equal():
    spelled_out = ReusePlan((None, ((0, 0), (0, 1)), (None, None)))
    assert spelled_out == ReusePlan((None, 0, None))
    assert hash(spelled_out) == hash(ReusePlan((None, 0, None)))
    assert ReusePlan((None, ((0, 1), (0, 0)))) != ReusePlan((None, 0))


def test_a_plan_prints_a_summary_and_one_line_per_layer():
    reuse = ReusePlan.from_sources([0, 0, 2, 2], heads={3: [1, 1, 0, None]})
    assert str(reuse).splitlines() == [
        "4 layers: 2 computing, 2 reusing",
        "layer 0  computes",
        "layer 1  reuses layer 0",
        "layer 2  computes",
        "layer 3  heads: layer 2 head 1, layer 2 head 1, layer 2 head 0, computes",
    ]
    assert str(ReusePlan.full(1)).startswith("1 layer: 1 computing")


@given(sources())
def test_from_json_and_parse_restore_a_written_plan(layers):
    reuse = ReusePlan(tuple(tuple(layer) for layer in layers))
    assert ReusePlan.from_json(reuse.to_json()) == reuse
    assert ReusePlan.parse(reuse.to_json()) == reuse
    assert "\n" not in reuse.to_json()


@given(sources())
def test_queries_agree_with_the_head_assignments(layers):
    reuse = ReusePlan(tuple(tuple(layer) for layer in layers))
    for layer, heads in enumerate(layers):
        assert list(reuse.heads(layer, len(heads))) == heads
        assert list(reuse.sources(layer)) == sorted({head[0] for head in heads if head is not None})
        assert reuse.computes(layer) == (None in heads)
        assert reuse.reuses(layer) == any(head is not None for head in heads)
        readers = [other for other, entry in enumerate(layers) if any(head and head[0] == layer for head in entry)]
        assert list(reuse.readers(layer)) == readers
    assert reuse.num_layers == len(layers)
    assert reuse.is_full == all(head is None for heads in layers for head in heads)


def test_the_plan_module_does_not_import_torch():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('plan', {plan.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['plan'] = module\n"
        "spec.loader.exec_module(module)\n"
        "print(module.ReusePlan.parse('2x2').layers)\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["(None, 0, None, 2)", "[]"]


def test_the_examples_in_the_docstrings_run():
    outcome = doctest.testmod(plan)
    assert outcome.attempted >= 5
    assert outcome.failed == 0


KEYS = ReusePlan.parse("1x1,2x2", share="keys", keys=64, window=32, block=16)


def test_a_keys_plan_prints_its_settings_and_is_restored_from_json():
    assert str(KEYS).splitlines() == [
        "5 layers: 3 computing, 2 reusing",
        "keys: 64 for each block of 16 queries, a window of 32 and the first key",
        "layer 0  computes",
        "layer 1  computes",
        "layer 2  reuses the keys of layer 1",
        "layer 3  computes",
        "layer 4  reuses the keys of layer 3",
    ]
    assert ReusePlan.parse(KEYS.to_json()) == KEYS
    mixed = ReusePlan((None, 0, None, ((2, 1), (2, 0))), ("map", "keys", None, "map"), 8)
    assert mixed.share == (None, "keys", None, "map")
    assert ReusePlan.from_json(mixed.to_json()) == mixed


def test_plans_with_other_share_modes_or_settings_differ():
    plans = [
        ReusePlan.parse("1x1,2x2"),
        KEYS,
        *(ReusePlan.parse("1x1,2x2", share="keys", **{name: 7}) for name in ("keys", "window", "block")),
    ]
    assert len(set(plans)) == len(plans)
    assert ReusePlan.full(4) == ReusePlan((None,) * 4, "keys", 64)
    assert ReusePlan.grouped(4, 2) == ReusePlan((None, 0, None, 2), ("keys", "map", None, "map"), 64)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"share": "weights"}, "share must be one of map, keys, corrected, got 'weights'"),
        ({"share": ("keys",)}, "one mode for each of the 5 layers, got 1"),
        ({"share": (None,) * 5}, "layer 2 reuses, but has no share mode"),
        ({"share": "keys", "keys": 0}, "keys must be an integer of at least 1, got 0"),
        ({"share": "keys", "window": -1}, "window must be an integer of at least 1, got -1"),
        ({"share": "keys", "block": True}, "block must be an integer of at least 1, got True"),
        ({"keys": 64}, 'keys=64 is a setting of share="keys"'),
        ({"share": "keys", "rank": 8}, 'rank=8 is a setting of share="corrected"'),
        ({"share": "corrected", "rank": 7}, "rank must be even, because pairs of numbers are rotated, got 7"),
    ],
)
def test_a_share_mode_or_setting_that_is_not_valid_is_refused_in_one_line(settings, problem):
    with pytest.raises(ValueError, match=problem) as refused:
        ReusePlan.parse("1x1,2x2", **settings)
    assert "\n" not in str(refused.value)


def test_all_readers_of_a_source_share_by_the_same_mode_and_keys_are_for_whole_layers():
    with pytest.raises(ValueError, match="layer 1 and other readers of its source have different share modes"):
        ReusePlan((None, 0, 0), ("map", "map", "keys"))
    with pytest.raises(ValueError, match='layer 1 has a head assignment, but share mode "keys" is for whole layers'):
        ReusePlan((None, ((0, 1), (0, 0))), "keys")
    with pytest.raises(ValueError, match="a plan in JSON has its own share mode"):
        ReusePlan.parse(KEYS.to_json(), share="keys")


def test_a_layer_that_shares_keys_reuses_and_computes():
    assert [KEYS.share_of(layer) for layer in range(5)] == [None, None, "keys", None, "keys"]
    assert [KEYS.reuses(layer) for layer in range(5)] == [False, False, True, False, True]
    assert all(map(KEYS.computes, range(5)))


def test_a_corrected_plan_prints_its_rank_and_is_restored_from_json():
    plan = ReusePlan((None, 0, ((0, 1), (0, 1))), "corrected")
    assert str(plan).splitlines() == [
        "3 layers: 1 computing, 2 reusing",
        "corrected: scores plus products of rank 16",
        "layer 0  computes",
        "layer 1  reuses the scores of layer 0",
        "layer 2  scores: layer 0 head 1, layer 0 head 1",
    ]
    assert ReusePlan.parse(plan.to_json()) == plan != ReusePlan(plan.layers, "corrected", rank=8)
    assert not any(map(plan.computes, (1, 2)))


@pytest.mark.parametrize("heads", [((0, 0), None), ((0, 0), (1, 1))])
def test_all_heads_of_a_corrected_layer_reuse_from_one_layer(heads):
    with pytest.raises(ValueError, match=r"layer 2: in share mode .corrected., all heads must reuse, and from one"):
        ReusePlan((None, None, heads), (None, None, "corrected"))
