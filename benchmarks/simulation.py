"""A random target of a real model's shape, and a drafter whose drafts are right at a stated rate.

Random weights cost what trained ones do, but no drafter can foresee what they write. Here a real drafter runs, for
its cost, and its logits are replaced. Accepted lengths found with it are chosen, not measured.

B batch, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.drafting.interface import DraftContext, DraftedBlock, Drafter, Sampler
from dspark_hf.generation.fixed_size import FixedSize
from dspark_hf.generation.targets.adapter import TargetAdapter

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    # long texts in minutes, on a processor
    "small": {
        "model_type": "qwen3",
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    # to try the benchmark itself
    "tiny": {
        "model_type": "qwen3",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}
# how far single drafts' chances lie around their position's rate: parameters of a beta distribution add up to this
_SPREAD = 2.0


def random_target(shape: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Return a target of that shape with random weights and no end-of-text token."""
    fields = dict(SHAPES[shape])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    with torch.device(device):
        target = AutoModelForCausalLM.from_config(config, dtype=dtype)
    target.generation_config.eos_token_id = None
    return target.eval()


class SimulatedDrafter(Drafter):
    """Run `drafter`, then propose the text of `script`, right at position k with the chance `rates[k]` on average.

    Chances differ from draft to draft, and margins tell them, as a well calibrated drafter's would.

    Args:
        drafter: whose time is spent.
        rates: chance of a draft at each position, given its prefix.
    """

    def __init__(self, drafter: DSparkAssistantModel, rates: Sequence[float]):
        self.config = drafter.config
        self._drafter = drafter
        self._rates = list(rates)
        # every row's whole text `(B, length)`, left padding included, and how much of it is padding
        self.script = torch.zeros(0, 0, dtype=torch.long)
        self.num_padded: list[int] = []

    @property
    def block_size(self) -> int:
        return min(self._drafter.block_size, len(self._rates))

    @property
    def target_layer_ids(self) -> list[int]:
        return self._drafter.target_layer_ids

    def check_target(self, target: TargetAdapter) -> None:
        self._drafter.check_target(target)

    def start(self, target: TargetAdapter, batch_size: int) -> DraftContext:
        # fewer rows than the script has are those of a profile, which looks at the time alone
        script, num_padded = self.script[:batch_size], self.num_padded[:batch_size]
        return _SimulatedContext(self._drafter.start(target, batch_size), script, num_padded, self._rates)


class _SimulatedContext(DraftContext):
    def __init__(self, context: DraftContext, script: Tensor, num_padded: Sequence[int], rates: Sequence[float]):
        self._context = context
        self._script = script
        self._num_padded = torch.tensor(num_padded, device=script.device)
        self._rates = rates

    def extend(self, hidden_states: Tensor, positions: Tensor, num_tokens: Sequence[int]) -> None:
        self._context.extend(hidden_states, positions, num_tokens)

    def draft(self, anchor_ids: Tensor, positions: Tensor, num_drafts: int, sampler: Sampler) -> DraftedBlock:
        def simulated(slot: int, logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor | None]:
            return sampler(slot, self._logits(slot, positions, logits.shape[-1]), drafted)

        return self._context.draft(anchor_ids, positions, num_drafts, simulated)

    def _logits(self, slot: int, positions: Tensor, vocab_size: int) -> Tensor:
        """Return logits `(B, V)` whose best token is right with a chance that their margin tells."""
        columns = positions.to(self._script.device) + 1 + slot + self._num_padded
        right = self._script.gather(1, columns.clamp_max(self._script.shape[1] - 1)[:, None])[:, 0]
        rate = self._rates[slot]
        chance = torch.distributions.Beta(rate * _SPREAD, (1 - rate) * _SPREAD).sample((len(right),))
        is_wrong = torch.rand(len(right)) >= chance
        proposed = (right + is_wrong.to(right.device)) % vocab_size
        logits = torch.zeros(len(right), vocab_size, device=right.device)
        margin = (chance.clamp(0.02, 0.98).logit() + math.log(9)).clamp_min(0.0)
        return logits.scatter_(1, proposed[:, None], margin.to(right.device)[:, None] + 1e-3)

    def fix_size(self, size: FixedSize) -> None:
        self._context.fix_size(size)

    def select_rows(self, rows: Tensor) -> None:
        self._context.select_rows(rows)
        rows = rows.to(self._script.device)
        self._script, self._num_padded = self._script[rows], self._num_padded[rows]
