"""Quantisation, adapters, pruning and offloading change a converted model as they change the original."""

import warnings
from contextlib import nullcontext

import families
import peft
import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from oracle import defined_output, disagreement, softmax_follows
from torch import nn
from torch.nn.utils import parametrizations, prune

import mapreuse as mr
from mapreuse.models import _optimize

LENGTHS = (12, 90, 91, 150, 300)
PLANS = {
    "full": mr.ReusePlan.full(4),
    "groups of 2": mr.ReusePlan.parse("2x2"),
    "other heads": mr.ReusePlan.from_sources([0, 0, 2, 2], {1: [3, 1, 1, 0], 3: [2, 2, 2, 2]}),
    "in part": mr.ReusePlan.from_sources([0, 0, 2, 2], {1: [None, 2, None, 0], 3: [1, None, 1, 3]}),
}
ORDERS = {
    "apply, tool": lambda model, plan, tool: tool(mr.apply(model, plan)),
    "optimize, apply, tool": lambda model, plan, tool: tool(mr.apply(mr.optimize(model), plan)),
    "apply, optimize, tool": lambda model, plan, tool: tool(mr.optimize(mr.apply(model, plan))),
    "apply, tool, optimize": lambda model, plan, tool: mr.optimize(tool(mr.apply(model, plan))),
}


def bert(implementation="sdpa"):
    torch.manual_seed(0)
    config = tf.BertConfig(**families.SIZE, vocab_size=50, max_position_embeddings=max(LENGTHS))
    model = tf.BertModel(config).eval()
    model.set_attn_implementation(implementation)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.4)
    return model


def batch_of(length):
    torch.manual_seed(length)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    return {"input_ids": torch.randint(1, 50, (2, length)), "attention_mask": mask}


def linear_layers(model):
    """Found as other tools find them: by their exact type."""
    return [module for module in model.modules() if type(module) is nn.Linear]


def on_each_linear_layer(change):
    def tool(model):
        for layer in linear_layers(model):
            change(layer)
        return model

    return tool


def quantize_dynamic(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert not any(isinstance(module, nn.Linear) for module in quantised.modules()), "a layer was left out"
    return quantised


def prune_for_good(layer):
    prune.l1_unstructured(layer, "weight", 0.3)
    prune.remove(layer, "weight")


def normalize_weight(layer):
    parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.1)


def add_lora(model):
    torch.manual_seed(1)
    layers = r"encoder\..*\.(value|dense)"
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=layers, init_lora_weights=False))


def quantize_by_torchao(model):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert all(type(layer.weight).__name__ == "Int8Tensor" for layer in linear_layers(model))
    return model


TOOLS = {
    "quantize_dynamic": (quantize_dynamic, 2e-2),
    "torchao": (quantize_by_torchao, 1e-4),
    "prune.l1_unstructured": (on_each_linear_layer(lambda one: prune.l1_unstructured(one, "weight", 0.3)), 1e-4),
    "prune.ln_structured": (on_each_linear_layer(lambda one: prune.ln_structured(one, "weight", 0.3, 2, 1)), 1e-4),
    "prune.remove": (on_each_linear_layer(prune_for_good), 1e-4),
    "weight_norm": (on_each_linear_layer(normalize_weight), 1e-4),
    "bfloat16": (nn.Module.bfloat16, 4e-2),
    "half": (nn.Module.half, 1e-2),
    "LoRA": (add_lora, 1e-4),
    "LoRA, merged": (lambda model: add_lora(model).merge_and_unload(), 1e-4),
    "cpu_offload": (lambda model: cpu_offload(model, "cpu"), 1e-4),
}
"""What other tools do to a model, and the largest error that their rounding explains."""

CASES = [(tool, plan) for tool in TOOLS for plan in PLANS if not ("prune" in tool and plan == "in part")]
"""Pruning takes a share of the weights of a layer, so it takes others from a layer that projects fewer heads."""

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by PEFT


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """oneDNN is taken to be faster where it is available."""
    monkeypatch.setattr(_optimize, "onednn_is_faster", lambda threads: torch.backends.mkldnn.is_available())


@pytest.mark.sample(19)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("tool", "plan"), CASES)
def test_a_tool_changes_a_converted_model_as_it_changes_the_original(tool, order, plan, length):
    change, tolerance = TOOLS[tool]
    batch = batch_of(length)
    original, converted = change(bert("eager")), ORDERS[order](bert(), PLANS[plan], change)
    with torch.no_grad():
        expected = defined_output(original, batch, PLANS[plan])
        output = converted(**batch).last_hidden_state
    assert disagreement(output, expected, batch["attention_mask"].bool()) < tolerance


@pytest.mark.parametrize("length", [12, 91])
def test_an_adapter_trains_as_on_the_original_and_can_be_merged_saved_and_opened(length, tmp_path):
    plan, batch, direction = PLANS["groups of 2"], batch_of(length), torch.linspace(-1, 1, 32)

    def converted():
        return mr.optimize(mr.apply(bert(), plan))

    def output(model):
        with torch.no_grad():
            return model(**batch).last_hidden_state

    def trained(model, definition):
        optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            with softmax_follows(plan) if definition else nullcontext():
                (model(**batch).last_hidden_state @ direction).sum().backward()
            optimizer.step()
        return model

    expected, model = trained(add_lora(bert("eager")), True), trained(add_lora(converted()), False)
    adapters = {name: one for name, one in expected.named_parameters() if one.requires_grad}
    untrained = dict(add_lora(bert()).named_parameters())
    for name, one in model.named_parameters():
        if one.requires_grad:
            moved = (adapters[name] - untrained[name]).abs().max()
            assert (one - adapters[name]).abs().max() < 1e-3 * moved
    reference, before = output(model), output(converted())
    assert (reference - before).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    opened = peft.PeftModel.from_pretrained(converted(), tmp_path)
    torch.testing.assert_close(output(opened), reference)
    model.merge_adapter()
    torch.testing.assert_close(output(model), reference, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(output(model.unload()), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tool", ["LoRA", "quantize_dynamic", "prune.ln_structured", "weight_norm"])
def test_a_plan_for_a_model_with_changed_projections_is_refused_with_a_way_out(tool):
    way_out = (
        "make it permanent first" if tool in ("prune.ln_structured", "weight_norm") else r"merge_and_unload|unquant"
    )
    with pytest.raises(mr.Unsupported, match=f"layer 0: .*(query|value).*({way_out})"):
        mr.apply(TOOLS[tool][0](bert()), PLANS["groups of 2"])


@pytest.mark.parametrize("save", [mr.save, tf.BertModel.save_pretrained])
@pytest.mark.parametrize("tool", ["quantize_dynamic", pytest.param("torchao", marks=pytest.mark.full)])
def test_a_quantised_model_is_not_saved(tool, save, tmp_path):
    model = TOOLS[tool][0](mr.apply(bert(), PLANS["groups of 2"]))
    with pytest.raises(
        ValueError, match="this BertModel is quantised and cannot be saved; save it before quantising"
    ):
        save(model, tmp_path / "new")
    assert not any(tmp_path.iterdir())
