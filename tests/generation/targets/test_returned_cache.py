"""Chats of several rows go on from a returned cache, and with padding between tokens, as without a drafter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from dspark_hf import DSparkAssistantModel, Request, generate_stream
from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.modeling.deepseek_v4.cache import DeepseekV4DSparkCache
from tests.closeness import assert_same_up_to_rounding
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.modeling.deepseek_v4.tiny import tiny_model
from tests.thinning import slow
from tests.tiny import SLIDING_WINDOW, SPECIAL_FAMILIES, tiny_target

NEW_TOKENS = 14
# they occur in some rows early, in others late or not at all
ENDS = list(range(20, 26))


def _target_and_cache(family: str) -> tuple[Any, Any]:
    if family == "deepseek_v4":
        model = tiny_model(5)
        return model, DeepseekV4DSparkCache(model.config)
    target = tiny_target(family)
    return target, DynamicCache(config=target.config)


def _chat(
    family: str, num_rows: int, *, masks_padding: bool, is_assisted: bool
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]], Tensor]:
    """Return the texts of three turns over one cache, its keys and values after them, and the last turn's mask."""
    target, cache = _target_and_cache(family)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": ENDS}
    options |= {"pad_token_id": 0, CACHE_KEY: cache}
    if is_assisted:
        options["assistant_model"] = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
        options["scheduler"] = "fixed"
    inputs, texts = ragged_prompts(num_rows, vocab_size=60), []
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        texts.append(target.generate(ids, attention_mask=mask, **options))
        new = texts[-1][:, ids.shape[1] :]
        is_end = torch.isin(new, torch.tensor(ENDS)).long()
        is_padding = (is_end.cumsum(-1) - is_end > 0) & masks_padding
        more = torch.randint(2, 60, (num_rows, 4), generator=generator)
        ids = torch.cat([texts[-1], more], dim=1)
        mask = torch.cat([mask, (~is_padding).long(), torch.ones_like(more)], dim=1)
    layers = [(layer.keys, layer.values) for layer in cache.layers] if family != "deepseek_v4" else []
    return texts, layers, mask


CHATS = [("llama", 1), ("llama", 2), ("llama", 3), ("gemma3_text", 4), ("gpt2", 3)]
QUICK_CHATS = [("llama", 1), ("llama", 3), ("gemma3_text", 4)]
# families whose layers count columns, or see chunks of a text
SPECIAL = [("llama4_text", 3), ("gpt_neo", 3), ("bloom", 3)]


@pytest.mark.parametrize(
    ("family", "num_rows", "masks_padding"),
    [(*chat, True) if chat in QUICK_CHATS + SPECIAL else slow(*chat, True) for chat in CHATS + SPECIAL]
    + [(*chat, False) if chat == ("llama", 1) else slow(*chat, False) for chat in CHATS]
    + [slow(family, 3, masks_padding) for family in SPECIAL_FAMILIES for masks_padding in (True, False)]
    + [slow("deepseek_v4", 3, True)],
)
def test_turns_after_rows_that_ended_early(family, num_rows, masks_padding):
    """The returned cache lacks the end of a row that ended before others, or holds it in another column."""
    ours, our_layers, _ = _chat(family, num_rows, masks_padding=masks_padding, is_assisted=True)
    plain, layers, mask = _chat(family, num_rows, masks_padding=masks_padding, is_assisted=False)
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))
    for one, other in zip(our_layers, layers, strict=True):
        for ours_, theirs in zip(one, other, strict=True):
            # a sliding layer keeps its last columns; what the last turn appended is not in the cache
            held = mask[:, : plain[-1].shape[1] - 1][:, -theirs.shape[2] :].bool()
            pairs = (states.transpose(1, 2)[held] for states in (ours_, theirs))
            assert_same_up_to_rounding(*pairs)


def test_what_the_chats_are_like():
    """No row ends before another, so that the tests above show nothing."""
    texts, _, mask = _chat("llama", 3, masks_padding=True, is_assisted=False)
    assert not mask[:, texts[0].shape[1] - 3 : texts[-1].shape[1]].all()


def _with_holes(num_rows: int) -> dict[str, Tensor]:
    inputs = ragged_prompts(num_rows, lengths=(19, 12, 17))
    inputs["attention_mask"][0, -6:-3] = 0
    inputs["attention_mask"][-1, -3:-1] = 0
    return inputs


@pytest.mark.parametrize(
    ("family", "num_rows"),
    [
        ("llama", 1),
        ("gemma3_text", 3),
        slow("llama", 3),
        slow("gemma3_text", 1),
        slow("mistral", 1),
        slow("mistral", 3),
    ],
)
def test_holes_in_the_mask(family, num_rows):
    """A sliding window counts the tokens of a row, where without a drafter it counts columns, holes included."""
    target, inputs = tiny_target(family), _with_holes(num_rows)
    options = {"max_new_tokens": 3 * SLIDING_WINDOW, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(**inputs, **options)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
    assert torch.equal(target.generate(**inputs, **options, assistant_model=drafter), plain)
    ends = {**options, "eos_token_id": [int(plain[0, -9])]}
    assert torch.equal(target.generate(**inputs, **ends, assistant_model=drafter), target.generate(**inputs, **ends))


def test_holes_in_a_stream():
    """A request whose mask has holes, or one beside it, ends otherwise than alone."""
    target = tiny_target("gemma3_text")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    inputs = _with_holes(3)
    options = {"max_new_tokens": 2 * SLIDING_WINDOW, "do_sample": False}
    requests, texts = [], []
    for row in range(3):
        mask = inputs["attention_mask"][row : row + 1]
        texts.append(target.generate(inputs["input_ids"][row : row + 1], attention_mask=mask, **options)[0])
        requests.append(Request(inputs["input_ids"][row], {**options, "attention_mask": mask}, row))
    for finished in generate_stream(target, requests, drafter=drafter, scheduler="fixed"):
        assert torch.equal(finished.token_ids, texts[finished.request.key])


@pytest.mark.parametrize("family", ["llama", "deepseek_v4"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_padding_behind_the_text(family, num_rows):
    """A right-padded row is silently continued from its last token, and not from the padding as without a drafter."""
    target, _ = _target_and_cache(family)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    inputs = ragged_prompts(num_rows, vocab_size=60)
    inputs["attention_mask"][-1, -2:] = 0
    with pytest.raises(ValueError, match=rf'must end in a token of every row.*rows \[{num_rows - 1}\].*side="left"'):
        target.generate(**inputs, max_new_tokens=4, assistant_model=drafter)
