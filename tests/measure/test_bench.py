"""The benchmark of a model: contestants, checks, results; never how fast it was."""

import json
import os
import statistics
import sys
import time

import pytest
import torch
from families import build
from tiny_models import SENTENCES, save_bert
from typer.testing import CliRunner

import mapreuse as mr
from mapreuse import cli
from mapreuse.maps import StorageChoice
from mapreuse.maps._storage_choice import StorageCost
from mapreuse.measure import (
    ALL_KINDS,
    Contestant,
    bench,
    bench_tables,
    fastest_threads,
    memory_in_fresh_process,
    peak_memory,
    plot_bench,
)
from mapreuse.measure import _bench as internals
from mapreuse.measure._contestants import Exports, split_plans
from mapreuse.models._optimize import is_optimized

OPTIONS = {"repeats": 2, "plans": "full,4x1", "kinds": ("eager", "sdpa", "mapreuse")}


def only_batch(results):
    (found,) = results["batches"].values()
    return found


@pytest.mark.parametrize(
    "family",
    ["bert", "parakeet", pytest.param("gpt2", marks=pytest.mark.full), pytest.param("vit", marks=pytest.mark.full)],
)
def test_contestants_are_checked_timed_and_compared_with_those_that_share_no_maps(family):
    model, batch = build(family)
    results = bench(model, [batch], **OPTIONS)
    found = only_batch(results)

    assert list(found["contestants"]) == ["eager", "sdpa", "mapreuse full", "mapreuse 4x1"]
    for name, cell in found["contestants"].items():
        assert "not_measured" not in cell, (name, cell)
        assert len(cell["seconds"]) == 2
        assert cell["agreement"] <= 1e-5
        assert set(found["ratios"][name]) == {"eager", "sdpa", "mapreuse full"} - {name}
    times = zip(*(found["contestants"][name]["seconds"] for name in ("sdpa", "mapreuse 4x1")), strict=True)
    speed_up = found["ratios"]["mapreuse 4x1"]["sdpa"]["median"]
    assert speed_up == pytest.approx(statistics.median(before / after for before, after in times))
    flops = [cell["flops"] for cell in found["contestants"].values()]
    assert flops[0] == flops[1] == flops[2] > flops[3] > 0
    assert json.loads(json.dumps(results))["batches"] == results["batches"]
    (table,) = bench_tables(results)
    assert list(table.header) == ["", *results["batches"]]
    assert "speed-up over sdpa" in table.title
    assert [row[0] for row in table.rows] == list(found["contestants"])
    assert f"{speed_up:.2f}×" in table.rows[-1][1]
    best = min(("mapreuse full", "mapreuse 4x1"), key=lambda name: found["contestants"][name]["median"])
    assert f": {best} over " in table.notes[0]
    assert mr.plan_of(model) is None


def test_optimize_is_a_contestant_of_its_own():
    model, batch = build("parakeet")
    built = Contestant("sdpa", optimized=True).build(model)
    assert any(map(is_optimized, built.modules()))
    assert not any(map(is_optimized, model.modules()))

    kinds = ("sdpa", "sdpa+optimize", "mapreuse", "mapreuse+optimize")
    cells = only_batch(bench(model, [batch], **OPTIONS | {"kinds": kinds}))["contestants"]
    assert list(cells) == [
        "sdpa", "sdpa+optimize", "mapreuse full", "mapreuse 4x1", "mapreuse full+optimize", "mapreuse 4x1+optimize"
    ]  # fmt: skip
    assert all(cell["agreement"] <= 1e-5 for cell in cells.values())


def test_batches_are_named_by_the_shape_of_their_input():
    model, batch = build("bert")
    short = {name: tensor[:, :4] for name, tensor in batch.items()}

    assert list(bench(model, [batch, short], **OPTIONS)["batches"]) == ["input_ids 3 × 9", "input_ids 3 × 4"]
    assert list(bench(model, {"short": short}, **OPTIONS)["batches"]) == ["short"]


def wrong(model):
    """Rolls the values of layer 1. Weights are shared with the original, so the hook works on the output."""
    values = model.encoder.layer[1].attention.self.value
    values.register_forward_hook(lambda module, args, output: output.roll(1, -1))


def failing(model):
    def fail(*args):
        raise NotImplementedError("no kernel for this device\nand a long explanation")

    model.register_forward_pre_hook(fail)


def test_a_contestant_with_a_wrong_output_is_reported_and_never_timed():
    model, batch = build("bert")
    found = only_batch(
        bench(model, [batch], **OPTIONS | {"kinds": ("sdpa", "wrong", "mapreuse")}, attentions={"wrong": wrong})
    )

    assert "differs from sdpa by" in found["contestants"]["wrong"]["not_measured"]
    assert "seconds" not in found["contestants"]["wrong"]
    assert "wrong" not in found["ratios"]
    assert "seconds" in found["contestants"]["mapreuse 4x1"]


def test_a_kernel_that_disagrees_with_pytorch_operators_is_reported(monkeypatch):
    """The reference of a plan runs as PyTorch operators."""
    from mapreuse.maps import DenseMap, needs_plain_operators

    apply = DenseMap.apply

    def wrong_unless_plain(self, values, *rest):
        context = apply(self, values, *rest)
        return context if needs_plain_operators(values) else context.roll(1, 1)

    monkeypatch.setattr(DenseMap, "apply", wrong_unless_plain)
    model, batch = build("bert")
    cells = only_batch(bench(model, [batch], **OPTIONS))["contestants"]

    assert {name for name, cell in cells.items() if "not_measured" in cell} == {"mapreuse 4x1"}


def test_a_contestant_that_fails_is_reported_on_one_line_and_the_others_go_on():
    model, batch = build("bert")
    kinds = ("broken", "broken+optimize", "sdpa", "mapreuse")
    results = bench(model, [batch], **OPTIONS | {"kinds": kinds}, attentions={"broken": failing})
    cells, (table,) = only_batch(results)["contestants"], bench_tables(results)

    for name in ("broken", "broken+optimize"):
        assert cells[name]["not_measured"] == "NotImplementedError: no kernel for this device"
        assert next(row for row in table.rows if row[0] == name)[1] == "not measured"
    assert "broken, broken+optimize: not measured: NotImplementedError: no kernel for this device" in table.notes
    assert "seconds" in cells["mapreuse 4x1"]


def test_a_training_step_compares_gradients():
    model, batch = build("bert")

    def halve_gradient(copied):
        attention = copied.encoder.layer[2].attention
        attention.register_forward_hook(
            lambda module, args, output: ((output[0] + output[0].detach()) / 2, *output[1:])
        )

    options = OPTIONS | {"kinds": ("sdpa", "halved", "mapreuse"), "training": True}
    cells = only_batch(bench(model, [batch], **options, attentions={"halved": halve_gradient}))["contestants"]

    assert "differs from sdpa" in cells["halved"]["not_measured"]
    assert all("seconds" in cells[name] for name in ("sdpa", "mapreuse full", "mapreuse 4x1"))
    assert all(weights.grad is None for weights in model.parameters())


def test_half_precision_may_differ_by_its_rounding():
    model, batch = build("bert")
    cells = only_batch(bench(model.bfloat16(), [batch], **OPTIONS))["contestants"]

    assert all(cell["agreement"] < 0.4 and "seconds" in cell for cell in cells.values())


def test_the_storage_that_auto_chooses_is_reported(monkeypatch):
    choice = StorageChoice((StorageCost("dense8", 1.0, 1),), 1)
    monkeypatch.setattr("mapreuse.maps._shared_maps.choose_storage", lambda *args, **settings: choice)
    model, batch = build("bert")
    cell = only_batch(bench(model, [batch], **OPTIONS | {"plans": "4x1", "storages": ("auto",)}))["contestants"][
        "mapreuse 4x1 auto"
    ]

    assert cell["chosen_storage"] == "dense8"
    assert cell["choice"].startswith("dense8 is the fastest")


@pytest.mark.parametrize(
    ("text", "plans"),
    [
        ("full,4x1", ("full", "4x1")),
        ("1x2,2x1,2x2", ("1x2,2x1", "2x2")),
        (" 1x2, 2x1 , full", ("1x2,2x1", "full")),
        ("[0,0,2,2],4x1", ("[0,0,2,2]", "4x1")),
        ("", ("full", "2x2", "4x1")),
    ],
)
def test_plans_are_separated_where_they_make_up_all_layers(text, plans):
    assert split_plans(text, 4) == plans


@pytest.mark.parametrize("text", ["2x1", "1x2,full", "3x2", "4y1", "[0,0", "1x2,4x1", "full,[0,0,9,0]"])
def test_plans_that_do_not_fit_the_model_are_refused(text):
    with pytest.raises(ValueError, match=r"^(plan|layer) .*(character|layer)"):
        split_plans(text, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("fast",)}, "contestants must be some of eager"),
        ({"kinds": ()}, "at least one"),
        ({"plans": "2x4"}, "is for 8 layers, but the model has 4"),
        ({"storages": ("fast",)}, "storages must be some of dense"),
        ({"storages": ()}, "at least one"),
        ({"training": True, "kinds": ("sdpa+onnx",)}, "runtimes cannot train"),
        ({"threads": 0}, "at least 1"),
        ({"repeats": 0}, "at least 1"),
    ],
)
def test_invalid_arguments_are_refused(options, message):
    model, batch = build("bert")
    with pytest.raises(ValueError, match=message):
        bench(model, [batch], **options)


def test_a_model_that_shares_maps_already_is_refused():
    model, batch = build("bert")
    with pytest.raises(ValueError, match="already shares"):
        bench(mr.apply(model, mr.ReusePlan.parse("4x1")), [batch])


def one_after_another(mebibytes):
    """Peak memory of three tensors, each freed before the next."""

    def allocate():
        for _ in range(3):
            torch.ones(mebibytes * 2**18)

    return peak_memory(allocate, "cpu")


def test_peak_memory_is_what_a_call_holds_at_once(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # so that the process finds this file
    assert 0.95 * 96 < memory_in_fresh_process(one_after_another, {"mebibytes": 96}) / 2**20 < 1.2 * 96


@pytest.mark.full
def test_a_process_that_fails_raises_its_last_line():
    with pytest.raises(RuntimeError, match="not callable"):
        memory_in_fresh_process(peak_memory, {"call": None, "device": "cpu"})


def test_memory_is_in_the_results_and_a_killed_contestant_is_not_timed():
    def measured(contestant, name):
        if contestant.kind == "eager":
            raise internals.Killed("its process was ended by SIGKILL")
        return 3 * 2**20 if contestant.kind == "mapreuse" else 12 * 2**20

    model, batch = build("bert")
    results = bench(model, [batch], **OPTIONS, memory=measured)
    cells, (table,) = only_batch(results)["contestants"], bench_tables(results)

    assert cells["mapreuse 4x1"]["memory_bytes"] == 3 * 2**20
    assert "SIGKILL" in cells["eager"]["not_measured"]
    assert {row[0]: row[-1] for row in table.rows} == {
        "eager": "", "sdpa": "12 MiB", "mapreuse full": "3 MiB", "mapreuse 4x1": "3 MiB"
    }  # fmt: skip


WITH_INT8 = ("sdpa", "sdpa+openvino", *(f"mapreuse{one}" for one in ("", "+int8", "+openvino", "+openvino+int8")))


def test_runtimes_are_contestants_and_int8_has_an_error(tmp_path):
    model, batch = build("bert")
    options = OPTIONS | {"plans": "4x1", "kinds": WITH_INT8, "threads": 1}
    results = bench(model, [batch], **options, exports=tmp_path)
    cells, (table,) = only_batch(results)["contestants"], bench_tables(results)

    assert list(cells) == [
        "sdpa", "mapreuse 4x1", "mapreuse 4x1+int8",
        "sdpa+openvino", "mapreuse 4x1+openvino", "mapreuse 4x1+openvino+int8",
    ]  # fmt: skip
    assert {name: cell.get("not_measured") for name, cell in cells.items()} == dict.fromkeys(cells)
    assert all(cell["agreement"] <= 1e-4 for cell in cells.values() if not cell["int8"])
    errors = {name: cell["int8_error"] for name, cell in cells.items() if cell["int8"]}
    assert all(1e-4 < error < 0.3 for error in errors.values())
    assert [row[-1] for row in table.rows] == [f"{errors[name]:.3f}" if name in errors else "" for name in cells]
    assert list(errors) == ["mapreuse 4x1+int8", "mapreuse 4x1+openvino+int8"]
    assert {"sdpa", "sdpa+openvino"} <= set(only_batch(results)["ratios"]["mapreuse 4x1+openvino"])
    descriptions = [json.loads(file.read_text()) for file in tmp_path.glob("*/mapreuse_export.json")]
    assert sorted((one["precision"], one["plan"] is None) for one in descriptions) == [
        ("float32", False), ("float32", True), ("int8", False)
    ]  # fmt: skip


def test_exports_are_kept_for_the_same_weights_only(tmp_path, monkeypatch):
    exported = []

    def export(model, path, example, **options):
        exported.append(path)
        path.mkdir()

    monkeypatch.setattr("mapreuse.measure._contestants.export", export)
    monkeypatch.setattr("mapreuse.measure._contestants.open_exported", lambda path, threads: print)
    (model, batch), contestant = build("bert"), Contestant("sdpa", runtime="onnx")
    exports = Exports(tmp_path, batch, [batch], 1)
    for one in (model, model, build("bert", seed=1)[0]):
        contestant.build(one, exports=exports)
    assert len(set(exported)) == len(exported) == 2


def test_a_missing_runtime_is_skipped_with_its_command_unless_it_was_named(monkeypatch):
    for package in ("openvino", "onnx"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(internals, "ALL_KINDS", ("sdpa", "mapreuse", "sdpa+openvino", "mapreuse+onnx+int8"))
    model, batch = build("bert")
    results = bench(model, [batch], plans="4x1", repeats=1, threads=1)
    cells, (table,) = only_batch(results)["contestants"], bench_tables(results)

    assert {name for name, cell in cells.items() if "seconds" in cell} == {"sdpa", "mapreuse 4x1"}
    skipped = [note for note in table.notes if "not measured" in note]
    assert skipped == [
        "sdpa+openvino, mapreuse 4x1+onnx+int8: not measured: exporting needs the package onnx: "
        "pip install 'mapreuse[export]'"
    ]
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mapreuse\[export\]'"):
        bench(model, [batch], **OPTIONS | {"kinds": ("sdpa+openvino",)})


@pytest.mark.parametrize("training", [False, True])
def test_by_default_every_kind_takes_part(training, monkeypatch):
    chosen = []
    monkeypatch.setattr(internals, "contestants", lambda kinds, *rest: chosen.append(kinds) or [])
    model, batch = build("bert")
    with pytest.raises(ValueError, match="at least one"):
        bench(model, [batch], training=training)
    assert chosen == [("sdpa", "mapreuse") if training else ALL_KINDS]
    assert {"eager", "sdpa+compile", "sdpa+onnx+int8", "mapreuse+compile", "mapreuse+openvino"} < set(ALL_KINDS)


def test_a_contestant_above_the_limit_runs_once_and_not_on_later_batches():
    model, batch = build("bert")
    slow = {"slow": lambda copied: copied.register_forward_hook(lambda *args: time.sleep(0.3))}
    kinds = ("sdpa", "slow", "mapreuse")
    options = OPTIONS | {"kinds": kinds, "plans": "4x1", "threads": 1, "max_seconds": 0.25}
    results = bench(model, {"first": batch, "second": batch}, **options, attentions=slow)
    first, second = (found["contestants"] for found in results["batches"].values())

    assert [len(first[name]["seconds"]) for name in ("sdpa", "slow")] == [2, 1]
    assert "seconds" not in second["slow"]
    assert second["slow"]["not_measured"] == "one run on first took 0 s, more than 0.25 s"
    ratio = results["batches"]["first"]["ratios"]["mapreuse 4x1"]["slow"]
    assert ratio["median"] == pytest.approx(first["slow"]["median"] / first["mapreuse 4x1"]["median"])


def test_without_a_number_the_faster_number_of_threads_serves_all(monkeypatch):
    monkeypatch.setattr(internals, "fastest_threads", lambda call: (call() is None) or (1, {"1": 0.5, "2": 0.8}))
    model, batch = build("bert")
    results = bench(model, [batch], **OPTIONS | {"kinds": ("sdpa",)})

    assert results["config"]["threads"] == results["machine"]["threads"] == 1
    (table,) = bench_tables(results)
    assert "1 CPU thread (with 2, this model takes 1.60 times as long)" in table.title


def test_all_threads_are_chosen_where_they_are_faster(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    for slower, best in ((1, 2), (2, 1)):
        number, seconds = fastest_threads(
            lambda slower=slower: time.sleep(0.02 * (torch.get_num_threads() == slower))
        )
        assert (number, list(seconds)) == (best, ["1", "2"])


def test_the_chart_is_a_png(tmp_path):
    model, batch = build("bert")
    plot_bench(bench(model, {"a": batch, "b": batch}, **OPTIONS, threads=1), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def saved(tmp_path):
    save_bert(tmp_path / "model")
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES * 2))
    return ["bench", str(tmp_path / "model"), "--calibration", str(tmp_path / "sentences.txt"), "--repeats", "1"]


def test_the_command_measures_a_saved_model_on_the_users_data(saved, tmp_path):
    words = [*saved, "--plans", "full,3x1", "--contestants", "sdpa,mapreuse", "--max-batches", "2"]
    words += ["--batch-size", "4", "--png", str(tmp_path / "bench.png")]
    ran = CliRunner().invoke(
        cli.app, [*words, "--json", str(tmp_path / "new" / "bench.json")], env={"COLUMNS": "120"}
    )

    assert ran.exit_code == 0, ran.output
    assert "speed-up over sdpa" in " ".join(ran.stdout.split())
    results = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert len(results["batches"]) == 2
    assert (tmp_path / "bench.png").is_file()
    for found in results["batches"].values():
        assert list(found["contestants"]) == ["sdpa", "mapreuse full", "mapreuse 3x1"]


@pytest.mark.full
def test_the_command_measures_the_memory_of_each_contestant(saved):
    words = [*saved, "--plans", "3x1", "--contestants", "sdpa,mapreuse", "--max-batches", "1", "--memory"]
    ran = CliRunner().invoke(cli.app, words, env={"COLUMNS": "120"})

    assert ran.exit_code == 0, ran.output
    assert ran.stdout.count(" MiB") == 2


def test_the_command_measures_given_lengths(saved, tmp_path):
    words = [*saved, "--contestants", "sdpa", "--lengths", "2,7", "--batch-size", "3", "--threads", "1"]
    ran = CliRunner().invoke(cli.app, [*words, "--json", str(tmp_path / "bench.json")])

    assert ran.exit_code == 0, ran.output
    results = json.loads((tmp_path / "bench.json").read_text())
    assert list(results["batches"]) == ["input_ids 3 × 2", "input_ids 3 × 7"]
    ran = CliRunner().invoke(cli.app, [*words[:-4], "--lengths", "2,x"])
    assert "--lengths must be integers" in str(ran.exception)
