"""The seam into Transformers: installed once, reversible, and out of the way of every other assistant."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin

from dspark_hf import DSparkAssistantModel, LookupAssistant, install, uninstall
from dspark_hf.generation import integration
from tests.generation.call.test_criteria import character_tokenizer
from tests.generation.call.test_outputs import Recorder
from tests.generation.prompts import ragged_prompts
from tests.tiny import tiny_target


@pytest.fixture
def restored():
    yield
    install()


def test_install_is_idempotent_and_reversible(restored):
    """Importing twice wraps twice, or Transformers cannot be had back as it was."""
    uninstall()
    original = GenerationMixin._assisted_decoding
    assert not integration.is_installed()
    install()
    wrapped = GenerationMixin._assisted_decoding
    install()
    assert GenerationMixin._assisted_decoding is wrapped
    assert wrapped.__wrapped__ is original
    uninstall()
    assert GenerationMixin._assisted_decoding is original
    names = ("_extract_generation_mode_kwargs", "generate_batch", "_prepare_generation_config")
    assert not any(hasattr(getattr(GenerationMixin, name), "is_dspark") for name in names)


def test_uninstalled_door_still_works(restored):
    """The documented hook depends on the patch."""
    target = tiny_target("llama")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    inputs = ragged_prompts(3)
    plain = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    uninstall()
    assert torch.equal(
        target.generate(**inputs, max_new_tokens=12, do_sample=False, custom_generate=drafter.decode), plain
    )


@pytest.mark.parametrize("kind", ["drafter", "with a recommendation", "lookups"])
def test_uninstalled_assistants_say_so(restored, kind):
    """Without the seam a drafter fails inside Transformers' own loop, and nothing says what is missing."""
    target = tiny_target("llama")
    assistant = LookupAssistant()
    if kind != "lookups":
        assistant = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
        assistant.generation_config = None if kind == "drafter" else GenerationConfig(num_assistant_tokens=2)
    uninstall()
    with pytest.raises((ValueError, AttributeError), match=r"Call `dspark_hf.install\(\)`"):
        target.generate(**ragged_prompts(1), max_new_tokens=4, do_sample=False, assistant_model=assistant)
    install()
    copied = copy.deepcopy(assistant)
    assert (copied.generation_config is None) == (kind != "with a recommendation")
    assert (
        target.generate(**ragged_prompts(1), max_new_tokens=4, do_sample=False, assistant_model=copied).shape[0] == 1
    )


def test_beams_are_refused_before_transformers_warns(capfd):
    """A call that is refused is preceded by a long warning that says that it goes on, with some flags ignored."""
    target = tiny_target("llama")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    with pytest.raises(ValueError, match=r"`num_beams` must be 1 when a drafter assists, got 2"):
        target.generate(**ragged_prompts(1), max_new_tokens=4, num_beams=2, assistant_model=drafter)
    assert "triggers assisted generate" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("num_rows", [1, 3])
def test_door_feeds_streamer_and_stop_strings(num_rows):
    """`custom_generate=drafter.decode` streams the prompt alone and never ends, or knows no tokenizer."""
    target, tokenizer, inputs = tiny_target("llama"), character_tokenizer(), ragged_prompts(num_rows)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "tokenizer": tokenizer}
    text = target.generate(**inputs, **options)[0, -4]
    options["stop_strings"] = [tokenizer.convert_ids_to_tokens(int(text))]
    plain, ours = Recorder(), Recorder()
    expected = target.generate(**inputs, **options, streamer=plain)
    assert torch.equal(target.generate(**inputs, **options, streamer=ours, custom_generate=drafter.decode), expected)
    assert ours.ended
    assert len(ours.values) == len(plain.values)
    assert all(torch.equal(one, other) for one, other in zip(ours.values, plain.values, strict=True))


def test_other_assistants_go_to_the_original():
    """An ordinary assistant model no longer works after importing us."""
    target, assistant = tiny_target("llama"), tiny_target("llama", num_hidden_layers=1)
    inputs = ragged_prompts(1)
    plain = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(target.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=assistant), plain)
    assert torch.equal(
        target.generate(**inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3), plain
    )


def test_changed_seam_is_reported(restored, monkeypatch):
    """A Transformers that renamed the seam fails somewhere inside instead of here."""
    uninstall()

    def stranger(self, ids):
        return ids

    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", stranger)
    with pytest.raises(RuntimeError, match=r"`transformers` must be a version that dspark_hf knows"):
        install()


def test_environment_variable_prevents_installation(fresh):
    """There is no way to import us without the patch, or an empty variable prevents it, too."""
    code = (
        "import os, dspark_hf; from dspark_hf.generation.integration import install_unless_refused, is_installed\n"
        "before = is_installed(); os.environ['DSPARK_HF_NO_INSTALL'] = ''; install_unless_refused()\n"
        "raise SystemExit(2 * before + is_installed())"
    )
    result = fresh.run(code, environment={"DSPARK_HF_NO_INSTALL": "1"})
    assert result.returncode == 1 and not result.stderr, result.stderr


def test_user_values_of_the_knobs_are_told_from_defaults():
    """A value the user set is taken for Transformers' default, or the other way round."""
    target = tiny_target("llama")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    drafter.scheduler = "fixed"
    inputs = ragged_prompts(1)
    # the default of Transformers, 20, is no wish of the user's
    target.generate(**inputs, max_new_tokens=9, do_sample=False, assistant_model=drafter)
    assert len(drafter.last_statistics.verified_by_position) == 7
    target.generate(**inputs, max_new_tokens=9, do_sample=False, assistant_model=drafter, num_assistant_tokens=3)
    assert len(drafter.last_statistics.verified_by_position) == 3
    target.generation_config.num_assistant_tokens = 2
    try:
        target.generate(**inputs, max_new_tokens=9, do_sample=False, assistant_model=drafter)
    finally:
        target.generation_config.num_assistant_tokens = None
    assert len(drafter.last_statistics.verified_by_position) == 2
