"""Drafters whose layers are stored in eight or four bits."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.targets.adapter import TargetAdapter
from tests.modeling.drafting import draft_greedily
from tests.thinning import slow
from tests.tiny import tiny_target

# kernels for four bits take widths of whole blocks
_SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128, "num_key_value_heads": 4}
_OPTIONS = {
    "8 bit": {"load_in_8bit": True},
    "4 bit": {"load_in_4bit": True},
    "own list": {"load_in_8bit": True, "llm_int8_skip_modules": ["fc"]},
}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        (pytest.param if case in (("8 bit", "gated"), ("4 bit", "vanilla"), ("own list", "rnn")) else slow)(*case)
        for case in product(_OPTIONS, ("vanilla", "gated", "rnn"))
    ],
)
def test_a_quantised_drafter_drafts_nearly_the_same(name: str, head: str, tmp_path: Path) -> None:
    """A drafter in fewer bits would fail in its first draft, or draft noise."""
    # here, as it takes seconds to import
    pytest.importorskip("bitsandbytes")
    target = tiny_target("llama", **_SIZES)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, markov_head_type=head)
    drafter.save_pretrained(tmp_path)
    given = BitsAndBytesConfig(**_OPTIONS[name])
    before = given.to_dict()
    quantised = DSparkAssistantModel.from_pretrained(tmp_path, quantization_config=given)
    assert given.to_dict() == before
    kinds = {kind for kind, module in quantised.named_modules() if type(module) is torch.nn.Linear}
    assert {"confidence_head.proj", "markov_head.markov_w2"} <= kinds
    assert ("fc" in kinds) == (name == "own list")
    assert not any("layers" in kind for kind in kinds)

    adapter = TargetAdapter(target, drafter.target_layer_ids)
    context = torch.randn(1, 6, 128 * len(drafter.target_layer_ids))
    plain, few = (draft_greedily(one, adapter, context, [6], [9], num_drafts=1) for one in (drafter, quantised))
    similarity = torch.cosine_similarity(plain.logits.flatten(), few.logits.flatten(), dim=0)
    assert similarity > 0.8
    options = {"max_new_tokens": 6, "do_sample": False}
    ids = torch.tensor([[5, 6, 7]])
    text = target.generate(ids, **options)
    assert torch.equal(target.generate(ids, assistant_model=quantised, **options), text)
