"""The lightning indexer: which compressed entries a query of a CSA layer reads.

B batch, T queries, E entries, H indexer heads, c index head size, K chosen entries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_hf.modeling.deepseek_v4.cache import CompressedStore
from dspark_hf.modeling.deepseek_v4.compressor import Compressor, EntriesSoFar
from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig
from dspark_hf.modeling.deepseek_v4.rotary import Rotary, per_head, rotate
from dspark_hf.modeling.deepseek_v4.storage import Fp4Codec, Span

# numbers that a block of scores may hold at once, per head
_MAX_SCORES = 1 << 22
_FP4 = Fp4Codec()


class Indexer(nn.Module):
    """Score compressed entries with small heads of their own, in fp32: sum over heads of `w * relu(q . k)`.

    With `indexer_dtype="fp4"` queries and keys are rotated and rounded to 4 bits first, as the released inference code
    does; otherwise neither is done: the rotation alone changes no score.
    """

    def __init__(self, config: DeepseekV4DSparkConfig, ratio: int):
        super().__init__()
        self.num_heads, self.head_dim = config.index_n_heads, config.index_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank, self.num_heads * self.head_dim, bias=False)
        self.weights_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self._rounding = None if config.indexer_dtype is None else rotate_and_round
        self.compressor = Compressor(
            config, ratio=ratio, size=self.head_dim, is_overlapping=True, rounding=self._rounding
        )

    def keys(self, hidden_states: Tensor, span: Span, store: CompressedStore | None) -> EntriesSoFar:
        """Return the keys of all entries so far, those that `hidden_states` `(B, T, D)` completes included."""
        return self.compressor(hidden_states, span, store)

    def queries(self, latent: Tensor, hidden_states: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Return queries `(B, T, H, c)` and head weights `(B, T, H)` of latents `(B, T, R)` and `(B, T, D)`."""
        query = self.wq_b(latent).unflatten(-1, (self.num_heads, self.head_dim))
        query = rotate(query, per_head(rotary))
        if self._rounding is not None:
            query = self._rounding(query)
        factor = self.head_dim**-0.5 * self.num_heads**-0.5
        return query.float(), self.weights_proj(hidden_states).float() * factor


def rotate_and_round(vectors: Tensor) -> Tensor:
    """Return vectors `(*, c)`, in their dtype, rotated and rounded to FP4; the gradient passes the rounding unchanged.

    A scale is the largest magnitude of 32 / 6, rounded up to a power of two; middles go to even.
    """
    # the released code takes 6 x 2^-126 for smaller magnitudes: it differs where all 32 are next to nothing
    return _FP4.round(hadamard(vectors))


def hadamard(vectors: Tensor) -> Tensor:
    """Return vectors `(*, c)` times the Hadamard matrix of Sylvester's order over sqrt(c), c a power of two.

    Computed in fp32 by sums and differences alone, so that a vector's result does not depend on those beside it.
    """
    size = vectors.shape[-1]
    mixed = vectors.float()
    for level in range(size.bit_length() - 1):
        first, second = mixed.unflatten(-1, (-1, 2, 1 << level)).unbind(-2)
        mixed = torch.stack([first + second, first - second], dim=-2).flatten(-3)
    return (mixed * size**-0.5).to(vectors.dtype)


def score_entries(index_keys: EntriesSoFar, query: Tensor, weights: Tensor) -> Tensor:
    """Return the scores `(B, T, E)` of all entries for queries `(B, T, H, c)` with head weights `(B, T, H)`."""
    batch, length, heads, _ = query.shape
    flat = query.flatten(1, 2)
    width = max(_MAX_SCORES // (batch * length * heads), 1)
    blocks = []
    for start in range(0, index_keys.num_entries, width):
        keys = index_keys.read(start, min(start + width, index_keys.num_entries)).float()
        affinity = (flat @ keys.transpose(1, 2)).relu_().view(batch, length, heads, -1)
        blocks.append((weights[:, :, None] @ affinity)[:, :, 0])
    return torch.cat(blocks, dim=-1)


def choose_entries(scores: Tensor, num_visible: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """Return the `num_chosen` best visible entries of every query, in ascending order; among equals the lowest first.

    Takes `scores` `(B, T, E)` and how many entries each query may see, `num_visible` `(B, T)`.

    Returns indices `(B, T, K)`, K = min(num_chosen, E), and which of them are visible.
    """
    num_entries = scores.shape[-1]
    numbers = torch.arange(num_entries, device=scores.device)
    if num_entries <= num_chosen:
        return numbers.expand_as(scores), numbers < num_visible[..., None]
    scores = scores.masked_fill(numbers >= num_visible[..., None], float("-inf"))
    best = scores.topk(num_chosen + 1, dim=-1)
    index = best.indices[..., :-1]
    # torch.topk breaks ties as it likes, which matters only between the last chosen entry and the next
    is_tied = best.values[..., -2] == best.values[..., -1]
    if bool(is_tied.any()):
        index = index.clone()
        index[is_tied] = _first_of_equals(scores[is_tied], num_chosen)
    index = index.sort(dim=-1).values
    return index, index < num_visible[..., None]


def _first_of_equals(scores: Tensor, num_chosen: int) -> Tensor:
    """Return the numbers `(N, K)` of the best of `scores` `(N, E)`, among equals the lowest."""
    last = scores.topk(num_chosen, dim=-1).values[:, -1:]
    above, equal = scores > last, scores == last
    missing = num_chosen - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= missing))
    return chosen.nonzero()[:, -1].view(len(scores), num_chosen)
