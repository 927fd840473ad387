"""Wrong use is refused with a sentence that names value, rule and remedy, before any work is done."""

from __future__ import annotations

from functools import partial
from types import MethodType

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    GenerationConfig,
)

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.generation.decoding import decode
from dspark_hf.generation.ragged_store import RaggedLengths
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.prompts import check_inputs
from dspark_hf.generation.targets.ragged_cache import RaggedLayer
from tests.generation.call.test_criteria import character_tokenizer
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.thinning import slow
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
    with pytest.raises(ValueError, match=r"`target_layer_ids` must lie in \[-1, 1\] for this target, got \[1, 5\]"):
        _generate(target, other)


def test_beam_search(target, drafter, no_forward):
    """Beams are silently decoded as one greedy text."""
    with pytest.raises(ValueError, match=r"`num_beams` must be 1 when a drafter assists, got 2"):
        _generate(target, drafter, num_beams=2)
    with pytest.raises(ValueError, match=r"`num_beams` must be 1"):
        target.generate(**ragged_prompts(1), max_new_tokens=4, num_beams=2, custom_generate=drafter.decode)


def test_num_return_sequences_with_greedy(target, drafter, no_forward):
    """Several copies of one greedy text are silently returned."""
    with pytest.raises(ValueError, match=r"num_return_sequences"):
        _generate(target, drafter, num_return_sequences=2, do_sample=False)


def test_caches_that_cannot_be_rolled_back(target, drafter, no_forward):
    """A cache that cannot forget keeps rejected drafts."""
    with pytest.raises((ValueError, ImportError), match=r"`cache_implementation`|HQQ"):
        _generate(target, drafter, cache_implementation="quantized", cache_config={"backend": "hqq"})


def test_no_cache(target, drafter, no_forward):
    """Without a cache every round would start over."""
    with pytest.raises(ValueError, match=r"`use_cache` must be True"):
        _generate(target, drafter, use_cache=False)


def test_attentions_of_a_batch(target, drafter, no_forward):
    """Attentions of rows that have left padding behind cannot be laid out as without a drafter."""
    with pytest.raises(ValueError, match=r"`output_attentions` must be False"):
        _generate(target, drafter, 3, output_attentions=True, return_dict_in_generate=True)


def test_target_that_turns_its_cache_off():
    """The message about a missing cache blames the user for what the target's configuration says."""
    config = AutoConfig.for_model("mpt", vocab_size=64, d_model=32, n_layers=2, n_heads=4, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    drafter = DSparkAssistantModel.from_target(model, num_hidden_layers=1, markov_rank=8)
    with pytest.raises(ValueError, match=r"`use_cache` must be True.*Pass `use_cache=True`"):
        _generate(model, drafter)
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": True}
    for num_rows in (1, 3):
        plain = model.generate(**ragged_prompts(num_rows), **options)
        assert torch.equal(model.generate(**ragged_prompts(num_rows), **options, assistant_model=drafter), plain)


def test_target_that_takes_no_positions():
    """A target that counts its positions itself puts the tokens of a shorter row at the longest one's."""
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    config = AutoConfig.for_model("bart", vocab_size=64, is_decoder=True, is_encoder_decoder=False, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    drafter = DSparkAssistantModel.from_target(model, num_hidden_layers=1, markov_rank=8)
    with pytest.raises(ValueError, match="unless the target takes `position_ids`"):
        _generate(model, drafter, 3)


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


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {"use_mtp": True}, {"dola_layers": "low"}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_other_ways_to_decode(target, drafter, no_forward, num_rows, options):
    """Of two ways to decode that a call names, one is dropped without a word."""
    with pytest.raises(ValueError, match=rf"`{next(iter(options))}` must be None when a drafter assists"):
        _generate(target, drafter, num_rows, **options)
    with pytest.raises(ValueError, match=rf"`{next(iter(options))}` must be None when a drafter assists"):
        target.generate(**ragged_prompts(num_rows), max_new_tokens=4, custom_generate=drafter.decode, **options)


def test_contrastive_search(target, drafter, no_forward):
    """The refusal of contrastive search blames the beams."""
    options = {"penalty_alpha": 0.6, "top_k": 4, "do_sample": False, "trust_remote_code": True}
    with pytest.raises(ValueError, match="`penalty_alpha` must be None when a drafter assists, got 0.6"):
        _generate(target, drafter, **options)


def test_continuous_batching_of_transformers(target, drafter, no_forward):
    """`generate_batch` decodes without the drafter that it was given, and says nothing."""
    with pytest.raises(ValueError, match="`assistant_model` must be left out of `generate_batch`.*`generate`"):
        target.generate_batch([[3, 4, 5]], max_new_tokens=2, assistant_model=drafter)


def test_offloaded_cache_of_several_rows(target, drafter, no_forward):
    """A cache that is to lie on the CPU stays on the device."""
    cache = DynamicCache(config=target.config, offloading=True)
    # so that no stream of an accelerator is needed
    with pytest.raises(ValueError, match="`cache_implementation` must not be 'offloaded' for several rows"):
        _generate(target, drafter, 3, **{CACHE_KEY: cache})


def test_empty_batch(target, drafter, no_forward):
    """A batch without rows fails deep inside, with words about an empty sequence."""
    with pytest.raises(ValueError, match=r"`input_ids` must hold a row, got \(0, 5\)"):
        target.generate(torch.zeros(0, 5, dtype=torch.long), max_new_tokens=4, assistant_model=drafter)


@pytest.mark.parametrize("num_held", [8, 12])
def test_cache_that_holds_all_of_the_ids(target, drafter, num_held):
    """Rows whose tokens are all in the cache fail deep inside, with words about sizes of tensors."""
    ids = torch.randint(2, 60, (2, num_held))
    cache = target(ids, use_cache=True)[CACHE_KEY]
    with pytest.raises(ValueError, match=rf"`input_ids` must go beyond what the cache holds.*with {num_held} held"):
        target.generate(ids[:, :8], max_new_tokens=4, assistant_model=drafter, **{CACHE_KEY: cache})


@pytest.mark.parametrize("num_rows", [1, 3])
def test_prompts_that_another_made_longer(num_rows):
    """Virtual tokens that a wrapper adds to the prompt, as in prompt tuning, are left out, or fail deep inside."""
    target = tiny_target("llama")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    target.prepare_inputs_for_generation = Tuned(target).prepare
    with pytest.raises(ValueError, match="`prepare_inputs_for_generation` must .*Tuned.* without `assistant_model`"):
        _generate(target, drafter, num_rows)


class Tuned:
    """Put embeddings before the prompt."""

    def __init__(self, model):
        self.model = model

    def prepare(self, *args, **kwargs):
        inputs = type(self.model).prepare_inputs_for_generation(self.model, *args, **kwargs)
        embeds = self.model.get_input_embeddings()(inputs.pop("input_ids"))
        return {**inputs, "inputs_embeds": torch.cat([embeds[:, :1], embeds], dim=1), "attention_mask": None}


@pytest.mark.parametrize(("num_rows", "tuning"), [(1, "prompt"), (3, "prompt"), (3, "prefix")])
def test_prompt_tuning_of_another_library(num_rows, tuning):
    """Prompts tuned with PEFT are left out, or fail deep inside."""
    peft = pytest.importorskip("peft")
    target = tiny_target("llama")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[tuning]
    tuned = peft.get_peft_model(target, config(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with pytest.raises(ValueError, match="`prepare_inputs_for_generation` must .*PeftModelForCausalLM"):
        _generate(tuned, drafter, num_rows)
    # an adapter within the layers is served
    adapted = peft.get_peft_model(
        tiny_target("llama"), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    ).eval()
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = adapted.generate(**ragged_prompts(num_rows), **options)
    assert torch.equal(adapted.generate(**ragged_prompts(num_rows), **options, assistant_model=drafter), plain)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_prompts_that_token_healing_made_shorter(target, drafter, num_rows):
    """Padded prompts that `token_healing` changes fail deep inside, with words about an index."""
    inputs = {name: values[-num_rows:] for name, values in ragged_prompts(3).items()}
    inputs["attention_mask"][:, :2] = 0
    inputs["input_ids"][:, :2] = 0
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "a", "bos_token": "b"})
    tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match=r"`attention_mask` must cover the 15 columns.*got 17.*`token_healing`"):
        target.generate(**inputs, max_new_tokens=4, token_healing=True, tokenizer=tokenizer, assistant_model=drafter)


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


_QWEN3_NEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "initializer_range": 0.4,
    "eos_token_id": None,
}


def _qwen3_next(*layer_types):
    config = AutoConfig.for_model("qwen3_next", **_QWEN3_NEXT, layer_types=list(layer_types))
    return AutoModelForCausalLM.from_config(config).eval()


# the fields without which their tiny targets cannot be built, and why they are refused
UNKNOWN_STATES = {
    "minimax": ({"num_local_experts": 2, "num_experts_per_tok": 1}, "which has one of its own"),
    "recurrent_gemma": ({"lru_width": 32, "block_types": ["recurrent", "attention"]}, "it has a form of its own"),
    "rwkv": ({"context_length": 64, "attention_hidden_size": 32}, "keep a state: it has a form of its own"),
    "zaya": ({"moe_intermediate_size": 24, "num_experts": 4, "router_hidden_size": 16}, "recurrence is none of those"),
}


@pytest.mark.parametrize("family", [family for family in UNKNOWN_STATES if family in CONFIG_MAPPING])
def test_states_that_cannot_be_taken_back(family):
    """The state of a target of another kind keeps rejected drafts and corrupts the text, or a drafter is trained for
    it in vain."""
    fields, reason = UNKNOWN_STATES[family]
    model = tiny_target(family, **fields)
    drafter = ScriptedDrafter(model, torch.zeros(1, 1), [0], 0.5)
    for call in (
        partial(model.generate, torch.tensor([[3, 4]]), max_new_tokens=4, assistant_model=drafter),
        partial(model.generate, torch.tensor([[3, 4]]), custom_generate=partial(decode, drafter=drafter)),
        partial(DSparkAssistantModel.from_target, model),
    ):
        with pytest.raises(
            ValueError, match=f"must have a cache .* rolled back, got {type(model).__name__}.*{reason}"
        ):
            call()


def test_targets_with_a_cache_of_their_own():
    """The message blames `use_cache`, which is on, for a cache that is not Transformers'."""
    config = AutoConfig.for_model("xlnet", vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)
    model = AutoModelForCausalLM.from_config(config).eval()
    drafter = ScriptedDrafter(model, torch.zeros(1, 1), [0], 0.5)
    expected = "must have a cache of Transformers, .* got XLNetLMHeadModel, which has one of its own"
    with pytest.raises(ValueError, match=expected):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=4, assistant_model=drafter)
    with pytest.raises(ValueError, match=expected):
        DSparkAssistantModel.from_target(model)


def _assert_identical(model, num_rows):
    """Compare with plain `generate`, with drafts that are half right and with those of a fresh drafter."""
    inputs, options = ragged_prompts(num_rows), {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**inputs, **options)
    script = ScriptedDrafter(model, plain, num_padded(inputs), 0.5)
    assert torch.equal(model.generate(**inputs, **options, assistant_model=script), plain)
    assert 0 < script.last_statistics.num_accepted < script.last_statistics.num_verified
    drafter = DSparkAssistantModel.from_target(model, num_hidden_layers=1, markov_rank=8)
    assert torch.equal(model.generate(**inputs, **options, assistant_model=drafter, scheduler="fixed"), plain)


@pytest.mark.parametrize("num_rows", [slow(1), 3])
def test_hybrid_class_with_attention_alone(num_rows):
    """A flag of the class refuses a layout that has no state."""
    _assert_identical(_qwen3_next("full_attention", "full_attention"), num_rows)


def test_short_convolutions():
    """A cache is refused since its convolutions cannot say before the first pass whether they can be taken back."""
    config = AutoConfig.for_model(
        "lfm2",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
        initializer_range=0.4,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    _assert_identical(model, 3)


def test_assertions_about_passes_are_not_what_a_user_reads():
    """A target that takes one token a pass fails with an assertion of its own in the first verify pass."""
    sizes = {"num_decoder_layers": 2, "num_decoder_attention_heads": 4, "decoder_ffn_dim": 48, "ngram": 2}
    config = AutoConfig.for_model("prophetnet", vocab_size=64, hidden_size=32, is_encoder_decoder=False, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="`target` must take several tokens a pass.*ProphetNetForCausalLM"):
        DSparkAssistantModel.from_target(model)


def test_cache_that_is_not_filled(target, drafter):
    """A target that passes over the cache it is given decodes every draft without the text before it."""

    def forward(self, *args, **kwargs):
        kwargs[CACHE_KEY] = None
        return type(self).forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target.model, "forward", MethodType(forward, target.model))
        with pytest.raises(ValueError, match="must hold every token once in the cache it is given, got 0 after 11"):
            _generate(target, drafter)


def test_caches_that_are_read_by_column():
    """Rows of their own lengths are read by column, one row's tokens for another's."""
    layer = RaggedLayer(RaggedLengths(2, torch.device("cpu")))
    assert layer.keys is None
    layer.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))
    with pytest.raises(ValueError, match="a target that reads its cache by itself"):
        _ = layer.keys


def test_images_are_called_by_the_users_name():
    """The message names what Transformers made of the argument, which the user never passed."""
    adapter = TargetAdapter(tiny_target())
    given = {"input_ids": None, "mm_encoder_outputs": {"image": object()}, "use_cache": True}
    with pytest.raises(ValueError, match=r"got \['pixel_values'\]"):
        check_inputs(adapter, GenerationConfig(), given)
    check_inputs(adapter, GenerationConfig(), {**given, "mm_encoder_outputs": {}})
