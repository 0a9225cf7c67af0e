"""The Trainer of transformers trains, saves and resumes models with converted stacks."""

import itertools
import logging

import pytest
import torch
import transformers as tf
from agreement import PLANS
from saved_models import sequence_to_sequence

import mapreuse as mr

HEADS, IN_PART = PLANS["other heads"], PLANS["in part"]
CONVERTED = {
    "whisper": ({"encoder": HEADS}, tf.AutoModelForSpeechSeq2Seq),
    "bart": ({"encoder": IN_PART, "decoder": HEADS}, tf.AutoModelForSeq2SeqLM),
}


def converted(name, *, seed=0):
    model, batch = sequence_to_sequence(name)
    torch.manual_seed(seed)
    model.init_weights()
    for stack, plan in CONVERTED[name][0].items():
        mr.apply(getattr(model.model, stack), plan)
    return model, batch


def trainer(model, batch, path, steps, **options):
    examples = [{key: tensor[i] for key, tensor in batch.items()} for i in range(len(batch["labels"]))]
    settings = tf.TrainingArguments(
        output_dir=str(path),
        max_steps=steps,
        save_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    metrics = itertools.count()
    return tf.Trainer(
        model,
        settings,
        train_dataset=examples,
        eval_dataset=examples[:1],
        compute_metrics=lambda _: {"evaluations": next(metrics)},
    )


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


@pytest.mark.parametrize("name", CONVERTED)
def test_a_checkpoint_is_opened_and_resumed(tmp_path, name, caplog, monkeypatch):
    model, batch = converted(name)
    before = logits(model, batch)
    trainer(model, batch, tmp_path, steps=2).train()
    expected = logits(model, batch)
    assert (expected - before).abs().max() > 1e-3

    opened = CONVERTED[name][1].from_pretrained(tmp_path / "checkpoint-2")
    torch.testing.assert_close(logits(opened, batch), expected, atol=1e-6, rtol=0)
    for stack, plan in CONVERTED[name][0].items():
        assert mr.plan_of(getattr(opened.model, stack)) == plan

    other, _ = converted(name, seed=1)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        resumed = trainer(other, batch, tmp_path, steps=2)
        resumed.train(resume_from_checkpoint=True)
    assert "unexpected keys" not in caplog.text
    assert resumed.state.global_step == 2
    torch.testing.assert_close(logits(other, batch), expected, atol=1e-6, rtol=0)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", CONVERTED)
def test_resuming_continues_as_if_training_had_not_stopped(tmp_path, name):
    """Dropout is off, so that both trainings see the same numbers."""
    whole, batch = converted(name)
    trainer(whole, batch, tmp_path / "whole", steps=3, save_strategy="no", lr_scheduler_type="constant").train()
    first, _ = converted(name)
    trainer(first, batch, tmp_path / "parts", steps=2, lr_scheduler_type="constant").train()
    second, _ = converted(name, seed=1)
    rest = trainer(second, batch, tmp_path / "parts", steps=3, lr_scheduler_type="constant")
    rest.train(resume_from_checkpoint=True)
    torch.testing.assert_close(logits(second, batch), logits(whole, batch), atol=1e-6, rtol=0)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model, batch = converted("whisper")
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    best = {"metric_for_best_model": "evaluations", "greater_is_better": False}
    finished = trainer(model, batch, tmp_path, steps=2, **options, **best)
    finished.train()
    assert finished.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    first, last = (tf.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / f"checkpoint-{n}") for n in (1, 2))
    torch.testing.assert_close(logits(model, batch), logits(first, batch), atol=1e-6, rtol=0)
    assert (logits(model, batch) - logits(last, batch)).abs().max() > 1e-4


def test_save_model_writes_what_save_pretrained_writes(tmp_path):
    model, batch = converted("whisper")
    trainer(model, batch, tmp_path, steps=1).save_model(str(tmp_path / "saved"))
    model.save_pretrained(tmp_path / "directly")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "directly" / name).read_bytes()
