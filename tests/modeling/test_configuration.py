"""`DSparkConfig` refuses what cannot work, and says what to do about it."""

from __future__ import annotations

from typing import Any

import pytest

from dspark_hf import DSparkConfig

VALID: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "target_layer_ids": [1, 3]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"backbone_type": "llama"},
            r"`backbone_type` must be one of \('qwen3', 'gemma3', 'gemma4', 'deepseek_v4'\), got 'llama'",
        ),
        ({"markov_head_type": "lstm"}, r"`markov_head_type` must be one of .*'rnn'\), got 'lstm'"),
        ({"block_size": 0}, r"`block_size` must be an integer in \[1, 1024\] .*, got 0"),
        ({"markov_rank": -1}, r"`markov_rank` must be an integer in \[0, .*, got -1"),
        ({"mask_token_id": 64}, r"`mask_token_id` must lie in \[0, 63\], got 64"),
        ({"mask_token_id": -1}, r"`mask_token_id` must lie in \[0, 63\], got -1"),
        ({"target_layer_ids": []}, r"`target_layer_ids` must be strictly increasing and not empty, got \[\]"),
        ({"target_layer_ids": [3, 1]}, r"`target_layer_ids` must be strictly increasing .*, got \[3, 1\]"),
        ({"target_layer_ids": [1, 1]}, r"`target_layer_ids` must be strictly increasing .*, got \[1, 1\]"),
        (
            {"target_layer_ids": [1, 4], "num_target_layers": 4},
            r"`target_layer_ids` must lie in \[-1, 3\] .*, got \[1, 4\]",
        ),
        ({"target_layer_ids": [-2, 4]}, r"`target_layer_ids` must lie in \[-1, 4\] .*, got \[-2, 4\]"),
        ({"num_key_value_heads": 3}, "`num_attention_heads` must be a multiple of num_key_value_heads=3, got 4"),
        ({"draft_vocab_size": 65}, r"`draft_vocab_size` must lie in \[1, 64\], got 65"),
        ({"sts_temperatures": [1.0]}, r"`sts_temperatures` must be 7 positive numbers \(block_size\), got \[1.0\]"),
        ({"sts_temperatures": [1.0] * 6 + [0.0]}, "`sts_temperatures` must be 7 positive numbers"),
        ({"accept_rates": [0.5]}, r"`accept_rates` must be 7 numbers in \[0, 1\] \(block_size\), got \[0.5\]"),
        ({"accept_rates": [0.5] * 6 + [1.5]}, "`accept_rates` must be 7 numbers in"),
    ],
)
def test_invalid_fields_are_named(fields: dict[str, Any], message: str) -> None:
    """A wrong field would surface as a shape error deep inside, or as bad drafts."""
    with pytest.raises(ValueError, match=message) as error:
        DSparkConfig(**{**VALID, **fields})
    assert "Correct it in the drafter's configuration." in str(error.value)


_KINDS: list[tuple[str, Any]] = [
    *(("block_size", value) for value in ("7", None, 2.5, True, 10**9, [7])),
    *(("vocab_size", value) for value in (None, "64", 0, 10**12, float("nan"))),
    *(("num_hidden_layers", value) for value in (0, -3, 10**9, 1.0)),
    *(("hidden_size", value) for value in (-32, 0, None)),
    *(("head_dim", value) for value in (0, -1, 2.0)),
    *(("num_key_value_heads", value) for value in (-1, 0)),
    *(("rms_norm_eps", value) for value in (-1, float("nan"), float("inf"), "1e-6", None, 10**400)),
    *(("mask_token_id", value) for value in (0.5, None, "0", True)),
    *(("target_layer_ids", value) for value in (3, "01", [0.9, 1.2], [True], [None], {})),
    *(("rope_parameters", value) for value in ("x", 3, [1])),
    *(("hidden_act", value) for value in ("nope", None, 3)),
    *(("sts_temperatures", [1.0] * 6 + [value]) for value in (float("nan"), float("inf"), "1", None, True)),
    *(("accept_rates", [0.5] * 6 + [value]) for value in (float("nan"), "1", None, True)),
    *(("sts_temperatures", value) for value in (7, "1111111")),
    *(("owns_embeddings", value) for value in ("false", 0, None)),
    *(("markov_head_type", value) for value in (None, 1, ["rnn"])),
    *(("draft_vocab_size", value) for value in (1.5, "8", True)),
    *(("embed_scale", value) for value in (0, float("nan"), None)),
    ("num_target_layers", 10**9),
    ("context_window", "8"),
    ("final_logit_softcapping", float("nan")),
    ("initializer_range", -0.1),
]


@pytest.mark.parametrize("name", sorted({name for name, _ in _KINDS}))
def test_a_field_of_another_kind_is_named(name: str) -> None:
    """A damaged `config.json` would end in a bare TypeError, ask for terabytes, or load and draft noise."""
    for value in (value for other, value in _KINDS if other == name):
        with pytest.raises(ValueError, match=rf"^`{name}` must "):
            DSparkConfig(**{**VALID, name: value})
        # what is set on the way, as `from_pretrained(..., field=value)` does
        with pytest.raises(ValueError, match=rf"^`{name}` must "):
            DSparkConfig.from_dict(DSparkConfig(**VALID).to_dict(), **{name: value})


def test_derived_defaults() -> None:
    """Fields left out would not follow from the given ones."""
    config = DSparkConfig(**VALID)
    assert (config.head_dim, config.num_key_value_heads, config.intermediate_size) == (8, 4, 128)
    assert config.num_target_layers == 4
    assert config.num_draft_logits == 64
    assert not config.tie_word_embeddings


def test_dflash_drafter_has_no_markov_embedding_to_judge_by() -> None:
    """A drafter without a Markov head would build a confidence head that reads one."""
    assert not DSparkConfig(**VALID, markov_rank=0).confidence_head_with_markov


def test_fields_survive_a_dictionary() -> None:
    """A saved configuration would come back with another field."""
    config = DSparkConfig(
        **VALID,
        markov_head_type="rnn",
        sts_temperatures=[1.5] * 7,
        eos_token_id=[2, 3],
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    again = DSparkConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.eos_token_id == [2, 3]
