"""docs/models.md and a sample of its model types; `python docs/model_families.py --check` tests all of them."""

import re
from pathlib import Path

import pytest
import transformers
from sweep import FULL_TOLERANCE, REUSE_TOLERANCE, sweep
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text()


def exact_on_the_page() -> dict[str, set[str]]:
    """The stacks in the table of exact ones, by model type."""
    table = PAGE[PAGE.index("## Exact") : PAGE.index("## Refused")]
    rows = re.findall(r"^\| ([^|]+) \| (.+?) \| [^|]*\|$", table, re.MULTILINE)
    return {
        name: {"" if stack == "(itself)" else stack.strip("`†") for stack in stacks.replace("†", "").split(", ")}
        for name, stacks in rows
        if name not in ("type", "---")
    }


EXACT = exact_on_the_page()
NAMED = [
    *("bert", "roberta", "distilbert", "electra", "modernbert", "vit", "deit", "dinov2", "wav2vec2", "hubert"),
    *("whisper", "audio-spectrogram-transformer", "clip", "gpt2", "llama", "qwen2", "parakeet_encoder"),
    "wav2vec2-conformer",
]
"""The families with a name in the documentation."""
SAMPLE = [*NAMED, *sorted(EXACT)[::9]]


def test_at_least_380_types_are_exact_and_the_page_states_the_number_of_its_rows():
    (counted,) = re.findall(r"\*\*(\d+) model types share maps exactly\*\*, in (\d+) stacks", PAGE)
    assert int(counted[0]) == len(EXACT) >= 380
    assert int(counted[1]) == sum(map(len, EXACT.values()))


def test_every_type_of_transformers_is_on_the_page():
    if f"`transformers` {transformers.__version__}," not in PAGE:
        pytest.skip(f"the page was made with another version than {transformers.__version__}")
    missing = [
        name for name in CONFIG_MAPPING_NAMES if not re.search(rf"(^|[ |]){re.escape(name)}[ ,.|]", PAGE, re.M)
    ]
    assert not missing


@pytest.mark.parametrize("family", NAMED)
def test_the_named_families_are_on_the_page(family):
    assert family in EXACT


@pytest.mark.sample(6)
@pytest.mark.parametrize("model_type", dict.fromkeys(SAMPLE))
def test_types_listed_as_exact_are_exact(model_type):
    found = {one.stack: one for one in sweep(model_type)}
    assert {stack for stack, one in found.items() if one.status == "exact"} == EXACT[model_type]
    for stack in EXACT[model_type]:
        assert found[stack].full <= FULL_TOLERANCE
        assert found[stack].reuse <= REUSE_TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("deepseek_v32", "its attention takes indices"),
        ("longformer", "does not go through transformers' attention interface"),
        ("moshi", "its values depend on codebook_idx"),
        ("qwen2_5_vl_vision", "calls attention_interface 2 times"),
        ("sam3_vit_model", "its hidden states have 4 dimensions"),
        ("kosmos_2_5_vision_model", "is not chosen by"),
        ("videomt", "does not run its layers one after the other, once each"),
        ("resnet", "holds no list of layers with attention"),
    ],
)
def test_types_listed_as_refused_are_refused_for_the_stated_reason(model_type, reason):
    results = sweep(model_type)
    assert {one.status for one in results} == {"refused"}
    assert reason in results[0].reason
    assert model_type not in EXACT
