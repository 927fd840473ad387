"""A fresh drafter fits any causal LM, and a drafter for another model is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.from_target import config_for_target
from tests.closeness import assert_same_up_to_rounding
from tests.generation.prompts import ragged_prompts
from tests.modeling.drafting import draft_greedily
from tests.recurrent import available
from tests.thinning import mostly_slow
from tests.tiny import FAMILIES, tiny_target


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_a_working_drafter(family: str) -> None:
    """`from_target` would fail for a family, or its drafter could not read the target's states."""
    target = tiny_target(family)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4, block_size=3)
    assert not drafter.training
    adapter = TargetAdapter(target, drafter.target_layer_ids)
    drafter.check_target(adapter)
    with adapter, torch.no_grad():
        target(torch.tensor([[5, 6, 7, 8]]))
        context = adapter.pop_context_hidden_states()
    block = draft_greedily(drafter, adapter, context, [4], [9])
    assert block.token_ids.shape == (1, 3)
    assert block.logits.shape == (1, 3, target.config.vocab_size)
    assert block.logits.isfinite().all()


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(36, [1, 9, 17, 25, 33]), (40, [1, 10, 19, 28, 37]), (8, [1, 2, 3, 4, 5]), (4, [1]), (2, [0]), (1, [0])],
)
def test_layers_are_evenly_spaced(num_layers: int, expected: list[int]) -> None:
    """Fresh drafters would read other layers than the released ones of the same target."""
    drafter = DSparkAssistantModel.from_target(
        tiny_target("llama", num_hidden_layers=num_layers), num_hidden_layers=1, markov_rank=4
    )
    assert drafter.target_layer_ids == expected
    assert drafter.config.num_target_layers == num_layers


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"pad_token_id": 5, "eos_token_id": 2}, 5),
        ({"pad_token_id": 2, "eos_token_id": 2}, 63),
        ({"pad_token_id": 3, "eos_token_id": [2, 3]}, 63),
        ({"pad_token_id": 1, "bos_token_id": 1}, 63),
        ({"pad_token_id": None}, 63),
    ],
)
def test_mask_token_is_no_real_token(special: dict, expected: int) -> None:
    """The masked slots would carry a token that means something to the target."""
    drafter = DSparkAssistantModel.from_target(tiny_target("llama", **special), num_hidden_layers=1, markov_rank=4)
    assert drafter.config.mask_token_id == expected
    given = DSparkAssistantModel.from_target(tiny_target(), num_hidden_layers=1, markov_rank=4, mask_token_id=7)
    assert given.config.mask_token_id == 7


def test_rope_theta_is_the_targets() -> None:
    """Drafters would rotate at another rate than the target whose states they read."""
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    llama = tiny_target("llama", rope_parameters=rope)
    assert _theta(DSparkAssistantModel.from_target(llama, markov_rank=4)) == 500000.0
    hybrid = {"full_attention": {**rope, "rope_theta": 7e5}, "sliding_attention": rope}
    gemma = tiny_target("gemma3_text", rope_parameters=hybrid)
    assert _theta(DSparkAssistantModel.from_target(gemma, markov_rank=4)) == 7e5
    assert _theta(DSparkAssistantModel.from_target(tiny_target("gpt2"), markov_rank=4)) == 10000.0


def _theta(drafter: DSparkAssistantModel) -> float:
    return drafter.config.rope_parameters["rope_theta"]


def test_takes_dtype_and_special_tokens_of_the_target() -> None:
    """A drafter would need a move by hand, or the Pipeline would keep a second tokenizer for it."""
    target = tiny_target("qwen3", eos_token_id=[2, 3]).to(torch.bfloat16)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    assert drafter.dtype == torch.bfloat16
    for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(drafter.config, name) == getattr(target.config, name)


def test_overrides_win() -> None:
    """Fields of the configuration could not be chosen."""
    drafter = DSparkAssistantModel.from_target(
        tiny_target(), num_hidden_layers=1, markov_rank=4, intermediate_size=16, use_qk_norm=False, block_size=4
    )
    assert drafter.layers[0].mlp.up_proj.weight.shape == (16, 32)
    assert not any("q_norm" in name for name, _ in drafter.named_parameters())
    assert drafter.block_size == 4


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_the_embeddings_output_may_be_tapped(family: str) -> None:
    """Layer -1 would be taken for the last layer, or for the embedding without its scale or its positions."""
    target = tiny_target(family)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4, target_layer_ids=[-1, 0])
    adapter = TargetAdapter(target, drafter.target_layer_ids)
    drafter.check_target(adapter)
    ids = torch.tensor([[5, 6, 7, 8]])
    with adapter, torch.no_grad():
        output = target(ids, output_hidden_states=True)
        tapped = adapter.pop_context_hidden_states()
    assert torch.equal(tapped, torch.cat([output.hidden_states[0], output.hidden_states[1]], dim=-1))
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(target.generate(ids, **options), target.generate(ids, assistant_model=drafter, **options))
    assert not any(layer._forward_pre_hooks for layer in adapter.layers)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_bare_matrices_may_be_borrowed(family: str) -> None:
    """Drafters that were trained on a target's bare matrices would read scaled rows and write capped logits."""
    target = tiny_target(family)
    drafter = DSparkAssistantModel.from_target(
        target, num_hidden_layers=1, markov_rank=4, borrows_bare_weights=True, block_size=3
    )
    adapter, ids = TargetAdapter(target), torch.tensor([[5, 6]])
    bare = target.get_input_embeddings().weight[ids]
    torch.testing.assert_close(drafter.embed(ids, adapter), bare)
    logits = bare @ target.get_output_embeddings().weight.T
    torch.testing.assert_close(drafter.draft_head(adapter)(bare), logits)


def test_encoder_decoders_are_refused() -> None:
    """An encoder-decoder would fail deep inside, without a reason."""
    config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="`target` must be a decoder-only causal LM, got .*T5"):
        DSparkAssistantModel.from_target(T5ForConditionalGeneration(config))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 64, "head_dim": 16}, "must have the target's `hidden_size` 64, got 32"),
        ({"vocab_size": 80}, "must have the target's `vocab_size` 80, got 64"),
        ({"num_hidden_layers": 2}, r"`target_layer_ids` must lie in \[-1, 1\] for this target, got \[1, 2\]"),
    ],
)
def test_drafters_of_other_targets_are_refused(overrides: dict, message: str) -> None:
    """A drafter for another model would crash late, or draft noise."""
    own = tiny_target("llama", num_hidden_layers=4)
    drafter = DSparkAssistantModel.from_target(own, num_hidden_layers=1, markov_rank=4, target_layer_ids=[1, 2])
    drafter.check_target(TargetAdapter(own))
    with pytest.raises(ValueError, match=message):
        drafter.check_target(TargetAdapter(tiny_target("llama", **overrides)))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"])
def test_warm_start_copies_the_last_layers(family: str) -> None:
    """A warm start would begin from other layers, or with norms off by the one that Gemma leaves out."""
    target = tiny_target(family, **({} if family.startswith("gemma") else {"num_hidden_layers": 3}))
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4, warm_start=True)
    layers, states = TargetAdapter(target).layers[-1:], torch.randn(1, 4, 32)
    for ours, theirs in zip(drafter.layers, layers, strict=True):
        assert torch.equal(ours.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight)
        assert torch.equal(ours.mlp.down_proj.weight, theirs.mlp.down_proj.weight)
        torch.testing.assert_close(ours.input_layernorm(states), theirs.input_layernorm(states))
        torch.testing.assert_close(ours.post_attention_layernorm(states), theirs.post_attention_layernorm(states))
        torch.testing.assert_close(ours.mlp(states), theirs.mlp(states))
    torch.testing.assert_close(drafter.norm(states), target.get_decoder().norm(states))
    # the last tapped layer passes through, seen as the first copied layer would see it
    torch.testing.assert_close(drafter.hidden_norm(states), layers[0].input_layernorm(states))
    passed = drafter.fc.weight[:, -32:]
    assert (passed.diagonal() > 0.5).all()
    assert drafter.markov_head.markov_w2.weight.count_nonzero() == 0
    assert drafter.config.use_qk_norm == (family in ("qwen3", "gemma3_text"))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma3_text"])
def test_a_copied_layer_computes_what_the_targets_does(family: str) -> None:
    """A warm start would copy weights into a layer that norms, scales or turns its states otherwise."""
    target = tiny_target(family)
    adapter = TargetAdapter(target)
    drafter = DSparkAssistantModel.from_target(
        target, num_hidden_layers=1, target_layer_ids=[0], markov_rank=4, warm_start=True
    )
    seen: dict[str, torch.Tensor] = {}
    hook = adapter.layers[-1].register_forward_hook(
        lambda module, args, kwargs, output: seen.update(
            entered=kwargs.get("hidden_states", args[0] if args else None),
            left=output[0] if isinstance(output, tuple) else output,
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        target(torch.randint(2, 60, (1, 6)))
    hook.remove()
    layer, entered = drafter.layers[0], seen["entered"]
    positions = torch.arange(6)[None]
    with torch.no_grad():
        rotary = drafter.rotary_emb(positions[:, :5], torch.float32)
        context = layer.self_attn.keys_and_values(layer.input_layernorm(entered[:, :5]), rotary)
        context = tuple(part.transpose(1, 2) for part in context)
        rotary = drafter.rotary_emb(positions[:, None, 5:], torch.float32)
        left = layer(entered[:, None, 5:], rotary, context, None)
    torch.testing.assert_close(left[:, 0], seen["left"][:, 5:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gemma4_text", "olmo2", "phi3", "gpt2", "qwen3_moe"])
def test_warm_start_refuses_other_layers(family: str) -> None:
    """Weights of a layer built otherwise would be copied to where they mean something else."""
    with pytest.raises(ValueError, match="`warm_start` must find the target's layers built like the drafter's"):
        DSparkAssistantModel.from_target(tiny_target(family), num_hidden_layers=1, markov_rank=4, warm_start=True)


def test_warm_start_needs_enough_layers() -> None:
    """More drafter layers than the target has would fail without a reason."""
    with pytest.raises(ValueError, match="`num_hidden_layers` must be at most 2 .*, got 3"):
        DSparkAssistantModel.from_target(tiny_target(), num_hidden_layers=3, markov_rank=4, warm_start=True)


def _from_config(family: str, **fields: Any) -> PreTrainedModel:
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, **{**common, "eos_token_id": None, "initializer_range": 0.4, **fields})
    return AutoModelForCausalLM.from_config(config).eval()


# whose configurations or modules are not built as those of others
_UNUSUAL: dict[str, dict[str, Any]] = {
    # widths by layer, and several streams of hidden states
    "gemma3n_text": {
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 0,
        "head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "laurel_rank": 8,
        "sliding_window": 8,
    },
    # layers with two attentions, counted twice
    "longcat_flash": {
        "num_hidden_layers": 4,
        "num_layers": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "n_routed_experts": 4,
        "moe_topk": 2,
        "zero_expert_num": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
    },
    # whose output head is called `decoder`
    "modernbert-decoder": {
        "intermediate_size": 48,
        **{f"{kind}_token_id": 0 for kind in ("pad", "bos", "cls", "sep")},
    },
}


@pytest.mark.parametrize("family", mostly_slow(_UNUSUAL, ("gemma3n_text", "modernbert-decoder")))
def test_unusual_targets(family: str) -> None:
    """`from_target` finds no layers or no widths in what is there, or reads hidden states along a wrong dimension."""
    target = _from_config(family, **_UNUSUAL[family])
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    assert len(TargetAdapter(target).layers) == 2
    options = {"max_new_tokens": 16, "do_sample": False}
    inputs = ragged_prompts(3)
    plain = target.generate(**inputs, **options)
    assert torch.equal(target.generate(**inputs, **options, assistant_model=drafter, scheduler="fixed"), plain)


def test_layers_of_an_image_encoder_are_not_the_decoders() -> None:
    """Taps lie on the layers of an image encoder, which no text passes."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    target = _from_config("git", intermediate_size=48, vision_config={**vision, "image_size": 32, "patch_size": 16})
    layers = TargetAdapter(target).layers
    assert layers is target.git.encoder.layer
    assert len(layers) == len(target.git.image_encoder.vision_model.encoder.layers)


def test_streams_are_read_along_their_own_dimension() -> None:
    """Hidden states of several streams are averaged over tokens, so that a drafter reads the future."""
    target = _from_config("gemma3n_text", **_UNUSUAL["gemma3n_text"])
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    adapter = TargetAdapter(target, [0])
    with adapter, torch.no_grad():
        target(ids)
        whole = adapter.pop_context_hidden_states()
        target(ids[:, :3])
        prefix = adapter.pop_context_hidden_states()
    assert whole.shape == (1, 5, 32)
    assert_same_up_to_rounding(whole[:, :3], prefix)


def test_embeddings_of_another_width_are_not_lent() -> None:
    """A drafter is built that fails at its first draft, since the target's embeddings are narrower than its states."""
    target = _from_config("opt", word_embed_proj_dim=16, ffn_dim=48)
    with pytest.raises(
        ValueError, match=r"`target` must have embeddings of its hidden size 32.*got 16.*owns_embeddings"
    ):
        DSparkAssistantModel.from_target(target, num_hidden_layers=1)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4, owns_embeddings=True)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(ids := torch.tensor([[5, 6, 7]]), **options)
    assert torch.equal(target.generate(ids, **options, assistant_model=drafter, scheduler="fixed"), plain)


def test_layers_without_positions_have_no_rate() -> None:
    """`from_target` asks the rotary parameters of layers that have none."""
    adapter = TargetAdapter(tiny_target())
    adapter.config.rope_parameters = {"full_attention": None, "sliding_attention": {"rope_theta": 5.0}}
    fields: dict[str, Any] = {"num_hidden_layers": 1, "target_layer_ids": [0], "mask_token_id": 3, "warm_start": False}
    assert config_for_target(adapter, **fields).rope_parameters["rope_theta"] == 10000.0


def test_layers_left_out_for_text_are_not_read() -> None:
    """A drafter reads the cross-attention of Llama 3.2 Vision, which runs for images only."""
    adapter = TargetAdapter(tiny_target(num_hidden_layers=8))
    adapter.config.cross_attention_layers = [0, 3]
    fields: dict[str, Any] = {
        "num_hidden_layers": 1,
        "target_layer_ids": None,
        "mask_token_id": 3,
        "warm_start": False,
    }
    assert config_for_target(adapter, **fields).target_layer_ids == [1, 2, 4, 5]


@pytest.mark.parametrize("family", available("mamba", "falcon_mamba"))
def test_a_target_without_attention_has_a_drafter(family: str) -> None:
    """No drafter can be made for a target of states alone: an error speaks of heads that its configuration lacks."""
    config = AutoConfig.for_model(family, vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
    target = AutoModelForCausalLM.from_config(config).eval()
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    assert drafter.config.num_attention_heads * drafter.config.head_dim == 32


def test_a_cache_by_another_name_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets of states alone have a cache in every version, and who has an older one reads that they have none."""
    target = tiny_target("qwen3")
    monkeypatch.setattr(target, "forward", lambda input_ids, cache_params=None: None)
    with pytest.raises(ValueError, match="takes it as `cache_params` before Transformers 5.24. Upgrade"):
        DSparkAssistantModel.from_target(target)
