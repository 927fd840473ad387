"""Scores, logits, hidden states, attentions, streams and statistics come per token as without a drafter."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import BaseStreamer

from tests.closeness import assert_same_up_to_rounding
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.thinning import slow
from tests.tiny import tiny_target

NEW_TOKENS = 16
WANTED = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
}


def _both(target, inputs, accuracy=0.7, **options):
    script = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    drafter = ScriptedDrafter(target, script, num_padded(inputs), accuracy)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return target.generate(**inputs, **options), target.generate(**inputs, **options, assistant_model=drafter), drafter


class Recorder(BaseStreamer):
    """Keep what was streamed."""

    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value.clone())

    def end(self):
        self.ended = True


@pytest.mark.parametrize(
    ("num_rows", "family"),
    [(1, "llama"), (4, "gemma4_text"), slow(1, "gemma4_text"), slow(4, "llama")]
    + [slow(num_rows, "gemma3_text") for num_rows in (1, 4)],
)
def test_scores_logits_and_hidden_states(num_rows, family):
    """What the output carries per token has another shape, order or value."""
    target = tiny_target(family)
    inputs = ragged_prompts(num_rows)
    plain, assisted, _ = _both(target, inputs, **WANTED, repetition_penalty=1.3)
    assert torch.equal(plain.sequences, assisted.sequences)
    for name in ("scores", "logits"):
        ours, theirs = getattr(assisted, name), getattr(plain, name)
        assert len(ours) == len(theirs) == NEW_TOKENS
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)
    mask = inputs["attention_mask"].bool()
    assert len(assisted.hidden_states) == len(plain.hidden_states) == NEW_TOKENS
    for step, (ours, theirs) in enumerate(zip(assisted.hidden_states, plain.hidden_states, strict=True)):
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape
            if step == 0:
                one, other = one[mask], other[mask]
            torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


# two streams of hidden states, which come before the rows
STREAMS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": None,
}


@pytest.mark.parametrize(("num_rows", "chunk_size"), [(1, None), (3, None), (3, 4)])
def test_hidden_states_of_several_streams(num_rows, chunk_size):
    """Of Gemma 3n, one stream comes for two, every token of a block with each, and several rows end in an error."""
    target, inputs = tiny_target("gemma3n_text", **STREAMS), ragged_prompts(num_rows)
    plain, assisted, _ = _both(target, inputs, **WANTED, prefill_chunk_size=chunk_size)
    assert torch.equal(plain.sequences, assisted.sequences)
    for step, (ours, theirs) in enumerate(zip(assisted.hidden_states, plain.hidden_states, strict=True)):
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape
            assert one.shape[:2] == (2, num_rows)
            if step == 0:
                mask = inputs["attention_mask"][:, -one.shape[2] :].bool()
                one, other = one[:, mask], other[:, mask]
            assert_same_up_to_rounding(one, other)


def test_attentions_of_one_row():
    """Attentions of a block are not cut apart by token."""
    target = tiny_target("llama", attn_implementation="eager")
    inputs = ragged_prompts(1)
    plain, assisted, _ = _both(target, inputs, return_dict_in_generate=True, output_attentions=True)
    assert len(assisted.attentions) == len(plain.attentions)
    for ours, theirs in zip(assisted.attentions, plain.attentions, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 4])
def test_streamer_gets_the_same_tokens(num_rows):
    """A streamer misses a token, gets one twice, or sees rows out of step."""
    target = tiny_target("llama")
    inputs = ragged_prompts(num_rows)
    script = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    eos = int(script[-1, inputs["input_ids"].shape[1] + 5])
    plain, assisted = Recorder(), Recorder()
    _both(target, inputs, streamer=plain, eos_token_id=eos)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": eos, "streamer": assisted}
    target.generate(**inputs, **options, assistant_model=ScriptedDrafter(target, script, num_padded(inputs), 0.7))
    # the first recorder heard both calls of the helper: plain, then assisted
    half = len(plain.values) // 2
    for heard in (plain.values[half:], assisted.values):
        assert len(heard) == half
        assert all(torch.equal(one, other) for one, other in zip(heard, plain.values, strict=False))
    assert assisted.ended


@pytest.mark.parametrize("num_rows", [1, 4])
def test_statistics_add_up(num_rows):
    """The statistics contradict the output."""
    target = tiny_target("llama")
    inputs = ragged_prompts(num_rows)
    _, output, drafter = _both(target, inputs, return_dict_in_generate=True)
    statistics = output.statistics
    assert drafter.last_statistics is statistics
    assert statistics.num_committed == num_rows * (NEW_TOKENS - 1)
    # every round commits its accepted drafts and one token of the target's own
    assert statistics.num_committed == statistics.num_accepted + statistics.num_rounds
    assert statistics.tau == pytest.approx(statistics.mean_accepted + 1)
    assert sum(statistics.accepted_by_position) == statistics.num_accepted
    assert (
        statistics.verified_by_position[0] >= statistics.accepted_by_position[0] >= statistics.verified_by_position[1]
    )
    assert all(0 <= rate <= 1 for rate in statistics.accept_rate_by_position)
    assert [len(row) for row in statistics.origins] == [NEW_TOKENS] * num_rows
    assert sum(sum(row) for row in statistics.origins) == statistics.num_accepted
    assert not any(row[0] for row in statistics.origins)
    assert min(statistics.draft_seconds, statistics.verify_seconds, statistics.other_seconds) > 0


def test_accept_rate_by_position_matches_the_script():
    """Acceptance by position is counted at a shifted position or over the wrong rounds."""
    target = tiny_target("llama")
    inputs = ragged_prompts(4)
    script = target.generate(**inputs, max_new_tokens=100, do_sample=False)
    drafter = ScriptedDrafter(target, script, num_padded(inputs), 0.7)
    target.generate(**inputs, max_new_tokens=100, do_sample=False, assistant_model=drafter)
    statistics = drafter.last_statistics
    for rate, tried in zip(statistics.accept_rate_by_position, statistics.verified_by_position, strict=True):
        # five standard deviations of a frequency over so many tries
        assert abs(rate - 0.7) < 5 * (0.7 * 0.3 / tried) ** 0.5


def test_plain_call_returns_a_tensor():
    """Without `return_dict_in_generate` an output object comes back."""
    target = tiny_target("llama")
    _, output, drafter = _both(target, ragged_prompts(1))
    assert isinstance(output, torch.Tensor)
    assert drafter.last_statistics.num_rounds > 0


def test_several_samples_of_one_prompt():
    """`num_return_sequences` is refused although rows can be decoded together."""
    target = tiny_target("llama")
    inputs = ragged_prompts(2)
    script = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False).repeat_interleave(3, dim=0)
    drafter = ScriptedDrafter(target, script, [n for n in num_padded(inputs) for _ in range(3)], 0.7)
    samples = target.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=True, num_return_sequences=3, assistant_model=drafter
    )
    assert samples.shape == (6, inputs["input_ids"].shape[1] + NEW_TOKENS)
    assert torch.equal(samples[:, : inputs["input_ids"].shape[1]], inputs["input_ids"].repeat_interleave(3, dim=0))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_kind_of_the_ids(num_rows):
    """Prompts of another kind of integer give texts of that kind, unlike without a drafter."""
    inputs = ragged_prompts(num_rows)
    inputs["input_ids"] = inputs["input_ids"].int()
    plain, assisted, _ = _both(tiny_target("llama"), inputs)
    assert assisted.dtype == plain.dtype
    assert torch.equal(assisted, plain)
