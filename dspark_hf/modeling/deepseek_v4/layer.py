"""One layer of DeepSeek-V4, what it shares with the drafting stages, and how fresh weights begin.

B batch, T tokens, n streams, D hidden, X experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dspark_hf.modeling.backbone import RMSNorm
from dspark_hf.modeling.deepseek_v4.attention import Attention
from dspark_hf.modeling.deepseek_v4.cache import DeepseekV4LayerCache
from dspark_hf.modeling.deepseek_v4.compressor import Compressor
from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig
from dspark_hf.modeling.deepseek_v4.experts import MixtureOfExperts, Router
from dspark_hf.modeling.deepseek_v4.hyper_connections import StreamMixing, read_streams
from dspark_hf.modeling.deepseek_v4.linear import GroupedLinear
from dspark_hf.modeling.deepseek_v4.rotary import Rotary
from dspark_hf.modeling.deepseek_v4.storage import Span


class HyperConnectedLayer(GradientCheckpointingLayer):
    """Norms, experts and hyper-connections around two sub-blocks; the attention is the subclass's.

    Hyper-connections are parameters of the layer itself, under the released names.
    """

    hc_attn_fn: nn.Parameter
    hc_attn_base: nn.Parameter
    hc_attn_scale: nn.Parameter
    hc_ffn_fn: nn.Parameter
    hc_ffn_base: nn.Parameter
    hc_ffn_scale: nn.Parameter

    def __init__(self, config: DeepseekV4DSparkConfig, *, is_hashed: bool):
        super().__init__()
        self.config = config
        self.ffn = MixtureOfExperts(config, is_hashed=is_hashed)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        n = config.hc_mult
        size = (2 + n) * n
        for part, shape in (("fn", (size, n * config.hidden_size)), ("base", (size,)), ("scale", (3,))):
            for block in ("attn", "ffn"):
                self.register_parameter(f"hc_{block}_{part}", _fp32_parameter(*shape))

    def read_for_attention(self, streams: Tensor) -> tuple[Tensor, StreamMixing]:
        """Return the attention's normed input `(*, D)` from streams `(*, n, D)`, and how to write its output back."""
        states, mixing = read_streams(streams, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale, self.config)
        return self.attn_norm(states), mixing

    def run_experts(self, streams: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the streams `(*, n, D)` after the experts, and the router's affinities `(N, X)`."""
        states, mixing = read_streams(streams, self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale, self.config)
        output, affinities = self.ffn(self.ffn_norm(states), token_ids)
        return mixing(streams, output), affinities


class DeepseekV4Layer(HyperConnectedLayer):
    """One layer of the target: attention over window and compressed entries, then experts."""

    def __init__(self, config: DeepseekV4DSparkConfig, layer: int):
        super().__init__(config, is_hashed=layer < config.num_hash_layers)
        self.attn = Attention(config, layer)

    def forward(
        self,
        streams: Tensor,
        span: Span,
        rotary: Rotary,
        cache: DeepseekV4LayerCache | None,
        token_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the streams `(B, T, n, D)`, the router's affinities `(B * T, X)` and the indexer's loss."""
        states, mixing = self.read_for_attention(streams)
        output, indexer_loss = self.attn(states, span.to(streams.device), rotary, cache)
        streams, affinities = self.run_experts(mixing(streams, output), token_ids)
        return streams, affinities, indexer_loss


def add_hyper_head(module: nn.Module, config: DeepseekV4DSparkConfig) -> None:
    """Give `module` the parameters that join the streams at the end, in fp32, under the released names."""
    n = config.hc_mult
    for part, shape in (("fn", (n, n * config.hidden_size)), ("base", (n,)), ("scale", (1,))):
        module.register_parameter(f"hc_head_{part}", _fp32_parameter(*shape))


def _fp32_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32))


def init_weights(module: nn.Module, config: DeepseekV4DSparkConfig) -> None:
    """Give the parameters that `module` itself owns their first values."""
    deviation = config.initializer_range
    if isinstance(module, (nn.Linear, GroupedLinear, nn.Embedding)):
        nn.init.normal_(module.weight, std=deviation)
    elif isinstance(module, Router):
        nn.init.normal_(module.weight, std=deviation)
        _init_routing(module, config)
    elif isinstance(module, RMSNorm) and module.weight is not None:
        nn.init.ones_(module.weight)
    elif isinstance(module, Compressor):
        nn.init.normal_(module.ape, std=deviation)
    elif isinstance(module, HyperConnectedLayer):
        _init_hyper_connection(module.hc_attn_fn, module.hc_attn_base, module.hc_attn_scale, config)
        _init_hyper_connection(module.hc_ffn_fn, module.hc_ffn_base, module.hc_ffn_scale, config)
    if hasattr(module, "attn_sink"):
        nn.init.zeros_(module.attn_sink)  # type: ignore[arg-type]  # a parameter by that name
    if hasattr(module, "hc_head_fn"):
        # parameters by these names, which mypy takes for anything a module may hold
        nn.init.normal_(module.hc_head_fn, std=deviation)  # type: ignore[arg-type]
        nn.init.zeros_(module.hc_head_base)  # type: ignore[arg-type]
        nn.init.ones_(module.hc_head_scale)  # type: ignore[arg-type]


def _init_routing(router: Router, config: DeepseekV4DSparkConfig) -> None:
    if router.tid2eid is None:
        nn.init.zeros_(router.bias)
        return
    # different experts for every token, evenly used
    start = torch.randint(config.n_routed_experts, (config.vocab_size, 1))
    steps = torch.arange(config.num_experts_per_tok) * max(config.n_routed_experts // config.num_experts_per_tok, 1)
    with torch.no_grad():
        router.tid2eid.copy_((start + steps) % config.n_routed_experts)


def _init_hyper_connection(fn: Tensor, base: Tensor, scale: Tensor, config: DeepseekV4DSparkConfig) -> None:
    nn.init.normal_(fn, std=config.initializer_range)
    nn.init.ones_(scale)
    nn.init.zeros_(base)
    n = config.hc_mult
    with torch.no_grad():
        # streams mostly keep to themselves at first
        base[2 * n :].view(n, n).diagonal().fill_(4.0)
