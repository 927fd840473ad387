"""One diagnosis from beginning to end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from dspark_hf.console import quiet_transformers
from dspark_hf.doctor.belonging import check_belonging
from dspark_hf.doctor.costs import advise, measure_here, summarise
from dspark_hf.doctor.drafting import Outcome, anchor_places, draft
from dspark_hf.doctor.prompting import QUESTIONS, encode, other_mode
from dspark_hf.doctor.readings import Reading, neighbours
from dspark_hf.doctor.recording import Recorded, record, write
from dspark_hf.doctor.results import Check, Costs, Diagnosis, Trial, Verdict
from dspark_hf.doctor.trials import Findings, expected_rate, mask_candidates, mean_gain, to_trial, try_readings
from dspark_hf.doctor.verdicts import judge, judge_checks
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.loading import load_tokenizer
from dspark_hf.modeling.from_target import check_servable
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel
from dspark_hf.prompts import Prompt

# prompts of the switched mode, and texts that are written again with the drafter
_NUM_OTHER_MODE, _NUM_COMPARED = 2, 1
# blocks of which the acceptance is known well enough
_NUM_BLOCKS = 128
# how much more text is looked at where so many blocks leave it open which reading is right: at least and at most, in
# so many seconds in all
_LONGER = (2, 3)
_SECONDS = 30.0
_CONTEXT = 128
_LEAST_ERRORS = 4.0


def diagnose(
    target: Any,
    drafter: DSparkAssistantModel,
    tokenizer: Any = None,
    *,
    prompts: Sequence[str | Prompt | Tensor] | None = None,
    max_new_tokens: int = 48,
    drafter_tokenizer: Any = None,
    measures_costs: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Diagnosis:
    """Return whether a drafter belongs to a target, how it has to be read, and what to set.

    The target answers a few prompts, greedily and without the drafter; every reading of the drafter then drafts at
    many places of these texts at once. Neither of the two is changed.

    Args:
        target: the model to accelerate.
        drafter: a drafter, read in any layout.
        tokenizer: the target's; None loads it by the target's name, unless all prompts are token ids.
        prompts: texts, each a user turn, or prompts, or token ids `(T,)`; default: four short questions.
        max_new_tokens: length of an answer; at least two blocks.
        drafter_tokenizer: the drafter's; None loads it from the drafter's folder, if there is one in it.
        measures_costs: whether to time passes and drafts here, which takes some seconds.
        say: told what is being done, for a display.

    Raises:
        TypeError: if `drafter` is not a `DSparkAssistantModel`, or `target` no model.
        ValueError: if there is no tokenizer for prompts that are text, or the answers are too short.

    Example:

        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from dspark_hf import DSparkAssistantModel
        >>> target = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, eos_token_id=None))
        >>> drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
        >>> diagnosis = diagnose(target, drafter, prompts=[torch.tensor([5, 6, 7])], measures_costs=False)
        >>> diagnosis.verdict.cause
        'untrained'
    """
    start = perf_counter()
    if not isinstance(drafter, DSparkAssistantModel):
        raise TypeError(
            f"`drafter` must be a DSparkAssistantModel, got {type(drafter).__name__}. Load it with "
            "`DSparkAssistantModel.from_pretrained`."
        )
    with quiet_transformers():
        found = _diagnose(
            target,
            drafter,
            tokenizer if tokenizer is not None else _find_tokenizer(target, prompts),
            list(QUESTIONS if prompts is None else prompts),
            max_new_tokens=max_new_tokens,
            drafter_tokenizer=drafter_tokenizer or _drafters_tokenizer(drafter),
            measures_costs=measures_costs,
            say=say,
        )
    return replace(found, seconds=perf_counter() - start)


def _find_tokenizer(target: Any, prompts: Sequence[Any] | None) -> Any:
    if prompts is not None and all(isinstance(prompt, Tensor) for prompt in prompts):
        return None
    name = getattr(getattr(target, "config", None), "name_or_path", None)
    if not name:
        raise ValueError(
            "`tokenizer` must be given for a target without a name, got None. Pass the target's, or prompts as "
            "token ids."
        )
    return load_tokenizer(name)


def _drafters_tokenizer(drafter: DSparkAssistantModel) -> Any:
    folder = Path(drafter.config.name_or_path or "")
    if not drafter.config.name_or_path or not (folder / "tokenizer.json").is_file():
        return None
    try:
        return load_tokenizer(str(folder))
    except ValueError:
        return None


def _diagnose(
    target: Any,
    drafter: DSparkAssistantModel,
    tokenizer: Any,
    prompts: list[Any],
    *,
    max_new_tokens: int,
    drafter_tokenizer: Any,
    measures_costs: bool,
    say: Callable[[str], None],
) -> Diagnosis:
    names = (_name(target), _name(drafter))
    try:
        adapter = TargetAdapter(check_servable(target))
    except ValueError as error:
        return Diagnosis(*names, verdict=Verdict("refused", str(error)), checks=())
    say("Comparing names, sizes and weights")
    checks = check_belonging(adapter, drafter, tokenizer, drafter_tokenizer)
    verdict = judge_checks(checks)
    if verdict is not None:
        return Diagnosis(*names, verdict=verdict, checks=tuple(checks))
    start = perf_counter()
    say("Letting the target write")
    mask_ids = mask_candidates(adapter, tokenizer)
    layer_ids = _layers_of_interest(drafter, adapter, mask_ids)
    encoded = encode(prompts, tokenizer)
    texts = record(target, encoded, layer_ids, max_new_tokens=max_new_tokens)
    _check_lengths(texts, drafter)
    say("Trying the drafter's readings")
    blocks_per_text = -(-_NUM_BLOCKS // len(texts))
    found = try_readings(drafter, texts, adapter, mask_ids, blocks_per_text=blocks_per_text)
    # a second look takes as much longer as there is more text
    spent = perf_counter() - start
    factor = min(int((_SECONDS - spent) / spent), _LONGER[1])
    if found.doubtful is not None and factor >= _LONGER[0]:
        say("Letting the target write more, since two readings are near each other")
        longer = min(factor * max_new_tokens, _room(adapter, encoded))
        more = record(target, encoded, layer_ids, max_new_tokens=max(longer, max_new_tokens))
        say("Trying the drafter's readings again")
        found = try_readings(drafter, more, adapter, mask_ids, blocks_per_text=factor * blocks_per_text)
    configured, expected = found.trials[0], expected_rate(found.configured)
    say("Trying text with and without thinking")
    thinking, preferred = _try_thinking(target, drafter, tokenizer, prompts, found, layer_ids, adapter, max_new_tokens)
    say("Writing with the drafter")
    is_identical = _is_identical(target, drafter, texts, max_new_tokens)
    costs: Costs | None = None
    advice: tuple[str, ...] = ()
    if measures_costs:
        say("Timing passes and drafts")
        costs, advice = _costs(target, drafter, found.configured)
    verdict = judge(
        checks,
        configured,
        found.best_trial,
        expected,
        doubtful=found.doubtful,
        prefers_thinking=preferred,
        is_identical=is_identical,
        is_fp32=target.dtype == torch.float32,
    )
    if verdict.cause not in ("fits", "revision", "quantised", "weak"):
        # what is to be mended first has another acceptance
        advice = ()
    return Diagnosis(
        *names,
        verdict=verdict,
        checks=(*checks, _check_text(is_identical, target.dtype)),
        trials=tuple(found.trials),
        thinking=thinking,
        expected_rate=expected,
        is_identical=is_identical,
        costs=costs,
        advice=advice,
    )


def _room(target: TargetAdapter, prompts: Sequence[Tensor]) -> int:
    """Return how many tokens the target's positions leave behind the longest prompt."""
    positions = getattr(target.config, "max_position_embeddings", None) or sys.maxsize
    return positions - max(len(prompt) for prompt in prompts)


def _name(model: Any) -> str:
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    return name or type(model).__name__


def _layers_of_interest(drafter: DSparkAssistantModel, target: TargetAdapter, mask_ids: Sequence[int]) -> list[int]:
    configured = Reading.configured(drafter.config)
    readings = [configured, *neighbours(configured, drafter.config, target.num_layers, mask_ids)]
    return sorted({layer_id for reading in readings for layer_id in reading.layer_ids(drafter.config)})


def _check_lengths(texts: Sequence[Recorded], drafter: DSparkAssistantModel) -> None:
    slots = drafter.config.num_slots
    if not any(len(anchor_places(text, slots, 2)) > 1 for text in texts):
        lengths = [len(text.answer) for text in texts]
        raise ValueError(
            f"`prompts` must lead to answers of more than {slots + 1} tokens, got {lengths}. Ask for longer ones, or "
            "raise `max_new_tokens`."
        )


def _try_thinking(
    target: Any,
    drafter: DSparkAssistantModel,
    tokenizer: Any,
    prompts: Sequence[Any],
    found: Findings,
    layer_ids: Sequence[int],
    adapter: TargetAdapter,
    max_new_tokens: int,
) -> tuple[tuple[Trial, ...], str | None]:
    """Return the trials with the chat template's switch at its default and the other way, and how to ask if better."""
    mode = other_mode(prompts, tokenizer)
    if mode is None:
        return (), None
    name, value = mode
    texts = record(
        target,
        encode(prompts[:_NUM_OTHER_MODE], tokenizer, **{name: value}),
        layer_ids,
        max_new_tokens=max_new_tokens,
    )
    reading = Reading.configured(drafter.config)
    outcome = draft(drafter, reading, texts, adapter, blocks_per_text=_NUM_BLOCKS // _NUM_OTHER_MODE)
    outcomes = ((f"{name}={not value}", found.configured), (f"{name}={value}", outcome))
    trials = tuple(to_trial(label, reading, drafter.config, one) for label, one in outcomes)
    gain, error = mean_gain(outcome, found.configured)
    usual = trials[0].tau - 1
    is_preferred = gain > max(0.25, _LEAST_ERRORS * error) and gain > usual
    return trials, f"{name}={value}" if is_preferred else None


def _is_identical(target: Any, drafter: DSparkAssistantModel, texts: Sequence[Recorded], max_new_tokens: int) -> bool:
    return all(
        torch.equal(
            write(
                target,
                text.token_ids[: text.start],
                max_new_tokens,
                assistant_model=drafter,
                scheduler="fixed",
                drafts="model",
            ),
            text.token_ids,
        )
        for text in texts[:_NUM_COMPARED]
    )


def _check_text(is_identical: bool, dtype: torch.dtype) -> Check:
    found = "the same with and without the drafter"
    if not is_identical:
        found = "differs with the drafter"
        if dtype != torch.float32:
            # passes of several tokens round otherwise, which decides near ties
            return Check("greedy text", None, f"{found}, as {str(dtype).removeprefix('torch.')} may")
    return Check("greedy text", is_identical, found)


def _costs(target: Any, drafter: DSparkAssistantModel, outcome: Outcome) -> tuple[Costs, tuple[str, ...]]:
    adapter = TargetAdapter(target, drafter.target_layer_ids)
    longest = getattr(adapter.config, "max_position_embeddings", None) or 2 * _CONTEXT
    context_length = min(_CONTEXT, max(1, longest - drafter.block_size - 1))
    table = measure_here(adapter, drafter, context_length)
    costs = summarise(table, context_length, outcome)
    return costs, advise(costs, table, outcome)
