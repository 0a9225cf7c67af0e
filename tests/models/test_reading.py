"""Attention classes are read from their source: the usual pattern is accepted, others are refused with a reason."""

import copy
import pickle

import pytest
import torch
from agreement import PLANS
from altered import (
    ALTERATIONS,
    OUTPUT,
    ROTARY,
    SERVED,
    VALUES,
    AlteredModernBertAttention,
    AlteredParakeetAttention,
    FaithfulAttention,
    NoSource,
    rewritten,
)
from families import build
from oracle import defined_output, disagreement
from torch import nn
from transformers.models.bart.modeling_bart import BartAttention
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEncoder,
    BertLayer,
    BertSelfAttention,
    BertSelfOutput,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.modernbert.modeling_modernbert import ModernBertAttention
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.swin.modeling_swin import SwinAttention
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerSelfAttention

import mapreuse as mr
from mapreuse.models import Unsupported, find_stack, output_projection
from mapreuse.models._adapters import attention_form
from mapreuse.models._reading import AttentionForm, read_attention
from mapreuse.models._source import fingerprint_of

SWIN_KEYS = ("k_proj", "relative_position_bias")
CACHE = {"cache": "layer_idx"}
FORMS = {
    LlamaAttention: AttentionForm(("q_proj",), ("k_proj",), "v_proj", ("o_proj",), "attention_dropout", **CACHE),
    FaithfulAttention: AttentionForm(("q_proj",), ("k_proj",), "v_proj", ("o_proj",), "attention_dropout", **CACHE),
    BertSelfAttention: AttentionForm(("query",), ("key",), "value", (), "dropout.p", **CACHE),
    BartAttention: AttentionForm(("q_proj",), ("k_proj",), "v_proj", ("out_proj",), "dropout", **CACHE),
    Qwen3Attention: AttentionForm(
        ("q_norm", "q_proj"), ("k_norm", "k_proj"), "v_proj", ("o_proj",), "attention_dropout", **CACHE
    ),
    SwinAttention: AttentionForm(
        ("q_proj",), SWIN_KEYS, "v_proj", ("o_proj",), "attention_dropout", ("relative_position_bias",)
    ),
}


@pytest.mark.parametrize("cls", FORMS)
def test_the_role_of_each_attribute_is_read(cls):
    assert read_attention(cls) == FORMS[cls]


UPDATE = "key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)"
OTHER_UPDATES = {
    "under a condition": ("past_key_values is not None:", "past_key_values is not None and self.training:"),
    "scaled values": (UPDATE, UPDATE.replace("(key_states, value_states,", "(key_states, 2 * value_states,")),
    "scaled values before": (UPDATE, f"value_states = 2 * value_states\n        {UPDATE}"),
    "keys kept elsewhere": (UPDATE, f"self.seen = key_states\n        {UPDATE}"),
    "keys thrown away": (UPDATE, UPDATE.replace("key_states, value_states =", "_, value_states =")),
    "another layer": (UPDATE, UPDATE.replace("self.layer_idx", "self.layer_idx + 1")),
    "two updates": (UPDATE, f"{UPDATE}\n        {UPDATE}"),
}


@pytest.mark.parametrize("change", OTHER_UPDATES)
def test_a_class_that_updates_a_cache_in_another_way_takes_none(monkeypatch, change):
    monkeypatch.setattr(FaithfulAttention, "forward", rewritten(FaithfulAttention, *OTHER_UPDATES[change]))
    assert read_attention(FaithfulAttention).cache is None
    model, batch = faithful_llama()
    mr.apply(model, PLANS["groups of 2"])
    assert model(**batch).past_key_values is None
    with pytest.raises(ValueError, match="cannot use a cache: mapreuse does not know how its attention") as error:
        model(**batch, use_cache=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_an_altered_forward_is_refused_with_the_reason(monkeypatch, alteration):
    old, new, problem = ALTERATIONS[alteration]
    monkeypatch.setattr(FaithfulAttention, "forward", rewritten(FaithfulAttention, old, new))
    with pytest.raises(Unsupported, match=f"^FaithfulAttention: .*{problem}") as error:
        read_attention(FaithfulAttention)
    assert "\n" not in str(error.value)


HARMLESS = {
    "other queries": (ROTARY, f"{ROTARY}\n    query_states *= 3"),
    "other keys": ("key_states = self.k_proj(hidden_states)", "key_states = 2 * self.k_proj(hidden_states)"),
    "another condition for a cache": (
        "past_key_values is not None:\n        key_states",
        "past_key_values is not None and self.training:\n        key_states",
    ),
    "no dropout": ("dropout=0.0 if not self.training else self.attention_dropout, ", ""),
    "no keyword arguments for attention": ("scaling=self.scaling, **kwargs", "scaling=self.scaling"),
    "values in two steps": (
        VALUES,
        "values = self.v_proj(hidden_states)\n"
        "    value_states = values.reshape(*hidden_shape).transpose(1, 2).contiguous()",
    ),
    "another name for the output": (
        f"{OUTPUT}\n    return attn_output",
        "projected = self.o_proj(attn_output)\n    return projected",
    ),
    "another way to a shape": (
        "attn_output = attn_output.reshape(*input_shape, -1)",
        "shape = attn_output.size()[:-2] + (-1,)\n    attn_output = attn_output.reshape(shape)",
    ),
    "dropout of the output": (
        OUTPUT,
        f"{OUTPUT}\n    attn_output = nn.functional.dropout(attn_output, p=self.attention_dropout, "
        "training=self.training)",
    ),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_a_forward_with_a_harmless_change_is_accepted_and_agrees(monkeypatch, change):
    monkeypatch.setattr(FaithfulAttention, "forward", rewritten(FaithfulAttention, *HARMLESS[change]))
    plan = mr.ReusePlan.from_sources([0, 0, 2, 2], heads={1: [3, 1, 1, 0]})

    (eager, batch), (model, _) = faithful_llama("eager"), faithful_llama()
    with torch.no_grad():
        reference = defined_output(eager, batch, plan)
        output = mr.apply(model, plan)(**batch).last_hidden_state
    assert disagreement(output, reference, batch["attention_mask"].bool()) <= 1e-4


@pytest.mark.parametrize("plan", ["other heads", "in part"])
@pytest.mark.parametrize("change", SERVED)
def test_a_reusing_layer_runs_what_its_forward_does_without_queries_and_keys(monkeypatch, change, plan):
    monkeypatch.setattr(FaithfulAttention, "forward", rewritten(FaithfulAttention, *SERVED[change]))
    (eager, batch), (model, _) = faithful_llama("eager"), faithful_llama()
    with torch.no_grad():
        reference = defined_output(eager, batch, PLANS[plan])
        model = mr.apply(model, PLANS[plan])
        output = pickle.loads(pickle.dumps(model))(**batch).last_hidden_state
    assert disagreement(output, reference, batch["attention_mask"].bool()) <= 1e-4


def faithful_llama(implementation="sdpa"):
    model, batch = build("llama", implementation=implementation)
    for layer in model.layers:
        layer.self_attn.__class__ = FaithfulAttention
    return model, batch


def scaled(monkeypatch, width):
    """A model whose queries are scaled inside a method by a parameter of this width."""
    monkeypatch.setattr(FaithfulAttention, "scaled", lambda self, query: query * self.scale, raising=False)
    new = "query_states = self.scaled(self.q_proj(hidden_states)).view"
    forward = rewritten(FaithfulAttention, "query_states = self.q_proj(hidden_states).view", new)
    monkeypatch.setattr(FaithfulAttention, "forward", forward)
    model, batch = faithful_llama()
    for layer in model.layers:
        layer.self_attn.scale = nn.Parameter(torch.ones(width))
    return model, batch


def test_attributes_used_by_a_method_have_the_role_of_its_caller(monkeypatch):
    model, batch = scaled(monkeypatch, 32)
    assert read_attention(FaithfulAttention).query == ("q_proj", "scale", "scaled")
    mr.apply(model, mr.ReusePlan.grouped(4, 2))
    assert [hasattr(layer.self_attn, "scale") for layer in model.layers] == [True, False, True, False]
    model(**batch)


def defined_in_part(model, batch):
    """The output of the model under a plan in part, by the definition."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return defined_output(eager, batch, PLANS["in part"])


@torch.no_grad()
def test_a_parameter_that_spans_all_heads_stays_whole_in_a_layer_that_computes_in_part(monkeypatch):
    model, batch = scaled(monkeypatch, 32)
    for layer in model.layers:
        nn.init.normal_(layer.self_attn.scale)
    reference = defined_in_part(model, batch)
    mr.apply(model, PLANS["in part"])
    assert model.layers[1].self_attn.q_proj.out_features == 32
    assert disagreement(model(**batch).last_hidden_state, reference, batch["attention_mask"].bool()) <= 1e-4


@torch.no_grad()
def test_a_forward_with_a_fixed_number_of_heads_projects_them_all(monkeypatch):
    old = "self.q_proj(hidden_states).view(hidden_shape)"
    new = "self.q_proj(hidden_states).view(*input_shape, self.config.num_attention_heads, self.head_dim)"
    monkeypatch.setattr(FaithfulAttention, "forward", rewritten(FaithfulAttention, old, new))
    model, batch = faithful_llama()
    reference = defined_in_part(model, batch)
    mr.apply(model, PLANS["in part"])
    assert model.layers[1].self_attn.q_proj.out_features == 32
    assert disagreement(model(**batch).last_hidden_state, reference, batch["attention_mask"].bool()) <= 1e-4


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("self.q_proj(hidden_states)", "hidden_states", "no query projection was found"),
        ("self.v_proj(hidden_states)", "self.project_values(hidden_states)", "project_values is not a module"),
    ],
)
def test_an_attention_without_its_projections_as_modules_is_refused(monkeypatch, old, new, problem):
    monkeypatch.setattr(FaithfulAttention, "forward", rewritten(FaithfulAttention, old, new))
    with pytest.raises(Unsupported, match=problem):
        mr.apply(faithful_llama()[0], mr.ReusePlan.grouped(4, 2))


def test_keys_from_two_projections_stay_whole_or_are_both_removed(monkeypatch):
    new = "self.k_proj(self.k_a_proj(hidden_states))"
    monkeypatch.setattr(FaithfulAttention, "forward", rewritten(FaithfulAttention, "self.k_proj(hidden_states)", new))
    model, batch = faithful_llama()
    for layer in model.layers:
        layer.self_attn.k_a_proj = nn.Linear(32, 32)
    with torch.no_grad():
        reference = defined_in_part(model, batch)
        output = mr.apply(copy.deepcopy(model), PLANS["in part"])(**batch).last_hidden_state
    assert disagreement(output, reference, batch["attention_mask"].bool()) <= 1e-4
    mr.apply(model, mr.ReusePlan.grouped(4, 2))
    assert not {"k_proj", "k_a_proj"} & model.layers[1].self_attn._modules.keys()


def test_a_forward_replaced_on_the_class_is_read_again(monkeypatch):
    changed = rewritten(LlamaAttention, "self.v_proj(hidden_states)", "self.v_proj(attention_mask)")
    monkeypatch.setattr(LlamaAttention, "forward", changed)
    with pytest.raises(Unsupported, match="LlamaAttention: its values depend on attention_mask"):
        mr.apply(build("llama")[0], mr.ReusePlan.grouped(4, 2))


def test_a_forward_replaced_on_one_module_is_refused():
    model, _ = build("llama")
    attention = model.layers[2].self_attn
    attention.forward = attention.forward
    with pytest.raises(Unsupported, match="LlamaAttention: its forward was replaced on the module itself"):
        mr.apply(model, mr.ReusePlan.grouped(4, 2))


@pytest.mark.parametrize(
    ("family", "cls", "old"),
    [
        ("parakeet", ParakeetEncoderAttention, "scaling=self.scaling"),
        ("modernbert", ModernBertAttention, "self.head_dim**-0.5"),
        ("gpt2", GPT2Attention, "scaling=self.scaling"),
        ("wav2vec2-conformer-relative", Wav2Vec2ConformerSelfAttention, "self.scaling"),
    ],
)
def test_a_class_with_an_adapter_is_refused_if_its_forward_has_changed(monkeypatch, family, cls, old):
    model, _ = build(family)
    monkeypatch.setattr(cls, "forward", rewritten(cls, old, f"{old} * 2"))
    with pytest.raises(
        Unsupported, match=rf"{cls.__name__}: its forward has changed \(fingerprint \w{{12}}, expected"
    ):
        mr.apply(model, mr.ReusePlan.grouped(4, 2))


@pytest.mark.parametrize(
    ("family", "cls"), [("parakeet", AlteredParakeetAttention), ("modernbert", AlteredModernBertAttention)]
)
def test_a_subclass_that_calls_the_original_forward_is_refused(family, cls):
    model, _ = build(family)
    for module in model.modules():
        if type(module) is cls.__mro__[1]:
            module.__class__ = cls
    with pytest.raises(Unsupported, match=f"{cls.__name__}: its forward does not go through"):
        mr.apply(model, mr.ReusePlan.grouped(4, 2))


def test_comments_and_docstrings_do_not_change_a_fingerprint():
    class Plain(nn.Module):
        def forward(self, x):
            return self.layer(x)

    class Commented(nn.Module):
        def forward(self, x):
            """A docstring."""
            return self.layer(x)  # a comment

    class Other(nn.Module):
        def forward(self, x):
            return self.layer(2 * x)

    assert fingerprint_of(Plain) == fingerprint_of(Commented) != fingerprint_of(Other)


def test_a_forward_without_source_is_refused():
    with pytest.raises(Unsupported, match="NoSource: its forward is not a plain method"):
        attention_form(NoSource())


LOOP = "for i, layer_module in enumerate(self.layer):"
AGAIN = "hidden_states = self.layer[1](hidden_states, attention_mask)"
ONE_AFTER_THE_OTHER = "does not run its layer one after the other, once"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (LOOP, LOOP.replace("self.layer", "self.layer[1:]"), ONE_AFTER_THE_OTHER),
        (LOOP, LOOP.replace("self.layer", "reversed(self.layer)"), ONE_AFTER_THE_OTHER),
        (LOOP, f"for _ in range(2):\n      {LOOP}", ONE_AFTER_THE_OTHER),
        (LOOP, f"{AGAIN}\n    {LOOP}", ONE_AFTER_THE_OTHER),
        ("return BaseModelOutput", f"{AGAIN}\n    return BaseModelOutput", ONE_AFTER_THE_OTHER),
        ("layer_module(", "self.call(layer_module,", "does not call its layer in their loop"),
    ],
)
def test_a_stack_that_does_not_run_every_layer_once_in_order_is_refused(monkeypatch, old, new, problem):
    model, _ = build("bert")
    monkeypatch.setattr(BertEncoder, "forward", rewritten(BertEncoder, old, new))
    with pytest.raises(Unsupported, match=f"^BertEncoder: its forward {problem}"):
        mr.apply(model, mr.ReusePlan.grouped(4, 2))


def test_a_loop_over_as_many_layers_as_the_config_counts_is_accepted(monkeypatch):
    model, _ = build("bert")
    loop = LOOP.replace("self.layer", "self.layer[: self.config.num_hidden_layers]")
    monkeypatch.setattr(BertEncoder, "forward", rewritten(BertEncoder, LOOP, loop))
    mr.apply(model, mr.ReusePlan.grouped(4, 2))


@pytest.mark.parametrize("cls", [BertEncoder, BertLayer, BertAttention])
def test_maps_are_injected_if_keyword_arguments_are_not_passed_on(monkeypatch, cls):
    eager, batch = build("bert", implementation="eager")
    model, _ = build("bert")
    monkeypatch.setattr(cls, "forward", rewritten(cls, "**kwargs,", ""))
    with torch.no_grad():
        for plan in (PLANS["full"], PLANS["other heads"], PLANS["two sources"]):
            output = mr.apply(copy.deepcopy(model), plan)(**batch).last_hidden_state
            reference = defined_output(eager, batch, plan)
            assert disagreement(output, reference, batch["attention_mask"].bool()) <= 1e-4


def test_maps_are_not_injected_into_an_attention_that_is_called_twice(monkeypatch):
    model, _ = build("bert")
    once = "attention_output, attn_weights = self.self("
    new = f"self.self(hidden_states)\n    kwargs = {{}}\n    {once}"
    forward = rewritten(BertAttention, once, new)
    monkeypatch.setattr(BertAttention, "forward", forward)
    monkeypatch.setattr(BertAttention, "forward", rewritten(BertAttention, "**kwargs,", ""))
    with pytest.raises(
        Unsupported, match=r"BertAttention: .* to self, and calls it in 2 places, so no map can travel"
    ):
        mr.apply(model, mr.ReusePlan.grouped(4, 2))


@pytest.mark.parametrize(
    ("cls", "old", "new"),
    [
        (BertAttention, "self.output(attention_output, hidden", "self.output(2 * attention_output, hidden"),
        (BertAttention, "(attention_output, hidden_states)", "(hidden_states, attention_output)"),
        (BertSelfOutput, "self.dense(hidden_states)", "self.dense(self.LayerNorm(hidden_states))"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_heads_are_assigned_also_if_the_context_does_not_go_straight_to_the_output_projection(
    monkeypatch, cls, old, new
):
    (model, batch), (eager, _) = build("bert"), build("bert", implementation="eager")
    monkeypatch.setattr(cls, "forward", rewritten(cls, old, new))
    with pytest.raises(Unsupported, match="no plain output projection directly after its context"):
        output_projection(find_stack(model).layers[1])
    reference = defined_output(eager, batch, PLANS["other heads"])
    output = mr.apply(model, PLANS["other heads"])(**batch).last_hidden_state
    assert disagreement(output, reference, batch["attention_mask"].bool()) <= 1e-4
