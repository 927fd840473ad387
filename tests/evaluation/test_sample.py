"""The answer that the page shows."""

from __future__ import annotations

from dataclasses import replace

import torch

from dspark_hf import LookupAssistant
from dspark_hf.evaluation.loading import Models
from dspark_hf.evaluation.records import Answer, RoundRecord, round_records
from dspark_hf.evaluation.report import render_report
from dspark_hf.evaluation.run import evaluate
from dspark_hf.evaluation.sample import TextRun, sample_answer, token_origins
from dspark_hf.evaluation.settings import EvaluationSettings
from tests.evaluation.examples import tiny_models, tiny_sets
from tests.tiny import tiny_target
from tests.training.tiny_tokenizer import tiny_tokenizer


def test_the_drafted_tokens_are_those_of_the_run():
    """The page colours words that the target wrote itself, or leaves out drafts that it accepted."""
    target, assistant = tiny_target(), LookupAssistant()
    with torch.no_grad():
        # writes one token for ever, which stood before
        target.get_output_embeddings().weight.zero_()
    prompt = torch.tensor([[5, 0, 0, 0, 0]])
    for count in (1, 2, 23, 24):
        output = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            assistant_model=assistant,
            scheduler="fixed",
        )
        statistics = assistant.last_statistics
        answer = Answer((tuple(output[0, prompt.shape[1] :].tolist()),), 1.0, round_records(statistics))
        assert token_origins(answer) == statistics.origins[0]
    assert sum(statistics.origins[0]) > 2


def test_runs_hold_the_whole_text():
    """A word is lost where drafts and the target's own words meet, or stands twice."""
    # one from the prefill, two drafts and a bonus, a draft that ends the text
    answer = Answer(((9, 10, 11, 12, 13),), 1.0, (RoundRecord(3, 3, 2, 3), RoundRecord(3, 3, 2, 1)))
    sample = sample_answer(answer, tiny_tokenizer(), "questions", 0.0)
    assert [one.is_draft for one in sample.runs] == [False, True, False, True]
    assert "".join(one.text for one in sample.runs).split() == ["w9", "w10", "w11", "w12", "w13"]
    assert (sample.num_tokens, sample.num_drafts) == (5, 3)


def test_the_page_shows_an_answer_and_what_to_set():
    """A reader sees numbers alone, or text of the model becomes part of the page."""
    models = tiny_models()
    models = Models(models.target, tiny_tokenizer(), models.drafters)
    evaluation = evaluate(models, tiny_sets(left=1), EvaluationSettings(max_new_tokens=6, repeats=1))
    assert evaluation.sample.num_tokens == 6
    runs = (TextRun("Own <b>", False), TextRun("<script>alert(1)</script>", True))
    page = render_report(replace(evaluation, sample=replace(evaluation.sample, runs=runs, num_drafts=4)), [])
    assert "Own &lt;b&gt;" in page
    assert '<span class="draft">&lt;script&gt;alert(1)&lt;/script&gt;</span>' in page
    assert "4 of 6 tokens" in page
    assert "Recommended here: " in page
    assert 'class="answer"' not in render_report(replace(evaluation, sample=None), [])
