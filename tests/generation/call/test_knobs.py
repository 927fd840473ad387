"""Run-time knobs: who sets them, who has the last word, and what is refused."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.call.knobs import read_options
from tests.generation.prompts import ragged_prompts
from tests.tiny import tiny_target


@pytest.fixture
def target():
    return tiny_target()


@pytest.fixture
def drafter(target):
    return DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)


@pytest.fixture
def chosen(target, drafter, monkeypatch):
    """Return a function that calls `generate` and returns the scheduler's name, its threshold and the drafts."""

    def call(**options):
        seen = []

        def remember(*arguments):
            found = read_options(*arguments)
            seen.append((found.scheduler.name, getattr(found.scheduler, "threshold", None), found.num_drafts))
            return found

        monkeypatch.setattr("dspark_hf.generation.decoding.read_options", remember)
        options = {"generation_config": GenerationConfig(max_new_tokens=3, do_sample=False), **options}
        target.generate(**ragged_prompts(1), **{"assistant_model": drafter, **options})
        return seen[0]

    return call


def _config(**fields):
    return GenerationConfig(max_new_tokens=3, do_sample=False, **fields)


def test_every_door_leads_to_the_knobs(target, drafter, chosen):
    """A scheduler in a configuration is accepted, saved and ignored; or a weaker voice outshouts a stronger one."""
    assert chosen() == ("adaptive", None, 7)
    drafter.generation_config = GenerationConfig(scheduler="asynchronous", num_assistant_tokens=6)
    assert chosen() == ("asynchronous", None, 6)
    drafter.scheduler = "threshold"
    assert chosen() == ("threshold", 0.4, 6)
    target.generation_config.scheduler = "fixed"
    target.generation_config.num_assistant_tokens = 5
    assert chosen() == ("fixed", None, 5)
    # a threshold chooses a scheduler too
    assert chosen(generation_config=_config(assistant_confidence_threshold=0.3)) == ("threshold", 0.3, 5)
    given = _config(scheduler="adaptive", num_assistant_tokens=4)
    assert chosen(generation_config=given) == ("adaptive", None, 4)
    assert chosen(generation_config=given, scheduler="fixed") == ("fixed", None, 4)
    assert chosen(generation_config=given, scheduler="fixed", num_assistant_tokens=3) == ("fixed", None, 3)
    # the target's own configuration goes on serving plain calls
    target.generate(**ragged_prompts(1), max_new_tokens=3)


def test_knobs_in_files(target, drafter, chosen, tmp_path):
    """What is saved with a target or a drafter has no effect once it is loaded."""
    drafter.generation_config = GenerationConfig(scheduler="fixed", num_assistant_tokens=2)
    drafter.save_pretrained(tmp_path / "drafter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "drafter")
    assert chosen(assistant_model=loaded) == ("fixed", None, 2)
    _config(scheduler="hardware_aware").save_pretrained(tmp_path)
    given = GenerationConfig.from_pretrained(tmp_path)
    assert chosen(generation_config=given, assistant_model=loaded)[0] == "hardware_aware"
    # a drafter that recommends nothing takes no part
    drafter.generation_config = None
    drafter.save_pretrained(tmp_path / "plain")
    assert DSparkAssistantModel.from_pretrained(tmp_path / "plain").generation_config is None


@pytest.mark.parametrize("place", ["call", "given", "target", "drafter"])
def test_names_are_checked_wherever_they_stand(target, drafter, chosen, place):
    """A typo runs with the default."""
    options = {}
    if place == "call":
        options["scheduler"] = "hardware-aware"
    elif place == "given":
        options["generation_config"] = _config(scheduler="hardware-aware")
    else:
        owner = target.generation_config if place == "target" else drafter
        owner.scheduler = "hardware-aware"
    with pytest.raises(ValueError, match="got 'hardware-aware'. Did you mean 'hardware_aware'?"):
        chosen(**options)


def test_misspelt_knob(chosen):
    """A configuration takes any name, so that a typo in it is kept and ignored."""
    with pytest.raises(ValueError, match="got 'schedular'. Did you mean 'scheduler'?"):
        chosen(generation_config=_config(schedular="fixed"))
    chosen(generation_config=_config(my_own_note="fixed"))


@pytest.mark.parametrize("value", ["3", 2.0, True])
def test_number_of_another_kind(chosen, value):
    """A text or a fraction fails in a comparison, without the rule."""
    with pytest.raises(TypeError, match=r"`num_assistant_tokens` must be a whole number in \[1, 7\]"):
        chosen(num_assistant_tokens=value)


@pytest.mark.parametrize("value", ["0.5", True])
def test_threshold_of_another_kind(chosen, value):
    """A text fails in a comparison, without the rule."""
    with pytest.raises(TypeError, match=r"`assistant_confidence_threshold` must be a number in \[0, 1\]"):
        chosen(assistant_confidence_threshold=value)
