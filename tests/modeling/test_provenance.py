"""A drafter knows its target, and says so when it is lent to another one in vain."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from dspark_hf import DSparkAssistantModel, Request, generate_stream
from dspark_hf.generation.scheduling.fixed import FixedScheduler
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.provenance import fingerprint
from tests.tiny import tiny_target


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("dspark_hf")
    before, logger.propagate = logger.propagate, True
    yield caplog
    logger.propagate = before


def _generate(target: PreTrainedModel, drafter: Any, count: int = 40) -> None:
    ids = torch.tensor([[5, 6, 7]])
    # what is looked up says nothing of the drafter
    options = {"assistant_model": drafter, "scheduler": FixedScheduler(), "drafts": "model"}
    target.generate(ids, max_new_tokens=count, do_sample=False, **options)


def _drafter(target: PreTrainedModel) -> DSparkAssistantModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4, block_size=3)


def test_the_fingerprint_tells_targets_apart() -> None:
    """A target would be taken for another one for its dtype, or one of the same shape for the right one."""
    own = tiny_target()
    expected = fingerprint(TargetAdapter(own))
    assert _drafter(own).config.target_fingerprint == expected
    assert fingerprint(TargetAdapter(tiny_target(seed=2))) != expected
    half = tiny_target().to(torch.bfloat16)
    assert fingerprint(TargetAdapter(half)) == expected
    assert fingerprint(TargetAdapter(half.float())) == expected


def test_a_drafter_of_another_target_is_mentioned_once(warnings: pytest.LogCaptureFixture) -> None:
    """A drafter for another model of the same shape would slow its user down for ever, without a word."""
    drafter = _drafter(tiny_target())
    other = tiny_target(seed=2)
    for _ in range(3):
        _generate(other, drafter)
    messages = [record.getMessage() for record in warnings.records]
    assert len(messages) == 1, messages
    assert messages[0].startswith("`assistant_model` was made for another target, not for this one, and only ")


def test_a_stream_mentions_it_once_too(warnings: pytest.LogCaptureFixture) -> None:
    """Requests that come and go would be slowed down by another model's drafter for ever, without a word."""
    drafter, other = _drafter(tiny_target()), tiny_target(seed=2)
    requests = [Request([5, 6, 7 + i], {"max_new_tokens": 30, "do_sample": False}) for i in range(4)]
    finished = list(generate_stream(other, requests, drafter=drafter, scheduler=FixedScheduler(), drafts="model"))
    assert [one.error for one in finished] == [None] * 4
    messages = [record.getMessage() for record in warnings.records]
    assert len(messages) == 1, messages
    assert messages[0].startswith("`assistant_model` was made for another target, not for this one, and only ")


def test_a_stream_of_its_own_target_says_nothing(warnings: pytest.LogCaptureFixture) -> None:
    """A drafter that is merely bad would be called another target's in a stream."""
    target = tiny_target()
    requests = [Request([5, 6, 7 + i], {"max_new_tokens": 30, "do_sample": False}) for i in range(2)]
    list(generate_stream(target, requests, drafter=_drafter(target), scheduler=FixedScheduler(), drafts="model"))
    assert not warnings.records


def test_bad_drafts_for_its_own_target_are_not_mentioned(warnings: pytest.LogCaptureFixture) -> None:
    """A drafter that is merely bad would be called another target's."""
    target = tiny_target()
    _generate(target, _drafter(target))
    assert not warnings.records


def test_good_drafts_for_another_target_are_not_mentioned(warnings: pytest.LogCaptureFixture) -> None:
    """A fine-tune that the drafter serves well would be called the wrong target."""
    drafter = _drafter(tiny_target())
    other = tiny_target(seed=2)
    with torch.no_grad():
        # both write one token for ever
        other.get_output_embeddings().weight.zero_()
        drafter.markov_head.markov_w2.weight.zero_()
    _generate(other, drafter)
    assert drafter.last_statistics.mean_accepted > 1
    assert not warnings.records


def test_names_count_where_there_is_no_fingerprint(warnings: pytest.LogCaptureFixture) -> None:
    """Files of other projects name their target, and nobody would compare."""
    drafter, other = _drafter(tiny_target()), tiny_target(seed=2)
    drafter.config.target_fingerprint = None
    drafter.config.base_model_name_or_path = "Someone/A-Target"
    other.config.name_or_path = "/models/another-target"
    _generate(other, drafter)
    assert "was made for Someone/A-Target, not for /models/another-target" in warnings.text
    warnings.clear()
    again = _drafter(tiny_target())
    again.config.target_fingerprint = None
    again.config.base_model_name_or_path = "Someone/Another-Target"
    _generate(other, again)
    assert not warnings.records
