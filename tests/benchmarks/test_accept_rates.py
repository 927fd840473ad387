"""Rates of acceptance along given texts are those that decoding finds."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from benchmarks import accept_rates
from benchmarks.accept_rates import _described, blocks_behind, main, num_right, rates_of, read_texts
from benchmarks.loading import Packaged
from benchmarks.recordings import record
from benchmarks.simulation import random_target
from dspark_hf import DSparkAssistantModel
from dspark_hf.calibration.observations import Observations
from tests.tiny import tiny_target
from tests.training.tiny_tokenizer import tiny_tokenizer


def test_blocks_behind_a_text_are_those_that_decoding_drafts():
    """One pass over a whole text drafts otherwise than decoding does round by round."""
    torch.manual_seed(0)
    target: Any = random_target("tiny", torch.float32, "cpu")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=4)
    prompt = torch.arange(5, 17)
    (text,) = record(target, drafter, [prompt], 12)
    blocks, _ = blocks_behind(target, drafter, text.prompt, text.token_ids[:12])
    assert [tuple(block) for block in blocks.tolist()] == [block.token_ids for block in text.blocks]


def test_confidence_behind_a_text_is_that_of_decoding():
    """Confidence is read as if every draft stood behind the anchor, not behind the draft before it."""
    torch.manual_seed(0)
    target: Any = random_target("tiny", torch.float32, "cpu")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=4)
    # fresh heads believe the same of every draft
    torch.nn.init.normal_(drafter.confidence_head.proj.weight)
    prompt = torch.arange(5, 17)[None]
    options = {"scheduler": "fixed", "drafts": "model", "max_new_tokens": 12, "do_sample": False}
    out = target.generate(prompt, assistant_model=drafter, return_dict_in_generate=True, **options)
    text = out.sequences[0, prompt.shape[1] :].tolist()
    _, logits = blocks_behind(target, drafter, prompt[0].tolist(), text)
    assert logits is not None
    place, compared = 0, 0
    for one in out.statistics.rounds:
        if one.confidence is not None:
            told = one.confidence[0]
            torch.testing.assert_close(logits[place, : len(told)].sigmoid(), told)
            compared += 1
        place += one.num_accepted[0] + 1
    assert compared > 2 and len(logits.unique()) > 8


def test_rates_count_drafts_behind_right_ones_alone():
    """A rate counts drafts behind a wrong one, or a block that the text ends in as all right."""
    assert [num_right(block, [1, 2, 3]) for block in ([1, 2, 3, 4], [1, 9, 3], [9, 2])] == [3, 1, 0]
    assert rates_of([0, 1, 1, 2], 2) == [0.75, 0.333]


def test_a_fine_tune_takes_the_packaged_targets_place(tmp_path, monkeypatch, capsys):
    """Rates behind a fine-tune's text are those of the model that it was made from."""
    tuned, tokenizer, answers = tiny_target(seed=2), tiny_tokenizer(), tmp_path / "answers.jsonl"
    tuned.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    drafter = DSparkAssistantModel.from_target(tuned, num_hidden_layers=1, markov_rank=8, block_size=4)
    line = {"prompt": "w9 w10", "completion_ids": [*range(7, 47)], "sampling": "greedy"}
    answers.write_text(json.dumps(line), encoding="utf-8")
    packaged = Packaged("A target", tiny_target(seed=1), None, drafter)
    monkeypatch.setattr(accept_rates, "load_packaged", lambda name, dtype: packaged)
    figure = tmp_path / "reliability.png"
    main([answers], dtype="fp32", target=str(tmp_path / "tuned"), figure=figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    ((prompt, text),) = read_texts(answers, tokenizer, 4)
    blocks, _ = blocks_behind(tuned, drafter, prompt, text)
    right = [num_right(block, text[place + 1 :]) for place, block in enumerate(blocks.tolist()[:-4])]
    first, of_the_file, of_all = capsys.readouterr().out.splitlines()
    assert first == str(rates_of(right, 4))
    assert of_the_file.removeprefix("answers.jsonl") == of_all.removeprefix("all")
    assert f"{len(right)} blocks, {1 + sum(right) / len(right):.3f} tokens each" in of_all


def test_how_far_the_confidence_is_off_is_told():
    """A belief of a half in drafts of which all are right is off by a half, and without beliefs nothing is said."""
    half, right = torch.zeros(8, 1, dtype=torch.float64), torch.ones(8, dtype=torch.long)
    told = _described(Observations(half, right, right, right))
    assert "8 blocks, 2.000 tokens each" in told
    assert "ECE of the survival 0.500 (0.500); of first drafts 0.500 are believed to be accepted, 1.000 are" in told
    assert "ECE" not in _described(Observations(half * math.nan, right, right, right))
