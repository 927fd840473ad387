"""Temperatures decide how much is verified, never what is said."""

from __future__ import annotations

import pytest
import torch

from dspark_hf import DSparkAssistantModel
from dspark_hf.calibration.observations import temporary_temperatures
from tests.generation.prompts import ragged_prompts
from tests.thinning import slow
from tests.tiny import tiny_target

NEW_TOKENS = 20


@pytest.mark.parametrize("num_rows", [slow(1), 3])
def test_greedy_text_is_that_of_plain_generate(num_rows):
    """Calibration changes the output."""
    target = tiny_target()
    torch.manual_seed(0)
    drafter = DSparkAssistantModel.from_target(
        target, num_hidden_layers=1, markov_rank=8, block_size=4, initializer_range=0.5, warm_start=True
    )
    inputs = ragged_prompts(num_rows)
    plain = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    num_verified = set()
    for temperatures in (None, [0.1] * 4, [10.0] * 4, [0.2, 5.0, 0.5, 1.0]):
        with temporary_temperatures(drafter, temperatures):
            assisted = target.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                assistant_model=drafter,
                assistant_confidence_threshold=0.55,
            )
        assert torch.equal(assisted, plain)
        num_verified.add(drafter.last_statistics.num_verified)
    # they had an effect: other drafts were verified
    assert len(num_verified) > 1


def test_temperatures_of_a_saved_drafter_reach_its_confidence(tmp_path):
    """What was fitted is saved but not applied, or applied to the wrong slot."""
    target = tiny_target()
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=4)
    prompt = torch.tensor([[5, 6, 7]])
    temperatures = [2.0, 0.5, 4.0, 1.0]
    options = {"max_new_tokens": 8, "do_sample": False, "scheduler": "fixed"}
    target.generate(prompt, assistant_model=drafter, **options)
    before = drafter.last_statistics.rounds[0].confidence
    drafter.config.sts_temperatures = temperatures
    drafter.save_pretrained(tmp_path)
    again = DSparkAssistantModel.from_pretrained(tmp_path)
    target.generate(prompt, assistant_model=again, **options)
    after = again.last_statistics.rounds[0].confidence
    # probabilities in fp32, of weights in other places of memory
    torch.testing.assert_close(after.logit(), before.logit() / torch.tensor(temperatures), atol=1e-4, rtol=1e-4)
