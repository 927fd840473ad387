"""Oracle of sampling: the exact distribution of generated text by enumeration, and whether samples follow it.

n enumerated prefixes, S length, V vocab.
"""

from __future__ import annotations

import torch
from scipy.special import chdtrc
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

# a correct sampler is condemned once in a million seeds
SMALLEST_P_VALUE = 1e-6
# Pearson's statistic follows its limit where every cell is expected a few times
_SMALLEST_EXPECTED = 5.0


@torch.no_grad()
def text_probabilities(
    target: PreTrainedModel,
    prompt: Tensor,
    num_tokens: int,
    *,
    processors: LogitsProcessorList | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Return the probability `(V,) * num_tokens`, fp64, of every text after one `prompt` `(S,)`.

    Nothing is cached and no row depends on another: every prefix is a forward pass of its own. A text behind an EOS
    token is padding.
    """
    vocab_size = target.config.vocab_size
    ids = prompt[None]
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask[None]
    is_over = torch.zeros(1, dtype=torch.bool)
    probabilities = torch.ones(1, dtype=torch.float64)
    for _ in range(num_tokens):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = target(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        scores = logits.float() if processors is None else processors(ids, logits.float())
        after = scores.double().softmax(-1)
        after[is_over] = torch.nn.functional.one_hot(torch.tensor(target.config.pad_token_id), vocab_size).double()
        probabilities = (probabilities[:, None] * after).flatten()
        # prefix i is followed by tokens 0 to V - 1
        new = torch.arange(vocab_size).repeat(len(ids))[:, None]
        ids = torch.cat([ids.repeat_interleave(vocab_size, 0), new], dim=1)
        mask = torch.cat([mask.repeat_interleave(vocab_size, 0), torch.ones_like(new)], dim=1)
        is_over = is_over.repeat_interleave(vocab_size)
        if target.generation_config.eos_token_id is not None:
            is_over = is_over | (new[:, 0] == target.generation_config.eos_token_id)
    return probabilities.view([vocab_size] * num_tokens)


def p_value(samples: Tensor, probabilities: Tensor) -> float:
    """Return the chance that a sampler of `probabilities` gives frequencies at least as odd as those of `samples`.

    Takes `samples` `(n, k)` of ids and the joint distribution of k ids. Pearson's chi-square with n draws: the sum of
    (observed - n p)^2 / (n p) over the cells, on one degree of freedom fewer than cells; cells with n p < 5 are taken
    together. A sample of probability zero gives 0.
    """
    cell = samples[:, 0]
    for column in range(1, samples.shape[1]):
        cell = cell * probabilities.shape[column] + samples[:, column]
    expected = probabilities.double().flatten() * len(samples)
    observed = torch.bincount(cell, minlength=len(expected)).double()
    if observed[expected == 0].any():
        return 0.0
    order = expected.argsort()
    expected, observed = expected[order], observed[order]
    num_rare = int((expected < _SMALLEST_EXPECTED).sum())
    while expected[:num_rare].sum() < _SMALLEST_EXPECTED and 0 < num_rare < len(expected):
        num_rare += 1
    if num_rare:
        expected = torch.cat([expected[:num_rare].sum()[None], expected[num_rare:]])
        observed = torch.cat([observed[:num_rare].sum()[None], observed[num_rare:]])
    # one cell left means one possible outcome: the check above has already judged it
    if len(expected) == 1:
        return 1.0
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(chdtrc(len(expected) - 1, float(statistic)))
