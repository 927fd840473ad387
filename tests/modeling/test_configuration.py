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
        ({"block_size": 0}, "`block_size` must be at least 1, got 0"),
        ({"markov_rank": -1}, "`markov_rank` must be at least 0 .*, got -1"),
        ({"mask_token_id": 64}, r"`mask_token_id` must lie in \[0, 63\], got 64"),
        ({"mask_token_id": -1}, r"`mask_token_id` must lie in \[0, 63\], got -1"),
        ({"target_layer_ids": []}, r"`target_layer_ids` must be strictly increasing and not empty, got \[\]"),
        ({"target_layer_ids": [3, 1]}, r"`target_layer_ids` must be strictly increasing .*, got \[3, 1\]"),
        ({"target_layer_ids": [1, 1]}, r"`target_layer_ids` must be strictly increasing .*, got \[1, 1\]"),
        (
            {"target_layer_ids": [1, 4], "num_target_layers": 4},
            r"`target_layer_ids` must lie in \[0, 3\], got \[1, 4\]",
        ),
        ({"target_layer_ids": [-1, 4]}, r"`target_layer_ids` must lie in \[0, 4\], got \[-1, 4\]"),
        ({"num_key_value_heads": 3}, "`num_attention_heads` must be a multiple of num_key_value_heads=3, got 4"),
        ({"draft_vocab_size": 65}, r"`draft_vocab_size` must lie in \[1, 64\], got 65"),
        ({"sts_temperatures": [1.0]}, r"`sts_temperatures` must be 7 positive numbers \(block_size\), got \[1.0\]"),
        ({"sts_temperatures": [1.0] * 6 + [0.0]}, "`sts_temperatures` must be 7 positive numbers"),
    ],
)
def test_invalid_fields_are_named(fields: dict[str, Any], message: str) -> None:
    """A wrong field would surface as a shape error deep inside, or as bad drafts."""
    with pytest.raises(ValueError, match=message) as error:
        DSparkConfig(**{**VALID, **fields})
    assert "Correct it in the drafter's configuration." in str(error.value)


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
