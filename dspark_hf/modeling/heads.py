"""Sequential heads of a DSpark drafter: Markov heads (Eq. 4-6) and the confidence head (Eq. 7).

B batch, K block_size, V proposable tokens, D hidden, R markov rank; `*` any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_hf.modeling.configuration_dspark import DSparkConfig

# A head over more tokens than this corrects the best of them alone, so many of them, unless its configuration says
# otherwise. Below, choosing them costs as much as correcting all (benchmarks/sampling.py); fewer than these cost
# accepted drafts (benchmarks/forced_acceptance.py).
LARGE_HEAD = 32_768
DEFAULT_MARKOV_TOP_K = 512


class MarkovHead(nn.Module):
    """Add a low-rank transition bias `W2 W1[x_{k-1}]` to the logits of slot k (Eq. 5)."""

    known_ids: Tensor

    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.markov_rank = config.markov_rank
        self.is_reduced = config.markov_over_draft_vocab
        # over the draft vocabulary, one more row serves every token that cannot be proposed
        num_rows = config.num_draft_logits + 1 if self.is_reduced else config.vocab_size
        self.markov_w1 = nn.Embedding(num_rows, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.num_draft_logits, bias=False)
        if self.is_reduced:
            # the proposable tokens, ascending; a table over a vocabulary of 262,144 would outweigh small drafters
            self.register_buffer("known_ids", torch.zeros(config.num_draft_logits, dtype=torch.long))

    def embed(self, prev_ids: Tensor) -> Tensor:
        """Return the Markov embedding `W1[x_{k-1}]` of `prev_ids` `(*)` as `(*, R)`."""
        return self.markov_w1(self._rows(prev_ids) if self.is_reduced else prev_ids)

    def _rows(self, prev_ids: Tensor) -> Tensor:
        size = len(self.known_ids)
        rows = torch.searchsorted(self.known_ids, prev_ids.contiguous()).clamp(max=size - 1)
        return torch.where(self.known_ids[rows] == prev_ids, rows, size)

    def initial_state(self, hidden_states: Tensor) -> Tensor | None:
        """Return the state before the first slot, given any `(*, D)` hidden states of that slot."""
        return None

    def step(self, prev_ids: Tensor, hidden_states: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the latent `(*, R)` of one slot and the next state; `project` turns the latent into the bias."""
        return self.embed(prev_ids), None

    def project(self, latent: Tensor) -> Tensor:
        """Return the bias `(*, V)` on the logits for a latent `(*, R)`."""
        return self.markov_w2(latent)

    def project_to(self, latent: Tensor, places: Tensor) -> Tensor:
        """Return the bias `(B, k)` on the logits at `places` `(B, k)` alone, for a latent `(B, R)`."""
        if type(self.markov_w2) is not nn.Linear:
            # quantised or wrapped: its rows cannot be had one by one
            return self.project(latent).gather(-1, places)
        return torch.bmm(self.markov_w2.weight[places], latent[..., None]).squeeze(-1)

    def latents(self, prev_ids: Tensor, hidden_states: Tensor, state: Tensor | None = None) -> Tensor:
        """Return the latents `(*, K, R)` of whole blocks, teacher-forced on `prev_ids` `(*, K)`.

        `state` is that before the first slot; None takes `initial_state`.
        """
        state = self.initial_state(hidden_states[..., 0, :]) if state is None else state
        steps = []
        for k in range(prev_ids.shape[-1]):
            latent, state = self.step(prev_ids[..., k], hidden_states[..., k, :], state)
            steps.append(latent)
        return torch.stack(steps, dim=-2)


class GatedMarkovHead(MarkovHead):
    """Markov head whose embedding is gated by the slot's hidden state."""

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size + config.markov_rank, config.markov_rank)

    def step(self, prev_ids: Tensor, hidden_states: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        embedding = self.embed(prev_ids)
        gate = self.gate_proj(torch.cat([hidden_states, embedding], dim=-1)).sigmoid()
        return gate * embedding, None


class RNNHead(MarkovHead):
    """Markov head with a gated recurrent state over the slots of a block (Eq. 6)."""

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        # one matrix for gate, candidate and output
        self.joint_proj = nn.Linear(2 * config.markov_rank + config.hidden_size, 3 * config.markov_rank)

    def initial_state(self, hidden_states: Tensor) -> Tensor | None:
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.markov_rank)

    def step(self, prev_ids: Tensor, hidden_states: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert state is not None
        joint = self.joint_proj(torch.cat([state, self.embed(prev_ids), hidden_states], dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        gate = gate.sigmoid()
        return output.tanh(), gate * state + (1 - gate) * candidate.tanh()


class ConfidenceHead(nn.Module):
    """Predict the logit of a draft's conditional acceptance from its hidden state (Eq. 7)."""

    def __init__(self, config: DSparkConfig):
        super().__init__()
        width = config.hidden_size + (config.markov_rank if config.confidence_head_with_markov else 0)
        self.proj = nn.Linear(width, 1, bias=config.confidence_head_bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits `(*)`, fp32, for features `(*, D)` or `(*, D + R)`."""
        bias = None if self.proj.bias is None else self.proj.bias.float()
        return nn.functional.linear(features.float(), self.proj.weight.float(), bias).squeeze(-1).float()


def build_markov_head(config: DSparkConfig) -> MarkovHead | None:
    """Return the Markov head that `config` asks for, or None for a plain DFlash drafter."""
    if config.markov_rank == 0:
        return None
    heads = {"vanilla": MarkovHead, "gated": GatedMarkovHead, "rnn": RNNHead}
    return heads[config.markov_head_type](config)
