"""Distillation: closer to the original on unseen batches, never further; resumed runs give the same bits."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import build
from oracle import output_of_layer, valid_rows
from text_batches import random_batches
from transformers import BertConfig, BertForSequenceClassification, BertModel

import mapreuse as mr
from mapreuse.conversion import DistillConfig, _distill
from mapreuse.measure import Latency
from mapreuse.models import find_stack

CONFIG = DistillConfig(steps=30, learning_rate=3e-3, evaluate_every=10, bfloat16=False)


@pytest.fixture(scope="module")
def original():
    return make_original()


def make_original():
    """BERT's initial weights make similar maps, so that distillation can recover everything."""
    config = dict(vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
    torch.manual_seed(0)
    return BertModel(BertConfig(**config)).eval()


def converted(original):
    """Groups of 2, with noise on the values."""
    model = mr.convert(original, mr.ReusePlan.grouped(4, 2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in find_stack(model).layers:
            weight = layer.attention.get_submodule("value").weight
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return model


@torch.no_grad()
def distance(model, original, batches):
    """Relative error of the last layer's output, channel by channel, with the oracle's definition of padding."""
    errors = []
    last = len(find_stack(original).layers) - 1
    for batch in batches:
        rows = valid_rows(original, batch, original(**batch))
        target, actual = (output_of_layer(one, last, batch)[rows] for one in (original, model))
        errors.append((actual - target).square().mean(0) / target.square().mean(0))
    return torch.stack(errors).mean().sqrt().item()


@pytest.mark.parametrize("length", [pytest.param(11, marks=pytest.mark.full), 12])
def test_a_classifier_with_as_many_labels_as_tokens_in_a_sentence_learns(length):
    torch.manual_seed(0)
    config = dict(vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
    model = BertForSequenceClassification(BertConfig(**config, num_labels=12)).eval()
    shared = mr.convert(model, mr.ReusePlan.grouped(4, 2))
    report = mr.distill(shared, model, random_batches(8, length=length), DistillConfig(steps=2, evaluate_every=1))
    assert report.after <= report.before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
def test_both_models_return_to_their_device(original):
    model = converted(original)
    mr.distill(model, original, random_batches(8), DistillConfig(steps=2))
    for one in (model, original):
        assert {parameter.device.type for parameter in one.parameters()} == {"cpu"}


def test_distillation_reduces_the_error_on_unseen_batches(original):
    model, unseen = converted(original), random_batches(5, seed=1)
    before = distance(model, original, unseen)
    kept = copy.deepcopy(original.state_dict())
    report = mr.distill(model, original, random_batches(24), CONFIG, held_out=unseen)

    assert report.before == pytest.approx(before, rel=1e-4)
    assert report.after == pytest.approx(distance(model, original, unseen), rel=1e-4)
    assert report.after < 0.8 * report.before
    assert all(torch.equal(kept[name], tensor) for name, tensor in original.state_dict().items())


def test_layers_before_the_first_shared_map_keep_their_weights(original):
    model = mr.convert(original, mr.ReusePlan.from_sources([0, 1, 1, 3]))
    model.encoder.layer[3].output.dense.bias.requires_grad_(False)
    torch.manual_seed(0)
    with torch.no_grad():
        model.encoder.layer[2].attention.self.value.weight.normal_(std=0.3)
    before = copy.deepcopy(model.state_dict())
    report = mr.distill(model, original, random_batches(8), CONFIG)
    assert report.after < report.before

    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[2] for name in changed} == {"1", "2", "3"}
    assert all(name.startswith("encoder.layer.") for name in changed)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["encoder.layer.3.output.dense.bias"]
    assert not changed & set(frozen)


@pytest.mark.parametrize(
    ("given", "seconds", "chosen"), [(None, 0.5, True), (None, 0.9, False), (True, None, True), (False, None, False)]
)
def test_bfloat16_is_used_if_it_is_given_or_measured_to_be_much_faster(original, monkeypatch, given, seconds, chosen):
    seen = []

    def timed(calls, **options):
        seen.clear()
        for call in calls.values():
            call()
        assert seen[-1] == torch.bfloat16, "the second contestant"
        seen.clear()
        return {"float32": Latency((1.0,)), "bfloat16": Latency((seconds,))}

    if given is not None:
        monkeypatch.delattr(_distill, "time_interleaved")
    else:
        monkeypatch.setattr(_distill, "time_interleaved", timed)
    model, unseen = converted(original), random_batches(5, seed=1)
    expected = distance(model, original, unseen)
    model.encoder.layer[2].attention.self.value.register_forward_hook(
        lambda module, args, output: seen.append(output.dtype)
    )
    report = mr.distill(
        model, original, random_batches(24), dataclasses.replace(CONFIG, bfloat16=given), held_out=unseen
    )

    assert report.bfloat16 is chosen
    assert (torch.bfloat16 in seen) is chosen
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert report.before == pytest.approx(expected, rel=1e-4), "evaluated in float32"
    assert report.after == pytest.approx(distance(model, original, unseen), rel=1e-4)
    assert report.after < 0.8 * report.before


@pytest.mark.parametrize(
    "family", ["parakeet", "gpt2", *(pytest.param(one, marks=pytest.mark.full) for one in ("vit", "distilbert"))]
)
def test_padding_is_left_out_in_families_with_other_masks_and_outputs(family):
    model, batch = build(family)
    shared = mr.convert(model, mr.ReusePlan.grouped(4, 2))
    batches = [batch] * 8
    report = mr.distill(copy.deepcopy(shared), model, batches, DistillConfig(steps=3, evaluate_every=3))
    assert report.before > 0.05
    assert report.after <= report.before
    if "attention_mask" in batch:
        assert not valid_rows(model, batch, model(**batch)).all(), "the family's batch has padding"
    assert report.before == pytest.approx(distance(shared, model, [batch]), rel=1e-3)


def test_training_that_does_not_help_keeps_the_weights(original):
    batches, model = random_batches(16), converted(original)
    before = copy.deepcopy(model.state_dict())
    wild = DistillConfig(steps=20, learning_rate=3.0, evaluate_every=5, patience=2)
    report = mr.distill(model, original, batches, wild)
    assert report.best_step == 0
    assert report.after == report.before
    assert report.before == pytest.approx(distance(model, original, batches[7::8]), rel=1e-4), "every eighth held out"
    assert report.step == 10, "two evaluations without improvement"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Interrupted(Exception):
    pass


class Breaking:
    """Batches that raise after `after` of them were read."""

    def __init__(self, batches, after):
        self.batches, self.left = batches, after

    def __iter__(self):
        for batch in self.batches:
            self.left -= 1
            if self.left < 0:
                raise Interrupted
            yield batch


def test_an_interrupted_run_continues_with_the_same_bits(original, tmp_path):
    batches, unseen = random_batches(7), random_batches(3, seed=1)
    whole = converted(original)
    expected = mr.distill(whole, original, batches, CONFIG, held_out=unseen)

    broken = converted(original)
    with pytest.raises(Interrupted):
        mr.distill(broken, original, Breaking(batches, 18), CONFIG, held_out=unseen, out_dir=tmp_path)
    best = min(expected.errors[step] for step in (0, 10))
    assert distance(broken, original, unseen) == pytest.approx(best, rel=1e-4), "the best weights so far"
    assert all(parameter.grad is None for parameter in broken.parameters())
    resumed = converted(original)
    report = mr.distill(resumed, original, batches, CONFIG, held_out=unseen, out_dir=tmp_path)

    assert report.errors == expected.errors
    assert all(
        torch.equal(one, other)
        for one, other in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True)
    )
    again = converted(original)
    once_more = mr.distill(again, original, Breaking(batches, 1), CONFIG, held_out=unseen, out_dir=tmp_path)
    assert once_more.errors == expected.errors, "a finished run is not repeated"
    assert torch.equal(next(again.parameters()), next(whole.parameters()))


@pytest.mark.full
def test_the_same_call_continues_with_the_model_that_the_run_left(original, tmp_path):
    batches, unseen = random_batches(7), random_batches(3, seed=1)
    expected = mr.distill(converted(original), original, batches, CONFIG, held_out=unseen)
    model = converted(original)
    for stop in (12, 12):  # after 10 steps, and after 20
        with pytest.raises(Interrupted):
            mr.distill(model, original, Breaking(batches, stop), CONFIG, held_out=unseen, out_dir=tmp_path)
    for _ in range(2):
        assert (
            mr.distill(model, original, batches, CONFIG, held_out=unseen, out_dir=tmp_path).errors == expected.errors
        )


def with_nan(model):
    with torch.no_grad():
        find_stack(model).layers[1].layer.output.dense.weight[0, 0] = float("nan")
    return model


def padded(batches):
    return [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])} for batch in batches]


@pytest.mark.parametrize(
    ("change", "batches", "options", "message"),
    [
        (copy.deepcopy, random_batches(8), {}, "apply a plan to it first"),
        (converted, random_batches(7), {}, "or none held out: give at least 8"),
        (converted, [], {}, "no batches to learn from"),
        (lambda original: with_nan(converted(original)), random_batches(8), {}, "hidden states are not finite"),
        (
            lambda original: converted(original).requires_grad_(False),
            random_batches(8),
            {},
            "no parameter of the layers",
        ),
        (converted, iter(random_batches(8)), {}, "give a list, not a generator"),
        (converted, random_batches(8), {"held_out": iter(random_batches(1))}, "give a list, not a generator"),
        (converted, padded(random_batches(8)), {}, "the held-out batches contain only padding"),
        (
            converted,
            padded(random_batches(1)),
            {"held_out": random_batches(1)},
            "the batch of step 0 contains only padding",
        ),
        (converted, Breaking(["ids"], 9), {"held_out": random_batches(1)}, "got a str"),
    ],
)
def test_bad_input_is_refused_and_changes_no_weights(original, change, batches, options, message):
    model = change(original)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        mr.distill(model, original, batches, CONFIG, **options)
    for name, now in model.state_dict().items():
        assert torch.equal(before[name].nan_to_num(7.0), now.nan_to_num(7.0))


SCRIPT = """
import sys, torch
sys.path[:0] = {paths!r}
import mapreuse as mr
from test_distill import CONFIG, converted, make_original
from text_batches import random_batches
original = make_original()
model = converted(original)
report = mr.distill(model, original, random_batches(8), CONFIG, held_out=random_batches(4, seed=1))
import accelerate
torch.save((report.errors, model.state_dict()), {out!r} + str(accelerate.PartialState().process_index))
"""


@pytest.mark.full
def test_two_processes_train_one_model(tmp_path, original):
    tests = Path(__file__).parent
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(paths=[str(tests), str(tests.parent)], out=str(tmp_path / "rank")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    (errors, weights), (other_errors, other_weights) = (torch.load(tmp_path / f"rank{rank}") for rank in range(2))
    assert errors == other_errors
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    unseen = random_batches(4, seed=1)
    assert errors[0] == pytest.approx(distance(converted(original), original, unseen), rel=1e-4)
    assert min(errors.values()) < 0.9 * errors[0]
    assert sorted(errors) == [0, 10, 20, 30]


def test_a_run_with_another_model_other_batches_or_settings_is_not_continued(original, tmp_path):
    config = DistillConfig(steps=2, evaluate_every=1)
    mr.distill(converted(original), original, random_batches(8), config, out_dir=tmp_path)
    other = converted(original)
    with torch.no_grad():
        next(other.parameters())[0] += 1
    others_held_out = [*random_batches(8)[:7], *random_batches(1, seed=2)]
    reshaped = [{name: value.view(2, -1) for name, value in batch.items()} for batch in random_batches(8)]
    for model, batches, settings in (
        (other, random_batches(8), config),
        (converted(original), others_held_out, config),
        (converted(original), reshaped, config),
        (converted(original), random_batches(8), DistillConfig(steps=2)),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="holds a run with other settings, batches or weights"):
            mr.distill(model, original, batches, settings, out_dir=tmp_path)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": None}, "budget as steps or as seconds"),
        ({"steps": 0}, "steps must be a whole number, at least 1, got 0"),
        ({"steps": None, "seconds": float("nan")}, "seconds must be a finite number, greater than 0, got nan"),
        ({"evaluate_every": 0}, "evaluate_every must be a whole number, at least 1, got 0"),
        ({"patience": True}, "patience must be a whole number, at least 1, got True"),
        ({"learning_rate": -1.0}, r"learning_rate must be a finite number, greater than 0, got -1\.0"),
        ({"warmup": 1.0}, r"warmup must be a finite number, from 0 to 0\.99, got 1\.0"),
        ({"logits": float("nan")}, "logits must be a finite number, at least 0, got nan"),
        ({"hidden": 0.0, "logits": 0.0}, "must not both be 0"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**{"steps": 1} | wrong)


@pytest.mark.parametrize("step", [mr.refit, lambda *given: mr.distill(*given, DistillConfig(steps=1))])
def test_an_original_that_does_not_match_is_refused(original, step):
    config = original.config.to_dict()
    for other, message in (
        (BertModel(BertConfig(**config | {"num_hidden_layers": 6})), "but its original has 6 layers of width 32"),
        (BertModel(BertConfig(**config | {"hidden_size": 64})), "but its original has 4 layers of width 64"),
        (converted(original), "the original shares attention maps itself"),
        (copy.deepcopy(original).bfloat16(), "in bfloat16 on the CPU"),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            step(converted(original), other, random_batches(8))
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("step", [mr.refit, lambda *given: mr.distill(*given, DistillConfig(steps=1))])
def test_modules_keep_their_training_mode(original, step):
    shared, target = converted(original).train(), copy.deepcopy(original).train()
    for model in (shared, target):
        model.embeddings.eval()
    step(shared, target, random_batches(8))
    for model in (shared, target):
        in_training = {name.split(".")[0] for name, module in model.named_modules() if module.training}
        assert in_training == {"", "encoder", "pooler"}


def test_earlier_gradients_are_ignored(original):
    fresh, used = converted(original), converted(original)
    for parameter in used.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.no_grad():
        for model in (fresh, used):
            mr.distill(model, original, random_batches(8), CONFIG)
    assert all(torch.equal(one, other) for one, other in zip(fresh.parameters(), used.parameters(), strict=True))
    assert all(parameter.grad is None for name, parameter in used.named_parameters() if "encoder" in name)


def test_an_unwritable_checkpoint_directory_is_refused(original, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="cannot make this directory of checkpoints"):
        mr.distill(converted(original), original, random_batches(8), CONFIG, out_dir=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_shuffled_batches_need_held_out_batches(original):
    class Shuffled:
        seed = 0

        def __iter__(self):
            self.seed += 1
            return iter(random_batches(9, seed=self.seed))

    with pytest.raises(ValueError, match="give held_out, or batches that are not shuffled"):
        mr.distill(converted(original), original, Shuffled(), CONFIG)
    config = DistillConfig(steps=2)
    assert mr.distill(converted(original), original, Shuffled(), config, held_out=random_batches(2)).step == 2


@pytest.mark.parametrize("name", ["optimizer.safetensors", "model.safetensors", "best.safetensors", "state.json"])
def test_a_truncated_checkpoint_is_refused_in_one_line(original, tmp_path, name):
    config = DistillConfig(steps=2)
    mr.distill(converted(original), original, random_batches(9), config, out_dir=tmp_path)
    file = tmp_path / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(ValueError, match=r"checkpoint-2: not a checkpoint \(.+\); delete it") as refused:
        mr.distill(converted(original), original, random_batches(9), config, out_dir=tmp_path)
    assert "\n" not in str(refused.value)
