"""The run-time knobs of speculation: which of those who may set them has the word, and what they may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from dspark_hf.generation.call.rotary import has_switch
from dspark_hf.generation.compat import KNOBS, explicit_knob, is_set
from dspark_hf.generation.drafting.interface import DraftContext, Drafter
from dspark_hf.generation.drafting.lookup import NoContext
from dspark_hf.generation.scheduling.choosing import choose_scheduler
from dspark_hf.generation.scheduling.interface import Scheduler
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.interface import RowwiseCache

# a threshold is the scheduler of that name: who sets one of them has decided on both
_SCHEDULING = ("scheduler", "assistant_confidence_threshold")
# how sampled drafts are accepted: as many as can be, or so that the text does not depend on them
SAMPLING_RULES = ("block", "invariant")
# what `draft_tree` may be beside a number of drafts; with the anchor, that makes a pass of 64 tokens at most
TREE_RULES = ("auto", "off")
MOST_BRANCHING = 63


@dataclass(frozen=True)
class SpeculationOptions:
    """How a call speculates.

    `num_drafts`: the drafter's drafts per round at most, 0 if it is not asked; `num_looked_up`: drafts that a row may
    look up instead, 0 if none; `scheduler`: how many are made, and how many of them verified; `drafts`: who makes
    them; `sampling`: the rule by which they are accepted when tokens are sampled; `num_branching`: drafts of a tree
    that the drafter makes instead of a chain, 0 for chains alone, None for as many as the schedule says.
    """

    num_drafts: int
    num_looked_up: int
    scheduler: Scheduler
    drafts: str
    sampling: str = SAMPLING_RULES[0]
    num_branching: int | None = 0

    @property
    def is_invariant(self) -> bool:
        """Whether sampled text depends on neither drafter nor schedule."""
        return self.sampling == "invariant"

    @property
    def most_drafts(self) -> int:
        """Drafts of a row and round at most, whoever makes them."""
        return max(self.num_drafts, self.num_looked_up)

    def target_layer_ids(self, drafter: Drafter) -> list[int]:
        """Return the layers whose outputs are read."""
        return drafter.target_layer_ids if self.num_drafts else []

    def start_context(self, drafter: Drafter, adapter: TargetAdapter, batch_size: int) -> DraftContext:
        """Return an empty context for `batch_size` sequences."""
        return drafter.start(adapter, batch_size) if self.num_drafts else NoContext()


def choose_knobs(
    call: Mapping[str, Any], given: GenerationConfig | None, models_own: GenerationConfig | None
) -> dict[str, Any]:
    """Return the knobs that were set: by the call, else the configuration given with it, else the target's own."""
    levels = [{name: call[name] for name in KNOBS if call.get(name) is not None}]
    levels += [_knobs_of(config) for config in (given, models_own) if config is not None]
    groups = (_SCHEDULING, ("num_assistant_tokens",), ("drafts",), ("sampling",), ("draft_tree",))
    return {name: value for group in groups for name, value in _first(levels, group).items()}


def _knobs_of(config: GenerationConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in KNOBS if is_set(config, name)}


def _first(levels: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any]:
    """Return what the first level says of `names` that says anything."""
    found = [{name: level[name] for name in names if name in level} for level in levels]
    return next((one for one in found if one), {})


def read_options(
    generation_config: GenerationConfig,
    drafter: Drafter,
    model: PreTrainedModel,
    scheduler: Scheduler | str | None,
    drafts: str | None = None,
    cache: Any = None,
    sampling: str | None = None,
    draft_tree: int | str | None = None,
    *,
    is_stream: bool = False,
) -> SpeculationOptions:
    """Return the run-time knobs of a call, else those that the drafter comes with.

    `scheduler`, `drafts`, `sampling` and `draft_tree` are what `custom_generate` was called with. Lookups are no
    longer than the `cache` can take back, if it is given. With `is_stream`, requests that come and go share passes.

    Raises:
        ValueError: if more drafts are asked for than the drafter was trained to propose, or of a source that there is
            not, or the threshold is no probability, or the scheduler does not exist or contradicts the threshold, or a
            name is misspelt.
        TypeError: if a knob is of another kind.
    """
    _check_spelling(generation_config)
    of_call = {name: explicit_knob(generation_config, name) for name in KNOBS}
    of_call |= {"scheduler": scheduler} if scheduler is not None else {}
    of_call |= {"drafts": drafts} if drafts is not None else {}
    of_call |= {"sampling": sampling} if sampling is not None else {}
    of_call |= {"draft_tree": draft_tree} if draft_tree is not None else {}
    of_call = {name: value for name, value in of_call.items() if value is not None}
    recommended = {} if drafter.generation_config is None else _knobs_of(drafter.generation_config)
    own = {} if drafter.scheduler is None else {"scheduler": drafter.scheduler}
    levels = [of_call, own, recommended]
    scheduling = _first(levels, _SCHEDULING)
    num_drafts = _first(levels, ("num_assistant_tokens",)).get("num_assistant_tokens")
    most = drafter.block_size or drafter.longest_lookup
    # of plain decoding there is nothing to say
    if num_drafts is not None and most:
        _check_number_of_drafts(num_drafts, most)
    threshold = scheduling.get("assistant_confidence_threshold")
    if threshold is not None:
        _check_threshold(threshold)
    is_tensor_parallel = (getattr(model, "tp_size", None) or 1) > 1
    source = _first(levels, ("drafts",)).get("drafts", drafter.drafts)
    _check_source(source, drafter)
    rule = _first(levels, ("sampling",)).get("sampling", SAMPLING_RULES[0])
    _check_rule(rule)
    # who says how many drafts a round has at most does not expect the two dozen of a tree
    tree = _first(levels, ("draft_tree",)).get("draft_tree", "auto" if num_drafts is None else "off")
    _check_tree(tree)
    chosen = choose_scheduler(
        scheduling.get("scheduler"),
        threshold,
        is_tensor_parallel=is_tensor_parallel,
        # requests that come and go follow the clock anyway
        must_repeat=bool(generation_config.do_sample) and rule == SAMPLING_RULES[0] and not is_stream,
    )
    longest_lookup = min(num_drafts or drafter.longest_lookup, _longest_lookup(drafter, model, cache))
    return SpeculationOptions(
        0 if source == "lookup" else num_drafts or drafter.block_size,
        0 if source == "model" else longest_lookup,
        chosen,
        source,
        rule,
        # requests that come and go share a pass, and how far drafts reach past a switch was checked for chains
        0 if is_stream or has_switch(model.config.get_text_config(decoder=True)) else _num_branching(tree),
    )


def _num_branching(tree: int | str) -> int | None:
    return tree if isinstance(tree, int) else 0 if tree == "off" else None


def _check_tree(tree: Any) -> None:
    is_number = isinstance(tree, int) and not isinstance(tree, bool)
    if tree not in TREE_RULES and not (is_number and 2 <= tree <= MOST_BRANCHING):
        raise ValueError(
            f"`draft_tree` must be one of {', '.join(TREE_RULES)}, or a number of drafts in [2, {MOST_BRANCHING}], "
            f"got {tree!r}. Correct it, or leave it out."
        )


def _check_source(source: Any, drafter: Drafter) -> None:
    if source not in drafter.sources:
        raise ValueError(
            f"`drafts` must be one of {', '.join(drafter.sources)} for {type(drafter).__name__}, got {source!r}. "
            "Correct it, or leave it out."
        )


def _check_rule(rule: Any) -> None:
    if rule not in SAMPLING_RULES:
        raise ValueError(
            f"`sampling` must be one of {', '.join(SAMPLING_RULES)}, got {rule!r}. Correct it, or leave it out."
        )


def _longest_lookup(drafter: Drafter, model: PreTrainedModel, cache: Any) -> int:
    """Return how many drafts may be looked up where no more of the drafter's could be served."""
    longest = drafter.longest_lookup
    if has_switch(model.config.get_text_config(decoder=True)):
        # how far drafts may reach was checked for the drafter's
        longest = min(longest, drafter.block_size)
    rollback = cache.max_rollback if isinstance(cache, RowwiseCache) else None
    return longest if rollback is None else min(longest, max(rollback - 1, 0))


def _check_number_of_drafts(num_drafts: Any, block_size: int) -> None:
    if isinstance(num_drafts, bool) or not isinstance(num_drafts, int):
        raise TypeError(
            f"`num_assistant_tokens` must be a whole number in [1, {block_size}], got {num_drafts!r}. Pass an int."
        )
    if not 1 <= num_drafts <= block_size:
        raise ValueError(
            f"`num_assistant_tokens` must lie in [1, {block_size}] for this drafter (its block_size), got "
            f"{num_drafts}. Slots beyond the trained block are noise: lower it, or leave it out."
        )


def _check_threshold(threshold: Any) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise TypeError(
            f"`assistant_confidence_threshold` must be a number in [0, 1], got {threshold!r}. Pass a float."
        )
    if not 0 <= threshold <= 1:
        raise ValueError(
            f"`assistant_confidence_threshold` must lie in [0, 1], got {threshold}. It is compared with a probability."
        )


def _check_spelling(generation_config: GenerationConfig) -> None:
    """Raise a `ValueError` for a name that Transformers does not know and that looks like a knob's."""
    known = vars(GenerationConfig())
    for name in vars(generation_config):
        # a configuration takes any name, so a typo in it would be kept, saved and ignored
        meant = [] if name in known or name.startswith("_") else get_close_matches(name, KNOBS, 1, 0.75)
        if meant and name not in KNOBS:
            raise ValueError(
                f"`generation_config` must spell its knobs rightly, got {name!r}. Did you mean {meant[0]!r}?"
            )
