"""A file that says two things is mentioned, and one that cannot be both is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspark_hf import DSparkConfig
from dspark_hf.modeling.formats import contradictions
from tests.modeling.deepspec_layout import Layout, deepspec_fields, deepspec_weights
from tests.modeling.formats.layouts import specforge_fields, speculators_fields, without_vocabulary, write

WEIGHTS = deepspec_weights(Layout())
DEEPSPEC = deepspec_fields(Layout())


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    logger = logging.getLogger("dspark_hf")
    before, logger.propagate = logger.propagate, True
    # what was said to another test may be said again
    contradictions._LOGGER.warning_once.cache_clear()
    yield lambda: [record.getMessage() for record in caplog.records if "contradicts itself" in record.getMessage()]
    logger.propagate = before


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({**DEEPSPEC, "dspark_block_size": 4}, "`dspark_block_size` is 4, `block_size` is "),
        (
            specforge_fields(mask_token_id=9),
            "`dflash_config.mask_token_id` is 4, `mask_token_id` is 9, and the first of them is taken",
        ),
        ({**DEEPSPEC, "markov_rank": 99}, "`markov_rank` is 99, and its tensors are those of 6, which is taken"),
        ({**DEEPSPEC, "vocab_size": 64}, "`vocab_size` is 64, and its tensors are those of "),
        ({**DEEPSPEC, "enable_confidence_head": False}, "`enable_confidence_head` is False"),
        (
            speculators_fields(base_model_name_or_path="else/another"),
            "names the target 'else/another', `speculators_config.verifier.name_or_path` names the target 'someone",
        ),
    ],
    ids=["two places", "two sections", "rank", "vocabulary", "heads", "names"],
)
def test_what_a_file_says_twice_is_mentioned_once(
    tmp_path: Path, said: Callable[[], list[str]], fields: dict[str, Any], expected: str
) -> None:
    """A drafter is read otherwise than its maker meant, and nobody hears of it."""
    folder = write(tmp_path, fields, WEIGHTS)
    for _ in range(2):
        DSparkConfig.from_pretrained(folder)
    assert len(said()) == 1, said()
    assert expected in said()[0]


@pytest.mark.parametrize(
    "fields",
    [
        DEEPSPEC,
        specforge_fields(),
        speculators_fields(),
        speculators_fields(base_model_name_or_path="/models/a-target"),
    ],
    ids=["deepspec", "specforge", "speculators", "a folder of the target"],
)
def test_a_file_that_is_of_one_mind_is_not_mentioned(
    tmp_path: Path, said: Callable[[], list[str]], fields: dict[str, Any]
) -> None:
    """Users are warned of files that are right."""
    DSparkConfig.from_pretrained(write(tmp_path, fields, WEIGHTS))
    assert said() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_layer_ids": [1]}, "read 1 layers of "),
        ({"mask_token_id": 10**6}, "`mask_token_id` must lie in"),
        ({"sts_temperatures": [1.0]}, "`sts_temperatures` must be "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_both_be_true_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """A drafter is built of a file that cannot be right."""
    with pytest.raises(ValueError, match=message):
        DSparkConfig.from_pretrained(write(tmp_path, {**DEEPSPEC, **changes}, without_vocabulary(WEIGHTS)))
