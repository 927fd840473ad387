"""Configuration of our DeepSeek-V4, with the field names of the released `config.json`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dspark_hf.modeling.deepseek_v4.configuration_checks import check_kinds, check_rope_scaling, require

AttentionKind = Literal["window", "csa", "hca"]

# the type that released checkpoints carry; Transformers' own classes answer to it
RELEASED_MODEL_TYPE = "deepseek_v4"
_CSA_RATIO = 4
_NEVER_RELEASED = (
    "cache_dtype",
    "indexer_dtype",
    "max_rollback",
    "indexer_loss_coef",
    "rope_parameters",
    "_name_or_path",
)
# our field -> the released one
_RENAMED = {"stored_quantization": "quantization_config", "compress_rope_scaling": "rope_scaling"}


class DeepseekV4DSparkConfig(PreTrainedConfig):
    """Describe a DeepSeek-V4 target, and the DSpark module in its checkpoint if there is one.

    Every released `config.json` can be read as it is. Defaults are those of Flash.

    Args:
        vocab_size: number of token ids.
        hidden_size: width D of a stream.
        moe_intermediate_size: width of one expert.
        num_hidden_layers: number of layers.
        num_attention_heads: number of query heads H.
        num_key_value_heads: always 1: keys and values are one vector for all heads.
        head_dim: size of a head, and of the key/value vector.
        qk_rope_head_dim: the last dimensions of a head, which rotary positions act on.
        q_lora_rank: rank of the query projection.
        o_groups: number of groups of the output projection.
        o_lora_rank: rank of the output projection, per group.
        n_routed_experts: number of routed experts of a layer.
        n_shared_experts: always 1.
        num_experts_per_tok: routed experts a token visits.
        num_hash_layers: first layers, whose experts follow from the token id alone.
        scoring_func: always `"sqrtsoftplus"`.
        norm_topk_prob: whether the chosen experts' weights are scaled to sum to 1 first.
        routed_scaling_factor: factor on the routed experts' weights.
        swiglu_limit: clamp of the experts' gate (above) and up (both sides) activations.
        compress_ratios: per layer, tokens per compressed entry: 0 for a window only, 4 for CSA (with the indexer),
            else HCA. Entries beyond `num_hidden_layers` belong to the drafting stages.
        sliding_window: tokens a query sees uncompressed, itself included.
        rope_theta: rotary base of window-only layers (no YaRN).
        compress_rope_theta: rotary base of layers with compression.
        rope_scaling: YaRN parameters of layers with compression, as released, or None.
        index_n_heads: number of the indexer's heads.
        index_head_dim: size of an indexer head.
        index_topk: compressed entries that a query of a CSA layer reads.
        hc_mult: number n of residual streams (manifold-constrained hyper-connections).
        hc_eps: epsilon of the hyper-connections.
        hc_sinkhorn_iters: Sinkhorn iterations.
        hidden_act: always `"silu"`.
        rms_norm_eps: epsilon of every RMSNorm.
        max_position_embeddings: longest context in tokens.
        initializer_range: standard deviation of fresh weights.
        quantization_config: how the checkpoint's weights are stored; kept as it is, never acted on by Transformers'
            own quantisers.
        expert_dtype: `"fp4"` where the routed experts are stored in 4 bits.
        num_nextn_predict_layers: as released; says nothing about DSpark.
        dspark_block_size: drafts per round of the checkpoint's own DSpark module; None where it has none.
        dspark_noise_token_id: token that fills the module's slots after the anchor.
        dspark_target_layer_ids: layers whose outputs the module reads, one per stage input.
        dspark_markov_rank: rank of the module's Markov head.
        cache_dtype: `None` (the model's dtype), or `"fp8"` to store the no-position dimensions of the key/value cache
            in 8 bits as the released code does.
        indexer_dtype: `None` (the model's dtype), or `"fp4"` to rotate the indexer's queries and keys, round both to 4
            bits as the released inference code does, and store the keys so. `index_head_dim` must be a power of two.
        max_rollback: tokens that a cache can take back exactly.
        output_router_logits: whether the training loss has the balance term.
        router_aux_loss_coef: factor of that term.
        indexer_loss_coef: factor of the term that trains the indexer (KL from the attention's own mass over the chosen
            entries); 0 leaves the indexer without a gradient, since a top-k has none.
        use_cache: whether a forward pass keeps a cache by default.

    Raises:
        ValueError: if a field breaks a rule; the message names the field, the rule and the value.

    Example:

        >>> from dspark_hf import DeepseekV4DSparkConfig
        >>> config = DeepseekV4DSparkConfig(num_hidden_layers=3, compress_ratios=[0, 4, 128])
        >>> config.attention_kinds
        ['window', 'csa', 'hca']
    """

    model_type = "deepseek_v4_dspark"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    # experts are modules of their own, as stored: each is split like a feed-forward network
    base_model_tp_plan = {
        "embed": "embedding_rowwise",
        "layers.*.ffn.experts.*.w1": "colwise",
        "layers.*.ffn.experts.*.w3": "colwise",
        "layers.*.ffn.experts.*.w2": "rowwise",
        "layers.*.ffn.shared_experts.w1": "colwise",
        "layers.*.ffn.shared_experts.w3": "colwise",
        "layers.*.ffn.shared_experts.w2": "rowwise",
    }
    attribute_map = {"num_local_experts": "n_routed_experts", "intermediate_size": "moe_intermediate_size"}

    def __init__(
        self,
        vocab_size: int = 129280,
        hidden_size: int = 4096,
        moe_intermediate_size: int = 2048,
        num_hidden_layers: int = 43,
        num_attention_heads: int = 64,
        num_key_value_heads: int = 1,
        head_dim: int = 512,
        qk_rope_head_dim: int = 64,
        q_lora_rank: int = 1024,
        o_groups: int = 8,
        o_lora_rank: int = 1024,
        n_routed_experts: int = 256,
        n_shared_experts: int = 1,
        num_experts_per_tok: int = 6,
        num_hash_layers: int = 3,
        scoring_func: str = "sqrtsoftplus",
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.5,
        swiglu_limit: float = 10.0,
        compress_ratios: Sequence[int] | None = None,
        sliding_window: int = 128,
        rope_theta: float = 10000.0,
        compress_rope_theta: float = 160000.0,
        rope_scaling: dict[str, Any] | None = None,
        index_n_heads: int = 64,
        index_head_dim: int = 128,
        index_topk: int = 512,
        hc_mult: int = 4,
        hc_eps: float = 1e-6,
        hc_sinkhorn_iters: int = 20,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        max_position_embeddings: int = 1048576,
        initializer_range: float = 0.02,
        quantization_config: dict[str, Any] | None = None,
        expert_dtype: str | None = None,
        num_nextn_predict_layers: int = 0,
        dspark_block_size: int | None = None,
        dspark_noise_token_id: int | None = None,
        dspark_target_layer_ids: Sequence[int] | None = None,
        dspark_markov_rank: int | None = None,
        cache_dtype: str | None = None,
        indexer_dtype: str | None = None,
        max_rollback: int = 16,
        output_router_logits: bool = False,
        router_aux_loss_coef: float = 0.001,
        indexer_loss_coef: float = 0.0,
        use_cache: bool = True,
        bos_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 1,
        **kwargs: Any,
    ):
        # before anything is made of them
        check_kinds(locals())
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.q_lora_rank = q_lora_rank
        self.o_groups = o_groups
        self.o_lora_rank = o_lora_rank
        self.n_routed_experts = n_routed_experts
        self.n_shared_experts = n_shared_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.num_hash_layers = num_hash_layers
        self.scoring_func = scoring_func
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.swiglu_limit = swiglu_limit
        self.compress_ratios = _default_ratios(num_hidden_layers) if compress_ratios is None else list(compress_ratios)
        self.sliding_window = sliding_window
        self.rope_theta = rope_theta
        self.compress_rope_theta = compress_rope_theta
        # under another name: Transformers would merge it with `rope_theta`, which belongs to the other layers
        self.compress_rope_scaling = rope_scaling or kwargs.pop("compress_rope_scaling", None)
        self.index_n_heads = index_n_heads
        self.index_head_dim = index_head_dim
        self.index_topk = index_topk
        self.hc_mult = hc_mult
        self.hc_eps = hc_eps
        self.hc_sinkhorn_iters = hc_sinkhorn_iters
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        # under another name: Transformers would load its own FP8 kernels for a `quantization_config`
        self.stored_quantization = quantization_config or kwargs.pop("stored_quantization", None)
        self.expert_dtype = expert_dtype
        self.num_nextn_predict_layers = num_nextn_predict_layers
        self.dspark_block_size = dspark_block_size
        self.dspark_noise_token_id = dspark_noise_token_id
        self.dspark_target_layer_ids = None if dspark_target_layer_ids is None else list(dspark_target_layer_ids)
        self.dspark_markov_rank = dspark_markov_rank
        self.cache_dtype = cache_dtype
        self.indexer_dtype = indexer_dtype
        self.max_rollback = max_rollback
        self.output_router_logits = output_router_logits
        self.router_aux_loss_coef = router_aux_loss_coef
        self.indexer_loss_coef = indexer_loss_coef
        self.use_cache = use_cache
        kwargs["tie_word_embeddings"] = False
        self.check()
        super().__init__(**{**kwargs, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id})

    @property
    def attention_kinds(self) -> list[AttentionKind]:
        """Kind of attention of every layer: `"window"`, `"csa"` or `"hca"`."""
        return [_kind(ratio) for ratio in self.compress_ratios[: self.num_hidden_layers]]

    @property
    def has_dspark(self) -> bool:
        """Whether the checkpoint carries a DSpark module."""
        return self.dspark_block_size is not None

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the fields of a folder or hub name, released or saved by us.

        Raises:
            ValueError: if it holds another kind of model.
        """
        fields, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        name, model_type = str(pretrained_model_name_or_path), fields.get("model_type")
        if not fields:
            raise ValueError(
                f"`pretrained_model_name_or_path` must hold a config.json, got {name!r} without one. Fetch that file, "
                "or correct the name."
            )
        if model_type not in (cls.model_type, RELEASED_MODEL_TYPE):
            is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
            remedy = (
                "Load it with `AutoModelForCausalLM`."
                if is_known
                else "The installed Transformers has no class for it."
            )
            raise ValueError(
                f"`pretrained_model_name_or_path` must hold a DeepSeek-V4 model ({RELEASED_MODEL_TYPE!r}), got "
                f"{name!r} with model type {model_type!r}. {remedy}"
            )
        return {**fields, "model_type": cls.model_type}, unused

    def to_released_dict(self) -> dict[str, Any]:
        """Return the fields as a released `config.json` has them."""
        fields = self.to_dict()
        for ours, released in _RENAMED.items():
            value = fields.pop(ours, None)
            if value is not None:
                fields[released] = value
        for name in _NEVER_RELEASED:
            fields.pop(name, None)
        # readers take any such key for a DSpark module
        fields = {key: value for key, value in fields.items() if value is not None or not key.startswith("dspark_")}
        return {**fields, "model_type": RELEASED_MODEL_TYPE, "architectures": ["DeepseekV4ForCausalLM"]}

    def check(self) -> None:
        """Raise a `ValueError` that names the field, the rule and the value if a field breaks a rule."""
        check_kinds(vars(self))
        check_rope_scaling(self.compress_rope_scaling)
        require(
            len(self.compress_ratios) >= self.num_hidden_layers,
            "compress_ratios",
            f"name a ratio for each of the {self.num_hidden_layers} layers",
            self.compress_ratios,
        )
        for name, only in (("num_key_value_heads", 1), ("n_shared_experts", 1), ("hidden_act", "silu")):
            require(getattr(self, name) == only, name, f"be {only!r}", getattr(self, name))
        require(self.scoring_func == "sqrtsoftplus", "scoring_func", "be 'sqrtsoftplus'", self.scoring_func)
        require(self.cache_dtype in (None, "fp8"), "cache_dtype", "be None or 'fp8'", self.cache_dtype)
        require(self.indexer_dtype in (None, "fp4"), "indexer_dtype", "be None or 'fp4'", self.indexer_dtype)
        require(
            self.indexer_dtype is None or (self.index_head_dim > 1 and self.index_head_dim.bit_count() == 1),
            "index_head_dim",
            f"be a power of two, at least 2, with indexer_dtype={self.indexer_dtype!r}",
            self.index_head_dim,
        )
        require(
            self.qk_rope_head_dim % 2 == 0 and self.qk_rope_head_dim <= min(self.head_dim, self.index_head_dim),
            "qk_rope_head_dim",
            f"be even and at most {min(self.head_dim, self.index_head_dim)}",
            self.qk_rope_head_dim,
        )
        require(
            self.num_attention_heads % self.o_groups == 0,
            "o_groups",
            f"divide num_attention_heads={self.num_attention_heads}",
            self.o_groups,
        )
        require(
            0 < self.num_experts_per_tok <= self.n_routed_experts,
            "num_experts_per_tok",
            f"lie in [1, {self.n_routed_experts}]",
            self.num_experts_per_tok,
        )
        ids = self.dspark_target_layer_ids
        if ids is not None:
            require(
                len(ids) > 0
                and all(first < second for first, second in pairwise(ids))
                and ids[-1] < self.num_hidden_layers,
                "dspark_target_layer_ids",
                f"be different layers in [0, {self.num_hidden_layers - 1}], in ascending order",
                ids,
            )
        noise = self.dspark_noise_token_id
        require(
            noise is None or noise < self.vocab_size,
            "dspark_noise_token_id",
            f"lie in [0, {self.vocab_size - 1}]",
            noise,
        )


def _kind(ratio: int) -> AttentionKind:
    if ratio == 0:
        return "window"
    return "csa" if ratio == _CSA_RATIO else "hca"


def _default_ratios(num_layers: int) -> list[int]:
    return [0 if layer < 2 else (_CSA_RATIO if layer % 2 == 0 else 128) for layer in range(num_layers)]
