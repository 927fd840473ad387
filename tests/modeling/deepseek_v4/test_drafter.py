"""The DSpark module of DeepSeek-V4 behind the drafter's interface, against its oracle."""

from __future__ import annotations

import pytest
import torch

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.formats.deepseek_v4 import our_name, released_name
from tests.closeness import assert_same_up_to_rounding, relative_difference
from tests.modeling.deepseek_v4.tiny import VOCAB, oracle_settings, tiny_model
from tests.reference.deepseek_v4_drafter import draft
from tests.thinning import slow


def _pair(seed: int, **fields):
    """Return a target and a drafter with stages like its layers, all parameters random."""
    target = tiny_model(seed, **fields)
    drafter = DSparkAssistantModel.from_target(
        target, markov_rank=8, block_size=5, initializer_range=0.2, mask_token_id=95
    )
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (0.5 if parameter.ndim == 1 else 0.0))
    return target, drafter


def _draft(target, drafter, token_ids):
    """Return greedy drafts after a text, their logits and their confidence."""
    seen = []

    def sampler(slot, logits, drafted):
        seen.append(logits)
        return logits.argmax(-1), None

    adapter = TargetAdapter(target, drafter.target_layer_ids)
    with torch.no_grad(), adapter:
        target(token_ids[:, :-1])
        features = adapter.pop_context_hidden_states()
        length = features.shape[1]
        context = drafter.start(adapter, len(token_ids))
        context.extend(features, torch.arange(length)[None].expand(len(token_ids), -1), [length] * len(token_ids))
        block = context.draft(token_ids[:, -1], torch.full((len(token_ids),), length), drafter.block_size, sampler)
    return features, block, torch.stack(seen, dim=1)


def _expected(target, drafter, token_ids, features, **options):
    """Return the oracle's drafts after a text whose tapped features are given."""
    num_stages = len(drafter.layers)
    return draft(
        {released_name(name, num_stages): tensor for name, tensor in drafter.state_dict().items()},
        oracle_settings(target.config),
        features[0],
        int(token_ids[0, -1]),
        token_ids.shape[1] - 1,
        target.model.embed.weight,
        target.head.weight,
        block_size=5,
        noise_token_id=95,
        **options,
    )


@pytest.mark.parametrize("length", [3, slow(17), 40])
def test_equals_the_oracle(length):
    """The module's drafts are not those of the released equations: they would all be rejected."""
    target, drafter = _pair(1)
    assert drafter.target_layer_ids == [2, 3, 4]
    token_ids = torch.randint(VOCAB, (1, length))
    features, block, logits = _draft(target, drafter, token_ids)
    expected = _expected(target, drafter, token_ids, features)
    assert block.token_ids[0].tolist() == expected.token_ids
    torch.testing.assert_close(logits[0].double(), expected.logits, atol=1e-4, rtol=1e-4)
    confidence = expected.confidence_logits.sigmoid()
    torch.testing.assert_close(block.confidence[0].double(), confidence, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [slow(3), 40])
def test_keys_are_rounded_as_released(length):
    """Drafts are made from other keys than those that the module was trained with, and more of them are rejected."""
    target, drafter = _pair(1, cache_dtype="fp8")
    token_ids = torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(length))
    features, _, logits = _draft(target, drafter, token_ids)
    rounded, exact = (
        _expected(target, drafter, token_ids, features, kv_fake_quant=is_rounded).logits.detach().float()
        for is_rounded in (True, False)
    )
    # a last bit may turn a rounding, which moves much less than all roundings together
    assert relative_difference(logits[0], rounded) < 0.2 * relative_difference(rounded, exact)


def test_names_go_both_ways():
    """A tensor of a released checkpoint lands in the wrong place, or comes back under another name."""
    _, drafter = _pair(2)
    names = {name: released_name(name, 3) for name in drafter.state_dict()}
    assert all(our_name(released, 3) == name for name, released in names.items())
    assert names["fc.weight"] == "mtp.0.main_proj.weight"
    assert names["streams.hc_head_fn"] == "mtp.2.hc_head_fn"
    assert names["layers.1.ffn.gate.bias"] == "mtp.1.ffn.gate.bias"
    assert names["confidence_head.proj.weight"] == "mtp.2.confidence_head.proj.weight"


def test_context_is_the_latest_window():
    """The drafter's memory grows with the text, or old text changes its drafts."""
    target, drafter = _pair(3)
    adapter = TargetAdapter(target, drafter.target_layer_ids)
    with torch.no_grad():
        features = torch.randn(1, 200, 3 * 64)
        whole, parts = drafter.start(adapter, 1), drafter.start(adapter, 1)
        whole.extend(features, torch.arange(200)[None], [200])
        for start in range(0, 200, 5):
            parts.extend(features[:, start : start + 5], torch.arange(start, start + 5)[None], [5])
        blocks = [
            context.draft(torch.tensor([7]), torch.tensor([200]), 5, lambda slot, logits, _: (logits.argmax(-1), None))
            for context in (whole, parts)
        ]
    assert torch.equal(blocks[0].token_ids, blocks[1].token_ids)
    torch.testing.assert_close(blocks[0].confidence, blocks[1].confidence, atol=1e-5, rtol=1e-5)
    assert max(parts.cache.lengths.host) <= 4 * target.config.sliding_window


@pytest.mark.parametrize("num_rows", [1, slow(4)])
def test_changes_no_token(num_rows):
    """Greedy text with the attached kind of drafter is not the text without it."""
    target, drafter = _pair(4)
    token_ids = torch.randint(1, VOCAB, (num_rows, 19))
    mask = torch.ones_like(token_ids)
    for row in range(1, num_rows):
        mask[row, : 5 * row] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        target.generate(token_ids, **options), target.generate(token_ids, assistant_model=drafter, **options)
    )


def test_training_pass_equals_drafting():
    """The trained block sees another context than the drafting one."""
    target, drafter = _pair(5)
    token_ids = torch.randint(VOCAB, (1, 40))
    features, block, logits = _draft(target, drafter, token_ids)
    previous = torch.cat([token_ids[:, -1:], block.token_ids[:, :-1]], dim=1)
    with torch.no_grad():
        states = drafter(
            features, token_ids[:, -1:], torch.tensor([[39]]), previous[:, None], TargetAdapter(target, [2, 3, 4])
        )
        head = drafter.draft_head(TargetAdapter(target))
        ours = head(states.hidden_states[:, 0]) + drafter.markov_head.project(states.latents[:, 0])
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(states.confidence_logits[:, 0].sigmoid(), block.confidence, atol=1e-4, rtol=1e-4)


def test_save_and_load(tmp_path):
    """A drafter of this kind does not survive saving."""
    target, drafter = _pair(6)
    drafter.save_pretrained(tmp_path)
    loaded = DSparkAssistantModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(drafter.parameters(), loaded.parameters(), strict=True))
    token_ids = torch.randint(VOCAB, (1, 9))
    assert_same_up_to_rounding(_draft(target, loaded, token_ids)[2], _draft(target, drafter, token_ids)[2])
