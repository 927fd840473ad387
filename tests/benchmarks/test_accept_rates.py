"""Rates of acceptance along given texts are those that decoding finds."""

from __future__ import annotations

import json
from typing import Any

import torch

from benchmarks import accept_rates
from benchmarks.accept_rates import blocks_behind, main, num_right, rates_of, read_texts
from benchmarks.loading import Packaged
from benchmarks.recordings import record
from benchmarks.simulation import random_target
from dspark_hf import DSparkAssistantModel
from tests.tiny import tiny_target
from tests.training.tiny_tokenizer import tiny_tokenizer


def test_blocks_behind_a_text_are_those_that_decoding_drafts():
    """One pass over a whole text drafts otherwise than decoding does round by round."""
    torch.manual_seed(0)
    target: Any = random_target("tiny", torch.float32, "cpu")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=4)
    prompt = torch.arange(5, 17)
    (text,) = record(target, drafter, [prompt], 12)
    blocks = blocks_behind(target, drafter, text.prompt, text.token_ids[:12]).tolist()
    assert [tuple(block) for block in blocks] == [block.token_ids for block in text.blocks]


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
    main([answers], dtype="fp32", target=str(tmp_path / "tuned"))
    ((prompt, text),) = read_texts(answers, tokenizer, 4)
    blocks = blocks_behind(tuned, drafter, prompt, text).tolist()
    right = [num_right(block, text[place + 1 :]) for place, block in enumerate(blocks[:-4])]
    assert capsys.readouterr().out.splitlines()[0] == str(rates_of(right, 4))
