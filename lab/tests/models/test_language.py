"""Metrics of language models, on small models and against other ways to compute them."""

import math

import numpy as np
import pytest
import torch
from mapreuse_lab.models import Metric, _texts, copying, perplexity, recall, text_windows
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


class Characters:
    """A tokenizer with one token for each character."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(character) % 128 for character in text]}


class Finder(nn.Module):
    """Predicts the token that followed the longest earlier match, with all its weight on it, or a wrong one."""

    device = torch.device("cpu")

    def __init__(self, shift=0):
        super().__init__()
        self.shift = shift

    def forward(self, input_ids, use_cache):
        tokens = input_ids[0].tolist()
        logits = torch.zeros(1, len(tokens), 128)
        for end in range(1, len(tokens) + 1):
            for length in range(min(20, end - 1), 0, -1):
                found = [i for i in range(length, end) if tokens[i - length : i] == tokens[end - length : end]]
                if found:
                    logits[0, end - 1, (tokens[found[-1]] + self.shift) % 128] = 100.0
                    break
        return CausalLMOutput(logits=logits)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, **SIZES)).eval()


@pytest.fixture
def windows():
    return list(torch.randint(128, (3, 1, 16), generator=torch.Generator().manual_seed(0)))


def test_perplexity_equals_the_exponential_of_the_loss_of_transformers(model, windows):
    with torch.no_grad():
        losses = [model(input_ids=one, labels=one).loss.item() for one in windows]
    assert perplexity(model, windows).value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_copying_counts_only_the_tokens_of_the_copy_after_its_first(model, windows):
    losses = []
    for one in windows:
        passage = one[:, :8]
        labels = torch.cat([torch.full((1, 9), -100), passage[:, 1:]], dim=1)
        with torch.no_grad():
            losses.append(model(input_ids=passage.repeat(1, 2), labels=labels).loss.item())
    assert copying(model, windows).value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_a_model_that_finds_repeated_text_copies_perfectly(windows):
    distinct = [torch.randperm(128, generator=torch.Generator().manual_seed(1))[None, :16]]
    assert copying(Finder(), distinct).value == pytest.approx(1.0)
    assert perplexity(Finder(), distinct).value == pytest.approx(128.0)


def test_recall_is_1_for_a_model_that_looks_pairs_up_and_0_for_one_that_misreads_them():
    assert recall(Finder(), Characters(), num_prompts=4).value == 1.0
    assert recall(Finder(shift=1), Characters(), num_prompts=4).value == 0.0


def test_windows_have_one_length_and_are_spread_over_the_text():
    text = "".join(f"line {number}\n" for number in range(1000))
    windows = text_windows(Characters(), text, 12, 4)
    assert [one.shape for one in windows] == [(1, 12)] * 4
    assert ["".join(map(chr, one[0].tolist())).splitlines()[0] for one in windows] == [
        "line 0",
        "line 260",
        "line 507",
        "line 754",
    ]
    with pytest.raises(ValueError, match="too short for 4 windows of 9000 tokens"):
        text_windows(Characters(), text, 9000, 4)


def test_a_metric_is_compared_pair_by_pair():
    worse = np.array([[2.0, 10.0], [5.0, 10.0], [1.0, 20.0]])
    better = worse - [1.0, 0.0]
    rates = Metric("WER", "rate", worse), Metric("WER", "rate", better)
    assert rates[0].value == pytest.approx(0.2)
    assert rates[0].against(rates[0]) == (0.0, (0.0, 0.0))
    difference, (low, high) = rates[0].against(rates[1])
    assert difference == pytest.approx(3 / 40)
    assert 0.049 < low < difference < high < 0.101
    ratios = Metric("perplexity", "perplexity", worse), Metric("perplexity", "perplexity", better)
    assert ratios[0].against(ratios[1])[0] == pytest.approx(math.exp(3 / 40))
    assert ratios[0].text_against(ratios[0]) == "×1.000 [1.000, 1.000]"


@pytest.mark.full
def test_texts_of_packages_are_read_as_plain_text():
    verses = _texts.bible()
    assert verses.startswith("In the beginning God created the heaven and the earth.\n")
    assert verses.rstrip().endswith("The grace of our Lord Jesus Christ be with you all. Amen.")
    assert len(verses.splitlines()) == 31102
    essays = _texts.essays()
    assert len(essays) > 5e6
    assert not set("*_#") & set(essays[:100000])
    assert len(_texts.fortunes()) > 10000
