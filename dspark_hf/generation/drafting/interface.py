"""What the decoding loop asks of a drafter.

B batch, K drafts, V vocab, D hidden, M tapped layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from dspark_hf.generation.fixed_size import FixedSize
from dspark_hf.generation.statistics import SpeculationStatistics

if TYPE_CHECKING:
    from dspark_hf.generation.targets.adapter import TargetAdapter


# (slot k, logits [B, V], drafted so far [B, k]) -> (token ids [B], probabilities [B, V] or None when greedy)
Sampler = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor | None]]


class CandidateSampler(ABC):
    """A `Sampler` that can also be shown those tokens alone that a draft can be, which are often few."""

    @property
    @abstractmethod
    def takes_candidates(self) -> bool:
        """Whether nothing that decides over drafts goes by their ids; else the whole vocabulary must be shown."""

    @abstractmethod
    def __call__(self, slot: int, logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draw the draft of a slot, as every `Sampler` does."""

    @abstractmethod
    def among(self, slot: int, logits: Tensor, drafted: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draw the draft of a slot from `candidates`, ids `(n,)` or `(B, n)`, whose `logits` are `(B, n)`.

        Returns the ids `(B,)` and their distributions `(B, n)` over the candidates, None when greedy.
        """


@dataclass
class DraftedBlock:
    """Drafts of one round.

    `token_ids` `(B, K)`; `probs` `(B, K, V)`, fp32, the distributions the tokens were really drawn from, or None when
    greedy, or if no draft was drawn at all: each is then the only one that could stand there; `confidence` `(B, K)`,
    fp32, the estimated chance that draft k is accepted given that its prefix is, or None without a confidence head;
    `margins` `(B, K)`, fp32, how far the best logit of each slot lies above the second, filled in by the decoding loop
    where a scheduler wants it. `confidence[:, k]` and `margins[:, k]` depend on the drafts before k only.

    `parents` `(1 + K,)` says which token of the anchor and its drafts each one continues, by index, -1 for the anchor;
    None is a chain, in which each continues the one before. Targets process trees, but `generate` accepts chains only:
    it refuses a block with parents.

    The decoding loop fills in the rest where rows look drafts up: `is_certain` `(B, K)`, which of them are not drawn
    from `probs`; `chances` `(B, K)`, fp32, the estimated chances of these, NaN for others; `num_modelled`, how many of
    the K drafts are the drafter's in rows that look nothing up, None for all. `probs` then hold those alone.
    """

    token_ids: Tensor
    probs: Tensor | None
    confidence: Tensor | None
    margins: Tensor | None = None
    parents: Tensor | None = None
    is_certain: Tensor | None = None
    chances: Tensor | None = None
    num_modelled: int | None = None

    @property
    def num_drafts(self) -> int:
        """Number K of drafts per row."""
        return self.token_ids.shape[1]

    @property
    def num_modelled_drafts(self) -> int:
        """Number of drafts that the drafter made for each row that looked nothing up."""
        return self.num_drafts if self.num_modelled is None else self.num_modelled


class DraftContext(ABC):
    """What a drafter remembers of the sequences being generated.

    Example, a context that guesses the same token for ever, whatever the target says:

        >>> import torch
        >>> class Guess(DraftContext):
        ...     def extend(self, hidden_states, positions, num_tokens):
        ...         pass
        ...     def draft(self, anchor_ids, positions, num_drafts, sampler):
        ...         return DraftedBlock(torch.full((len(anchor_ids), num_drafts), 7), probs=None, confidence=None)
        ...     def select_rows(self, rows):
        ...         pass
        >>> Guess().draft(torch.tensor([3, 4]), torch.tensor([9, 9]), num_drafts=2, sampler=None).token_ids.tolist()
        [[7, 7], [7, 7]]
    """

    @abstractmethod
    def extend(self, hidden_states: Tensor, positions: Tensor, num_tokens: Sequence[int]) -> None:
        """Append hidden states `(B, T, M * D)` of the target at `positions` `(B, T)`: `num_tokens[r]` of row r."""

    @abstractmethod
    def draft(self, anchor_ids: Tensor, positions: Tensor, num_drafts: int, sampler: Sampler) -> DraftedBlock:
        """Return `num_drafts` drafts after the anchors `(B)`, which stand at `positions` `(B)`."""

    @abstractmethod
    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` `(B')` of the batch, in that order."""

    def fix_size(self, size: FixedSize) -> None:  # noqa: B027 (nothing that grows with the text is compiled)
        """Keep all shapes from round to round, and compile what drafts: called once, before anything is read.

        By default nothing changes.
        """

    def append_rows(self, other: Any) -> None:
        """Append the rows of another context of the same drafter; only `generate_stream` asks for it."""
        raise NotImplementedError(
            "`drafter` must have contexts with `append_rows` for `generate_stream`, got "
            f"{type(self).__name__} without. Implement it, or use `target.generate`."
        )


class Drafter(ABC):
    """A model that proposes blocks of tokens from the target's hidden states.

    `scheduler` says how many drafts are made and verified: a name, a `Scheduler`, or None for the adaptive one;
    `drafts` says who makes them: `"model"`, `"lookup"`, which repeats what stood in prompt or text before, or
    `"both"`. What a call says goes before, or the target's generation configuration; what `generation_config`
    recommends, if there is one, comes last. At least `min_match` tokens must have stood before, and at most
    `longest_lookup` are looked up for a row at once. A drafter that reads no hidden states has no `target_layer_ids`,
    and none are captured for it. `last_statistics` holds what the last call of `generate` measured. Several threads
    may use a drafter at once; what each of them measured is in its output with `return_dict_in_generate=True`.

    A class of your own must also have a `config` with the target's `vocab_size`, as a `PreTrainedConfig` has it:
    `generate(assistant_model=drafter)` compares the two before it calls the drafter (transformers 5.24,
    `_validate_assistant`).
    """

    # Transformers evaluates annotations when the class is made, and schedulers know drafters
    scheduler: Any = None
    generation_config: Any = None
    drafts: str = "both"
    # what `drafts` may be
    sources: ClassVar[tuple[str, ...]] = ("model", "lookup", "both")
    # a single token says little, but which of them go on is soon learned
    min_match: int = 1
    # with the anchor a pass is then 16 tokens wide: kernels work in tiles of that size
    longest_lookup: int = 15
    # of each draft, how often it was accepted if those before it were, where the drafter was evaluated
    accept_rates: Any = None
    last_statistics: SpeculationStatistics | None = None

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Number of drafts the drafter was trained to propose per round."""

    @property
    @abstractmethod
    def target_layer_ids(self) -> list[int]:
        """Target decoder layers whose outputs the drafter reads."""

    @abstractmethod
    def check_target(self, target: TargetAdapter) -> None:
        """Raise a `ValueError` if this drafter was not made for `target`."""

    def review(  # noqa: B027 (most drafters have nothing to say)
        self, target: TargetAdapter, statistics: SpeculationStatistics
    ) -> None:
        """Look at what a call of `generate`, or a request of a stream, measured; by default do nothing."""

    @abstractmethod
    def start(self, target: TargetAdapter, batch_size: int) -> DraftContext:
        """Return an empty context for `batch_size` sequences."""
