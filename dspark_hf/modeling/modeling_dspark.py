"""The DSpark drafter as a Transformers model (arXiv 2607.05147).

B batch, N blocks per row, K block_size, T tokens, V vocab, D hidden, M tapped layers, R markov rank.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from dspark_hf import hubs
from dspark_hf.generation.compat import run_compiled
from dspark_hf.generation.custom_generate import CustomGenerate
from dspark_hf.generation.drafting.branching import grow_tree
from dspark_hf.generation.drafting.chain import sample_block
from dspark_hf.generation.drafting.context import ContextCache
from dspark_hf.generation.drafting.interface import DraftContext, DraftedBlock, Sampler
from dspark_hf.generation.fixed_size import FixedSize, fix_shapes
from dspark_hf.generation.lean_passes import below_autograd
from dspark_hf.generation.packing import pack_beside
from dspark_hf.generation.statistics import SpeculationStatistics
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling import from_target, quantization
from dspark_hf.modeling.backbone import DSparkLayer, RMSNorm
from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.modeling.deepseek_v4.checkpoints.dspark_module import load_module
from dspark_hf.modeling.deepseek_v4.layer import init_weights
from dspark_hf.modeling.deepseek_v4.stage import DeepseekV4Stage, StageRotary, StreamEnds
from dspark_hf.modeling.draft_head import DraftHead
from dspark_hf.modeling.formats import gguf
from dspark_hf.modeling.formats.choosing import find_packaging, load_gguf, load_tensors
from dspark_hf.modeling.formats.deepseek_v4 import drafter_fields, is_released
from dspark_hf.modeling.formats.recommendation import read_recommendation
from dspark_hf.modeling.formats.remote_code import AUTO_MAP, write_custom_generate
from dspark_hf.modeling.formats.sizes import ELSEWHERE, check_sizes
from dspark_hf.modeling.formats.tensors import HUB_OPTIONS, read_shapes
from dspark_hf.modeling.heads import DEFAULT_MARKOV_TOP_K, LARGE_HEAD, ConfidenceHead, build_markov_head
from dspark_hf.modeling.provenance import Acquaintance
from dspark_hf.modeling.rotary import RotaryEmbedding
from dspark_hf.modeling.saved_folder import complete_folder, copy_mapped_weights, upload_card
from dspark_hf.modeling.vocabulary import resize_vocabulary
from dspark_hf.modeling.warm_start import copy_last_layers
from dspark_hf.places import take_at

_LOGGER = logging.get_logger(__name__)


@dataclass
class BlockStates:
    """Outputs of a training pass.

    `hidden_states` `(B, N, K, D)` are the backbone's, after the final norm; `latents` `(B, N, K, R)` the Markov head's
    (None without one); `confidence_logits` `(B, N, K)`, fp32, the confidence head's (None without one).
    """

    hidden_states: Tensor
    latents: Tensor | None
    confidence_logits: Tensor | None


class DSparkAssistantModel(PreTrainedModel, CustomGenerate):
    """Propose blocks of tokens for a target model, from the target's own hidden states.

    Pass it as `assistant_model` to `target.generate(...)`. The embedding and the output head are borrowed from the
    target by reference unless the checkpoint brought its own.

    Example:

        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from dspark_hf import DSparkAssistantModel
        >>> target = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, eos_token_id=None))
        >>> drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
        >>> prompt = torch.tensor([[5, 6, 7]])
        >>> plain = target.generate(prompt, max_new_tokens=8, do_sample=False)
        >>> assisted = target.generate(prompt, max_new_tokens=8, do_sample=False, assistant_model=drafter)
        >>> torch.equal(plain, assisted)
        True
    """

    config_class = DSparkConfig
    base_model_prefix = ""
    main_input_name = "context_hidden_states"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DSparkLayer", "DeepseekV4Stage"]
    # parameters of DeepSeek-V4's stages only
    _keep_in_fp32_modules_strict = ["hc_", "attn_sink", "gate.bias"]
    config: DSparkConfig
    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        self._acquaintance = Acquaintance()
        width = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * width, width, bias=False)
        self.hidden_norm = RMSNorm(width, config.rms_norm_eps)
        self.norm = RMSNorm(width, config.rms_norm_eps)
        deepseek, count = config.deepseek_v4, config.num_hidden_layers
        self.streams = None if deepseek is None else StreamEnds(deepseek)
        if deepseek is None:
            are_causal = [config.has_causal_sliding_layers and config.window_of(i) is not None for i in range(count)]
            self.layers = nn.ModuleList([DSparkLayer(config, is_causal) for is_causal in are_causal])
            self.rotary_emb: nn.Module = RotaryEmbedding(config)
        else:
            self.layers = nn.ModuleList([DeepseekV4Stage(deepseek) for _ in range(count)])
            self.rotary_emb = StageRotary(deepseek)
        self.markov_head = build_markov_head(config)
        self.confidence_head = ConfidenceHead(config) if config.enable_confidence_head else None
        if config.owns_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if config.owns_head:
            self.lm_head = nn.Linear(width, config.num_draft_logits, bias=False)
        if config.draft_vocab_size is not None:
            # as vLLM and speculators store it: draft id + d2t[draft id] = target id; t2d marks proposable tokens
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
            self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.post_init()

    @classmethod
    def from_target(
        cls,
        target: PreTrainedModel,
        *,
        block_size: int = 7,
        num_hidden_layers: int | None = None,
        target_layer_ids: Sequence[int] | None = None,
        mask_token_id: int | None = None,
        markov_rank: int = 256,
        markov_head_type: str = "vanilla",
        enable_confidence_head: bool = True,
        draft_token_ids: Tensor | Sequence[int] | None = None,
        warm_start: bool = False,
        **overrides: Any,
    ) -> DSparkAssistantModel:
        """Return a fresh, untrained drafter for `target`, on its device and in its dtype.

        Args:
            target: any decoder-only causal LM.
            block_size: drafts per round (7, as released).
            num_hidden_layers: drafter layers; default 5 as released, at most as many as the target has.
            target_layer_ids: layers to read; default 5 evenly spaced ones from the second to the third from last.
            mask_token_id: default the target's padding token, or its last token id where padding is a real token.
            markov_rank: rank of the Markov head; 0 for none.
            markov_head_type: `"vanilla"`, `"gated"` or `"rnn"`.
            enable_confidence_head: whether to add a confidence head.
            draft_token_ids: the tokens the drafter may propose, for a reduced draft vocabulary; default all.
            warm_start: copy the target's last layers into the drafter where their shapes agree.
            overrides: other fields of `DSparkConfig`.

        Raises:
            ValueError: if no drafter can assist `target`, an encoder-decoder for example, or a field breaks a rule of
                `DSparkConfig`, or `warm_start` finds no layer that fits.
        """
        target = from_target.check_servable(target)
        if overrides.pop("draft_vocab_size", None) is not None:
            raise ValueError(
                "`draft_vocab_size` must be left out, since it is the number of `draft_token_ids`, got it. Pass the "
                "tokens themselves: `training.conversations.most_frequent_tokens` chooses them from text."
            )
        adapter = TargetAdapter(target)
        config = from_target.config_for_target(
            adapter,
            block_size=block_size,
            num_hidden_layers=num_hidden_layers,
            target_layer_ids=target_layer_ids,
            mask_token_id=mask_token_id,
            markov_rank=markov_rank,
            markov_head_type=markov_head_type,
            enable_confidence_head=enable_confidence_head,
            draft_vocab_size=None if draft_token_ids is None else len(draft_token_ids),
            warm_start=warm_start,
            **overrides,
        )
        drafter = cls(config)
        if draft_token_ids is not None:
            drafter.set_draft_token_ids(torch.as_tensor(draft_token_ids, device=drafter.d2t.device))
        if warm_start:
            copy_last_layers(adapter, drafter)
        dtype = target.dtype if target.dtype.is_floating_point else torch.float32
        drafter.to(device=adapter.device, dtype=dtype)  # type: ignore[call-arg]  # Transformers hides the signature
        return drafter.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]  # every further argument is passed on
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a drafter from a folder or a hub name: our own layout, a foreign one, or DeepSeek-V4.

        `modelscope://AUTHOR/MODEL` is fetched from ModelScope.
        Of a GGUF file, name the path itself, or with `gguf_file` the file inside a folder or hub name.

        Of foreign folders configurations and tensors are read; code that they bring is never run. With a
        `BitsAndBytesConfig` that says nothing of it, the heads stay as they are: they are small, and decide what is
        drafted.
        Takes every argument of `PreTrainedModel.from_pretrained`. Of a DeepSeek-V4 checkpoint with a DSpark module,
        that module alone is read; `dtype`, `keep_quantized`, a device as `device_map` and hub options apply.

        Raises:
            ValueError: if the folder holds no DSpark drafter, or its tensors are not exactly the drafter's: one left
                at random would draft badly without an error.
        """
        if hubs.is_elsewhere(str(pretrained_model_name_or_path)):
            revision = kwargs.pop("revision", None)
            pretrained_model_name_or_path = hubs.local_name(str(pretrained_model_name_or_path), revision=revision)
        known_file = kwargs.get(gguf.OPTION) or "config.json"
        kwargs.update(hubs.hub_options(pretrained_model_name_or_path, kwargs, known_file))
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        fields: dict[str, Any] = {}
        file = None
        if pretrained_model_name_or_path is not None:
            file = gguf.find_file(pretrained_model_name_or_path, kwargs)
        if file is not None:
            kwargs.pop(gguf.OPTION, None)
            pretrained_model_name_or_path = file
        elif pretrained_model_name_or_path is not None:
            fields, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub_options)
        if is_released(fields):
            config = cls.config_class.from_dict(drafter_fields(fields))
            return load_module(cls, pretrained_model_name_or_path, config, **kwargs)
        if isinstance(kwargs.get("quantization_config"), BitsAndBytesConfig):
            kwargs["quantization_config"] = quantization.leave_out_heads(kwargs["quantization_config"])
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["output_loading_info"] = True
        if file is None and find_packaging(fields) is None:
            if pretrained_model_name_or_path is not None and not any(kwargs.get(name) for name in ELSEWHERE):
                cls._check_own_sizes(pretrained_model_name_or_path, kwargs, hub_options)
            loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        else:
            options = _options_for_tensors(cls.config_class, pretrained_model_name_or_path, kwargs, hub_options)
            if file is not None:
                tensors = load_gguf(file)
            else:
                tensors = load_tensors(pretrained_model_name_or_path, fields, **hub_options)
            shapes = {name: tuple(x.shape) for name, x in tensors.items()}
            check_sizes(shapes, cls._shapes_of(options["config"]), pretrained_model_name_or_path, hub_options)
            loaded = super().from_pretrained(None, *args, state_dict=tensors, **options)
            loaded[0].config.name_or_path = str(pretrained_model_name_or_path)
        drafter, info = loaded
        for kind in ("missing_keys", "unexpected_keys"):
            if info[kind]:
                raise ValueError(
                    f"`pretrained_model_name_or_path` must hold exactly the drafter's tensors, got "
                    f"{kind.replace('_', ' ')} {sorted(info[kind])} in {str(pretrained_model_name_or_path)!r}. Its "
                    "weights and its configuration do not belong together: save the drafter anew."
                )
        drafter.check_draft_token_ids()
        # a GGUF file stands alone
        folder = pretrained_model_name_or_path if file is None else None
        drafter.generation_config = read_recommendation(folder, hub_options)
        copy_mapped_weights(drafter)
        return (drafter, info) if wants_info else drafter

    @classmethod
    def _check_own_sizes(cls, name_or_path: Any, options: dict[str, Any], hub_options: dict[str, Any]) -> None:
        """Raise a `ValueError` if a tensor in our own layout is not of the size that its configuration says."""
        config = _options_for_tensors(cls.config_class, name_or_path, options, hub_options)["config"]
        # weights in fewer bits lie in other shapes
        if getattr(config, "quantization_config", None) is None:
            shapes = read_shapes(name_or_path, **hub_options)
            check_sizes(shapes, cls._shapes_of(config), name_or_path, hub_options)

    @classmethod
    def _shapes_of(cls, config: DSparkConfig) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a drafter's tensors by their names, without making it."""
        with torch.device("meta"):
            return {name: tuple(x.shape) for name, x in cls(config).state_dict().items()}

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, remote_code: bool = True, **kwargs: Any
    ) -> None:
        """Save weights, configuration, a model card, and the target's tokenizer if it lies on this machine.

        The knobs that `generation_config` recommends, if there is one, are saved too.

        The folder also holds a shim, so that `trust_remote_code=True` loads the installed class without
        `import dspark_hf`, and without the package Transformers says what to install, and `custom_generate/`, so that
        `target.generate(..., custom_generate=folder, trust_remote_code=True)` does; `remote_code=False` leaves both
        out. A model card or a tokenizer that is there already stays.
        """
        if remote_code:
            # the configuration writes the shim when it is saved
            self.config.auto_map = dict(AUTO_MAP)
        elif hasattr(self.config, "auto_map"):
            del self.config.auto_map
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.recommended is not None:
            # Transformers saves those of models that generate by themselves
            self.recommended.save_pretrained(save_directory)
        if remote_code:
            write_custom_generate(save_directory)
        complete_folder(save_directory, self.config, self._origin)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # type: ignore[override]  # every argument is passed on
        """Upload what `save_pretrained` writes; takes the arguments of `PreTrainedModel.push_to_hub`.

        A repository without a model card gets the drafter's, unless another branch or a pull request is asked for.
        """
        if not kwargs.get("create_pr") and kwargs.get("revision") is None:
            # Transformers keeps the card that it finds, and else writes an empty one
            upload_card(
                repo_id, self.config, origin=self._origin, private=kwargs.get("private"), token=kwargs.get("token")
            )
        # mypy takes the inherited method, a copy that Transformers decorates, for a function
        return super().push_to_hub(repo_id, **kwargs)  # type: ignore[arg-type]

    @property
    def _origin(self) -> str | None:
        """The folder that the drafter was loaded from, if any."""
        return self.name_or_path if self.name_or_path and os.path.isdir(self.name_or_path) else None

    def _init_weights(self, module: nn.Module) -> None:
        deepseek = self.config.deepseek_v4
        if deepseek is None:
            super()._init_weights(module)
        else:
            init_weights(module, deepseek)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: the code lives in the installed package, and a saved folder must not receive a copy of it."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the drafter's activations; its weights may be stored in fewer bits."""
        return cast(Tensor, self.hidden_norm.weight).dtype

    # what the decoding loop asks of a drafter

    @property
    def block_size(self) -> int:
        """Drafts per round the drafter was trained for."""
        return self.config.block_size

    @property
    def markov_top_k(self) -> int | None:
        """Tokens of a slot that the Markov head corrects, or None for all: what the configuration says."""
        chosen = self.config.markov_top_k
        if chosen is None:
            is_large = self.config.num_draft_logits > LARGE_HEAD
            chosen = DEFAULT_MARKOV_TOP_K if is_large else 0
        return chosen or None

    @property
    def accept_rates(self) -> list[float] | None:
        """How often each draft is accepted if those before it are, as evaluated; None if it was not."""
        return self.config.accept_rates

    @property
    def target_layer_ids(self) -> list[int]:
        """Target layers whose outputs the drafter reads."""
        return self.config.target_layer_ids

    def check_target(self, target: TargetAdapter) -> None:
        """Raise a `ValueError` that names the mismatch if this drafter was not made for `target`."""
        if self.device.type == "meta":
            raise ValueError(
                "`assistant_model` must hold its weights on a device, got a drafter on 'meta'. Load it with "
                "`from_pretrained`, not offloaded: it is small."
            )
        from_target.check_match(self.config, target)

    def review(self, target: TargetAdapter, statistics: SpeculationStatistics) -> None:
        """Say once if the drafter was made for another target, and its first drafts show it."""
        warning = self._acquaintance.judge(self.config, target, statistics)
        if warning is not None:
            _LOGGER.warning(warning)

    def start(self, target: TargetAdapter, batch_size: int) -> DraftContext:
        """Return an empty context for `batch_size` sequences of `target`."""
        return _DSparkContext(self, target, batch_size)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Raise a `TypeError`: a drafter proposes, the target writes."""
        raise TypeError(
            "`generate` must be called on the target, got a drafter. Swap them: "
            "`target.generate(**inputs, assistant_model=drafter)`."
        )

    @property
    def draft_token_ids(self) -> Tensor | None:
        """The proposable tokens `(draft_vocab_size,)`, or None if all are."""
        if self.config.draft_vocab_size is None:
            return None
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def set_draft_token_ids(self, token_ids: Tensor) -> None:
        """Make `token_ids` the proposable tokens, in ascending order.

        Raises:
            ValueError: unless they are `draft_vocab_size` different tokens of the vocabulary, or if the drafter was
                made to propose all tokens.
        """
        if self.config.draft_vocab_size is None:
            raise ValueError(
                f"`draft_token_ids` must be chosen when a drafter is made, got {len(token_ids)} for one that may "
                "propose all tokens. Pass them to `from_target`, or train on with `dspark-hf train --draft-vocab`."
            )
        token_ids = torch.unique(token_ids.to(self.d2t.device))
        size = self.config.draft_vocab_size
        if len(token_ids) != size or token_ids[0] < 0 or token_ids[-1] >= self.config.vocab_size:
            raise ValueError(
                f"`draft_token_ids` must be {size} different ids in [0, {self.config.vocab_size - 1}], got "
                f"{len(token_ids)} different ids from {token_ids[0]} to {token_ids[-1]}. Remove duplicates."
            )
        self.d2t.copy_(token_ids - torch.arange(len(token_ids), device=self.d2t.device))
        self.t2d.zero_()
        self.t2d[token_ids] = True
        if self.config.markov_over_draft_vocab and self.markov_head is not None:
            self.markov_head.known_ids.copy_(token_ids)

    def check_draft_token_ids(self) -> None:
        """Raise a `ValueError` if `d2t` and `t2d`, as loaded, do not name the proposable tokens as one."""
        if self.config.draft_vocab_size is None or self.d2t.is_meta:
            return
        size, known = self.config.vocab_size, getattr(self.markov_head, "known_ids", None)
        ids = cast(Tensor, self.draft_token_ids)
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= size:
            raise _wrong_map(f"`d2t` must name tokens in [0, {size - 1}], got ids from {lowest} to {highest}")
        if len(ids.unique()) < len(ids):
            raise _wrong_map(f"`d2t` must name {len(ids)} different tokens, got {len(ids.unique())}")
        marked = torch.zeros(size, dtype=torch.bool, device=ids.device)
        marked[ids] = True
        if not torch.equal(self.t2d.to(ids.device).bool(), marked):
            raise _wrong_map(
                f"`t2d` must mark the {len(ids)} tokens that `d2t` names, got {int(self.t2d.sum())} others"
            )
        if known is not None and not torch.equal(known.to(ids.device), ids.sort().values):
            raise _wrong_map("`known_ids` must hold the tokens that `d2t` names, in ascending order, got others")

    def resize_token_embeddings(  # type: ignore[override]  # there may be no embedding to return
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding | None:
        """Fit the drafter to a target whose vocabulary was resized: `drafter.resize_token_embeddings(size)`.

        Embedding and output head are the target's; what is resized are the Markov head's tables, and an embedding and
        head of the drafter's own. New rows are the mean of those there are, whatever `mean_resizing` says. Returns the
        drafter's own embedding, or None.

        Raises:
            ValueError: if the drafter needs a token that would be gone.
        """
        size = self.config.vocab_size if new_num_tokens is None else int(new_num_tokens)
        if pad_to_multiple_of is not None:
            size += -size % pad_to_multiple_of
        resize_vocabulary(self, size)
        return self.embed_tokens if self.config.owns_embeddings else None

    # the parts

    def embed(self, token_ids: Tensor, target: TargetAdapter) -> Tensor:
        """Return embeddings `(*, D)` in the drafter's dtype and on its device."""
        if self.config.owns_embeddings:
            # rounded to the weights' dtype first, as Gemma does
            scale = torch.tensor(self.config.embed_scale, device="cpu").to(self.dtype).item()
            return self.embed_tokens(token_ids) * scale
        embed = target.embed_bare if self.config.borrows_bare_weights else target.embed
        return embed(token_ids).to(device=self.device, dtype=self.dtype)

    def project_context(self, context_hidden_states: Tensor) -> Tensor:
        """Return the context features `(B, T, D)` of tapped hidden states `(B, T, M * D)` (Eq. 2)."""
        return self.hidden_norm(self.fc(context_hidden_states.to(device=self.device, dtype=self.dtype)))

    def context_keys_and_values(self, features: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return every layer's context keys and values `(B, H, T, E)` for features `(B, T, D)` at `(B, T)` (Eq. 3)."""
        rotary = self.rotary_emb(positions, features.dtype)
        pairs = [cast(DSparkLayer, layer).keys_and_values(features, rotary) for layer in self.layers]
        return [(keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in pairs]

    def run_blocks(
        self,
        anchor_ids: Tensor,
        anchor_positions: Tensor,
        num_slots: int,
        context: Sequence[tuple[Tensor, Tensor]],
        context_masks: Sequence[Tensor | None],
        target: TargetAdapter,
    ) -> tuple[Tensor, Tensor]:
        """Return hidden states of blocks that start at the anchors `(B, N)`, after the final norm and before (Eq. 1).

        Both are `(B, N, num_slots, D)`. `context` holds every layer's keys and values, `context_masks` `(B, N, C)`
        what each block may see of them there, None for all.
        """
        slots = torch.arange(num_slots, device=anchor_ids.device)
        block_ids = anchor_ids[..., None].expand(*anchor_ids.shape, num_slots)
        block_ids = torch.where(slots == 0, block_ids, self.config.mask_token_id)
        hidden_states = self.embed(block_ids, target)
        rotary = self.rotary_emb(anchor_positions[..., None] + slots, hidden_states.dtype)
        if self.streams is not None:
            hidden_states = self.streams.open(hidden_states)
        for layer, layer_context, mask in zip(self.layers, context, context_masks, strict=True):
            hidden_states = layer(hidden_states, rotary, layer_context, mask)
        if self.streams is not None:
            hidden_states = self.streams.close(hidden_states)
        return self.norm(hidden_states), hidden_states

    def confidence_features(self, normed: Tensor, unnormed: Tensor) -> Tensor:
        """Return what the confidence head reads: the state before the final norm in DeepSeek-V4, else after it."""
        return normed if self.streams is None else unnormed

    def confidence_logits(self, hidden_states: Tensor, previous_ids: Tensor) -> Tensor | None:
        """Return the logits `(*, K)` of the drafts' acceptance (Eq. 7), or None without a confidence head."""
        if self.confidence_head is None:
            return None
        if self.config.confidence_head_with_markov and self.markov_head is not None:
            embedding = self.markov_head.embed(previous_ids).to(hidden_states.dtype)
            hidden_states = torch.cat([hidden_states, embedding], dim=-1)
        return self.confidence_head(hidden_states)

    def forward(
        self,
        context_hidden_states: Tensor,
        anchor_ids: Tensor,
        anchor_positions: Tensor,
        previous_ids: Tensor,
        target: TargetAdapter,
    ) -> BlockStates:
        """Run blocks of whole sequences, teacher-forced: the training pass.

        Args:
            context_hidden_states: tapped hidden states `(B, T, M * D)` of positions 0 to T - 1.
            anchor_ids: first token of every block `(B, N)`.
            anchor_positions: their positions `(B, N)`; block n sees the context before its anchor only.
            previous_ids: the true token before every slot's prediction `(B, N, K)`; slot 0's is the anchor.
            target: the target, which lends its embedding.
        """
        length = context_hidden_states.shape[1]
        positions = torch.arange(length, device=anchor_ids.device).expand(len(anchor_ids), -1)
        context = self.context_keys_and_values(self.project_context(context_hidden_states), positions)
        age = anchor_positions[..., None] - positions[:, None, :]
        windows = [self.config.window_of(layer) for layer in range(len(self.layers))]
        seen = {w: age > 0 if w is None else (age > 0) & (age <= w) for w in set(windows)}
        hidden_states, unnormed = self.run_blocks(
            anchor_ids, anchor_positions, self.config.num_slots, context, [seen[w] for w in windows], target
        )
        hidden_states, unnormed, state = self.drafting_slots(hidden_states, unnormed, anchor_ids)
        head = self.markov_head
        latents = None if head is None else head.latents(previous_ids, hidden_states, state)
        features = self.confidence_features(hidden_states, unnormed)
        return BlockStates(hidden_states, latents, self.confidence_logits(features, previous_ids))

    def drafting_slots(
        self, normed: Tensor, unnormed: Tensor, anchor_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the states `(*, K, D)` of the slots that draft, and the Markov head's state before them.

        Takes the states of all slots `(*, slots, D)`, normed and not, and the anchors `(*)`.
        """
        if self.config.sample_from_anchor:
            return normed, unnormed, None
        state, head = None, self.markov_head
        if head is not None:
            # the anchor's slot drafts nothing, but a recurrent head has passed it in training
            _, state = head.step(anchor_ids, normed[..., 0, :], head.initial_state(normed[..., 0, :]))
        return normed[..., 1:, :], unnormed[..., 1:, :], state

    def draft_head(self, target: TargetAdapter) -> DraftHead:
        """Return the function from hidden states to logits over the proposable tokens."""
        head = DraftHead(self, target, _ROWS.get(self))
        if head.rows is not None and head.rows.weight.device.type == "cpu":
            _ROWS[self] = head.rows
        return head


# The rows of the target's head that each drafter used last: what is packed of them serves further calls.
_ROWS: WeakKeyDictionary[DSparkAssistantModel, nn.Linear] = WeakKeyDictionary()


def _options_for_tensors(
    config_class: type[DSparkConfig], name_or_path: Any, options: dict[str, Any], hub_options: dict[str, Any]
) -> dict[str, Any]:
    """Return options of `from_pretrained` for tensors at hand: the configuration among them, what finds files not."""
    names = inspect.signature(config_class.__init__).parameters
    overrides = {name: value for name, value in options.items() if name in names}
    left = {name: value for name, value in options.items() if name not in (*overrides, *HUB_OPTIONS)}
    if not isinstance(left.get("config"), DSparkConfig):
        left["config"] = config_class.from_pretrained(name_or_path, **hub_options, **overrides)
    return left


def _wrong_map(message: str) -> ValueError:
    return ValueError(f"{message}. The map of draft tokens is damaged: fetch or save the drafter anew.")


class _DSparkContext(DraftContext):
    """The drafter's context cache over one call of `generate`."""

    def __init__(self, drafter: DSparkAssistantModel, target: TargetAdapter, batch_size: int):
        self._drafter = drafter
        self._target = target
        self._ids = drafter.draft_token_ids
        self._num_slots = drafter.config.num_slots
        self._windows = [drafter.config.window_of(layer) for layer in range(len(drafter.layers))]
        # what no layer sees any more is forgotten
        window = None if None in self._windows else drafter.config.context_window
        self.cache = ContextCache(len(drafter.layers), batch_size, drafter.device, window)
        temperatures = drafter.config.sts_temperatures
        self._temperatures = None if temperatures is None else torch.tensor(temperatures, device=drafter.device)
        self._widths: Sequence[int] = ()
        self._compiled_read: Any = None
        self._compiled_block: Any = None

    @cached_property
    def _head(self) -> DraftHead:
        # not before something is drafted, and outside of what is compiled: to copy a head's rows takes its time
        head = self._drafter.draft_head(self._target)
        if head.rows is not None:
            pack_beside(self._target.model, head.rows)
        return head

    def fix_size(self, size: FixedSize) -> None:
        self.cache.fix_size(size.num_slots)
        if size.compile_options is not None:
            # modules of the target's take part: whatever of them cannot be compiled is run as it is
            options = {**size.compile_options, "fullgraph": False}
            self._widths = size.widths
            self._compiled_read = torch.compile(self._read, **options)
            self._compiled_block = torch.compile(self._run_block, **options)

    def extend(self, hidden_states: Tensor, positions: Tensor, num_tokens: Sequence[int]) -> None:
        drafter, window = self._drafter, self.cache.window
        if window is not None and hidden_states.shape[1] > window:
            hidden_states, positions, num_tokens = _latest(hidden_states, positions, num_tokens, window)
        positions = positions.to(drafter.device)
        if hidden_states.shape[1] in self._widths and self.cache.is_made:
            fix_shapes([hidden_states, positions])
            run_compiled(self._compiled_read, hidden_states, positions)
        else:
            with below_autograd(drafter):
                self._read(hidden_states, positions)
        self.cache.lengthen(num_tokens)

    def _read(self, hidden_states: Tensor, positions: Tensor) -> None:
        features = self._drafter.project_context(hidden_states)
        self.cache.write(self._drafter.context_keys_and_values(features, positions))

    def draft(self, anchor_ids: Tensor, positions: Tensor, num_drafts: int, sampler: Sampler) -> DraftedBlock:
        drafter, anchors = self._drafter, anchor_ids.to(self._drafter.device)
        hidden_states, unnormed, state, logits = self._block(anchors, positions, num_drafts)
        token_ids, probs, previous_ids = sample_block(
            logits,
            hidden_states,
            anchors,
            sampler,
            markov_head=drafter.markov_head,
            vocab_size=drafter.config.vocab_size,
            proposable_ids=self._ids,
            markov_top_k=drafter.markov_top_k,
            state=state,
        )
        beliefs = drafter.confidence_logits(drafter.confidence_features(hidden_states, unnormed), previous_ids)
        if beliefs is not None and self._temperatures is not None:
            beliefs = beliefs / self._temperatures[:num_drafts]
        return DraftedBlock(token_ids, probs, None if beliefs is None else beliefs.sigmoid())

    @property
    def drafts_trees(self) -> bool:
        return True

    def draft_tree(self, anchor_ids: Tensor, positions: Tensor, num_slots: int, num_drafts: int) -> DraftedBlock:
        drafter, anchors = self._drafter, anchor_ids.to(self._drafter.device)
        hidden_states, _, state, logits = self._block(anchors, positions, num_slots)
        token_ids, parents, log_probs = grow_tree(
            logits,
            hidden_states,
            anchors,
            num_drafts,
            markov_head=drafter.markov_head,
            proposable_ids=self._ids,
            markov_top_k=drafter.markov_top_k,
            state=state,
        )
        return DraftedBlock(token_ids, None, None, parents=parents, chances=log_probs.exp()[None])

    def _block(
        self, anchors: Tensor, positions: Tensor, num_drafts: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Return what `_run_block` does, compiled where sizes are fixed, behind all that was read."""
        drafter, head, positions = self._drafter, self._head, positions.to(self._drafter.device)
        context = [self.cache.read(layer) for layer in range(len(drafter.layers))]
        masks = {window: self.cache.mask(window) for window in set(self._windows)}
        seen = [masks[window] for window in self._windows]
        if self._compiled_block is None:
            # the target lends its embedding and its head
            with below_autograd(drafter, self._target.model):
                return self._run_block(head, anchors, positions, num_drafts, context, seen)
        fix_shapes([mask for mask in masks.values() if mask is not None])
        hidden_states, unnormed, state, logits = run_compiled(
            self._compiled_block, head, anchors, positions, drafter.block_size, context, seen
        )
        return hidden_states[:, :num_drafts], unnormed[:, :num_drafts], state, logits[:, :num_drafts]

    def _run_block(
        self,
        head: DraftHead,
        anchors: Tensor,
        positions: Tensor,
        num_drafts: int,
        context: Sequence[tuple[Tensor, Tensor]],
        masks: Sequence[Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Return the states of `num_drafts` slots `(B, K, D)`, normed and not, the head's state, and base logits."""
        drafter = self._drafter
        # all slots run even if fewer drafts are wanted: the block was trained at its full width
        normed, unnormed = drafter.run_blocks(
            anchors[:, None], positions[:, None], self._num_slots, context, masks, self._target
        )
        hidden_states, unnormed, state = drafter.drafting_slots(normed[:, 0], unnormed[:, 0], anchors)
        hidden_states, unnormed = hidden_states[:, :num_drafts], unnormed[:, :num_drafts]
        return hidden_states, unnormed, state, head(hidden_states)

    def select_rows(self, rows: Tensor) -> None:
        self.cache.select_rows(rows)

    def append_rows(self, other: _DSparkContext) -> None:
        self.cache.append_rows(other.cache)


def _latest(
    hidden_states: Tensor, positions: Tensor, num_tokens: Sequence[int], window: int
) -> tuple[Tensor, Tensor, list[int]]:
    """Return the last `window` real tokens of every row: `(B, window, *)`, `(B, window)` and how many are real."""
    starts = torch.tensor([max(count - window, 0) for count in num_tokens], device=positions.device)
    index = starts[:, None] + torch.arange(window, device=positions.device)
    states = take_at(hidden_states, index.to(hidden_states.device))
    return states, positions.gather(1, index), [min(count, window) for count in num_tokens]
