"""Logits processors see, at every drafted position, the very prefix that plain `generate` would show them.

B batch, b rows asked about, A tokens ahead, W positions, V vocab.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkingConfig,
)

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.call.processors import ProcessorChain
from dspark_hf.generation.call.sequences import Sequences
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.thinning import slow
from tests.tiny import tiny_target

VOCAB_SIZE = 11
PROMPT_LENGTH = 4
# committed tokens after the prompt, per row
NUM_COMMITTED = (3, 0, 5, 3)
EOS = 7
NEW_TOKENS = 16


class PrefixDependent(LogitsProcessor):
    """Add a bias that depends on every token of the prefix and on its place."""

    depends_on_prefix_alone = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        places = torch.arange(1, input_ids.shape[1] + 1)
        key = (input_ids * places).sum(-1, keepdim=True)
        return scores + 3 * torch.sin(key + torch.arange(scores.shape[1]))


class RowDependent(LogitsProcessor):
    """Bias every row of the whole batch in its own way, as a processor does that holds something per prompt."""

    depends_on_prefix_alone = True

    def __init__(self, num_rows: int, vocab_size: int):
        self.bias = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 3 * self.bias


class InPlace(LogitsProcessor):
    """Change the scores it is given instead of a copy, and return halves of them."""

    depends_on_prefix_alone = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 2] = scores[:, 2] - input_ids[:, -1]
        return (8 * scores).round().half()


def _allowed(row: int, ids: Tensor) -> list[int]:
    return [token for token in range(VOCAB_SIZE) if (token + row + int(ids.sum())) % 3]


_allowed.depends_on_prefix_alone = True

PROCESSORS: dict[str, list[LogitsProcessor]] = {
    "none": [],
    "temperature": [TemperatureLogitsWarper(0.6)],
    "top-k": [TopKLogitsWarper(4)],
    "top-p": [TopPLogitsWarper(0.7)],
    "min-p": [MinPLogitsWarper(0.2)],
    "typical": [TypicalLogitsWarper(0.6)],
    "repetition penalty": [RepetitionPenaltyLogitsProcessor(1.7)],
    "no repeated n-gram": [NoRepeatNGramLogitsProcessor(2)],
    "bad words": [NoBadWordsLogitsProcessor([[5], [3, 9], [8, 8, 1]])],
    "sequence bias": [SequenceBiasLogitsProcessor([[[4], 2.0], [[3, 9], -5.0]])],
    "min new tokens": [MinNewTokensLengthLogitsProcessor(PROMPT_LENGTH, 6, EOS)],
    "allowed tokens": [PrefixConstrainedLogitsProcessor(_allowed, 1)],
    "prefix-dependent": [PrefixDependent()],
    "row-dependent": [RowDependent(len(NUM_COMMITTED), VOCAB_SIZE)],
    "in place": [InPlace()],
    "mixture": [
        RepetitionPenaltyLogitsProcessor(1.3),
        PrefixConstrainedLogitsProcessor(_allowed, 1),
        TemperatureLogitsWarper(0.8),
        PrefixDependent(),
        TopPLogitsWarper(0.9),
        RowDependent(len(NUM_COMMITTED), VOCAB_SIZE),
    ],
}


def _ragged_sequences() -> Sequences:
    sequences = Sequences(torch.randint(VOCAB_SIZE, (len(NUM_COMMITTED), PROMPT_LENGTH)), 0)
    for row, count in enumerate(NUM_COMMITTED):
        sequences.append(row, torch.randint(VOCAB_SIZE, (count,)))
    return sequences


def _one_at_a_time(
    processors: list[LogitsProcessor], sequences: Sequences, rows: list[int], ahead: Tensor, logits: Tensor
) -> Tensor:
    """Call the processors once per row and position, on a batch in which every row has that prefix."""
    scores = torch.empty_like(logits)
    num_skipped = ahead.shape[1] - (logits.shape[1] - 1)
    for index, row in enumerate(rows):
        for position in range(logits.shape[1]):
            prefix = torch.cat([sequences.row(row), ahead[index, : num_skipped + position]])
            batch = prefix.repeat(sequences.batch_size, 1)
            row_scores = logits[index, position].repeat(sequences.batch_size, 1)
            scores[index, position] = LogitsProcessorList(processors)(batch, row_scores)[row].float()
    return scores


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2], [1, 3]], ids=["all rows", "one row", "some rows"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_every_position_sees_its_own_prefix(name, rows):
    """A processor acts on a drafted position as if other tokens stood before it, or as if it were another row's."""
    processors = PROCESSORS[name]
    # a prefill, the second and the fourth draft, a verify pass, and the tail of one
    for num_ahead, width in ((0, 1), (1, 1), (3, 1), (3, 4), (4, 3)):
        sequences = _ragged_sequences()
        ahead = torch.randint(VOCAB_SIZE, (len(rows), num_ahead))
        logits = 2 * torch.randn(len(rows), width, VOCAB_SIZE)
        given = logits.clone()
        scores = ProcessorChain(LogitsProcessorList(processors), sequences)(rows, ahead, logits)
        # a batch of another size may be gone through in other steps, which moves sums by their last bits
        torch.testing.assert_close(scores, _one_at_a_time(processors, sequences, rows, ahead, given))
        # the raw logits are an output of their own
        assert torch.equal(logits, given)


def test_scores_are_fp32():
    """Scores of a bf16 target are rounded twice, unlike those of plain `generate`."""
    logits = torch.randn(4, 1, VOCAB_SIZE).bfloat16()
    chain = ProcessorChain(LogitsProcessorList([TemperatureLogitsWarper(0.7)]), _ragged_sequences())
    scores = chain([0, 1, 2, 3], torch.empty(4, 0, dtype=torch.long), logits)
    # some thousand times closer than a second rounding to bf16
    torch.testing.assert_close(scores, logits.float() / 0.7, atol=0, rtol=1e-6)


def test_nothing_is_asked_behind_an_end():
    """A processor is shown a text that goes on after its EOS token, which plain `generate` never does."""
    seen: list[list[int]] = []

    class Recorder(LogitsProcessor):
        depends_on_prefix_alone = True

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.extend(input_ids.tolist())
            return scores - 1

    chain = ProcessorChain(LogitsProcessorList([Recorder()]), Sequences(torch.tensor([[1, 2]]), 0), [EOS, 9])
    scores = chain([0], torch.tensor([[3, EOS, 4]]), torch.zeros(1, 4, VOCAB_SIZE))
    assert seen == [[1, 2], [1, 2, 3]]
    assert scores[0, :, 0].tolist() == [-1, -1, 0, 0]


@cache
def _without_options(num_rows: int) -> Tensor:
    return tiny_target().generate(**ragged_prompts(num_rows), max_new_tokens=NEW_TOKENS, do_sample=False)


@pytest.mark.parametrize("num_rows", [slow(1), 3])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        slow({"encoder_no_repeat_ngram_size": 1}),
        {"encoder_repetition_penalty": 1.5},
        {"bad_words_ids": [[token] for token in range(20, 40)] + [[19, token] for token in range(40, 64)]},
        slow({"sequence_bias": [[[4], 2.0], [[3, 9], -5.0]]}),
        {"min_new_tokens": 9, "eos_token_id": list(range(20, 50))},
        slow({"min_length": 25, "eos_token_id": list(range(20, 50))}),
        {"forced_eos_token_id": 9, "eos_token_id": 9},
        {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 9},
        slow({"suppress_tokens": list(range(20, 50))}),
        {"begin_suppress_tokens": list(range(20, 50))},
        slow({"renormalize_logits": True}),
        slow({"remove_invalid_values": True}),
        {"prefix_allowed_tokens_fn": lambda row, ids: [t for t in range(2, 64) if (t + row + len(ids)) % 3]},
        # this scheme looks at every token of the vocabulary
        slow({"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash")}),
        {"watermarking_config": WatermarkingConfig(bias=4.0)},
        {"logits_processor": LogitsProcessorList([PrefixDependent()])},
        # it lives for three rows or for one
        {"row-dependent": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_generate_act_as_without_a_drafter(options, num_rows):
    """An option of `generate` changes the text in another way than it does without a drafter."""
    if "row-dependent" in options:
        options = {"logits_processor": LogitsProcessorList([RowDependent(num_rows, 64)])}
    target = tiny_target()
    inputs = ragged_prompts(num_rows)
    plain = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
    assisted = target.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=drafter, **options
    )
    assert torch.equal(assisted, plain)
    if not {"renormalize_logits", "remove_invalid_values"} & options.keys():
        assert not torch.equal(plain, _without_options(num_rows))


def _trie(texts: list[list[int]], prompt_length: int) -> Any:
    """Return a constraint that knows no text but its own: another prefix than one of theirs raises an error."""

    def allowed(row: int, ids: Tensor) -> list[int]:
        done = ids[prompt_length:].tolist()
        return sorted({text[len(done)] for text in texts if text[: len(done)] == done and len(text) > len(done)})

    return allowed


@pytest.mark.parametrize(
    ("draft_token_ids", "do_sample"),
    [(None, False), (range(0, 64, 2), True), slow(None, True), slow(range(0, 64, 2), False)],
    ids=["all tokens", "even tokens, sampled", "all tokens, sampled", "even tokens"],
)
def test_constraint_is_asked_about_its_own_texts_only(draft_token_ids, do_sample):
    """A constraint that plain `generate` satisfies raises an error: drafts go on after EOS or leave the constraint."""
    texts = [[10, 11, 12, EOS], [10, 13, EOS], [20, EOS], [20, 21, 22, 24, 26, EOS]]
    target = tiny_target()
    drafter = DSparkAssistantModel.from_target(
        target, num_hidden_layers=1, markov_rank=8, draft_token_ids=draft_token_ids
    )
    inputs = ragged_prompts(1)
    prompt_length = inputs["input_ids"].shape[1]
    options = {"eos_token_id": EOS, "prefix_allowed_tokens_fn": _trie(texts, prompt_length), "do_sample": do_sample}
    for _ in range(12 if do_sample else 1):
        assisted = target.generate(**inputs, **options, max_new_tokens=NEW_TOKENS, assistant_model=drafter)
        assert assisted[0, prompt_length:].tolist() in texts
    if not do_sample:
        assert torch.equal(assisted, target.generate(**inputs, **options, max_new_tokens=NEW_TOKENS))


def test_returned_sequences_of_a_prompt_share_its_row_number():
    """A constraint is asked about row numbers that do not exist when several sequences per prompt are sampled."""
    target = tiny_target()
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    options = {
        **ragged_prompts(2),
        "max_new_tokens": NEW_TOKENS,
        "do_sample": True,
        "num_return_sequences": 3,
        # every row has two tokens of its own, so that the text tells its number
        "prefix_allowed_tokens_fn": lambda row, ids: [10 * row, 10 * row + 1],
    }
    plain = target.generate(**options)[:, -NEW_TOKENS:]
    assisted = target.generate(**options, assistant_model=drafter)[:, -NEW_TOKENS:]
    assert torch.equal(assisted // 10, plain // 10)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.5},
        {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5, 7], ngram_len=3), "do_sample": True},
    ],
    ids=["guidance", "SynthID"],
)
def test_processors_with_a_state_are_refused(options):
    """A processor counts rejected drafts as text: the output changes without an error."""
    target = tiny_target()
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    forwards: list[None] = []
    handle = target.register_forward_pre_hook(lambda module, args: forwards.append(None))
    with pytest.raises(ValueError, match="must not keep a state"):
        target.generate(**ragged_prompts(1), max_new_tokens=4, assistant_model=drafter, **options)
    handle.remove()
    assert not forwards
