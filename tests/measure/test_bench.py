"""The encoder benchmark: who takes part, what is checked, what is written; never how fast it was."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from mapreuse import ReusePlan, cli
from mapreuse.maps import StorageChoice, StorageCost
from mapreuse.measure import (
    BenchConfig,
    KernelsConfig,
    bench,
    bench_kernels,
    bench_tables,
    kernel_tables,
    memory_in_fresh_process,
    peak_memory,
    plans_for,
)
from mapreuse.measure import _bench as internals
from mapreuse.measure._bench import memory_of
from mapreuse.measure._contestants import BUILDERS, Contestant, build, build_definition, contestants, runner
from mapreuse.measure._encoders import ENCODERS
from mapreuse.measure._memory import Killed

LENGTH = 70  # more than one block of query rows, the last one shorter


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """Every encoder with four layers, so that nothing takes long."""
    for name, spec in ENCODERS.items():
        monkeypatch.setitem(ENCODERS, name, replace(spec, num_layers=4))


def config(**settings):
    chosen = {"lengths": (LENGTH,), "repeats": 2, "contestants": ("eager", "sdpa", "ours"), "plans": ("full", "4x1")}
    return BenchConfig(**(chosen | settings))


def test_the_librarys_attention_is_timed_with_our_convolutions_too():
    spec = ENCODERS["conformer-m"]
    kinds = {type(module).__name__ for module in build(Contestant("sdpa+optimize"), spec, LENGTH).modules()}
    assert {"ChannelsLastConv1d", "ChannelsLastConv2d", "ParakeetEncoderAttention"} <= kinds
    results = bench(config(contestants=("sdpa", "sdpa+optimize", "ours"), plans=("full",)))
    measured = results["lengths"][str(LENGTH)]
    assert list(measured["ratios"]["ours full"]) == ["sdpa", "sdpa+optimize"]
    assert all(cell["agreement"] <= 1e-5 for cell in measured["contestants"].values())


def test_what_auto_chooses_at_a_length_is_told_and_compared_with_the_definition(monkeypatch):
    def choosing(scores, *rest, **settings):
        storage = "dense" if scores.shape[2] <= LENGTH else "dense8"
        return StorageChoice((StorageCost(storage, 1.0, 1),), 1)

    monkeypatch.setattr(internals, "_CHECKED_LENGTH", LENGTH)
    monkeypatch.setattr("mapreuse.maps._shared_maps.choose_storage", choosing)
    results = bench(config(lengths=(2 * LENGTH,), contestants=("ours",), plans=("4x1",), storages=("auto",)))
    cell = results["lengths"][str(2 * LENGTH)]["contestants"]["ours 4x1 auto"]
    assert cell["carried"] == "dense8"
    assert cell["choice"].startswith("dense8 is the fastest")
    assert cell["agreement"] > 1e-4, "weights in 8 bits are thousandths off"


@pytest.mark.parametrize("encoder", ["conformer-m", "plain-conformer-m", "bert-base"])
def test_every_contestant_is_checked_timed_and_set_against_those_that_reuse_nothing(encoder):
    results = bench(config(encoder=encoder))
    measured = results["lengths"][str(LENGTH)]

    assert list(measured["contestants"]) == ["eager", "sdpa", "ours full", "ours 4x1"]
    for cell in measured["contestants"].values():
        assert len(cell["seconds"]) == 2
        assert cell["median"] > 0
        assert cell["agreement"] <= 1e-5
    assert {name: list(row) for name, row in measured["ratios"].items()} == {
        "ours full": ["eager", "sdpa"],
        "ours 4x1": ["eager", "sdpa", "ours full"],
    }
    assert measured["front"]["name"] == ENCODERS[encoder].front
    assert measured["front"]["median"] > 0
    assert {"schema", "machine", "config", "command", "signal"} <= set(results)
    assert json.loads(json.dumps(results)) == results | {"config": json.loads(json.dumps(results["config"]))}


def test_ratios_are_medians_of_quotients_of_the_same_round(monkeypatch):
    fixed = {
        "eager": (4.0, 8.0, 6.0),
        "sdpa": (2.0, 2.0, 2.0),
        "ours full": (1.0, 4.0, 2.0),
        "ours 4x1": (1.0, 1.0, 1.0),
    }

    def timed(calls, **settings):
        return {name: internals.Latency(fixed.get(name, (1.0, 1.0, 1.0))) for name in calls}

    monkeypatch.setattr(internals, "time_interleaved", timed)
    ratios = bench(config())["lengths"][str(LENGTH)]["ratios"]

    assert ratios["ours full"]["eager"]["median"] == 3.0  # of 4, 2 and 3
    assert ratios["ours full"]["eager"]["spread"] == pytest.approx((3.5 - 2.5) / 2 / 3)
    assert ratios["ours 4x1"]["sdpa"] == {"median": 2.0, "spread": 0.0}


def test_a_contestant_with_a_wrong_output_is_named_and_never_timed(monkeypatch):
    def wrong(contestant, spec, longest):
        encoder = spec.build("sdpa", spec.num_layers, longest)
        with torch.no_grad():
            encoder.layers.layers[1].self_attn.v_proj.weight[3, 5] += 0.05
        return encoder

    monkeypatch.setitem(BUILDERS, "sdpa", wrong)
    measured = bench(config())["lengths"][str(LENGTH)]

    reason = measured["contestants"]["sdpa"]["not_measured"]
    assert f"away from the definition at length {LENGTH}, more than 1.0e-04" in reason
    assert "seconds" not in measured["contestants"]["sdpa"]
    assert all("sdpa" not in row for row in measured["ratios"].values())
    assert "seconds" in measured["contestants"]["ours 4x1"]


def test_a_contestant_that_follows_another_plan_is_wrong(monkeypatch):
    ours = BUILDERS["ours"]
    monkeypatch.setitem(BUILDERS, "ours", lambda entry, *rest: ours(replace(entry, plan="2x2"), *rest))
    cells = bench(config(plans=("full", "2x2", "4x1")))["lengths"][str(LENGTH)]["contestants"]

    assert {name for name, cell in cells.items() if "not_measured" in cell} == {"ours full", "ours 4x1"}


def test_a_contestant_that_is_wrong_at_the_timed_length_only_is_caught_there(monkeypatch):
    monkeypatch.setattr(internals, "_CHECKED_LENGTH", 20)

    def wrong(contestant, spec, longest):
        encoder = spec.build("sdpa", spec.num_layers, longest)
        encoder.layers.register_forward_hook(
            lambda module, args, output: output if args[0].shape[1] < 50 else lazy(output)
        )
        return encoder

    def lazy(output):
        output.last_hidden_state = output.last_hidden_state.roll(1, 1)
        return output

    monkeypatch.setitem(BUILDERS, "sdpa", wrong)
    measured = bench(config(lengths=(20, LENGTH)))["lengths"]

    assert "seconds" in measured["20"]["contestants"]["sdpa"]
    assert f"away from eager at length {LENGTH}" in measured[str(LENGTH)]["contestants"]["sdpa"]["not_measured"]


def test_a_contestant_that_fails_is_reported_on_one_line_and_the_rest_go_on(monkeypatch):
    def broken(contestant, spec, longest):
        raise NotImplementedError("no kernel for this device\nand a long explanation")

    monkeypatch.setitem(BUILDERS, "flex", broken)
    results = bench(config(contestants=("flex", "flex+compile", "sdpa", "ours")))
    cells = results["lengths"][str(LENGTH)]["contestants"]
    table = bench_tables(results)[0]

    for name in ("flex", "flex+compile"):
        assert cells[name]["not_measured"] == "NotImplementedError: no kernel for this device"
        assert f"{name}: not measured: NotImplementedError: no kernel for this device" in table.notes
        assert next(row for row in table.rows if row[0] == name)[-1] == "not measured"
    assert "seconds" in cells["ours 4x1"]


def test_tables_show_ours_first_with_a_ratio_to_every_other(monkeypatch):
    table = bench_tables(bench(config()))[0]

    assert table.header == ["", "× eager", "× sdpa", "× ours full", "time"]
    assert [row[0] for row in table.rows] == ["ours full", "ours 4x1", "eager", "sdpa"]
    assert all("±" in cell for cell in table.rows[1][1:])
    assert all(len(row) == len(table.header) for row in table.rows)
    assert any(note.startswith("subsampling by itself") for note in table.notes)


@pytest.mark.parametrize("encoder", ["conformer-m", "plain-conformer-m"])
def test_the_whole_encoder_and_a_training_step_run_too(encoder):
    whole = bench(config(encoder=encoder, part="whole", batch=2))["lengths"][str(LENGTH)]
    step = bench(config(encoder=encoder, training=True))["lengths"][str(LENGTH)]

    assert all("seconds" in cell for cell in (*whole["contestants"].values(), *step["contestants"].values()))
    assert "front" not in step


def test_a_wrong_gradient_is_found_in_training(monkeypatch):
    def wrong(contestant, spec, longest):
        encoder = spec.build("sdpa", spec.num_layers, longest)
        attention = encoder.layers.layers[2].self_attn
        attention.register_forward_hook(lambda module, args, output: (output[0].detach(), None))
        return encoder

    monkeypatch.setitem(BUILDERS, "sdpa", wrong)
    cells = bench(config(training=True))["lengths"][str(LENGTH)]["contestants"]

    assert "away from the definition" in cells["sdpa"]["not_measured"]
    assert "seconds" in cells["ours 4x1"]


def test_half_precision_is_allowed_what_rounding_costs_the_definition():
    cells = bench(config(encoder="bert-base", dtype="bfloat16", lengths=(8,)))["lengths"]["8"]["contestants"]

    assert all(1e-4 < cell["agreement"] < 0.2 for cell in cells.values())


def test_compiled_and_flex_contestants_agree_with_the_definition():
    # In a process of its own: the compiler cannot trace through the shape checks of the test run.
    program = f"""
import json
from dataclasses import replace
from mapreuse.measure import ENCODERS, BenchConfig, bench
ENCODERS["conformer-m"] = replace(ENCODERS["conformer-m"], num_layers=1)
kinds = ("sdpa", "sdpa+compile", "flex", "ours+compile")
results = bench(BenchConfig(lengths=({LENGTH},), repeats=1, contestants=kinds, plans=("full",)))
print(json.dumps(results["lengths"]["{LENGTH}"]))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    measured = json.loads(ran.stdout)
    cells = measured["contestants"]

    assert {name: cell.get("not_measured") for name, cell in cells.items()} == dict.fromkeys(
        ("sdpa", "flex", "sdpa+compile", "ours full+compile")
    )
    assert all(cell["agreement"] < 1e-5 for cell in cells.values())
    assert cells["sdpa+compile"]["graph_breaks"] == 0  # whatever the others do to the code they share
    assert measured["compiled_while_timed"] == 0


def test_progress_goes_up_to_its_total():
    seen = []
    bench(config(), lambda doing, done, total: seen.append((done, total)))

    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == pytest.approx(seen[-1][1])


def test_inputs_are_neither_constant_nor_zero_and_the_same_every_time():
    for spec in ENCODERS.values():
        inputs = spec.inputs(LENGTH, 2)
        torch.testing.assert_close(spec.inputs(LENGTH, 2), inputs)
        assert inputs.float().std(1).min() > 0
        assert not torch.equal(inputs[0], inputs[1])
        encoder = spec.build("sdpa", 1, LENGTH)
        with torch.no_grad():
            assert encoder.front(inputs).shape[:2] == (2, LENGTH)


def test_maps_are_peaked_enough_that_a_wrong_one_shows():
    spec = ENCODERS["conformer-m"]
    hidden = spec.build("sdpa", 1, LENGTH).front(spec.inputs(LENGTH, 1)).detach()
    outputs = [
        runner(build_definition(plan, spec, LENGTH), "layers", compiled=False)(hidden) for plan in ("full", "4x1")
    ]
    ours = runner(build(Contestant("ours", "4x1"), spec, LENGTH), "layers", compiled=False)(hidden)

    assert internals.disagreement(outputs[1], outputs[0]) > 100 * internals.TOLERANCE
    assert internals.disagreement(ours, outputs[1]) < 1e-5


@pytest.mark.parametrize(
    ("text", "plans"),
    [
        ("full,4x1", ("full", "4x1")),
        ("1x2,2x1,2x2", ("1x2,2x1", "2x2")),
        (" 1x2, 2x1 , full", ("1x2,2x1", "full")),
        ("[0,0,2,2],4x1", ("[0,0,2,2]", "4x1")),
        ("", ()),
    ],
)
def test_plans_are_parted_where_they_make_up_all_layers(text, plans):
    assert plans_for("conformer-m", text) == plans


@pytest.mark.parametrize("text", ["2x1", "1x2,full", "3x2", "4y1", "[0,0", "1x2,4x1"])
def test_plans_that_do_not_fit_the_encoder_are_refused(text):
    with pytest.raises(ValueError, match=r"layers|plan|Expecting"):
        plans_for("conformer-m", text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "gpt"}, "--encoder must be one of conformer-m"),
        ({"contestants": ("fast",)}, "--contestants must be one of eager"),
        ({"plans": ("2x4",)}, "speaks of 8 layers, but the encoder has 4"),
        ({"lengths": (0,)}, "--lengths must be at least 1"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"threads": 0}, "--threads must be at least 1"),
        ({"repeats": 0}, "--repeats must be at least 1"),
        ({"dtype": "int8"}, "--dtype must be one of float32"),
        ({"device": "tpu"}, "--device must be one of cpu"),
        ({"part": "half"}, "--part must be one of layers"),
    ],
)
def test_settings_that_are_off_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**settings)


def test_a_gpu_that_is_not_there_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for kind in (BenchConfig, KernelsConfig):
        with pytest.raises(ValueError, match="no CUDA GPU"):
            kind(device="cuda")


def test_defaults_follow_the_encoder_and_the_command_says_the_rest():
    chosen = BenchConfig(encoder="bert-base", lengths=(5, 6), contestants=("sdpa", "ours"), memory=True)

    assert chosen.plans == ("full", "2x2", "4x1")
    assert all(ReusePlan.parse(plan).num_layers == 4 for plan in chosen.plans if plan != "full")
    assert chosen.command == (
        "mapreuse bench --encoder bert-base --lengths 5,6 --plans full,2x2,4x1 --contestants sdpa,ours --memory"
    )
    assert BenchConfig(training=True).contestants == ("eager", "sdpa", "ours")


def test_uncompiled_contestants_come_first_and_full_plans_have_no_strategy():
    names = [e.name for e in contestants(("ours+compile", "ours", "sdpa"), ("full", "4x1"), ("dense", "recompute"))]

    assert names[:4] == ["ours full", "ours 4x1", "ours 4x1 recompute", "sdpa"]
    assert names[4:] == ["ours full+compile", "ours 4x1+compile", "ours 4x1 recompute+compile"]


def one_after_another(mebibytes):
    """Peak memory of three tensors, each gone before the next."""

    def allocate():
        for _ in range(3):
            torch.ones(mebibytes * 2**18)

    return peak_memory(allocate, "cpu")


def test_peak_memory_is_what_a_call_holds_at_once(monkeypatch):
    """In a process of its own: what other tests' threads let go of meanwhile would count, too."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert 0.95 * 96 < memory_in_fresh_process(one_after_another, {"mebibytes": 96}) / 2**20 < 1.2 * 96


def test_memory_is_measured_in_a_process_of_its_own():
    settings = {"lengths": [200], "contestants": ["eager"], "plans": ["full"]}
    request = {"config": settings, "contestant": {"kind": "eager"}, "length": 200}

    # Scores over 399 distances, their padded and shifted copies, the softmax: at least 4 such tensors at once.
    assert 4 * 4 * 4 * 200 * 400 < memory_in_fresh_process(memory_of, request) < 200 * 2**20


def test_a_process_that_fails_gives_its_last_line():
    with pytest.raises(RuntimeError, match="--encoder must be one of"):
        memory_in_fresh_process(
            memory_of, {"config": {"encoder": "gpt"}, "contestant": {"kind": "sdpa"}, "length": 20}
        )


def test_memory_stands_in_the_cells_and_a_killed_contestant_is_not_run_here(monkeypatch):
    def measured(function, request):
        assert function is memory_of
        if request["contestant"]["kind"] == "eager":
            raise Killed("its process was ended by SIGKILL; out of memory, most likely")
        return 3 * 2**20 if request["contestant"]["kind"] == "ours" else 12 * 2**20

    monkeypatch.setattr(internals, "memory_in_fresh_process", measured)
    results = bench(config(memory=True))
    cells = results["lengths"][str(LENGTH)]["contestants"]
    rows = {row[0]: row for row in bench_tables(results)[0].rows}

    assert cells["ours 4x1"]["memory_bytes"] == 3 * 2**20
    assert "SIGKILL" in cells["eager"]["not_measured"]
    assert rows["ours 4x1"][-2:] == ["3 MiB", "1/4.0"]
    assert rows["sdpa"][-2:] == ["12 MiB", ""]


@pytest.fixture
def short_turns(monkeypatch):
    """Turns of one call: what they take is not looked at here."""
    from mapreuse.measure import _cores

    monkeypatch.setattr(_cores, "_turns", lambda length: 1)


def test_cores_are_set_against_their_products_and_their_growth_is_told(short_turns):
    results = bench_kernels(KernelsConfig(lengths=(100, 200), repeats=2))
    cores = results["lengths"]["200"]

    assert results["agreement"] < 1e-5
    assert set(cores["ratios"]) == {
        "reusing core ÷ map × values",
        "computing core ÷ sum of its products",
        "computing core, map kept ÷ sum of its products",
    }
    blocks = cores["sum of products"]["blocks"]
    rounds = zip(*(cores["cores"][name]["seconds"] for name in blocks), strict=True)
    assert cores["sum of products"]["seconds"] == pytest.approx([sum(times) for times in rounds])
    assert set(results["growth"]["100 → 200"]) == {
        "reusing core",
        "map × values",
        "computing core",
        "computing core, map kept",
    }
    assert json.loads(json.dumps(results))["lengths"] == results["lengths"]
    for table in kernel_tables(results):
        assert all(len(row) == len(table.header) for row in table.rows)


def test_the_command_prints_ratios_and_writes_everything_to_json(tmp_path):
    file = tmp_path / "speed" / "bench.json"
    words = ["bench", "--lengths", str(LENGTH), "--repeats", "1", "--contestants", "sdpa,ours", "--plans", "full,4x1"]
    ran = CliRunner().invoke(cli.app, [*words, "--json", str(file)], env={"COLUMNS": "120"})

    assert ran.exit_code == 0, ran.output
    assert "× sdpa" in ran.stdout
    assert "Inputs: log-mel-like features" in ran.stdout
    results = json.loads(file.read_text())
    assert list(results["lengths"][str(LENGTH)]["contestants"]) == ["sdpa", "ours full", "ours 4x1"]
    assert str(tmp_path) not in file.read_text()


def test_the_command_times_cores(tmp_path, short_turns):
    file = tmp_path / "cores.json"
    ran = CliRunner().invoke(
        cli.app, ["bench", "--kernels", "--lengths", "50,100", "--repeats", "1", "--json", str(file)]
    )

    assert ran.exit_code == 0, ran.output
    assert "Growth" in ran.stdout
    assert set(json.loads(file.read_text())["lengths"]) == {"50", "100"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "ten"], "--lengths must be whole numbers parted by commas"),
        (["--encoder", "gpt"], "--encoder must be one of"),
        (["--plans", "4x4"], "speaks of 16 layers"),
        (["--kernels", "--plans", "4x1"], "--kernels takes"),
    ],
)
def test_bad_input_to_the_command_is_a_value_error(words, message):
    ran = CliRunner().invoke(cli.app, ["bench", *words])

    assert isinstance(ran.exception, ValueError)
    assert message in str(ran.exception)


def test_a_core_that_is_wrong_is_not_timed(monkeypatch):
    from mapreuse.measure import _cores

    attend = _cores.attend

    def wrong(scores, values, **settings):
        context, weights = attend(scores, values, **settings)
        return context.roll(1, -2), weights

    monkeypatch.setattr(_cores, "attend", wrong)
    with pytest.raises(ValueError, match="away from transformers' attention"):
        bench_kernels(KernelsConfig(lengths=(100,)))
