"""Oracle of DeepSeek-V4: one token at a time, every past token kept, no cache, from the equations of its report.

Takes an already dequantised checkpoint by its official tensor names; knows nothing of `dspark_hf`.
The released Hadamard rotation of the indexer's queries and keys, which leaves every product as it is, and their FP4
rounding are left out unless `Settings.index_fake_quant` asks for them.

Sections (§) are those of the technical report. D hidden, H heads, N keys, T tokens, V vocab, c head_dim, n streams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]

KIND_OF_RATIO = {0: "window", 4: "csa", 128: "hca"}


@dataclass(frozen=True)
class Yarn:
    """Stretches the slow rotary frequencies by `factor`; betas are turns within `original_length` positions."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class Settings:
    """What the tensors do not tell by their shapes; defaults as in the released models.

    `layer_kinds` holds "window", "csa" or "hca" per layer, or nothing: then the released ratios 0, 4 and 128 tell.
    A layer routes by token id where it has the table `ffn.gate.tid2eid`.
    """

    compress_ratios: tuple[int, ...]
    num_heads: int
    head_dim: int
    rope_head_dim: int
    o_groups: int
    num_experts_per_token: int
    route_scale: float
    window: int = 128
    layer_kinds: tuple[str, ...] = ()
    index_num_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    index_fake_quant: bool = False
    norm_topk_prob: bool = True
    swiglu_limit: float = 10.0
    rms_eps: float = 1e-6
    hc_mult: int = 4
    hc_eps: float = 1e-6
    hc_sinkhorn_iters: int = 20
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    yarn: Yarn | None = None

    @property
    def num_layers(self) -> int:
        """Return the number of layers, one per ratio."""
        return len(self.compress_ratios)

    def kind(self, layer: int) -> str:
        """Return how a layer sees the tokens outside its window."""
        return self.layer_kinds[layer] if self.layer_kinds else KIND_OF_RATIO[self.compress_ratios[layer]]


@dataclass(frozen=True)
class Outputs:
    """`logits` `(T, V)`, the streams `(T, n, D)` each layer returns, and what the CSA layers' indexers did.

    Per CSA layer and query: `index_scores` of all visible entries and `chosen_entries`, best first.
    """

    logits: Tensor
    layer_outputs: list[Tensor]
    chosen_entries: dict[int, list[list[int]]]
    index_scores: dict[int, list[Tensor]]


def forward(
    weights: Weights,
    settings: Settings,
    token_ids: Sequence[int],
    *,
    kv_fake_quant: bool = False,
    dtype: torch.dtype | None = torch.float64,
) -> Outputs:
    """Return logits and streams of one sequence that starts at position 0; `dtype` None computes as `embed.weight`."""
    weights = cast(weights, weights["embed.weight"].dtype if dtype is None else dtype)
    # every stream starts as the embedding
    streams = [torch.stack([weights["embed.weight"][token]] * settings.hc_mult) for token in token_ids]
    layer_outputs: list[Tensor] = []
    chosen_entries: dict[int, list[list[int]]] = {}
    index_scores: dict[int, list[Tensor]] = {}
    for layer in range(settings.num_layers):
        name = f"layers.{layer}"
        entered = [enter(weights, f"{name}.hc_attn", f"{name}.attn_norm", h, settings) for h in streams]
        attended, chosen, scores = attention(
            weights, f"{name}.attn", layer, [block.inputs for block in entered], settings, kv_fake_quant
        )
        streams = [leave(block, y, h) for block, y, h in zip(entered, attended, streams, strict=True)]
        streams = [
            moe_sub_block(weights, name, h, settings, token) for h, token in zip(streams, token_ids, strict=True)
        ]
        layer_outputs.append(torch.stack(streams))
        if settings.kind(layer) == "csa":
            chosen_entries[layer], index_scores[layer] = chosen, scores
    logits = []
    for h in streams:
        x = rms_norm(merge_streams(weights, "hc_head", h, settings), weights["norm.weight"], settings.rms_eps)
        logits.append(weights["head.weight"] @ x)
    return Outputs(torch.stack(logits), layer_outputs, chosen_entries, index_scores)


def tapped_features(outputs: Outputs, layer_ids: Sequence[int]) -> Tensor:
    """Return `(T, M * D)`: the means over the streams that M layers return, side by side, the drafter's context."""
    return torch.cat([outputs.layer_outputs[layer].mean(1) for layer in layer_ids], -1)


def cast(weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights in `dtype`, tables of expert ids as they are."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return `x` over the root mean square of its last dimension, times `weight`."""
    normed = x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return normed if weight is None else normed * weight


def best_first(scores: Tensor, count: int) -> list[int]:
    """Return the indices of the `count` largest scores; of equal scores the lowest index first."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


# rotary positions: the last dimensions of a head, neighbours paired


def rotary_frequencies(dim: int, theta: float, yarn: Yarn | None) -> list[float]:
    """Return the radians per position of `dim / 2` pairs, stretched by YaRN (arXiv 2309.00071)."""
    frequencies = []
    for pair in range(dim // 2):
        frequency = theta ** (-2 * pair / dim)
        if yarn is not None:
            # the pairs that make `beta` turns within the original length, rounded outwards
            low, high = (
                dim * math.log(yarn.original_length / (beta * 2 * math.pi)) / (2 * math.log(theta))
                for beta in (yarn.beta_fast, yarn.beta_slow)
            )
            first, last = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
            # a ramp without width is a step
            stretched = min(max((pair - first) / max(last - first, 1e-3), 0.0), 1.0)
            frequency = frequency * (1 - stretched) + frequency / yarn.factor * stretched
        frequencies.append(frequency)
    return frequencies


def layer_frequencies(settings: Settings, is_compressing: bool) -> list[float]:
    """Return a layer's frequencies: window layers turn without YaRN, compressing ones by another theta and with it."""
    if is_compressing:
        return rotary_frequencies(settings.rope_head_dim, settings.compress_rope_theta, settings.yarn)
    return rotary_frequencies(settings.rope_head_dim, settings.rope_theta, None)


def rotate(x: Tensor, position: int, frequencies: Sequence[float]) -> Tensor:
    """Return `x` `(..., c)` with its last pairs `(2i, 2i + 1)` turned; a negative position turns back."""
    turned = x.clone()
    first = x.shape[-1] - 2 * len(frequencies)
    for pair, frequency in enumerate(frequencies):
        even, odd = first + 2 * pair, first + 2 * pair + 1
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        turned[..., even] = x[..., even] * cos - x[..., odd] * sin
        turned[..., odd] = x[..., even] * sin + x[..., odd] * cos
    return turned


# manifold-constrained hyper-connections (mHC, §2.2)


@dataclass(frozen=True)
class Entered:
    """A sub-block's normed `inputs` `(D,)` and how its output goes back: `post` `(n,)` and `comb` `(n, n)`."""

    inputs: Tensor
    post: Tensor
    comb: Tensor


def enter(weights: Weights, hc_name: str, norm_name: str, streams: Tensor, settings: Settings) -> Entered:
    """Return one token's way into a sub-block: mix = fn f / rms(f) for the flat streams f, then pre, post, comb."""
    n = settings.hc_mult
    mix = stream_mix(weights, hc_name, streams, settings)
    base, scale = weights[f"{hc_name}_base"], weights[f"{hc_name}_scale"]
    pre = torch.sigmoid(mix[:n] * scale[0] + base[:n]) + settings.hc_eps
    post = 2 * torch.sigmoid(mix[n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = doubly_stochastic((mix[2 * n :] * scale[2] + base[2 * n :]).view(n, n), settings)
    merged = weighted_sum(pre, streams)
    return Entered(rms_norm(merged, weights[f"{norm_name}.weight"], settings.rms_eps), post, comb)


def leave(entered: Entered, y: Tensor, streams: Tensor) -> Tensor:
    """Return the streams after a sub-block: out[k] = post[k] y + sum_j comb[j, k] h[j]."""
    outputs = []
    for k in range(len(streams)):
        outputs.append(entered.post[k] * y + weighted_sum(entered.comb[:, k], streams))
    return torch.stack(outputs)


def merge_streams(weights: Weights, name: str, streams: Tensor, settings: Settings) -> Tensor:
    """Return one token's streams as one vector before the final norm: sum_i (sigmoid(mix_i) + eps) h_i."""
    mix = stream_mix(weights, name, streams, settings)
    pre = torch.sigmoid(mix * weights[f"{name}_scale"] + weights[f"{name}_base"]) + settings.hc_eps
    return weighted_sum(pre, streams)


def stream_mix(weights: Weights, name: str, streams: Tensor, settings: Settings) -> Tensor:
    """Return the projection of the flattened streams over their common root mean square."""
    flat = streams.flatten()
    return weights[f"{name}_fn"] @ flat * (flat.pow(2).mean() + settings.rms_eps).rsqrt()


def weighted_sum(shares: Tensor, vectors: Tensor) -> Tensor:
    """Return sum_i shares[i] vectors[i]."""
    return torch.einsum("i,id->d", shares, vectors)


def doubly_stochastic(mix: Tensor, settings: Settings) -> Tensor:
    """Return softmax of the rows + eps, columns normed, then rows and columns again `hc_sinkhorn_iters - 1` times."""
    eps = settings.hc_eps
    comb = mix.softmax(1) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(settings.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    return comb


# attention (§2.3: CSA and the indexer in §2.3.1, HCA in §2.3.2)


def attention(
    weights: Weights, name: str, layer: int, inputs: Sequence[Tensor], settings: Settings, kv_fake_quant: bool
) -> tuple[list[Tensor], list[list[int]], list[Tensor]]:
    """Return a layer's attention output per token and, for CSA, the chosen entries and all scores per token.

    A query sees the last `window` tokens, itself included, and completed entries: all (HCA) or the indexer's (CSA).
    """
    kind, ratio = settings.kind(layer), settings.compress_ratios[layer]
    frequencies = layer_frequencies(settings, kind != "window")
    window_kvs = [
        shared_kv(weights, name, x, position, frequencies, settings, kv_fake_quant)
        for position, x in enumerate(inputs)
    ]
    entries: list[Tensor] = []
    index_keys: list[Tensor] = []
    if kind != "window":
        entries = compress(weights, f"{name}.compressor", inputs, ratio, kind == "csa", frequencies, settings)
        if kv_fake_quant:
            entries = [fake_quantise(entry, settings) for entry in entries]
    if kind == "csa":
        index_keys = compress(weights, f"{name}.indexer.compressor", inputs, ratio, True, frequencies, settings)
        if settings.index_fake_quant:
            index_keys = [fake_quantise_index(key) for key in index_keys]
    outputs: list[Tensor] = []
    chosen: list[list[int]] = []
    scores: list[Tensor] = []
    for position, x in enumerate(inputs):
        latent, query = queries(weights, name, x, position, frequencies, settings)
        seen = window_kvs[max(0, position - settings.window + 1) : position + 1]
        # an entry is visible once its window is complete
        num_visible = 0 if ratio == 0 else (position + 1) // ratio
        if kind == "hca":
            seen = seen + entries[:num_visible]
        if kind == "csa":
            scores.append(
                score_entries(
                    weights, f"{name}.indexer", x, latent, position, index_keys[:num_visible], frequencies, settings
                )
            )
            chosen.append(best_first(scores[-1], settings.index_topk))
            seen = seen + [entries[i] for i in chosen[-1]]
        heads = attend(query, torch.stack(seen), weights[f"{name}.attn_sink"])
        outputs.append(project_heads(weights, name, heads, position, frequencies, settings))
    return outputs, chosen, scores


def queries(
    weights: Weights, name: str, x: Tensor, position: int, frequencies: Sequence[float], settings: Settings
) -> tuple[Tensor, Tensor]:
    """Return the normed latent that the indexer reads too, and the heads `(H, c)`, each normed without weight."""
    latent = rms_norm(weights[f"{name}.wq_a.weight"] @ x, weights[f"{name}.q_norm.weight"], settings.rms_eps)
    heads = (weights[f"{name}.wq_b.weight"] @ latent).view(settings.num_heads, settings.head_dim)
    return latent, rotate(rms_norm(heads, None, settings.rms_eps), position, frequencies)


def shared_kv(
    weights: Weights,
    name: str,
    x: Tensor,
    position: int,
    frequencies: Sequence[float],
    settings: Settings,
    kv_fake_quant: bool,
) -> Tensor:
    """Return a token's one vector `(c,)` that is key and value of all heads."""
    kv = rms_norm(weights[f"{name}.wkv.weight"] @ x, weights[f"{name}.kv_norm.weight"], settings.rms_eps)
    kv = rotate(kv, position, frequencies)
    return fake_quantise(kv, settings) if kv_fake_quant else kv


def compress(
    weights: Weights,
    name: str,
    inputs: Sequence[Tensor],
    ratio: int,
    overlaps: bool,
    frequencies: Sequence[float],
    settings: Settings,
) -> list[Tensor]:
    """Return one entry per complete window of `ratio` tokens: sum_j softmax_j(z) * kv, normed, at the window's start.

    z = wgate x + ape[position % ratio], and each channel has a softmax of its own.
    With overlap the second half of the columns is a token's part in its own window's entry, the first half its part
    in the next one's.
    """
    norm = weights[f"{name}.norm.weight"]
    width = len(norm)
    kvs = [weights[f"{name}.wkv.weight"] @ x for x in inputs]
    gates = [
        weights[f"{name}.wgate.weight"] @ x + weights[f"{name}.ape"][position % ratio]
        for position, x in enumerate(inputs)
    ]
    entries = []
    for i in range(len(inputs) // ratio):
        own = range(i * ratio, (i + 1) * ratio)
        if overlaps:
            # the first window has none before it
            before = range(max(0, (i - 1) * ratio), i * ratio)
            slots = [(gates[t][:width], kvs[t][:width]) for t in before]
            slots += [(gates[t][width:], kvs[t][width:]) for t in own]
        else:
            slots = [(gates[t], kvs[t]) for t in own]
        shares = torch.stack([gate for gate, _ in slots]).softmax(0)
        pooled = sum((share * kv for share, (_, kv) in zip(shares, slots, strict=True)), torch.zeros_like(norm))
        entries.append(rotate(rms_norm(pooled, norm, settings.rms_eps), i * ratio, frequencies))
    return entries


def score_entries(
    weights: Weights,
    name: str,
    x: Tensor,
    latent: Tensor,
    position: int,
    keys: Sequence[Tensor],
    frequencies: Sequence[float],
    settings: Settings,
) -> Tensor:
    """Return one query's index scores, one per key: score[s] = sum_h w_h relu(q_h . k_s)."""
    num_heads, width = settings.index_num_heads, settings.index_head_dim
    query = rotate((weights[f"{name}.wq_b.weight"] @ latent).view(num_heads, width), position, frequencies)
    if settings.index_fake_quant:
        query = torch.stack([fake_quantise_index(head) for head in query])
    head_weights = weights[f"{name}.weights_proj.weight"] @ x * width**-0.5 * num_heads**-0.5
    scores = [torch.dot(head_weights, (query @ key).relu()) for key in keys]
    return torch.stack(scores) if scores else x.new_zeros(0)


def attend(query: Tensor, kvs: Tensor, sinks: Tensor) -> Tensor:
    """Return `(H, c)` for heads `query` `(H, c)` over `kvs` `(N, c)`; a sink only adds to its head's denominator."""
    logits = torch.einsum("hc,nc->hn", query, kvs) * query.shape[-1] ** -0.5
    largest = torch.maximum(logits.max(1).values, sinks)
    shares = (logits - largest[:, None]).exp()
    denominator = shares.sum(1) + (sinks - largest).exp()
    return torch.einsum("hn,nc->hc", shares / denominator[:, None], kvs)


def project_heads(
    weights: Weights, name: str, heads: Tensor, position: int, frequencies: Sequence[float], settings: Settings
) -> Tensor:
    """Return `(D,)`: heads turned back by the query's position, projected in groups by wo_a, then jointly by wo_b."""
    groups = rotate(heads, -position, frequencies).reshape(settings.o_groups, -1)
    blocks = weights[f"{name}.wo_a.weight"].chunk(settings.o_groups)
    projected = torch.cat([block @ group for block, group in zip(blocks, groups, strict=True)])
    return weights[f"{name}.wo_b.weight"] @ projected


def fake_quantise(kv: Tensor, settings: Settings) -> Tensor:
    """Return `kv` with its dimensions without position rounded as stored: e4m3 and a power-of-two scale per 64."""
    num_plain = kv.shape[-1] - settings.rope_head_dim
    plain = kv[:num_plain].tolist()
    rounded: list[float] = []
    for first in range(0, num_plain, 64):
        group = plain[first : first + 64]
        largest = max(1e-4, *(abs(value) for value in group))
        mantissa, exponent = math.frexp(largest / 448)
        # the smallest power of two that keeps the largest value within 448
        scale = 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)
        rounded += [round_to_e4m3(value / scale) * scale for value in group]
    return torch.cat([kv.new_tensor(rounded), kv[num_plain:]])


def round_to_e4m3(value: float) -> float:
    """Return the nearest number of 3 mantissa bits and exponents from -6, ties to even, at most 448."""
    if value == 0:
        return 0.0
    exponent = max(math.frexp(value)[1] - 1, -6)
    step = 2.0 ** (exponent - 3)
    return max(-448.0, min(448.0, round(value / step) * step))


def fake_quantise_index(vector: Tensor) -> Tensor:
    """Return an indexer's query or key rotated, then rounded: e2m1 and a power-of-two scale per 32."""
    rotated = hadamard_rotate(vector).tolist()
    rounded: list[float] = []
    for first in range(0, len(rotated), 32):
        group = rotated[first : first + 32]
        largest = max(6 * 2.0**-126, *(abs(value) for value in group))
        mantissa, exponent = math.frexp(largest / 6)
        # the smallest power of two that keeps the largest value within 6
        scale = 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)
        rounded += [round_to_e2m1(value / scale) * scale for value in group]
    return vector.new_tensor(rounded)


def hadamard_rotate(vector: Tensor) -> Tensor:
    """Return H x / sqrt(c), where H[i, j] is -1 where i and j share an odd number of ones in binary, else 1."""
    size = len(vector)
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return vector.new_tensor(signs) @ vector / math.sqrt(size)


def round_to_e2m1(value: float) -> float:
    """Return the nearest of 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with the sign, halfway to the even place in that list."""
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    place = min(range(8), key=lambda i: (abs(table[i] - abs(value)), i % 2))
    return math.copysign(table[place], value)


# mixture of experts (§2.1)


def moe_sub_block(weights: Weights, name: str, streams: Tensor, settings: Settings, token_id: int | None) -> Tensor:
    """Return one token's streams after a layer's experts; `token_id` None where no layer routes by it."""
    entered = enter(weights, f"{name}.hc_ffn", f"{name}.ffn_norm", streams, settings)
    return leave(entered, moe(weights, f"{name}.ffn", entered.inputs, settings, token_id), streams)


def moe(weights: Weights, name: str, x: Tensor, settings: Settings, token_id: int | None) -> Tensor:
    """Return the chosen experts' outputs, weighted by s / sum s * route_scale, plus the shared expert's.

    s = sqrt(softplus(gate x)); the experts are the table's for the token id, or the best by s + bias.
    """
    logits = weights[f"{name}.gate.weight"] @ x
    scores = (logits.clamp_min(0) + (-logits.abs()).exp().log1p()).sqrt()
    table = weights.get(f"{name}.gate.tid2eid")
    if table is not None and token_id is not None:
        chosen = [int(expert) for expert in table[token_id]]
    else:
        # the bias chooses and does not weigh
        chosen = best_first(scores + weights[f"{name}.gate.bias"], settings.num_experts_per_token)
    total = scores[chosen].sum() if settings.norm_topk_prob else 1.0
    output = expert_output(weights, f"{name}.shared_experts", x, 1.0, settings)
    for expert in chosen:
        share = scores[expert] / total * settings.route_scale
        output = output + expert_output(weights, f"{name}.experts.{expert}", x, share, settings)
    return output


def expert_output(weights: Weights, name: str, x: Tensor, share: float | Tensor, settings: Settings) -> Tensor:
    """Return w2 (share * silu(min(w1 x, limit)) * clamp(w3 x, -limit, limit))."""
    limit = settings.swiglu_limit
    gate = (weights[f"{name}.w1.weight"] @ x).clamp(max=limit)
    up = (weights[f"{name}.w3.weight"] @ x).clamp(-limit, limit)
    return weights[f"{name}.w2.weight"] @ (share * gate * gate.sigmoid() * up)
