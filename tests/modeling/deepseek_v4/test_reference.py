"""The oracles of DeepSeek-V4 against Transformers' own implementation, and against cases computed by hand."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

from dspark_hf import DeepseekV4DSparkConfig, DeepseekV4DSparkForCausalLM
from tests.modeling.deepseek_v4.tiny import VOCAB, oracle_settings, tiny_config
from tests.reference.deepseek_v4 import (
    Entered,
    Outputs,
    Settings,
    Yarn,
    attend,
    compress,
    doubly_stochastic,
    enter,
    expert_output,
    fake_quantise,
    fake_quantise_index,
    forward,
    hadamard_rotate,
    leave,
    moe,
    project_heads,
    queries,
    rotary_frequencies,
    rotate,
    round_to_e2m1,
    round_to_e4m3,
    score_entries,
    shared_kv,
    tapped_features,
)
from tests.reference.deepseek_v4_drafter import Draft, argmax, draft
from tests.thinning import mostly_slow

# fp32 against fp64, relative to the root mean square of what is compared: after five layers at most 2e-5 was seen on
# several seeds, and a wrong setting makes a difference of 1e-2 at least (`test_comparison_sees_every_setting`)
TOLERANCE = 1e-4
# the oracle computes in fp64: a millionfold its rounding, and far less than anything that is read
NOTHING = 1e-9

NATIVE_KINDS = {
    "window": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}
# a ramp with values between none and all: 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1
LONG_YARN = {
    "compress_rope_theta": 100.0,
    "qk_rope_head_dim": 16,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 64,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
    },
}
# what is compared: the text's length and the fields that differ from `tiny_config`
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (45, {}),
    "no_yarn": (45, {"rope_scaling": None, "sliding_window": 7}),
    "long_yarn": (45, LONG_YARN),
    "learned": (40, {"compress_ratios": [8, 4, 0, 4, 8], "num_hash_layers": 0, "index_topk": 3, "swiglu_limit": 0.5}),
    "hashed": (30, {"num_hash_layers": 5, "routed_scaling_factor": 2.5, "num_experts_per_tok": 3, "o_groups": 4}),
    "streams": (30, {"hc_mult": 3, "hc_sinkhorn_iters": 2, "hc_eps": 1e-2, "rms_norm_eps": 1e-2}),
    # as in the released models
    "ratios": (137, {"num_hidden_layers": 2, "compress_ratios": [128, 4], "num_hash_layers": 1, "index_topk": 16}),
}

# in this order
OFFICIAL_NAMES = (
    (r"^model\.", ""),
    (r"^lm_head\.", "head."),
    (r"^embed_tokens\.", "embed."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
    (r"\.compressor\.indexer\.q_b_proj\.", ".indexer.wq_b."),
    (r"\.compressor\.indexer\.scorer\.", ".indexer."),
    (r"\.compressor\.indexer\.", ".indexer.compressor."),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."),
    (r"\.position_bias$", ".ape"),
    (r"\.sinks$", ".attn_sink"),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.(q_a|q_b|kv|o_a|o_b)_proj\.", r".w\1."),
    (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
    (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
    (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
    (r"\.gate_proj\.", ".wgate."),
    (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
)


def _native_model(config: DeepseekV4DSparkConfig, seed: int) -> DeepseekV4ForCausalLM:
    """Return Transformers' model of our configuration, every tensor of its state random."""
    kinds = config.attention_kinds
    rates = {NATIVE_KINDS["csa"]: 4, NATIVE_KINDS["hca"]: 128}
    rates |= {NATIVE_KINDS[kind]: ratio for kind, ratio in zip(kinds, config.compress_ratios, strict=False) if ratio}
    same = [
        *("vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("head_dim", "qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "n_routed_experts"),
        *("num_experts_per_tok", "num_hash_layers", "routed_scaling_factor", "swiglu_limit", "sliding_window"),
        *("compress_rope_theta", "index_n_heads", "index_head_dim", "index_topk", "hc_mult", "hc_eps"),
        *("hc_sinkhorn_iters", "rms_norm_eps", "eos_token_id"),
    ]
    others: dict[str, Any] = {
        "layer_types": [NATIVE_KINDS[kind] for kind in kinds],
        "compress_rates": rates,
        "rope_scaling": config.compress_rope_scaling,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    torch.manual_seed(seed)
    native = DeepseekV4ForCausalLM(DeepseekV4Config(**{name: getattr(config, name) for name in same}, **others)).eval()
    for name, tensor in native.state_dict().items():
        if name.endswith("tid2eid"):
            order = torch.rand(config.vocab_size, config.n_routed_experts).argsort(1)
            tensor.copy_(order[:, : config.num_experts_per_tok])
        elif "norm" in name or name.endswith("scale"):
            tensor.copy_(1 + 0.3 * torch.randn_like(tensor))
        elif tensor.ndim == 1:
            tensor.copy_(0.5 * torch.randn_like(tensor))
        else:
            tensor.copy_(torch.randn_like(tensor) * 1.5 / math.sqrt(tensor.shape[-1]))
    return native


def _official(native: DeepseekV4ForCausalLM) -> dict[str, Tensor]:
    """Return the weights under their released names, experts one by one."""
    weights = {}
    for name, tensor in native.state_dict().items():
        for pattern, official in OFFICIAL_NAMES:
            name = re.sub(pattern, official, name)
        if name.endswith("experts.gate_up_proj"):
            for expert, (w1, w3) in enumerate(stacked.chunk(2) for stacked in tensor):
                weights[name.replace("gate_up_proj", f"{expert}.w1.weight")] = w1
                weights[name.replace("gate_up_proj", f"{expert}.w3.weight")] = w3
        elif name.endswith("experts.down_proj"):
            weights |= {name.replace("down_proj", f"{expert}.w2.weight"): w2 for expert, w2 in enumerate(tensor)}
        else:
            weights[name] = tensor
    return weights


def _native_outputs(native: DeepseekV4ForCausalLM, token_ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return what every layer returns and the logits; its `hidden_states` leave the last layer out."""
    layers: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda *called: layers.append(called[2][0])) for layer in native.model.layers]
    with torch.no_grad():
        logits = native(token_ids, use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return layers, logits


@pytest.mark.parametrize("case", mostly_slow(CASES, ("long_yarn", "learned", "hashed")))
def test_three_models_agree(case):
    """The oracle or our model is no DeepSeek-V4: on the same weights Transformers' own computes something else."""
    length, fields = CASES[case]
    config = tiny_config(**fields)
    native = _native_model(config, seed=11)
    weights = _official(native)
    token_ids = torch.randint(VOCAB, (1, length))
    native_layers, native_logits = _native_outputs(native, token_ids)

    ours = DeepseekV4DSparkForCausalLM(config).eval()
    ours.load_state_dict({name if name == "head.weight" else f"model.{name}": w for name, w in weights.items()})
    with torch.no_grad():
        outputs = ours(token_ids, use_cache=False, output_hidden_states=True)
    expected = forward(weights, oracle_settings(config), token_ids[0].tolist())
    for layer, streams in enumerate(expected.layer_outputs):
        _assert_equal(native_layers[layer], streams)
        _assert_equal(outputs.hidden_states[layer + 1][0], streams)
    _assert_equal(native_logits, expected.logits)
    _assert_equal(outputs.logits[0], expected.logits)


def _assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert _difference(actual, expected) < TOLERANCE


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the root mean square of what is expected."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected).abs().max() / expected.pow(2).mean().sqrt())


class Target(NamedTuple):
    """A model's weights by their released names, and its settings for the oracle."""

    weights: dict[str, Tensor]
    settings: Settings

    def run(self, token_ids: list[int]) -> Outputs:
        """Return what the oracle computes."""
        return forward(self.weights, self.settings, token_ids)


def _target(seed: int, **fields: Any) -> Target:
    """Return the weights and settings of a random model of Transformers."""
    config = tiny_config(**fields)
    return Target(_official(_native_model(config, seed)), oracle_settings(config))


SMALL: dict[str, Any] = {
    **LONG_YARN,
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 8],
    "num_hash_layers": 1,
    "index_topk": 3,
    "swiglu_limit": 2.0,
}


@pytest.mark.slow
def test_comparison_sees_every_setting():
    """A setting has no effect on the text that the models are compared on: a mistake in it would go unseen."""
    target = _target(14, **SMALL)
    assert target.settings.yarn is not None
    token_ids = torch.randint(VOCAB, (34,)).tolist()
    expected = target.run(token_ids).logits
    yarn_changes: dict[str, Any] = {"factor": 5.0, "original_length": 80, "beta_fast": 8.0, "beta_slow": 1.0}
    changes: dict[str, list[Any]] = {
        "yarn": [None, *(replace(target.settings.yarn, **{name: new}) for name, new in yarn_changes.items())],
        "window": [15, 17],
        "num_experts_per_token": [3],
        "route_scale": [1.4],
        "index_topk": [2],
        "norm_topk_prob": [False],
        "swiglu_limit": [2.5],
        "rms_eps": [1e-3],
        "hc_eps": [1e-3],
        "hc_sinkhorn_iters": [8],
        "rope_head_dim": [8],
        "rope_theta": [9000.0],
        "compress_rope_theta": [110.0],
    }
    for name, values in changes.items():
        for value in values:
            changed = Target(target.weights, replace(target.settings, **{name: value})).run(token_ids)
            assert _difference(changed.logits, expected) > 100 * TOLERANCE, (name, value)


def test_oracle_sees_no_later_token():
    """The oracle of a text depends on what comes after it: drafts compared with it may know the future."""
    target = _target(15, **SMALL)
    token_ids = torch.randint(VOCAB, (34,)).tolist()
    whole = target.run(token_ids)
    for length in (1, 4, 21):
        begun = target.run(token_ids[:length])
        other = target.run(token_ids[:length] + [(token_ids[length] + 1) % VOCAB])
        for outputs in (whole, other):
            assert _difference(outputs.logits[:length], begun.logits) < NOTHING
            for streams, expected in zip(outputs.layer_outputs, begun.layer_outputs, strict=True):
                assert _difference(streams[:length], expected) < NOTHING
        assert _difference(whole.logits[length], other.logits[length]) > TOLERANCE


@pytest.mark.parametrize(
    ("ratio", "window", "seen"),
    [
        # the window holds three tokens, the query's own included
        (0, 3, [0, 1, 2]),
        # entry i can be read from the last token of its window on; entry 1 holds the window before, entry 2 does not
        (4, 1, [0, *range(3, 13)]),
        (8, 2, [0, 1, *range(7, 13)]),
    ],
)
def test_reach_of_a_token(ratio, window, seen):
    """A query of one layer sees tokens outside its window and entries, or misses some inside."""
    fields = {"num_hidden_layers": 1, "num_hash_layers": 0, "compress_ratios": [ratio], "sliding_window": window}
    target = _target(16, **fields)
    token_ids = torch.randint(VOCAB, (13,)).tolist()
    logits = target.run(token_ids).logits
    changed = target.run([(token_ids[0] + 1) % VOCAB, *token_ids[1:]]).logits
    assert [t for t in range(13) if _difference(logits[t], changed[t]) > NOTHING] == seen


def test_kinds_of_the_released_ratios():
    """A layer of a released model is taken for one of another kind."""
    settings = _settings(compress_ratios=(0, 4, 128))
    assert [settings.kind(layer) for layer in range(settings.num_layers)] == ["window", "csa", "hca"]


def test_overlap_reaches_one_window():
    """A CSA entry holds more than its own window and the one before."""
    weights = {
        "c.wkv.weight": torch.tensor([[1.0], [0.0], [0.0], [1.0]]),
        "c.wgate.weight": torch.zeros(4, 1),
        "c.ape": torch.zeros(2, 4),
        "c.norm.weight": torch.ones(2),
    }
    inputs = [torch.tensor([value]) for value in (1.0, 3.0, 5.0, 7.0, 9.0, 11.0)]
    entries = compress(weights, "c", inputs, 2, True, [], _settings(rms_eps=0.0))
    # the means over (0, 1) (0, 3); (1, 0) (3, 0) (0, 5) (0, 7); (5, 0) (7, 0) (0, 9) (0, 11): (0, 2), (1, 3), (3, 5)
    expected = [[0.0, 2**0.5], [1 / 5**0.5, 3 / 5**0.5], [3 / 17**0.5, 5 / 17**0.5]]
    torch.testing.assert_close(torch.stack(entries), torch.tensor(expected))


def test_compressor_of_ratio_two():
    """An entry is not the mean that its gates ask for, per channel, or does not stand at its window's first token."""
    weights = {
        "c.wkv.weight": torch.tensor([[1.0], [2.0]]),
        "c.wgate.weight": torch.zeros(2, 1),
        # shares 1/4 and 3/4 in the first channel, 3/4 and 1/4 in the second
        "c.ape": torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]]),
        "c.norm.weight": torch.tensor([1.0, 10.0]),
    }
    inputs = [torch.tensor([value]) for value in (1.0, 3.0, 3.0, -1.0, 100.0)]
    # a quarter turn per two positions; the fifth token completes nothing
    first, second = compress(weights, "c", inputs, 2, False, [math.pi / 4], _settings(rms_eps=0.0))
    # (1/4 + 9/4, 2 (3/4 + 3/4)) over its root mean square
    size = ((2.5**2 + 3.0**2) / 2) ** 0.5
    torch.testing.assert_close(first, torch.tensor([2.5, 30.0]) / size)
    # (3/4 - 3/4, 2 (9/4 - 1/4)) = (0, 4) likewise gives (0, 10 sqrt 2), then turns
    torch.testing.assert_close(second, torch.tensor([-10 * 2**0.5, 0.0]))


def test_gates_of_the_compressor_read_the_token():
    """Only the place in a window weighs its tokens."""
    weights = {
        "c.wkv.weight": torch.tensor([[1.0], [1.0]]),
        "c.wgate.weight": torch.tensor([[math.log(3)], [0.0]]),
        "c.ape": torch.zeros(2, 2),
        "c.norm.weight": torch.ones(2),
    }
    (entry,) = compress(weights, "c", [torch.zeros(1), torch.ones(1)], 2, False, [], _settings(rms_eps=0.0))
    # shares 1/4 and 3/4 of (0, 1) in the first channel, halves in the second
    torch.testing.assert_close(entry, torch.tensor([0.75, 0.5]) / ((0.75**2 + 0.5**2) / 2) ** 0.5)


def test_rotary_positions():
    """Positions turn other dimensions than the last ones, in other pairs, or do not turn back."""
    x = torch.tensor([5.0, 6.0, 1.0, 2.0, 3.0, 4.0])
    # a quarter turn and a half turn per position
    frequencies = [math.pi / 2, math.pi]
    assert torch.equal(rotate(x, 0, frequencies), x)
    torch.testing.assert_close(rotate(x, 1, frequencies), torch.tensor([5.0, 6.0, -2.0, 1.0, -3.0, -4.0]))
    torch.testing.assert_close(rotate(rotate(x, 1, frequencies), -1, frequencies), x)
    assert rotary_frequencies(4, 10000.0, None) == pytest.approx([1.0, 0.01])


def test_yarn_frequencies():
    """Long contexts turn faster or slower than the released models learned."""
    # plain frequencies halve; 8 turns are made by pair log2(64 / (8 * 2 pi)) = 0.35, one by pair 3.35, so the ramp is
    # a quarter per pair, and what is on it is divided by four
    expected = [1.0, 0.5 * (1 - 3 / 16), 0.25 * (1 - 6 / 16), 0.125 * (1 - 9 / 16)]
    assert rotary_frequencies(8, 16.0, Yarn(4.0, 64, beta_fast=8.0, beta_slow=1.0)) == pytest.approx(expected)


def test_sinkhorn():
    """Streams are mixed by a matrix whose rows and columns do not sum to one: they grow or vanish layer by layer."""
    mix = torch.tensor([[math.log(4), 0.0], [0.0, 0.0]], dtype=torch.float64)
    once = doubly_stochastic(mix, _settings(hc_eps=0.0, hc_sinkhorn_iters=1))
    # rows (4/5, 1/5) and (1/2, 1/2), whose columns sum to 13/10 and 7/10
    torch.testing.assert_close(once, torch.tensor([[8 / 13, 2 / 7], [5 / 13, 5 / 7]], dtype=torch.float64))
    # the limit keeps the ratio a d / (b c) = 4 of the diagonals, so 2 / 3 stands on one and 1 / 3 on the other
    limit = torch.tensor([[2 / 3, 1 / 3], [1 / 3, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(doubly_stochastic(mix, _settings(hc_eps=0.0)), limit)
    torch.testing.assert_close(doubly_stochastic(mix, _settings()), limit, atol=5e-6, rtol=0.0)
    comb = doubly_stochastic(torch.randn(4, 4, dtype=torch.float64), _settings(hc_eps=0.0, hc_sinkhorn_iters=100))
    torch.testing.assert_close(comb.sum(0), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(comb.sum(1), torch.ones(4, dtype=torch.float64))


def test_streams_are_mixed_from_the_first_index():
    """The transposed matrix mixes the streams."""
    streams = torch.tensor([[1.0], [10.0]])
    entered = Entered(torch.zeros(1), post=torch.tensor([0.0, 2.0]), comb=torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    assert leave(entered, torch.tensor([5.0]), streams).tolist() == [[0.0], [11.0]]


def test_sink_of_attention():
    """The sink is ignored, or gives to the output."""
    kvs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    # all logits are zero: the sink log 2 takes two of five parts
    heads = attend(torch.zeros(2, 2), kvs, torch.tensor([math.log(2), 0.0]))
    torch.testing.assert_close(heads, torch.tensor([[2 / 5, 2 / 5], [2 / 4, 2 / 4]]))


def test_index_scores():
    """Heads of the indexer that a key repels count, or all are on another scale than the released ones."""
    weights = {
        "i.wq_b.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]).repeat_interleave(4, dim=0),
        "i.weights_proj.weight": torch.tensor([[3.0], [-5.0], [7.0], [7.0]]),
    }
    keys = [torch.ones(4), -torch.ones(4), torch.tensor([1.0, 0.0, 0.0, 0.0])]
    settings = _settings(index_num_heads=4, index_head_dim=4)
    latent = torch.tensor([1.0, -2.0])
    scores = score_entries(weights, "i", torch.tensor([2.0]), latent, 9, keys, [], settings)
    # products with the keys are 4, -4, 1 for the first head, -8, 8, -2 for the second and 0 for the others; weights
    # are 6 and -10, each over sqrt(4) sqrt(4)
    assert scores.tolist() == [6.0, -20.0, 1.5]


def test_clamp_of_an_expert():
    """An expert's gate is cut from below, its other half on one side only, or both at another place."""
    weights = {
        "e.w1.weight": torch.tensor([[20.0], [-20.0], [1.0]]),
        "e.w3.weight": torch.tensor([[3.0], [-30.0], [30.0]]),
        "e.w2.weight": torch.eye(3),
    }
    output = expert_output(weights, "e", torch.ones(1), 0.5, _settings(swiglu_limit=10.0))
    silu = [value / (1 + math.exp(-value)) for value in (10.0, -20.0, 1.0)]
    torch.testing.assert_close(output, torch.tensor([silu[0] * 1.5, silu[1] * -5.0, silu[2] * 5.0]))


def test_routing():
    """Experts are weighed by what only chooses them, chosen by what only weighs, or the shared one is weighed too."""
    weights = {
        # sqrt(softplus) is 2, 1, 3
        "f.gate.weight": torch.tensor([[math.log(math.exp(root**2) - 1)] for root in (2.0, 1.0, 3.0)]),
        "f.gate.bias": torch.tensor([0.0, 5.0, 0.0]),
    }
    # silu(40) = 40: an expert gives 40 times its w3
    for name, value in {"experts.0": 1.0, "experts.1": 10.0, "experts.2": 100.0, "shared_experts": 0.1}.items():
        weights[f"f.{name}.w1.weight"] = torch.full((1, 1), 40.0)
        weights[f"f.{name}.w3.weight"] = torch.full((1, 1), value)
        weights[f"f.{name}.w2.weight"] = torch.ones(1, 1)
    settings = _settings(num_experts_per_token=2, route_scale=4.0, swiglu_limit=1e3)
    # the bias brings in expert 1, whose share is 1 of 1 + 3
    learned = 40 * (0.1 + 4 * (10 * 1 / 4 + 100 * 3 / 4))
    torch.testing.assert_close(moe(weights, "f", torch.ones(1), settings, 1), torch.tensor([learned]))
    # the table of token 1 says experts 0 and 1, whose shares are 2 and 1 of 3
    weights["f.gate.tid2eid"] = torch.tensor([[2, 2], [1, 0]])
    hashed = 40 * (0.1 + 4 * (1 * 2 / 3 + 10 * 1 / 3))
    torch.testing.assert_close(moe(weights, "f", torch.ones(1), settings, 1), torch.tensor([hashed]))


def test_rounding_of_stored_vectors():
    """The oracle rounds to other numbers than 8 bits hold, or at another scale."""
    values = torch.cat([torch.linspace(-500, 500, 4001), torch.linspace(-0.02, 0.02, 401)])
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert [round_to_e4m3(value) for value in values.tolist()] == expected.tolist()
    # the largest of each 64 sets the scale: 449 / 448 needs 2, where 2^-9 is lost; 448 / 448 needs 1, where it is
    # kept; small ones take 2^-22 of 1e-4 / 448, where 1e-9 becomes 2^-8. What holds the position stays
    kv = torch.full((194,), 2.0**-9)
    kv[0], kv[64], kv[128:192] = 449.0, 448.0, 1e-9
    rounded = fake_quantise(kv, _settings(rope_head_dim=2))
    assert rounded[[0, 1, 64, 65, 128, 193]].tolist() == [448.0, 0.0, 448.0, 2.0**-9, 2.0**-30, 2.0**-9]


def test_rounding_of_the_indexers_vectors():
    """The oracle rotates or rounds the indexer's vectors otherwise than 4 bits hold them."""
    values = [0.25, 0.2501, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.001, -2.5, -0.2, 6.0]
    assert [round_to_e2m1(value) for value in values] == [0, 0.5, 1, 1, 2, 2, 4, 4, 6, -2, 0, 6]
    # H of 4, row by row: all; every second; every second pair; both
    x = torch.tensor([1.0, 2.0, 3.0, 5.0])
    assert hadamard_rotate(x).tolist() == [5.5, -1.5, -2.5, 0.5]
    # 5.5 / 6 needs the scale 1
    assert fake_quantise_index(x).tolist() == [6.0, -1.5, -2.0, 0.5]
    assert fake_quantise_index(x * 2).tolist() == [12.0, -3.0, -4.0, 1.0]
    # a scale for each 32: the rotation of a constant is one number, and zeros have a scale too
    assert fake_quantise_index(torch.ones(64)).tolist() == [8.0] + [0.0] * 63
    assert fake_quantise_index(torch.zeros(64)).tolist() == [0.0] * 64


def _settings(**fields: Any) -> Settings:
    """Return settings for one equation alone."""
    defaults: dict[str, Any] = {
        "compress_ratios": (0,),
        "num_heads": 1,
        "head_dim": 2,
        "rope_head_dim": 0,
        "o_groups": 1,
        "num_experts_per_token": 1,
        "route_scale": 1.0,
    }
    return Settings(**{**defaults, **fields})


class Module(NamedTuple):
    """A DSpark module by its released names, the target's tables that it borrows, and its settings."""

    weights: dict[str, Tensor]
    settings: Settings
    embed: Tensor
    head: Tensor

    def draft(self, features: Tensor, anchor: int = 7, noise: int = 95, block_size: int = 5, **options: Any) -> Draft:
        """Return the block that the oracle drafts after all positions of `features`."""
        return draft(
            self.weights,
            self.settings,
            features,
            anchor,
            len(features),
            self.embed,
            self.head,
            block_size=block_size,
            noise_token_id=noise,
            **options,
        )


def _module(seed: int) -> Module:
    """Return a module whose three stages are the last three layers of a random model, without compression."""
    weights, settings = _target(seed)
    module = {
        "mtp.0.main_proj.weight": torch.randn(64, 3 * 64) / 8,
        "mtp.0.main_norm.weight": 1 + 0.3 * torch.randn(64),
        "mtp.2.markov_head.markov_w1.weight": torch.randn(VOCAB, 8),
        "mtp.2.markov_head.markov_w2.weight": torch.randn(VOCAB, 8),
        "mtp.2.confidence_head.proj.weight": torch.randn(1, 64 + 8),
    }
    for name, tensor in weights.items():
        if name.startswith(("norm.", "hc_head")):
            module[f"mtp.2.{name}"] = tensor
        for stage in range(3):
            prefix = f"layers.{stage + 2}."
            if name.startswith(prefix) and ".compressor." not in name and ".indexer." not in name:
                module[f"mtp.{stage}.{name.removeprefix(prefix)}"] = tensor
    return Module(module, settings, weights["embed.weight"], weights["head.weight"])


def test_drafts_depend_on_the_latest_window():
    """Drafts depend on text older than the drafter's context, or miss its oldest or newest token."""
    module = _module(21)
    features = torch.randn(30, 3 * 64)
    expected = module.draft(features)
    window = module.settings.window
    other = features.clone()
    other[: 30 - window] = torch.randn(30 - window, 3 * 64)
    assert _difference(module.draft(other).logits, expected.logits) < NOTHING
    for row in (30 - window, 29):
        other = features.clone()
        other[row] += 1
        assert _difference(module.draft(other).logits, expected.logits) > 1e-3


def test_drafts_do_not_depend_on_the_place_in_the_text():
    """The same context gives other drafts further on in a text: positions are not counted from one to the next."""
    module = _module(22)
    features = torch.randn(30, 3 * 64)
    expected = module.draft(features)
    shifted = module.draft(features[30 - module.settings.window :])
    assert shifted.token_ids == expected.token_ids
    torch.testing.assert_close(shifted.logits, expected.logits, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(shifted.confidence_logits, expected.confidence_logits, atol=1e-10, rtol=1e-10)
    # what stands one position nearer gives others
    nearer = module.draft(torch.cat([features[14:15], features[14:29]]))
    assert _difference(nearer.logits, expected.logits) > 1e-3


def test_rows_of_a_block_see_each_other():
    """A block's rows see only those before them, which is not how the module was trained."""
    module = _module(23)
    features = torch.randn(20, 3 * 64)
    expected = module.draft(features)
    assert _difference(module.draft(features, noise=94).logits[:1], expected.logits[:1]) > 1e-3
    assert _difference(module.draft(features, block_size=4).logits[:1], expected.logits[:1]) > 1e-3


def test_lone_anchor_passes_plain_layers():
    """A stage is no layer of the target: without context, and alone, its anchor comes out as from three layers."""
    module = _module(24)
    weights, settings = _target(24)
    for name in list(weights):
        if re.match(r"layers\.[01]\.", name):
            del weights[name]
        elif name.startswith("layers."):
            weights[re.sub(r"\d+", lambda number: str(int(number[0]) - 2), name, count=1)] = weights.pop(name)
    settings = replace(settings, compress_ratios=(0, 0, 0), layer_kinds=("window",) * 3)
    expected = forward(weights, settings, [7]).logits[0]
    block = module.draft(torch.zeros(0, 3 * 64), block_size=1)
    w1, w2 = (module.weights[f"mtp.2.markov_head.markov_{name}.weight"].double() for name in ("w1", "w2"))
    torch.testing.assert_close(block.logits[0] - w2 @ w1[7], expected)


def test_context_of_the_stages(monkeypatch):
    """The context does not enter a stage as its `kv_norm(wkv(main_norm(main_proj(.))))`, turned by its position."""
    module = _module(25)
    settings = module.settings
    seen: list[Tensor] = []

    def spy(query, kvs, sinks):
        seen.append(kvs)
        return attend(query, kvs, sinks)

    monkeypatch.setattr("tests.reference.deepseek_v4_drafter.attend", spy)
    features = torch.randn(2, 3 * 64, dtype=torch.float64)
    module.draft(features, block_size=4)
    # three stages of four rows, each of which sees two positions and four rows
    assert [len(kvs) for kvs in seen] == [6] * 12
    weights = {name: tensor.double() for name, tensor in module.weights.items()}
    main = torch.nn.functional.rms_norm(
        features @ weights["mtp.0.main_proj.weight"].T, (64,), weights["mtp.0.main_norm.weight"], settings.rms_eps
    )
    for stage in range(3):
        name = f"mtp.{stage}.attn"
        kvs = torch.nn.functional.rms_norm(
            main @ weights[f"{name}.wkv.weight"].T, (32,), weights[f"{name}.kv_norm.weight"], settings.rms_eps
        )
        # the first position does not turn
        torch.testing.assert_close(seen[4 * stage][:2], torch.stack([kvs[0], _turned(kvs[1], 1)]))


def test_positions_of_a_block(monkeypatch):
    """The anchor does not stand right after its context, and each noise token one further."""
    module = _module(28)
    seen: list[tuple[Tensor, Tensor]] = []
    turned_back: list[int] = []

    def spy(query, kvs, sinks):
        seen.append((query, kvs))
        return attend(query, kvs, sinks)

    def spy_output(weights, name, heads, position, *others):
        turned_back.append(position)
        return project_heads(weights, name, heads, position, *others)

    monkeypatch.setattr("tests.reference.deepseek_v4_drafter.attend", spy)
    monkeypatch.setattr("tests.reference.deepseek_v4_drafter.project_heads", spy_output)
    # equal tokens enter the first stage as equals
    module.draft(torch.randn(3, 3 * 64), anchor=95, block_size=3)
    weights = {name: tensor.double() for name, tensor in module.weights.items()}
    streams = module.embed[95].double().expand(4, -1)
    x = enter(weights, "mtp.0.hc_attn", "mtp.0.attn_norm", streams, module.settings).inputs
    _, query = queries(weights, "mtp.0.attn", x, 0, [], module.settings)
    kv = shared_kv(weights, "mtp.0.attn", x, 0, [], module.settings, False)
    for row, (turned_query, kvs) in enumerate(seen[:3]):
        torch.testing.assert_close(turned_query, _turned(query, 3 + row))
        torch.testing.assert_close(kvs[3 + row], _turned(kv, 3 + row))
    assert turned_back == [3, 4, 5] * 3


def _turned(vectors: Tensor, position: int) -> Tensor:
    """Return heads `(*, 32)` with their last eight dimensions turned, as complex numbers, without YaRN."""
    angles = position * torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    pairs = torch.view_as_complex(vectors[..., 24:].unflatten(-1, (4, 2)))
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    return torch.cat([vectors[..., :24], turned], dim=-1)


def test_tapped_features_are_means_of_streams():
    """The module reads something else than the mean over the streams that each tapped layer returns."""
    layers = [torch.arange(8.0).view(1, 4, 2), torch.ones(1, 4, 2), -torch.arange(8.0).view(1, 4, 2)]
    features = tapped_features(Outputs(torch.zeros(1, 3), layers, {}, {}), [0, 2])
    assert features.tolist() == [[3.0, 4.0, -3.0, -4.0]]


def test_heads_on_two_tokens():
    """Markov bias or confidence are not read from the token before, or the confidence reads the normed state."""
    module = _module(26)
    weights = dict(module.weights)
    for name, tensor in module.weights.items():
        # stages that add nothing, and streams that are summed with a half each: the state is twice the embedding
        if name.endswith((".wo_b.weight", ".w2.weight", "hc_head_fn", "hc_head_base")):
            weights[name] = torch.zeros_like(tensor)
    weights["mtp.2.norm.weight"] = torch.ones(64)
    weights["mtp.2.markov_head.markov_w1.weight"] = torch.eye(2)
    weights["mtp.2.markov_head.markov_w2.weight"] = torch.tensor([[0.0, 3.0], [2.0, -1.0]])
    weights["mtp.2.confidence_head.proj.weight"] = torch.tensor([[1 / 64] * 64 + [10.0, 20.0]])
    embed = torch.tensor([[1.0] * 64, [3.0] * 64])
    head = torch.tensor([[1.0 / 64] * 64, [2.0 / 64] * 64])
    # whatever their size, normed states are ones, and give the base logits 1 and 2
    small = Module(weights, replace(module.settings, rms_eps=0.0, hc_eps=0.0), embed, head)
    block = small.draft(torch.randn(9, 3 * 64), anchor=0, noise=1)
    # after token 0 the bias is (0, 2), after token 1 (3, -1)
    assert block.token_ids == [1, 0, 1, 0, 1]
    logits = torch.tensor([[1.0, 4.0], [4.0, 1.0], [1.0, 4.0], [4.0, 1.0], [1.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(block.logits, logits, atol=1e-6, rtol=0.0)
    # the anchor's state is 2, a noise token's 6; to it comes 10 after token 0, 20 after token 1
    confidence = torch.tensor([12.0, 26.0, 16.0, 26.0, 16.0], dtype=torch.float64)
    torch.testing.assert_close(block.confidence_logits, confidence, atol=1e-6, rtol=0.0)
    # what is chosen, not the best, is what the next row reads
    block = small.draft(torch.randn(9, 3 * 64), anchor=0, noise=1, choose=lambda logits: 1 - argmax(logits))
    assert block.token_ids == [0, 0, 0, 0, 0]
    torch.testing.assert_close(block.confidence_logits[1:], torch.full((4,), 16.0, dtype=torch.float64))


def test_anchor_follows_its_context():
    """A block is drafted at a position that its context does not lead up to."""
    module = _module(27)
    with pytest.raises(ValueError, match="`anchor_position` must be the number of processed tokens, 4, got 5"):
        draft(
            module.weights,
            module.settings,
            torch.randn(4, 3 * 64),
            7,
            5,
            module.embed,
            module.head,
            block_size=2,
            noise_token_id=95,
        )
