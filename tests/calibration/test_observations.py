"""What is observed of a drafter: the right logits, the right fates, and a drafter left as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dspark_hf import DSparkAssistantModel, SpeculationStatistics
from dspark_hf.calibration import observations as module
from dspark_hf.calibration.observations import (
    Observations,
    collect_observations,
    join_observations,
    read_observations,
    temporary_temperatures,
)
from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.statistics import Round
from tests.calibration.synthetic import synthetic_observations
from tests.generation.altered import AlteredDrafter
from tests.generation.drafters import ScriptedDrafter
from tests.thinning import slow
from tests.tiny import tiny_target

BLOCK_SIZE = 4
PROMPTS = [torch.randint(2, 64, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 4, 6, 3)]


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def drafter(target):
    torch.manual_seed(0)
    # larger weights than fresh ones, so that confidences differ
    return DSparkAssistantModel.from_target(
        target, num_hidden_layers=1, markov_rank=8, block_size=BLOCK_SIZE, initializer_range=0.5
    )


def _statistics(rounds: list[Round], num_tokens: list[int]) -> SpeculationStatistics:
    return SpeculationStatistics(rounds=rounds, origins=[[False] * count for count in num_tokens])


def test_rounds_become_blocks():
    """Fates are given to the wrong rows, or slots that were never verified count as rejected."""
    confidence = torch.tensor([[0.5, 0.6, 0.7], [0.1, 0.2, 0.3]])
    rounds = [
        Round((0, 1), 3, confidence, (3, 2), (2, 0)),
        Round((1,), 2, confidence[1:, :2], (1,), (1,)),
        Round((1,), 0, None, (0,), (0,)),
    ]
    found = read_observations(_statistics(rounds, [4, 5]), block_size=4, prompt_ids=[7, 8])
    assert found.num_accepted.tolist() == [2, 0, 1]
    assert found.num_observed.tolist() == [3, 2, 1]
    assert found.prompt_ids.tolist() == [7, 8, 8]
    expected = confidence.double().logit()[[0, 1, 1]]
    expected = torch.cat([expected, torch.full((3, 1), float("nan"))], dim=1).double()
    expected[torch.arange(4) >= torch.tensor([3, 2, 1])[:, None]] = float("nan")
    torch.testing.assert_close(found.confidence_logits, expected, equal_nan=True)
    assert found.is_observed(1).tolist() == [True, True, False]
    assert found.is_reached(1).tolist() == [True, False, False]


def test_drafts_after_the_end_of_the_text_are_not_observed():
    """What the target says after its own end teaches the temperatures."""
    confidence = torch.full((1, 4), 0.5)
    # the prefill's token, then 3 tokens; then the second of 3 accepted drafts ends the text
    rounds = [Round((0,), 4, confidence, (4,), (2,)), Round((0,), 4, confidence, (4,), (3,))]
    found = read_observations(_statistics(rounds, [1 + 3 + 2]), block_size=4)
    assert found.num_accepted.tolist() == [2, 2]
    assert found.num_observed.tolist() == [4, 2]


def test_an_end_inside_a_block_is_found_in_a_real_run(target):
    """The end of a text is looked for where the decoding loop does not put it."""
    prompt = PROMPTS[0][None]
    plain = target.generate(prompt, max_new_tokens=24, do_sample=False)
    new = plain[0, prompt.shape[1] :].tolist()
    # the prefill writes token 0, the first round of 5 drafts tokens 1 to 6, and the second ends at one of its drafts
    place = next(index for index in range(7, 12) if new[index] not in new[:index])

    def believe(block: DraftedBlock) -> DraftedBlock:
        return replace(block, confidence=torch.full(block.token_ids.shape, 0.5))

    perfect = AlteredDrafter(ScriptedDrafter(target, plain, [0], 1.0), believe)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": new[place], "pad_token_id": 0}
    output = target.generate(prompt, assistant_model=perfect, **options)
    assert output[0, prompt.shape[1] :].tolist() == new[: place + 1]
    found = read_observations(perfect.last_statistics, perfect.block_size)
    assert found.num_accepted.tolist() == found.num_observed.tolist() == [5, place - 6]


def test_temperatures_are_undone():
    """A drafter that is calibrated already is calibrated on top of that."""
    logits = torch.tensor([[3.0, -1.0, 0.5]], dtype=torch.float64)
    temperatures = [2.0, 0.5, 16.0]
    rounds = [Round((0,), 3, (logits / torch.tensor(temperatures)).sigmoid().float(), (3,), (1,))]
    found = read_observations(_statistics(rounds, [3]), 3, temperatures)
    torch.testing.assert_close(found.confidence_logits, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("batch_size", "temperature"), [(1, 0.0), (3, 1.0), slow(1, 1.0), slow(3, 0.0)])
def test_every_draft_of_every_prompt_is_verified(target, drafter, batch_size, temperature):
    """Prompts are lost or mixed up in batches, or drafts are cut from the very blocks that are to be observed."""
    target.generation_config.assistant_confidence_threshold = 0.9
    found = collect_observations(
        target,
        drafter,
        PROMPTS,
        max_new_tokens=16,
        temperature=temperature,
        batch_size=batch_size,
        has_progress_bar=False,
    )
    del target.generation_config.assistant_confidence_threshold
    assert found.prompt_ids.unique().tolist() == [0, 1, 2, 3]
    assert found.block_size == BLOCK_SIZE
    # a prompt's last rounds have no room for whole blocks, all others are whole
    for prompt in range(4):
        blocks = found.select(found.prompt_ids == prompt)
        assert (blocks.num_observed[:-BLOCK_SIZE] == BLOCK_SIZE).all()
        assert int((blocks.num_accepted + 1).sum()) in (14, 15)
    known = torch.arange(BLOCK_SIZE) < found.num_observed[:, None]
    assert torch.equal(~found.confidence_logits.isnan(), known)


def test_greedy_batches_show_what_single_prompts_show(target, drafter):
    """A row of a batch is observed otherwise than the same prompt alone."""
    alone, together = (
        collect_observations(
            target, drafter, PROMPTS, max_new_tokens=12, temperature=0, batch_size=size, has_progress_bar=False
        )
        for size in (1, 4)
    )
    order = together.prompt_ids.argsort(stable=True)
    assert torch.equal(alone.num_accepted, together.num_accepted[order])
    torch.testing.assert_close(
        alone.confidence_logits, together.confidence_logits[order], equal_nan=True, atol=2e-3, rtol=0
    )


def test_present_temperatures_have_no_part_in_it(target, drafter):
    """A second calibration starts from the first one's temperatures, or leaves other ones behind."""
    options = {"max_new_tokens": 12, "temperature": 0, "has_progress_bar": False}
    plain = collect_observations(target, drafter, PROMPTS[:2], **options)
    with temporary_temperatures(drafter, [3.0, 0.5, 2.0, 1.0]):
        again = collect_observations(target, drafter, PROMPTS[:2], **options)
        assert drafter.config.sts_temperatures == [3.0, 0.5, 2.0, 1.0]
    assert drafter.config.sts_temperatures is None
    torch.testing.assert_close(plain.confidence_logits, again.confidence_logits, equal_nan=True, atol=2e-3, rtol=0)


def test_logits_survive_where_the_sigmoid_is_one(target, drafter):
    """An over-confident drafter's logits are rounded away, and the temperatures fit the rounding."""
    bias = drafter.confidence_head.proj.bias
    with torch.no_grad():
        bias += 40
        found = collect_observations(
            target, drafter, PROMPTS[:1], max_new_tokens=12, temperature=0, has_progress_bar=False
        )
        bias -= 40
        plain = collect_observations(
            target, drafter, PROMPTS[:1], max_new_tokens=12, temperature=0, has_progress_bar=False
        )
    torch.testing.assert_close(
        found.confidence_logits, plain.confidence_logits + 40, equal_nan=True, atol=1e-2, rtol=0
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_the_drafter_as_it_was(target, drafter, monkeypatch, error):
    """Temperatures of the run stay in the drafter, or the work of an hour is lost to Ctrl-C."""
    calls = []

    def generate(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) == 3:
            raise error
        return type(target).generate(target, *args, **kwargs)

    monkeypatch.setattr(target, "generate", generate, raising=False)
    options = {"max_new_tokens": 8, "temperature": 0, "has_progress_bar": False}
    with temporary_temperatures(drafter, [2.0] * BLOCK_SIZE):
        if error is KeyboardInterrupt:
            found = collect_observations(target, drafter, PROMPTS, **options)
            assert found.prompt_ids.unique().tolist() == [0, 1]
        else:
            with pytest.raises(RuntimeError):
                collect_observations(target, drafter, PROMPTS, **options)
        assert drafter.config.sts_temperatures == [2.0] * BLOCK_SIZE


def test_prompts_are_split_evenly():
    """A prompt is on both sides of the split, or a part of a file that is in order decides alone."""
    observations = synthetic_observations(90, [1.0, 1.0], num_prompts=5)
    even, odd = observations.split_by_prompt()
    assert even.prompt_ids.unique().tolist() == [0, 2, 4]
    assert odd.prompt_ids.unique().tolist() == [1, 3]
    joined = join_observations([even, odd])
    assert isinstance(joined, Observations)
    assert len(joined) == 90
    assert joined.num_prompts == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "`prompts` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"max_new_tokens": 2}, "`max_new_tokens` must be at least 3, got 2"),
        ({"temperature": -1.0}, "`temperature` must be at least 0, got -1.0"),
        ({"temperature": float("nan")}, "`temperature` must be at least 0, got nan"),
    ],
)
def test_mistakes_are_told_before_any_work(target, drafter, monkeypatch, options, message):
    """A user waits for answers before hearing of a typing error."""
    monkeypatch.setattr(module, "_observe", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        collect_observations(target, drafter, **{"prompts": PROMPTS, **options})


def test_wrong_drafters_are_refused_before_any_work(target, drafter, monkeypatch):
    """A drafter without confidence, or of another target, is run for hours in vain."""
    monkeypatch.setattr(module, "_observe", lambda *args, **kwargs: pytest.fail("work was done"))
    headless = DSparkAssistantModel.from_target(
        target, num_hidden_layers=1, markov_rank=8, enable_confidence_head=False
    )
    with pytest.raises(ValueError, match="`drafter` must have a confidence head"):
        collect_observations(target, headless, PROMPTS)
    with pytest.raises(ValueError, match="`assistant_model` must have the target's `vocab_size` 80, got 64"):
        collect_observations(tiny_target(vocab_size=80), drafter, PROMPTS)


def test_answers_without_drafts_are_refused(target, drafter, monkeypatch):
    """Nothing was observed, and a fit of nothing fails somewhere else."""
    monkeypatch.setattr(target.generation_config, "eos_token_id", list(range(64)))
    with pytest.raises(ValueError, match="got 4 prompts and not one verified draft"):
        collect_observations(target, drafter, PROMPTS, temperature=0, has_progress_bar=False)


def test_too_few_blocks_are_told_early(target, drafter, monkeypatch):
    """Hundreds of prompts are answered before it is said that their answers are too short to fit on."""
    calls = []

    def observe(target, drafter, prompts, first_id, **options):
        calls.append(first_id)
        ids = torch.full((2,), first_id)
        return Observations(torch.zeros(2, BLOCK_SIZE, dtype=torch.float64), ids * 0, ids * 0 + 1, ids)

    monkeypatch.setattr(module, "_observe", observe)
    prompts = [PROMPTS[0]] * 100
    message = (
        "`prompts` must lead to at least 300 blocks in every other answer .*got 16 blocks in the first 8 answers, so "
        "about 100 of all 100 prompts. Give about 300 prompts"
    )
    with pytest.raises(ValueError, match=message):
        collect_observations(target, drafter, prompts, min_reached=300, has_progress_bar=False)
    assert len(calls) == 8
    # where it may still do, the fit itself decides
    assert len(collect_observations(target, drafter, prompts, min_reached=200, has_progress_bar=False)) == 200


def test_transformers_own_decoding_is_noticed(target, drafter, monkeypatch):
    """Without our decoding loop a stale or foreign record would be read."""
    monkeypatch.setattr(target, "generate", lambda *args, **kwargs: None, raising=False)
    with pytest.raises(ValueError, match="`dspark_hf` must be installed in Transformers"):
        collect_observations(target, drafter, PROMPTS, has_progress_bar=False)
