"""DeepSeek-V4 as a Transformers model, with a cache that can be rolled back exactly.

Modules carry the names of the released tensors. B batch, T tokens, n streams, D hidden, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.generation.targets.adapter import device_of
from dspark_hf.modeling.backbone import RMSNorm
from dspark_hf.modeling.deepseek_v4.cache import DeepseekV4DSparkCache
from dspark_hf.modeling.deepseek_v4.checkpoints.released import ReleasedCheckpoints
from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig
from dspark_hf.modeling.deepseek_v4.hyper_connections import join_streams
from dspark_hf.modeling.deepseek_v4.layer import DeepseekV4Layer, add_hyper_head, init_weights
from dspark_hf.modeling.deepseek_v4.losses import balance_loss
from dspark_hf.modeling.deepseek_v4.packing import Packing
from dspark_hf.modeling.deepseek_v4.rotary import rotary_tables
from dspark_hf.modeling.deepseek_v4.storage import make_span
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel


@dataclass
class DeepseekV4ModelOutput(MoeModelOutputWithPast):
    """Output of the decoder: that of Transformers' mixtures of experts, where

    - `hidden_states` are streams `(B, T, n, D)`: the embedding's, then the output of every layer,
    - `router_logits` are the affinities `(B * T, X)` of every layer with learned routing,
    - `indexer_loss` is new: the mean divergence of the indexers from their attention, a scalar.
    """

    indexer_loss: Tensor | None = None


@dataclass
class DeepseekV4CausalLMOutput(MoeCausalLMOutputWithPast):
    """Output of the causal LM: that of Transformers' mixtures of experts, and `indexer_loss`; logits are in fp32."""

    indexer_loss: Tensor | None = None


class DeepseekV4DSparkPreTrainedModel(ReleasedCheckpoints):
    """What both models share."""

    config_class = DeepseekV4DSparkConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekV4Layer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    # as the released code: router, hyper-connections, compressor, sinks and head in fp32
    _keep_in_fp32_modules_strict = ["hc_", "attn_sink", "gate", "compressor", "head"]
    _keys_to_ignore_on_load_unexpected = [r"^mtp\."]
    _is_stateful = False
    config: DeepseekV4DSparkConfig

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states; the first parameter, which Transformers looks at, is in fp32 with any."""
        embedding: Any = self.get_input_embeddings()
        return embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device that token ids belong on; the embedding, which Transformers looks at, may itself be on disk."""
        return device_of(self.get_input_embeddings())

    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config)


class DeepseekV4DSparkModel(DeepseekV4DSparkPreTrainedModel):
    """The decoder of DeepSeek-V4, without the output head."""

    hc_head_fn: nn.Parameter
    hc_head_base: nn.Parameter
    hc_head_scale: nn.Parameter

    def __init__(self, config: DeepseekV4DSparkConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DeepseekV4Layer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        add_hyper_head(self, config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embed = value  # type: ignore[assignment]  # any module that embeds

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DeepseekV4DSparkCache | None = None,
        past_key_values: DeepseekV4DSparkCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> DeepseekV4ModelOutput:
        """Run the decoder over `input_ids` `(B, T)`.

        Args:
            input_ids: token ids; needed also beside `inputs_embeds` if the first layers route by token id.
            attention_mask: `(B, S)`, S the tokens so far and these; zeros mark padding on either side. None: no
                padding.
            position_ids: not looked at: positions follow from the mask and the cache, since compressed entries do.
            cache: from an earlier pass.
            past_key_values: the same, under its older name.
            inputs_embeds: embeddings `(B, T, D)` instead of the tokens' own.
            use_cache: whether to keep a cache; default as configured, and never in training.
            output_hidden_states: whether to return every layer's streams.

        Raises:
            ValueError: if neither tokens nor embeddings are given, or mask or cache do not fit.
        """
        cache = past_key_values if cache is None else cache
        embeds = self._embeddings(input_ids, inputs_embeds)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            # a layer that runs twice would write twice
            use_cache = False
            if cache is not None:
                raise ValueError(
                    f"`{CACHE_KEY}` must be left out of training with gradient checkpointing, got a cache. Leave it "
                    "out, or call `model.eval()` first."
                )
        if use_cache and cache is None:
            cache = DeepseekV4DSparkCache(self.config, embeds.dtype)
        _check_cache(cache)
        packing = Packing(attention_mask, embeds.shape[:2], 0 if cache is None else cache.num_columns)
        embeds, token_ids = packing.pack(embeds), None if input_ids is None else packing.pack(input_ids)
        if cache is None:
            span = make_span([0] * len(embeds), packing.counts, packing.width, embeds.device)
        else:
            span = cache.begin(packing.counts, packing.width, embeds.device)
        streams = embeds.unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1)
        plain, compressed = (rotary_tables(self.config, span.positions, is_compressed=each) for each in (False, True))
        kinds = self.config.attention_kinds
        every, affinities, losses = [streams], [], []
        for number, layer in enumerate(self.layers):
            store = None if cache is None else cache.store(number)
            rotary = plain if kinds[number] == "window" else compressed
            streams, affinity, loss = layer(streams, span, rotary, store, token_ids)
            losses.append(loss)
            if output_hidden_states:
                every.append(streams)
            if number >= self.config.num_hash_layers:
                affinities.append(affinity)
        if cache is not None:
            cache.finish(span, packing.num_columns)
        joined = join_streams(
            # layers may be on other devices
            streams.to(self.hc_head_fn.device),
            self.hc_head_fn,
            self.hc_head_base,
            self.hc_head_scale,
            self.config,
        )
        return DeepseekV4ModelOutput(
            last_hidden_state=packing.unpack(self.norm(joined)),
            hidden_states=tuple(packing.unpack(states) for states in every) if output_hidden_states else None,
            router_logits=tuple(affinities),
            indexer_loss=torch.stack([loss.to(losses[0].device) for loss in losses]).sum(),
            **_under_its_name(cache),
        )

    def _embeddings(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if inputs_embeds is not None:
            return inputs_embeds
        if input_ids is None:
            raise ValueError("`input_ids` must be given, got neither `input_ids` nor `inputs_embeds`. Pass token ids.")
        return self.embed(input_ids)


def _under_its_name(cache: Any) -> dict[str, Any]:
    return {CACHE_KEY: cache}


def _check_cache(cache: Any) -> None:
    if cache is not None and not isinstance(cache, DeepseekV4DSparkCache):
        raise ValueError(
            f"`{CACHE_KEY}` must be a DeepseekV4DSparkCache, got {type(cache).__name__}. Leave it out, or pass one "
            "that an earlier call returned."
        )


class DeepseekV4DSparkForCausalLM(DeepseekV4DSparkPreTrainedModel, GenerationMixin):
    """DeepSeek-V4 with its output head.

    Example:

        >>> import torch
        >>> from dspark_hf import DeepseekV4DSparkConfig, DeepseekV4DSparkForCausalLM
        >>> config = DeepseekV4DSparkConfig(vocab_size=64, hidden_size=32, moe_intermediate_size=16,
        ...     num_hidden_layers=3, compress_ratios=[0, 4, 8], num_attention_heads=4, head_dim=16,
        ...     qk_rope_head_dim=8, q_lora_rank=16, o_groups=2, o_lora_rank=16, n_routed_experts=4,
        ...     num_experts_per_tok=2, num_hash_layers=1, sliding_window=8, index_n_heads=16, index_head_dim=16,
        ...     index_topk=4, eos_token_id=None)
        >>> model = DeepseekV4DSparkForCausalLM(config).eval()
        >>> model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
    """

    _tp_plan = {"head": "colwise_gather_output"}

    def __init__(self, config: DeepseekV4DSparkConfig):
        super().__init__(config)
        self.model = DeepseekV4DSparkModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output head."""
        self.head = new_embeddings  # type: ignore[assignment]  # any module that projects

    def get_decoder(self) -> DeepseekV4DSparkModel:
        """Return the decoder."""
        return self.model

    def set_decoder(self, decoder: DeepseekV4DSparkModel) -> None:
        """Replace the decoder."""
        self.model = decoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DeepseekV4DSparkCache | None = None,
        past_key_values: DeepseekV4DSparkCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> DeepseekV4CausalLMOutput:
        """Return next-token logits; the arguments are those of `DeepseekV4DSparkModel.forward`, and:

        Args:
            labels: `(B, T)`, the tokens themselves; -100 where there is no loss.
            output_router_logits: whether to return the affinities and add the balance term to the loss.
            logits_to_keep: number of last positions with logits (0: all), or their indices.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            cache=cache if past_key_values is None else past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        states = states[:, kept] if not isinstance(kept, int) else states
        logits = self.head(states.to(self.head.weight.dtype)).float()
        aux_loss = None
        if output_router_logits:
            is_real = None if attention_mask is None else attention_mask[:, -outputs.last_hidden_state.shape[1] :]
            aux_loss = self._balance_loss(outputs.router_logits, is_real)
        return DeepseekV4CausalLMOutput(
            loss=None if labels is None else self._loss(logits, labels, aux_loss, outputs.indexer_loss, kwargs),
            aux_loss=aux_loss,
            indexer_loss=outputs.indexer_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits if output_router_logits else None,
            **_under_its_name(outputs.get(CACHE_KEY)),
        )

    def _balance_loss(self, affinities: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        is_real = None
        if mask is not None and not bool(mask.all()):
            # the affinities are in packed order: a row's real tokens first
            counts = mask.sum(-1)
            width = affinities[0].shape[0] // len(mask)
            is_real = (torch.arange(width, device=mask.device) < counts[:, None]).flatten()
        return balance_loss(affinities, self.config.num_experts_per_tok, is_real)

    def _loss(
        self, logits: Tensor, labels: Tensor, aux_loss: Tensor | None, indexer_loss: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        num_items = kwargs.get("num_items_in_batch")
        # of accumulated batches each adds its share of the next-token loss: of the other terms too
        share = 1.0 if num_items is None else labels.ne(-100).sum().to(loss.device) / num_items
        if aux_loss is not None:
            loss = loss + share * self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        if self.config.indexer_loss_coef:
            loss = loss + share * self.config.indexer_loss_coef * indexer_loss.to(loss.device)
        return loss

    @property
    def dspark(self) -> Any:
        """The drafter in the checkpoint that this model was loaded from; read when it is first asked for.

        Raises:
            ValueError: if there is none.
        """
        # no submodule: it is not this model's to save or to train
        if "_dspark" not in self.__dict__:
            if not self.config.has_dspark or not self.name_or_path:
                raise ValueError(
                    "`use_dspark` must be left out for a model that was not loaded from a checkpoint with a DSpark "
                    f"module, got {self.name_or_path or 'a fresh model'!r}. Pass a drafter as `assistant_model`."
                )
            stored = None if self.dtype == torch.bfloat16 else self.dtype
            drafter = DSparkAssistantModel.from_pretrained(
                self.name_or_path, dtype=stored, cache_dtype=self.config.cache_dtype, **self._hub_options
            )
            self.__dict__["_dspark"] = drafter.to(self.device)
        return self.__dict__["_dspark"]

    def generate(self, *args: Any, use_dspark: bool = False, **kwargs: Any) -> Any:
        """Generate as every model of Transformers; with `use_dspark=True`, assisted by the checkpoint's own drafter.

        Raises:
            ValueError: if `use_dspark` is set without such a drafter, or beside `assistant_model`.
        """
        if use_dspark:
            if kwargs.get("assistant_model") is not None:
                raise ValueError("`use_dspark` must be False beside `assistant_model`, got True. Choose one drafter.")
            kwargs["assistant_model"] = self.dspark
        return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        # transformers 5.24: GenerationMixin would prepare a cache of the kinds that it knows
        if model_kwargs.get(CACHE_KEY) is not None or generation_config.use_cache is False:
            # transformers narrows `self` to models that generate
            prepare: Any = super()._prepare_cache_for_generation  # type: ignore[misc]
            return prepare(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                "`cache_implementation` must be left out for DeepSeek-V4, got "
                f"{generation_config.cache_implementation!r}. It has a cache of its own."
            )
        model_kwargs[CACHE_KEY] = DeepseekV4DSparkCache(self.config, self.dtype)
        return None
