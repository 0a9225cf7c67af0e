"""Benchmarks of encoders with random weights: inputs, checks and commands; never how fast they were."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from mapreuse_lab import cli
from mapreuse_lab.benchmarks import bench_encoder, open_encoder
from mapreuse_lab.benchmarks._encoder_bench import ENCODERS, encoder_memory
from mapreuse_lab.models import bert_base, conformer_m, minilm, plain_conformer_m
from typer.testing import CliRunner

from mapreuse import ReusePlan, apply
from mapreuse.measure import disagreement, memory_in_fresh_process

LENGTH = 70  # more than one block of query rows, the last one shorter
BUILDERS = {
    "conformer-m": lambda max_length: conformer_m(num_layers=4),
    "plain-conformer-m": lambda max_length: plain_conformer_m(num_layers=4),
    "bert-base": lambda max_length: bert_base(max_length, num_layers=4),
    "minilm": lambda max_length: minilm(max_length, num_layers=4),
}


@pytest.fixture
def shallow(monkeypatch):
    """Every encoder with four layers, so that nothing takes long."""
    for name, encoder in ENCODERS.items():
        monkeypatch.setitem(ENCODERS, name, dataclasses.replace(encoder, build=BUILDERS[name]))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_is_benched_by_length(name, shallow):
    results = bench_encoder(name, (LENGTH,), repeats=1, plans="full,4x1", kinds=("eager", "sdpa", "mapreuse"))
    cells = results["batches"][str(LENGTH)]["contestants"]

    assert list(cells) == ["eager", "sdpa", "mapreuse full", "mapreuse 4x1"]
    assert all("seconds" in cell and cell["agreement"] <= 1e-5 for cell in cells.values())
    assert results["unit"] == ENCODERS[name].unit


@pytest.mark.parametrize("name", ENCODERS)
def test_layers_compute_the_same_without_the_front_end(name, shallow):
    layers, batches = open_encoder(name, (LENGTH,), batch_size=2)
    (inputs,) = batches[str(LENGTH)].values()
    assert inputs.shape[:2] == (2, LENGTH)
    if not ENCODERS[name].front:
        with pytest.raises(ValueError, match="no front end"):
            open_encoder(name, (LENGTH,), part="whole")
        return
    whole, whole_batches = open_encoder(name, (LENGTH,), part="whole", batch_size=2)
    with torch.no_grad():
        torch.testing.assert_close(whole(**whole_batches[str(LENGTH)])[0], layers(**batches[str(LENGTH)])[0])


def test_maps_are_peaked_enough_that_a_wrong_map_changes_the_output(shallow):
    model, batches = open_encoder("conformer-m", (LENGTH,))
    batch = batches[str(LENGTH)]
    with torch.no_grad():
        original = model(**batch)[0]
        assert disagreement(apply(model, ReusePlan.parse("4x1"))(**batch)[0], original) > 1e-2


@pytest.mark.full
def test_flex_and_compiled_contestants_agree_with_the_others():
    # In a process of its own: the compiler cannot trace through the shape checks of the test run.
    program = f"""
import dataclasses, json
from mapreuse_lab.benchmarks import bench_encoder
from mapreuse_lab.benchmarks._encoder_bench import ENCODERS
from mapreuse_lab.models import conformer_m
ENCODERS["conformer-m"] = dataclasses.replace(ENCODERS["conformer-m"], build=lambda _: conformer_m(num_layers=1))
kinds = ("sdpa", "sdpa+compile", "flex", "mapreuse+compile")
results = bench_encoder("conformer-m", ({LENGTH},), repeats=1, kinds=kinds, plans="full")
print(json.dumps(results["batches"]["{LENGTH}"]))
"""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    measured = json.loads(ran.stdout)
    cells = measured["contestants"]

    assert {name: cell.get("not_measured") for name, cell in cells.items()} == dict.fromkeys(
        ("sdpa", "flex", "sdpa+compile", "mapreuse full+compile")
    )
    assert all(cell["agreement"] < 1e-5 for cell in cells.values())
    assert cells["sdpa+compile"]["graph_breaks"] == 0
    assert measured["compiled_while_timed"] == 0


@pytest.mark.full
def test_memory_is_measured_in_a_process_of_its_own():
    request = {"name": "conformer-m", "length": 200, "threads": 1, "contestant": {"kind": "eager"}}

    # Scores over 399 distances, their padded and shifted copies, the softmax: at least 4 such tensors at once.
    assert 4 * 4 * 4 * 200 * 400 < memory_in_fresh_process(encoder_memory, request) < 200 * 2**20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "gpt"}, "--encoder must be one of conformer-m"),
        ({"lengths": (0,)}, "--lengths and --batch must be at least 1"),
        ({"dtype": "int8"}, "--dtype must be one of float32"),
        ({"device": "tpu"}, "--device must be cpu or cuda"),
        ({"part": "half"}, "--part must be one of layers"),
    ],
)
def test_invalid_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        open_encoder(**{"name": "conformer-m"} | options)


def test_the_command_prints_speed_ups_and_writes_everything_to_json(tmp_path, shallow):
    file = tmp_path / "speed" / "bench.json"
    words = f"bench --lengths {LENGTH} --repeats 1 --contestants sdpa,mapreuse --plans full,4x1 --json {file}"
    ran = CliRunner().invoke(cli.app, words, env={"COLUMNS": "120"})

    assert ran.exit_code == 0, ran.output
    assert "speed-up over sdpa" in " ".join(ran.stdout.split())
    assert "Inputs: log-mel-like features" in ran.stdout
    cells = json.loads(file.read_text())["batches"][str(LENGTH)]["contestants"]
    assert list(cells) == ["sdpa", "mapreuse full", "mapreuse 4x1"]


def test_the_command_breaks_an_encoder_down(tmp_path, shallow):
    file = tmp_path / "breakdown.json"
    ran = CliRunner().invoke(cli.app, f"breakdown --lengths 40,60 --repeats 1 --plans 4x1 --json {file}")

    assert ran.exit_code == 0, ran.output
    found = [(one["batch"], one["name"]) for one in json.loads(file.read_text())["breakdowns"]]
    assert found == [(length, name) for length in ("40", "60") for name in ("sdpa", "mapreuse 4x1+optimize")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "ten"], "--lengths must be integers separated by commas"),
        (["--encoder", "gpt"], "--encoder must be one of"),
        (["--plans", "2x1"], "is for 2 layers"),
        (["--kernels", "--plans", "4x1"], "--kernels takes"),
    ],
)
def test_bad_input_to_the_command_is_a_value_error(words, message, shallow):
    ran = CliRunner().invoke(cli.app, ["bench", *words])

    assert isinstance(ran.exception, ValueError)
    assert message in str(ran.exception)
