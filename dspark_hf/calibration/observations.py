"""What a drafter believed of its drafts and what came of them, block by block.

N blocks, K block_size, b rows of a round, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dspark_hf.console import Steps
from dspark_hf.generation.statistics import SpeculationStatistics
from dspark_hf.generation.targets.adapter import TargetAdapter, input_device
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel
from dspark_hf.prompts import pad_left

# fp32 rounds the sigmoid of a logit beyond 17 to 1, and the logit is lost; divided by 16 it survives up to 250
_TEMPERATURE_OF_RUN = 16.0
# answers after which the number of blocks in all of them can be told well enough
_TELLING_PROMPTS = 8


@dataclass(frozen=True)
class Observations:
    """Blocks whose drafts were verified.

    Args:
        confidence_logits: `(N, K)`, fp64, at temperature 1; NaN in slots that were not observed.
        num_accepted: accepted drafts of every block `(N,)`.
        num_observed: slots of every block `(N,)` whose fate is known: those that were verified, up to an accepted end
            of the text.
        prompt_ids: the prompt `(N,)` every block belongs to.
    """

    confidence_logits: Tensor
    num_accepted: Tensor
    num_observed: Tensor
    prompt_ids: Tensor

    def __len__(self) -> int:
        return len(self.confidence_logits)

    @property
    def block_size(self) -> int:
        """Number of slots of a block."""
        return self.confidence_logits.shape[1]

    @property
    def num_prompts(self) -> int:
        """Number of different prompts."""
        return len(self.prompt_ids.unique())

    def is_observed(self, position: int) -> Tensor:
        """Return for every block `(N,)` whether it is known if all drafts up to slot `position` are accepted."""
        return self.num_observed > position

    def is_reached(self, position: int) -> Tensor:
        """Return for every block `(N,)` whether slot `position` was observed and all drafts before it accepted."""
        return self.is_observed(position) & (self.num_accepted >= position)

    def select(self, mask: Tensor) -> Observations:
        """Return the blocks where `mask` `(N,)` holds."""
        return Observations(
            self.confidence_logits[mask], self.num_accepted[mask], self.num_observed[mask], self.prompt_ids[mask]
        )

    def split_by_prompt(self) -> tuple[Observations, Observations]:
        """Return the blocks of every other prompt, from the first on, and the blocks of the prompts between them."""
        is_odd = self.prompt_ids.unique(return_inverse=True)[1] % 2 == 1
        return self.select(~is_odd), self.select(is_odd)


def join_observations(parts: Sequence[Observations]) -> Observations:
    """Return the blocks of all `parts`, at least one, in order."""
    names = ("confidence_logits", "num_accepted", "num_observed", "prompt_ids")
    return Observations(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def read_observations(
    statistics: SpeculationStatistics,
    block_size: int,
    temperatures: Sequence[float] | None = None,
    prompt_ids: Sequence[int] | None = None,
) -> Observations:
    """Return the blocks of one call of `generate`.

    Args:
        statistics: what the call measured.
        block_size: the drafter's block size.
        temperatures: the drafter's `sts_temperatures` during the call; they are undone.
        prompt_ids: the prompt of every row of the batch; default the row's number.
    """
    # rounds count what was accepted even where the text had ended; what was kept tells where that was
    num_left = [len(origins) - 1 for origins in statistics.origins]
    logits, counts = [torch.empty(0, block_size, dtype=torch.float64)], []
    for one in statistics.rounds:
        kept = []
        for row, num_verified, num_accepted in zip(one.rows, one.num_verified, one.num_accepted, strict=True):
            num_kept = min(num_accepted + 1, num_left[row])
            num_left[row] -= num_kept
            has_ended = num_kept <= num_accepted
            num_observed = num_kept if has_ended else num_verified
            kept.append((min(num_accepted, num_kept), num_observed, row if prompt_ids is None else prompt_ids[row]))
        if one.confidence is not None:
            logits.append(_confidence_logits(one.confidence, block_size, temperatures))
            counts.extend(kept)
    confidence_logits = torch.cat(logits)
    accepted, observed, ids = torch.tensor(counts, dtype=torch.long).view(-1, 3).unbind(1)
    confidence_logits[torch.arange(block_size) >= observed[:, None]] = float("nan")
    return Observations(confidence_logits, accepted, observed, ids).select(observed > 0)


def _confidence_logits(confidence: Tensor, block_size: int, temperatures: Sequence[float] | None) -> Tensor:
    """Return logits `(b, K)`, fp64, at temperature 1 of confidences `(b, K')`; NaN in the slots that are missing."""
    limit = torch.finfo(torch.float32).eps / 2
    logits = torch.logit(confidence.cpu().double(), eps=limit)
    if temperatures is not None:
        logits = logits * torch.tensor(temperatures, dtype=torch.float64)[: logits.shape[1]]
    missing = logits.new_full((len(logits), block_size - logits.shape[1]), float("nan"))
    return torch.cat([logits, missing], dim=1)


def check_pair(target: PreTrainedModel, drafter: DSparkAssistantModel) -> None:
    """Raise a `ValueError` unless `drafter` was made for `target` and has a confidence head."""
    check_confidence_head(drafter.config.enable_confidence_head)
    drafter.check_target(TargetAdapter(target, drafter.target_layer_ids))


def check_confidence_head(has_confidence_head: bool) -> None:
    """Raise a `ValueError` unless there is a confidence head."""
    if not has_confidence_head:
        raise ValueError(
            "`drafter` must have a confidence head, got one with `enable_confidence_head=False`. There is nothing to "
            "calibrate: train a drafter with the head, or cap its drafts with `num_assistant_tokens`."
        )


@torch.no_grad()
def collect_observations(
    target: PreTrainedModel,
    drafter: DSparkAssistantModel,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    batch_size: int = 1,
    min_reached: int = 0,
    has_progress_bar: bool = True,
) -> Observations:
    """Let `target` answer prompts, verify every draft, and return all blocks.

    The drafter's temperatures are out of force meanwhile, and as before afterwards. Ctrl-C ends the run early: the
    blocks of the prompts that are complete are returned, unless there are none.

    Args:
        target: the model that answers.
        drafter: the drafter to observe.
        prompts: token ids `(T,)` of every prompt; not those that the drafter was trained on.
        max_new_tokens: length of an answer.
        temperature: 0 for greedy answers, above 0 for sampling at that temperature; default what the target's
            generation configuration says. Observe what will be used: sampling accepts more drafts than greedy. Top-k,
            top-p and the like stay as in the target's generation configuration.
        batch_size: prompts answered at once.
        min_reached: blocks that a fit on every other prompt needs. The run ends as soon as the answers so far show
            that it will not come near them.
        has_progress_bar: whether to show progress.

    Raises:
        ValueError: before any work if the drafter has no confidence head or belongs to another target, or a number
            breaks its rule; after the first batch if the confidence is no number; after some prompts if all of them
            will give far fewer blocks than `min_reached`; at the end if not a single draft was verified.
    """
    check_pair(target, drafter)
    options = _generate_options(temperature)
    for name, value, least in (
        ("prompts", len(prompts), 1),
        ("batch_size", batch_size, 1),
        # the prefill writes the first token, and a round needs room for one draft and the bonus token
        ("max_new_tokens", max_new_tokens, 3),
    ):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}. Raise it.")
    parts, num_done = [], 0
    with Steps("prompts", len(prompts), is_shown=has_progress_bar) as bar:
        try:
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                parts.append(_observe(target, drafter, batch, start, max_new_tokens=max_new_tokens, **options))
                num_done += len(batch)
                bar.advance(len(batch))
                _check_pace(sum(map(len, parts)), num_done, len(prompts), min_reached)
        except KeyboardInterrupt:
            if not parts:
                raise
            bar.say(f"Interrupted: going on with the first {num_done} of {len(prompts)} prompts.")
    observations = join_observations(parts)
    if len(observations) == 0:
        raise ValueError(
            f"`prompts` must lead to answers with drafts, got {num_done} prompts and not one verified draft. "
            "Raise `max_new_tokens`, or use prompts with longer answers."
        )
    return observations


def _check_pace(num_blocks: int, num_done: int, num_prompts: int, min_reached: int) -> None:
    """Raise a `ValueError` if all prompts will give less than half of the blocks that a fit on every other one needs.

    Args:
        num_blocks: blocks of the prompts so far.
        num_done: prompts so far; from a number on that says something of the others.
        num_prompts: all prompts.
        min_reached: blocks that the fit needs.
    """
    expected = num_blocks * num_prompts / num_done / 2
    if num_done < max(_TELLING_PROMPTS, num_prompts // 20) or 2 * expected >= min_reached:
        return
    wanted = f"about {math.ceil(num_prompts * min_reached / expected)}" if num_blocks else "other"
    raise ValueError(
        f"`prompts` must lead to at least {min_reached} blocks in every other answer (`min_reached`), got "
        f"{num_blocks} blocks in the first {num_done} answers, so about {expected:.0f} of all {num_prompts} prompts. "
        f"Give {wanted} prompts, raise `max_new_tokens`, or lower `min_reached` at the cost of noise."
    )


def _generate_options(temperature: float | None) -> dict[str, Any]:
    if temperature is None:
        return {}
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"`temperature` must be at least 0, got {temperature}. 0 means greedy.")
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def _observe(
    target: Any, drafter: DSparkAssistantModel, prompts: Sequence[Tensor], first_id: int, **options: Any
) -> Observations:
    """Return the blocks of one batch of prompts."""
    temperatures = [_TEMPERATURE_OF_RUN] * drafter.block_size
    drafter.last_statistics = None
    with temporary_temperatures(drafter, temperatures):
        target.generate(
            **pad_left(prompts, input_device(target)),
            assistant_model=drafter,
            num_assistant_tokens=drafter.block_size,
            scheduler="fixed",
            drafts="model",
            assistant_confidence_threshold=0.0,
            pad_token_id=_pad_token_id(target),
            **options,
        )
    # mypy still sees the None of above
    statistics: SpeculationStatistics | None = drafter.last_statistics
    if statistics is None:
        raise ValueError(
            "`dspark_hf` must be installed in Transformers to observe a drafter, got Transformers' own assisted "
            "decoding. Call `dspark_hf.install()`, and leave `DSPARK_HF_NO_INSTALL` unset."
        )
    found = read_observations(statistics, drafter.block_size, temperatures, range(first_id, first_id + len(prompts)))
    is_observed = torch.arange(found.block_size) < found.num_observed[:, None]
    if not found.confidence_logits[is_observed].isfinite().all():
        raise ValueError(
            "`drafter` must have a confidence in [0, 1], got NaN. Its weights are damaged: fetch or train it anew."
        )
    return found


@contextmanager
def temporary_temperatures(drafter: DSparkAssistantModel, temperatures: Sequence[float] | None) -> Iterator[None]:
    """Let the drafter's confidence have other temperatures inside the block."""
    previous = drafter.config.sts_temperatures
    drafter.config.sts_temperatures = None if temperatures is None else list(temperatures)
    try:
        yield
    finally:
        drafter.config.sts_temperatures = previous


def _pad_token_id(target: PreTrainedModel) -> int:
    """Return a padding token for finished rows: `generate` would warn about its own choice once a prompt."""
    config = target.generation_config
    eos = config.eos_token_id
    first_eos = eos[0] if isinstance(eos, list) else eos
    return next((token for token in (config.pad_token_id, first_eos) if token is not None), 0)
