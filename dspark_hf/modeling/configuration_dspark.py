"""Configuration of a DSpark drafter (arXiv 2607.05147)."""

from __future__ import annotations

import inspect
import os
from typing import Any

from transformers import PreTrainedConfig

from dspark_hf.hubs import hub_options, local_name
from dspark_hf.modeling.configuration_checks import check_kinds, require
from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig
from dspark_hf.modeling.formats import choosing, gguf, remote_code
from dspark_hf.modeling.formats import deepseek_v4 as drafter_names
from dspark_hf.modeling.formats.tensors import HUB_OPTIONS

# the Pipeline looks a class up by these names among those of Transformers: an Auto class leads back to ours
_LOADING = (gguf.OPTION, "trust_remote_code", "_from_auto", "_from_pipeline", "_commit_hash")
_ARCHITECTURES = ("DSparkAssistantModel", "AutoModelForCausalLM")


class DSparkConfig(PreTrainedConfig):
    """Describe a DSpark drafter: a parallel block backbone, a Markov head and a confidence head.

    Args:
        vocab_size: size of the target's vocabulary.
        hidden_size: width of the drafter and of the target's hidden states (they are the same).
        intermediate_size: width of the gated MLP.
        num_hidden_layers: number of drafter layers (5 in the released checkpoints).
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key/value heads; defaults to `num_attention_heads`.
        head_dim: size of one head; defaults to `hidden_size // num_attention_heads`.
        hidden_act: activation of the MLP.
        rms_norm_eps: epsilon of every RMSNorm.
        rope_parameters: rotary embedding in Transformers' form, for example
            `{"rope_type": "default", "rope_theta": 10000.0}`; the types are `"default"`, `"linear"`, `"yarn"`,
            `"llama3"` and `"proportional"` (Gemma 4).
        rope_interleaved: whether every even entry of a head turns with the next one (LFM2), instead of with the one
            half a head further on.
        max_position_embeddings: longest context the rotary embedding is meant for, in tokens.
        attention_bias: whether the attention projections carry a bias.
        use_qk_norm: whether queries and keys pass an RMSNorm per head (Qwen3's way; the released drafters do).
        attention_k_eq_v: whether values are the unnormalised keys (Gemma 4; then there is no `v_proj`).
        backbone_type: `"qwen3"` (pre-norm), `"gemma3"` (sandwich norms), `"gemma4"` (sandwich norms, value norm,
            layer scalar) or `"deepseek_v4"` (hyper-connections, experts, one key/value vector for all heads).
        backbone_config: fields of the `DeepseekV4DSparkConfig` that describes the stages, for `"deepseek_v4"` only.
        context_window: latest context positions that a block sees; `None` means all.
        sliding_layers: the drafter layers that `context_window` holds for; `None` means all of them.
        has_causal_sliding_layers: whether a slot sees only the block's earlier slots in those layers, not the later.
        embed_scale: factor on the drafter's own token embedding (`sqrt(hidden_size)` for Gemma 4). A borrowed
            embedding brings the target's own scale.
        final_logit_softcapping: soft cap of the drafter's own output head. A borrowed head brings the target's.
        owns_embeddings: whether the checkpoint carries its own `embed_tokens` and `lm_head` (the released DeepSpec
            checkpoints do). Otherwise both are borrowed from the target by reference.
        owns_head: whether it carries its own `lm_head`, where that is not as with the embedding.
        borrows_bare_weights: whether what is borrowed is the target's matrices alone, without the scale of its
            embedding and the scale and cap of its logits.
        block_size: drafted tokens per round, also the number of input slots: anchor + `block_size - 1` masks (Eq. 1).
        sample_from_anchor: whether the anchor's slot drafts too, so that slot k drafts the token behind it. If not,
            one more slot is run, slot k drafts the token at its own place, and what the anchor's slot says is dropped.
        mask_token_id: token that fills the slots after the anchor.
        target_layer_ids: target decoder layers whose outputs are injected as context (Eq. 2-3), strictly increasing;
            -1 is the embedding's output.
        num_target_layers: number of decoder layers of the target.
        markov_rank: rank of the Markov head's transition bias (Eq. 5); 0 means none, which is a plain DFlash drafter.
        markov_head_type: `"vanilla"`, `"gated"` or `"rnn"`.
        markov_over_draft_vocab: whether the Markov head tells previous tokens apart only where the drafter can propose
            them; all others share one row. Drafts are proposable, so only anchors can be others. Needs
            `draft_vocab_size`; makes drafters for large vocabularies many times smaller.
        markov_top_k: how many tokens of a slot the Markov head corrects, those with the best base logits; no others
            are proposed then. 0 means all of them; `None` means 512 where more than 32,768 can be proposed, else all.
        enable_confidence_head: whether a confidence head predicts each draft's acceptance (Eq. 7).
        confidence_head_with_markov: whether that head also reads the previous token's Markov embedding.
        confidence_head_bias: whether that head has a bias.
        draft_vocab_size: number of tokens the drafter can propose; `None` means all of them. The tokens are named by
            the buffer `d2t` of the weights.
        sts_temperatures: `block_size` temperatures of the confidence, from Sequential Temperature Scaling; `None`
            means uncalibrated.
        accept_rates: of each of the `block_size` drafts, how often it is accepted if those before it are, on text kept
            aside: what decoding expects of the drafter until it has seen more. Training writes it, `None` is unknown.
        initializer_range: standard deviation of fresh weights.
        base_model_name_or_path: name or path of the target that the drafter was made for, if that is known.
        target_fingerprint: what tells that target from others of its shape, see `modeling/provenance.py`.

    Raises:
        ValueError: if a field is not of its kind, not finite, out of bounds, or breaks a rule above; the message names
            the field, the rule and the value.

    Example:

        >>> from dspark_hf import DSparkConfig
        >>> config = DSparkConfig(vocab_size=128, hidden_size=32, num_attention_heads=4, target_layer_ids=[0, 1])
        >>> config.block_size
        7
    """

    model_type = "dspark"

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 2560,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 5,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        rope_parameters: dict[str, Any] | None = None,
        rope_interleaved: bool = False,
        max_position_embeddings: int = 32768,
        attention_bias: bool = False,
        use_qk_norm: bool = True,
        attention_k_eq_v: bool = False,
        backbone_type: str = "qwen3",
        backbone_config: dict[str, Any] | None = None,
        context_window: int | None = None,
        sliding_layers: list[int] | None = None,
        has_causal_sliding_layers: bool = False,
        embed_scale: float = 1.0,
        final_logit_softcapping: float | None = None,
        owns_embeddings: bool = False,
        owns_head: bool | None = None,
        borrows_bare_weights: bool = False,
        block_size: int = 7,
        sample_from_anchor: bool = True,
        mask_token_id: int = 0,
        target_layer_ids: list[int] | None = None,
        num_target_layers: int | None = None,
        markov_rank: int = 256,
        markov_head_type: str = "vanilla",
        markov_over_draft_vocab: bool = False,
        markov_top_k: int | None = None,
        enable_confidence_head: bool = True,
        confidence_head_with_markov: bool = True,
        confidence_head_bias: bool = True,
        draft_vocab_size: int | None = None,
        sts_temperatures: list[float] | None = None,
        accept_rates: list[float] | None = None,
        initializer_range: float = 0.02,
        base_model_name_or_path: str | None = None,
        target_fingerprint: str | None = None,
        **kwargs: Any,
    ):
        check_kinds(dict(locals()))
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.rope_interleaved = rope_interleaved
        self.max_position_embeddings = max_position_embeddings
        self.attention_bias = attention_bias
        self.use_qk_norm = use_qk_norm
        self.attention_k_eq_v = attention_k_eq_v
        self.backbone_type = backbone_type
        self.backbone_config = backbone_config
        self.context_window = context_window
        self.sliding_layers = None if sliding_layers is None else list(sliding_layers)
        self.has_causal_sliding_layers = has_causal_sliding_layers
        self.embed_scale = embed_scale
        self.final_logit_softcapping = final_logit_softcapping
        self.owns_embeddings = owns_embeddings
        self.owns_head = owns_embeddings if owns_head is None else owns_head
        self.borrows_bare_weights = borrows_bare_weights
        self.block_size = block_size
        self.sample_from_anchor = sample_from_anchor
        self.mask_token_id = mask_token_id
        self.target_layer_ids = [0] if target_layer_ids is None else list(target_layer_ids)
        self.num_target_layers = (
            max([0, *self.target_layer_ids]) + 1 if num_target_layers is None else num_target_layers
        )
        self.markov_rank = markov_rank
        self.markov_head_type = markov_head_type
        self.markov_over_draft_vocab = markov_over_draft_vocab
        self.markov_top_k = markov_top_k
        self.enable_confidence_head = enable_confidence_head
        self.confidence_head_with_markov = confidence_head_with_markov and markov_rank > 0
        self.confidence_head_bias = confidence_head_bias
        self.draft_vocab_size = draft_vocab_size
        self.sts_temperatures = sts_temperatures
        self.accept_rates = accept_rates
        self.initializer_range = initializer_range
        self.base_model_name_or_path = base_model_name_or_path
        self.target_fingerprint = target_fingerprint
        # the drafter never ties: a borrowed head and embedding keep whatever tie the target has
        kwargs["tie_word_embeddings"] = False
        self._check_relations()
        super().__init__(**kwargs)

    @property
    def deepseek_v4(self) -> DeepseekV4DSparkConfig | None:
        """What describes the stages of a DeepSeek-V4 backbone, or None for other backbones."""
        return None if self.backbone_config is None else DeepseekV4DSparkConfig(**self.backbone_config)

    @property
    def num_draft_logits(self) -> int:
        """Number of tokens the drafter can propose."""
        return self.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size

    @property
    def num_slots(self) -> int:
        """Number of input slots: the anchor and the masks."""
        return self.block_size if self.sample_from_anchor else self.block_size + 1

    def window_of(self, layer: int) -> int | None:
        """Return how much of the context one of the drafter's layers sees, None for all of it."""
        return self.context_window if self.sliding_layers is None or layer in self.sliding_layers else None

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the fields of a drafter folder, hub name or GGUF file, in our own layout or a foreign one.

        Raises:
            ValueError: if there is no DSpark drafter.
        """
        pretrained_model_name_or_path = local_name(pretrained_model_name_or_path)
        known_file = kwargs.get(gguf.OPTION) or "config.json"
        kwargs.update(hub_options(pretrained_model_name_or_path, kwargs, known_file))
        file = gguf.find_file(pretrained_model_name_or_path, kwargs)
        if file is not None:
            unused = {name: value for name, value in kwargs.items() if name not in (*HUB_OPTIONS, *_LOADING)}
            return {**gguf.translate(file), "architectures": list(_ARCHITECTURES)}, unused
        fields, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        packaging = choosing.find_packaging(fields)
        if packaging is not None:
            given = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            fields = choosing.translate(packaging, pretrained_model_name_or_path, fields, **given)
            fields["architectures"] = list(_ARCHITECTURES)
        elif drafter_names.is_released(fields):
            fields = drafter_names.drafter_fields(fields)
        unread = choosing.describe_unread(fields)
        if unread is not None:
            known = ", ".join(packaging.name for packaging in choosing.PACKAGINGS)
            raise ValueError(
                f"`pretrained_model_name_or_path` must hold a drafter in dspark_hf's layout or one of {known}, "
                f"got {str(pretrained_model_name_or_path)!r}, {unread}, which is not read yet. Take one in "
                "another layout, or train one with `DSparkAssistantModel.from_target(target)`."
            )
        if fields.get("model_type") != cls.model_type:
            raise ValueError(
                f"`pretrained_model_name_or_path` must hold a DSpark drafter, got "
                f"{str(pretrained_model_name_or_path)!r} with model type {fields.get('model_type')!r}. Make a drafter "
                "for a target with `DSparkAssistantModel.from_target(target)`."
            )
        return fields, unused

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save `config.json`, and the remote-code shim beside it if `auto_map` is set."""
        self.architectures = list(_ARCHITECTURES)
        if getattr(self, "auto_map", None):
            remote_code.write_shim(save_directory)
            self.auto_map = dict(remote_code.AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: the code lives in the installed package, and a saved folder must not receive a copy of it."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of a dictionary, with `kwargs` in the place of its fields.

        Raises:
            ValueError: if a field is not of its kind, or breaks a rule.
        """
        result = super().from_dict(config_dict, **kwargs)
        # Transformers sets overrides after the configuration is made
        (result[0] if isinstance(result, tuple) else result).check()
        return result

    def check(self) -> None:
        """Raise a `ValueError` that names the field if one was set to what cannot be."""
        names = (
            name for name in inspect.signature(DSparkConfig.__init__).parameters if name not in ("self", "kwargs")
        )
        check_kinds({name: getattr(self, name) for name in names})
        self._check_relations()

    def _check_relations(self) -> None:
        require(
            (self.backbone_config is not None) == (self.backbone_type == "deepseek_v4"),
            "backbone_config",
            "be given for the backbone type 'deepseek_v4' and for no other",
            self.backbone_config,
        )
        ids = self.target_layer_ids
        increasing = len(ids) > 0 and all(a < b for a, b in zip(ids, ids[1:], strict=False))
        require(increasing, "target_layer_ids", "be strictly increasing and not empty", ids)
        require(
            ids[0] >= -1 and ids[-1] < self.num_target_layers,
            "target_layer_ids",
            f"lie in [-1, {self.num_target_layers - 1}] (-1 is the embedding)",
            ids,
        )
        sliding = self.sliding_layers
        require(
            sliding is None
            or (self.context_window is not None and all(0 <= i < self.num_hidden_layers for i in sliding)),
            "sliding_layers",
            f"name layers in [0, {self.num_hidden_layers - 1}], and be None without `context_window`",
            sliding,
        )
        require(
            not self.has_causal_sliding_layers or (self.context_window is not None and self.backbone_config is None),
            "has_causal_sliding_layers",
            "be False without `context_window`, and for DeepSeek-V4's stages",
            self.has_causal_sliding_layers,
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_attention_heads",
            f"be a multiple of num_key_value_heads={self.num_key_value_heads}",
            self.num_attention_heads,
        )
        require(
            not self.markov_over_draft_vocab or self.draft_vocab_size is not None,
            "markov_over_draft_vocab",
            "be False without `draft_vocab_size`",
            self.markov_over_draft_vocab,
        )
