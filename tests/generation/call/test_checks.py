"""Wrong use is refused with a sentence that names value, rule and remedy, before any work is done."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from dspark_hf import DSparkAssistantModel, generate_stream
from tests.generation.prompts import ragged_prompts
from tests.tiny import tiny_target


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama")


@pytest.fixture(scope="module")
def drafter(target):
    return DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)


def _generate(target, drafter, num_rows=1, **options):
    return target.generate(**ragged_prompts(num_rows), max_new_tokens=4, assistant_model=drafter, **options)


@pytest.fixture
def no_forward(target, monkeypatch):
    """Fail if the target runs at all."""

    def refuse(*args, **kwargs):
        raise AssertionError("the target ran before the request was refused")

    monkeypatch.setattr(target.model, "forward", refuse)


def test_more_drafts_than_trained(target, drafter, no_forward):
    """Drafts beyond the trained block are noise and only cost."""
    with pytest.raises(ValueError, match=r"`num_assistant_tokens` must lie in \[1, 7\].*got 8"):
        _generate(target, drafter, num_assistant_tokens=8)
    with pytest.raises(ValueError, match=r"`num_assistant_tokens` must lie in \[1, 7\].*got 20"):
        _generate(target, drafter, num_assistant_tokens=20)


def test_threshold_outside_its_range(target, drafter, no_forward):
    """A threshold in percent silently rejects every draft."""
    with pytest.raises(ValueError, match=r"`assistant_confidence_threshold` must lie in \[0, 1\], got 40"):
        _generate(target, drafter, assistant_confidence_threshold=40)


def test_drafter_of_another_width(target, no_forward):
    """A drafter for another hidden size fails deep inside a matrix product."""
    other = DSparkAssistantModel.from_target(tiny_target("llama", hidden_size=64), num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"`hidden_size` 32, got 64"):
        _generate(target, other)


def test_drafter_of_another_vocabulary(target, no_forward):
    """A drafter for another vocabulary drafts tokens that do not exist."""
    other = DSparkAssistantModel.from_target(tiny_target("llama", vocab_size=96), num_hidden_layers=1)
    with pytest.raises(ValueError):
        _generate(target, other)
    with pytest.raises(ValueError, match=r"`vocab_size` 64, got 96"):
        target.generate(**ragged_prompts(1), max_new_tokens=4, custom_generate=other.decode)


def test_layers_outside_the_target(target, no_forward):
    """A drafter of a deeper target reads layers that are not there."""
    deeper = tiny_target("llama", num_hidden_layers=6)
    other = DSparkAssistantModel.from_target(deeper, num_hidden_layers=1, target_layer_ids=[1, 5])
    with pytest.raises(ValueError, match=r"`target_layer_ids` must lie in \[0, 1\] for this target, got \[1, 5\]"):
        _generate(target, other)


def test_beam_search(target, drafter, no_forward):
    """Beams are silently decoded as one greedy text."""
    with pytest.raises(ValueError, match=r"`num_beams` must be 1 when a drafter assists, got the mode 'beam_search'"):
        _generate(target, drafter, num_beams=2)
    with pytest.raises(ValueError, match=r"`num_beams` must be 1"):
        target.generate(**ragged_prompts(1), max_new_tokens=4, num_beams=2, custom_generate=drafter.decode)


def test_num_return_sequences_with_greedy(target, drafter, no_forward):
    """Several copies of one greedy text are silently returned."""
    with pytest.raises(ValueError, match=r"num_return_sequences"):
        _generate(target, drafter, num_return_sequences=2, do_sample=False)


@pytest.mark.parametrize("implementation", ["static", "quantized"])
def test_caches_that_cannot_be_rolled_back(target, drafter, no_forward, implementation):
    """A cache that cannot forget keeps rejected drafts."""
    options = {"cache_config": {"backend": "hqq"}} if implementation == "quantized" else {}
    with pytest.raises((ValueError, ImportError), match=r"`cache_implementation`|HQQ"):
        _generate(target, drafter, cache_implementation=implementation, **options)


def test_no_cache(target, drafter, no_forward):
    """Without a cache every round would start over."""
    with pytest.raises(ValueError, match=r"`use_cache` must be True"):
        _generate(target, drafter, use_cache=False)


def test_attentions_of_a_batch(target, drafter, no_forward):
    """Attentions of rows that have left padding behind cannot be laid out as without a drafter."""
    with pytest.raises(ValueError, match=r"`output_attentions` must be False"):
        _generate(target, drafter, 3, output_attentions=True, return_dict_in_generate=True)


BY_COLUMNS = {
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
        "num_heads": 4,
        "window_size": 4,
        "max_position_embeddings": 64,
    },
    "falcon": {"alibi": True, "num_hidden_layers": 2, "num_attention_heads": 4},
}


@pytest.mark.parametrize("family", BY_COLUMNS)
def test_attention_that_counts_columns(family):
    """A window or a bias by distance, counted in columns, falls on the wrong tokens once rows differ in length."""
    config = AutoConfig.for_model(family, vocab_size=64, hidden_size=32, eos_token_id=None, **BY_COLUMNS[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    drafter = DSparkAssistantModel.from_target(model, num_hidden_layers=1, markov_rank=8)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**ragged_prompts(1), **options)
    assert torch.equal(model.generate(**ragged_prompts(1), **options, assistant_model=drafter), plain)
    with pytest.raises(ValueError, match=r"unless the target has full or sliding attention.*\['(local|alibi)'\].*one"):
        model.generate(**ragged_prompts(3), **options, assistant_model=drafter)
    with pytest.raises(ValueError, match="`target` must have full or sliding attention"):
        generate_stream(model, [], drafter=drafter)


def test_target_that_turns_its_cache_off():
    """The message about a missing cache blames the user for what the target's configuration says."""
    config = AutoConfig.for_model("mpt", vocab_size=64, d_model=32, n_layers=2, n_heads=4, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    drafter = DSparkAssistantModel.from_target(model, num_hidden_layers=1, markov_rank=8)
    with pytest.raises(ValueError, match=r"`use_cache` must be True.*Pass `use_cache=True`"):
        _generate(model, drafter)
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": True}
    plain = model.generate(**ragged_prompts(1), **options)
    assert torch.equal(model.generate(**ragged_prompts(1), **options, assistant_model=drafter), plain)
    with pytest.raises(ValueError, match="unless the target takes `position_ids`"):
        model.generate(**ragged_prompts(3), **options, assistant_model=drafter)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_rows_of_padding(target, drafter, no_forward, num_rows):
    """A row whose attention mask is all zeros fails deep inside, with words about indices."""
    inputs = ragged_prompts(num_rows)
    inputs["attention_mask"][-1] = 0
    with pytest.raises(ValueError, match=rf"`attention_mask` must leave every row a token.*rows \[{num_rows - 1}\]"):
        target.generate(**inputs, max_new_tokens=4, assistant_model=drafter)


def test_ensemble_weight(target, drafter, no_forward):
    """A setting that trades exactness for speed is silently ignored."""
    with pytest.raises(ValueError, match=r"`assistant_ensemble_weight` must be None"):
        _generate(target, drafter, assistant_ensemble_weight=0.5)


def test_encoder_decoder_targets():
    """A drafter is made for, or used with, a target it cannot serve."""
    config = AutoConfig.for_model(
        "t5", vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    with pytest.raises(ValueError, match=r"must be a decoder-only causal LM, got the encoder-decoder"):
        DSparkAssistantModel.from_target(model)
    drafter = DSparkAssistantModel.from_target(tiny_target("llama"), num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"must assist a decoder-only target"):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=4, assistant_model=drafter)


# the fields without which their tiny targets cannot be built
UNKNOWN_STATES = {
    "minimax": ({"num_local_experts": 2, "num_experts_per_tok": 1}, "It keeps one in a form of its own"),
    "recurrent_gemma": ({"lru_width": 32, "block_types": ["recurrent", "attention"]}, "in a form of its own"),
    "rwkv": ({"context_length": 64, "attention_hidden_size": 32}, "it keeps its state in a form of its own"),
    "zaya": ({"moe_intermediate_size": 24, "num_experts": 4, "router_hidden_size": 16}, "is none of those"),
}


@pytest.mark.parametrize("family", UNKNOWN_STATES)
def test_states_that_cannot_be_taken_back(family, drafter):
    """The state of a target of another kind keeps rejected drafts and corrupts the text."""
    fields, reason = UNKNOWN_STATES[family]
    model = tiny_target(family, **fields)
    for door in ({"assistant_model": drafter}, {"custom_generate": drafter.decode}):
        with pytest.raises(ValueError, match=f"must assist a target whose cache can be rolled back, got .*{reason}"):
            model.generate(torch.tensor([[3, 4]]), max_new_tokens=4, **door)
