"""Weights of the original or of another plan load into a converted model, or are refused: never with other heads."""

import copy
import pickle
from pathlib import Path

import accelerate
import peft
import pytest
import safetensors.torch
import torch
import transformers as tf
from agreement import PLANS, randomize_biases
from families import build
from oracle import defined_output, defined_packed_output, disagreement, valid_rows
from packed_encoders import WIDTH, encoder, peaked
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import load_sharded_checkpoint

import mapreuse as mr

FAMILIES = ["bert", "llama", "gpt2", "modernbert", "parakeet", "wav2vec2-conformer-relative", "whisper-encoder"]
"""Families with separate, grouped and fused projections, and with parameters that have a row for each head."""
BY_HEADS = [name for name in PLANS if name not in ("full", "groups of 2", "all from one")]
IN_PART = {
    # In layer 1, as many heads compute in each plan.
    plan: mr.ReusePlan.from_sources([0, 0, 2, 2], heads={1: heads})
    for plan, heads in {"first": [None, 2, None, 0], "second": [1, None, 2, None]}.items()
}
OTHER_HEADS = r"holds heads 0, 2, but under this plan heads 1, 3 compute; load the weights of the original"


def trained(family, **settings):
    """A model of the family with other weights than those of `build(family)`, and with biases."""
    model, batch = build(family, seed=7, **settings)
    randomize_biases(model)
    return model, batch


def converted(family, plan, **settings):
    """A model under a plan, made from weights that are about to be replaced."""
    return mr.apply(build(family)[0], plan, **settings)


@torch.no_grad()
def assert_follows(model, family, plan):
    """The model puts out what the definition makes of the trained weights under the plan."""
    eager, batch = trained(family, implementation="eager")
    output = model.eval()(**batch)
    rows = valid_rows(eager, batch, output)
    assert disagreement(output.last_hidden_state, defined_output(eager, batch, plan), rows) <= 1e-4


@pytest.mark.sample(2)
@pytest.mark.parametrize("plan", BY_HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_the_original_load_into_a_converted_model(family, plan):
    model = converted(family, PLANS[plan])
    missing, _ = model.load_state_dict(trained(family)[0].state_dict(), strict=False)
    assert not missing
    assert_follows(model, family, PLANS[plan])


@pytest.mark.parametrize("plan", ["other heads", "in part"])
def test_weights_of_the_original_load_into_a_converted_encoder_of_torch(plan):
    original, model = encoder(batch_first=True), mr.apply(encoder(batch_first=True), PLANS[plan])
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.load_state_dict(original.state_dict(), strict=False)
    states = torch.randn(2, 9, WIDTH)
    with torch.no_grad():
        reference = defined_packed_output(original, PLANS[plan], states)
        assert disagreement(model.eval()(states), reference, torch.ones(2, 9, dtype=torch.bool)) <= 1e-4


@pytest.mark.parametrize("family", ["bert", "gpt2", "parakeet"])
def test_weights_of_a_plan_with_another_assignment_load_and_follow_the_plan_of_the_model(family):
    plans = [mr.ReusePlan.from_sources([0, 0, 2, 2], heads={1: heads}) for heads in ([3, 1, 1, 0], [0, 2, 3, 1])]
    model = converted(family, plans[1])
    model.load_state_dict(mr.apply(trained(family)[0], plans[0]).state_dict(), strict=True)
    assert_follows(model, family, plans[1])


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "parakeet"])
def test_weights_of_other_heads_are_refused_and_those_of_the_same_heads_load(family, tmp_path):
    states = {name: mr.apply(trained(family)[0], plan).state_dict() for name, plan in IN_PART.items()}
    shapes = [
        {name: tensor.shape for name, tensor in state.items() if "computing_heads" not in name}
        for state in states.values()
    ]
    assert shapes[0] == shapes[1], "only the heads tell the weights apart"
    model = converted(family, IN_PART["second"])
    unnamed = {name: tensor for name, tensor in states["second"].items() if "computing_heads" not in name}
    safetensors.torch.save_file(states["first"], tmp_path / "model.safetensors")
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=OTHER_HEADS):
            model.load_state_dict(states["first"], strict=strict)
        with pytest.raises(RuntimeError, match=OTHER_HEADS):
            safetensors.torch.load_model(model, tmp_path / "model.safetensors", strict=strict)
        with pytest.raises(RuntimeError, match=r"heads 1, 3 compute, but the buffer computing_heads .* is not among"):
            model.load_state_dict(unnamed, strict=strict)
        with pytest.raises(RuntimeError, match=OTHER_HEADS):
            accelerate.load_checkpoint_in_model(model, tmp_path, strict=strict)
        with pytest.raises(ValueError, match=r"tensor of shape .*looks incorrect"):
            accelerate.load_checkpoint_in_model(model, tmp_path, device_map={"": "cpu"}, strict=strict)
    model.load_state_dict(states["second"], strict=True)
    assert_follows(model, family, IN_PART["second"])


LOADERS = {
    "load_model": lambda model, path: safetensors.torch.load_model(model, path / "model.safetensors", strict=False),
    "in model": accelerate.load_checkpoint_in_model,
    "in model, device map": lambda model, path: accelerate.load_checkpoint_in_model(
        model, path, device_map={"": "cpu"}
    ),
    "and dispatch": lambda model, path: accelerate.load_checkpoint_and_dispatch(model, path, device_map={"": "cpu"}),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("family", ["bert", "parakeet"])
@pytest.mark.parametrize("saved", ["original", "same plan"])
def test_other_loaders_give_the_weights_to_the_heads_they_belong_to(family, loader, saved, tmp_path):
    plan = PLANS["other heads" if saved == "original" else "in part"]
    source = trained(family)[0]
    if saved == "same plan":
        mr.apply(source, plan)
    safetensors.torch.save_model(source, tmp_path / "model.safetensors")
    model = converted(family, plan)
    LOADERS[loader](model, tmp_path)
    assert_follows(model, family, plan)


def test_shards_without_the_buffer_that_names_the_heads_are_refused_with_that_reason(tmp_path):
    saved = mr.apply(trained("bert")[0], PLANS["in part"])
    saved.save_pretrained(tmp_path, max_shard_size="4KB")
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="one shard of a checkpoint; open the directory by from_pretrained"):
            load_sharded_checkpoint(converted("bert", PLANS["in part"]), tmp_path, strict=strict)
    assert_follows(tf.BertModel.from_pretrained(tmp_path), "bert", PLANS["in part"])


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_loader_by_name_refuses_weights_of_the_original_where_rows_were_removed(family, tmp_path):
    safetensors.torch.save_model(trained(family)[0], tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="Trying to set a tensor of shape"):
        accelerate.load_checkpoint_in_model(converted(family, PLANS["in part"]), tmp_path, device_map={"": "cpu"})


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "average": lambda model: averaged(model, use_buffers=False),
    "average with buffers": lambda model: averaged(model, use_buffers=True),
}


def averaged(model, **settings):
    average = AveragedModel(model, **settings)
    for _ in range(3):
        average.update_parameters(model)
    return average.module


@pytest.mark.sample(2)
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_a_copy_follows_the_plan_and_checks_heads_as_well(family, copied):
    model = COPIES[copied](mr.apply(trained(family)[0], IN_PART["second"]))
    assert_follows(model, family, IN_PART["second"])
    with pytest.raises(RuntimeError, match=OTHER_HEADS):
        model.load_state_dict(converted(family, IN_PART["first"]).state_dict())
    model.load_state_dict(trained(family)[0].state_dict(), strict=False)
    assert_follows(model, family, IN_PART["second"])


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "parakeet", "modernbert"])
def test_every_projection_puts_out_the_width_that_it_names(family):
    model, batch = trained(family)
    mr.apply(model, PLANS["in part"])
    wrong = []

    def compare(module, args, output):
        named = module.nf if isinstance(module, Conv1D) else module.out_features
        of_weight = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
        if not named == of_weight == output.shape[-1]:
            wrong.append((module, output.shape))

    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_hook(compare)
    model(**batch)
    assert not wrong


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("bert", ["query", "key", "value", "dense"]),
        ("llama", ["q_proj", "k_proj", "v_proj"]),
        ("gpt2", ["c_attn"]),
        ("parakeet", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_lora_trains_merges_and_unmerges_under_a_plan_by_heads(family, targets):
    model, batch = trained(family)
    mr.apply(model, PLANS["in part"])
    config = peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=family == "gpt2", lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config).eval()

    def states():
        with torch.no_grad():
            return adapted(**batch).last_hidden_state

    before = states()
    weights = [p for name, p in adapted.named_parameters() if p.requires_grad and "pooler" not in name]
    optimizer, direction = torch.optim.Adam(weights, lr=0.05), torch.randn_like(before)
    for _ in range(2):  # the first step changes only one factor of each product
        optimizer.zero_grad()
        (adapted(**batch).last_hidden_state * direction).mean().backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in weights)
    trained_states = states()
    assert (trained_states - before).abs().max() > 1e-2
    adapted.merge_adapter()
    torch.testing.assert_close(states(), trained_states, atol=1e-4, rtol=1e-4)
    adapted.unmerge_adapter()
    torch.testing.assert_close(states(), trained_states, atol=1e-4, rtol=1e-4)
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).last_hidden_state, trained_states, atol=1e-4, rtol=1e-4)


LENGTHS = [12, 90, 91, 150, 300]
PERMUTED = mr.ReusePlan.from_sources([0, 0, 2, 2], heads={1: [2, 0, 3, 1], 3: [3, 3, 0, 1]})


@pytest.mark.sample(4)
@pytest.mark.parametrize("storage", ["dense", "dense16", "recompute"])
@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("plan", [PERMUTED, PLANS["in part"], PLANS["two sources"]], ids=["permuted", "part", "two"])
def test_heads_are_in_place_at_every_length(plan, length, grad_mode, storage):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 32}
    model = tf.BertModel(tf.BertConfig(**sizes, vocab_size=50, max_position_embeddings=300), add_pooling_layer=False)
    model = peaked(model)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    batch = {"input_ids": torch.randint(3, 50, (2, length)), "attention_mask": mask}
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        reference = defined_output(eager, batch, plan)
    with torch.set_grad_enabled(grad_mode):
        output = mr.apply(model, plan, storage=storage)(**batch).last_hidden_state
    assert disagreement(output.detach(), reference, mask.bool()) <= (1e-2 if storage == "dense16" else 1e-4)


SAVED = Path(__file__).parent / "saved_by_format_3"


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "parakeet"])
def test_a_directory_of_format_3_opens_with_the_same_outputs_and_is_saved_in_the_new_order(family, tmp_path):
    expected = safetensors.torch.load_file(SAVED / "outputs.safetensors")[family]
    batch = {"input_ids": torch.tensor([[1, 7, 3, 9, 4, 2]])}
    if family == "parakeet":
        batch = {"input_features": torch.linspace(-1, 1, 320).view(1, 40, 8)}
    model = mr.load(SAVED / family)
    mr.save(model, tmp_path)
    for one in (model, mr.load(tmp_path)):
        with torch.no_grad():
            torch.testing.assert_close(one(**batch).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
