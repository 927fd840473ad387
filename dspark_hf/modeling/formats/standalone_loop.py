"""Greedy decoding and sampling with a drafter for one text at a time, on PyTorch and Transformers alone.

`formats/standalone.py` puts this file and the parts of a drafter into one `custom_generate/generate.py`, which needs
no `dspark_hf`. Unlike the package's own loop it does one row, every round to the full block, and keeps all of a
sliding window's past.

K drafts, V vocab, D hidden, M tapped layers.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    MinPLogitsWarper,
    PreTrainedConfig,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils.hub import cached_file

from dspark_hf.generation.drafting.chain import sample_block
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.backbone import DSparkLayer, RMSNorm
from dspark_hf.modeling.draft_head import DraftHead
from dspark_hf.modeling.heads import build_markov_head
from dspark_hf.modeling.rotary import RotaryEmbedding

# the drafter's configuration, where it is written with its weights
FIELDS: dict[str, Any] = {}
# what drafts may be drawn with: these ask for nothing but the scores
_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
_PLAIN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# inputs of a text model that say nothing more for one row without padding
_KNOWN_INPUTS = {
    "attention_mask",
    "cache",
    "cache_position",
    "logits_to_keep",
    "past_key_values",
    "position_ids",
    "use_cache",
}
_WHOLE_PACKAGE = "Install `dspark-hf`, whose loop does, or generate without `custom_generate`"
_DRAFTERS: WeakKeyDictionary[Any, dict[str, StandaloneDrafter]] = WeakKeyDictionary()


class StandaloneDrafter(nn.Module):
    """A DSpark drafter's backbone and Markov head, for one row.

    Args:
        fields: its configuration, with `num_slots`, `num_draft_logits` and `windows` worked out.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, fields: dict[str, Any]):
        super().__init__()
        config: Any = PreTrainedConfig(**fields)
        self.config = config
        width = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * width, width, bias=False)
        self.hidden_norm = RMSNorm(width, config.rms_norm_eps)
        self.norm = RMSNorm(width, config.rms_norm_eps)
        are_causal = [config.has_causal_sliding_layers and window is not None for window in config.windows]
        self.layers = nn.ModuleList([DSparkLayer(config, is_causal) for is_causal in are_causal])
        self.rotary_emb = RotaryEmbedding(config)
        self.markov_head = build_markov_head(config)
        if config.owns_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if config.owns_head:
            self.lm_head = nn.Linear(width, config.num_draft_logits, bias=False)
        if config.draft_vocab_size is not None:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
            self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.fc.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return self.fc.weight.dtype

    @property
    def draft_token_ids(self) -> Tensor | None:
        """The proposable tokens, or None if all are."""
        if self.config.draft_vocab_size is None:
            return None
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def embed(self, token_ids: Tensor, target: TargetAdapter) -> Tensor:
        """Return embeddings `(*, D)`, the drafter's own or the target's."""
        if self.config.owns_embeddings:
            scale = torch.tensor(self.config.embed_scale, device="cpu").to(self.dtype).item()
            return self.embed_tokens(token_ids) * scale
        embed = target.embed_bare if self.config.borrows_bare_weights else target.embed
        return embed(token_ids).to(device=self.device, dtype=self.dtype)


class StandaloneContext:
    """What a drafter has read of one text.

    Args:
        drafter: the drafter.
        target: its target.
    """

    def __init__(self, drafter: StandaloneDrafter, target: TargetAdapter):
        self._drafter = drafter
        self._target = target
        self._head = DraftHead(drafter, target)
        self._ids = drafter.draft_token_ids
        self._read: list[tuple[Tensor, Tensor]] = []

    def extend(self, hidden_states: Tensor, start: int) -> None:
        """Read tapped hidden states `(1, T, M * D)` of the positions from `start` on."""
        drafter = self._drafter
        states = hidden_states.to(device=drafter.device, dtype=drafter.dtype)
        features = drafter.hidden_norm(drafter.fc(states))
        positions = torch.arange(start, start + states.shape[1], device=drafter.device)[None]
        rotary = drafter.rotary_emb(positions, features.dtype)
        layers: Any = drafter.layers
        for i, (layer, window) in enumerate(zip(layers, drafter.config.windows, strict=True)):
            pair = tuple(one.transpose(1, 2) for one in layer.keys_and_values(features, rotary))
            if i < len(self._read):
                pair = tuple(torch.cat([old, new], dim=2) for old, new in zip(self._read[i], pair, strict=True))
            keys, values = pair if window is None else (one[:, :, -window:] for one in pair)
            self._read[i : i + 1] = [(keys, values)]

    def draft(
        self, anchor_id: Tensor, position: int, num_drafts: int, sampler: Callable[..., Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Return `num_drafts` drafts `(1, K)` after the anchor `(1)`, and their distributions `(1, K, V)`, if any."""
        drafter, config = self._drafter, self._drafter.config
        anchor = anchor_id.to(drafter.device)
        slots = torch.arange(config.num_slots, device=drafter.device)
        block = torch.where(slots == 0, anchor[:, None, None], config.mask_token_id)
        states = drafter.embed(block, self._target)
        rotary = drafter.rotary_emb(position + slots[None, None], states.dtype)
        for layer, context in zip(drafter.layers, self._read, strict=True):
            states = layer(states, rotary, context, None)
        states, state = drafter.norm(states)[:, 0], None
        if not config.sample_from_anchor:
            head = drafter.markov_head
            if head is not None:
                _, state = head.step(anchor, states[:, 0], head.initial_state(states[:, 0]))
            states = states[:, 1:]
        states = states[:, :num_drafts]
        token_ids, probs, _ = sample_block(
            self._head(states),
            states,
            anchor,
            sampler,
            markov_head=drafter.markov_head,
            vocab_size=config.vocab_size,
            proposable_ids=self._ids,
            markov_top_k=config.markov_top_k or None,
            state=state,
        )
        return token_ids.to(anchor_id.device), None if probs is None else probs.to(anchor_id.device)


def generate(
    model: Any,
    streamer: Any = None,
    tokenizer: Any = None,
    num_assistant_tokens: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Return what `model.generate(**kwargs)` does, assisted by the drafter in this repository.

    Greedy decoding gives the same tokens (in fp32), sampling the same distribution.

    Args:
        model: the target.
        streamer: gets the tokens as they are decided.
        tokenizer: for `stop_strings`.
        num_assistant_tokens: drafts per round, at most the drafter's block.
        kwargs: of `generate`.

    Raises:
        ValueError: for what this small loop does not serve: several rows, beams, outputs other than the tokens.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    # Transformers tells nobody which repository this is: the name stands in the frame that called
    name = given.pop("drafter", None) or sys._getframe(1).f_locals.get("custom_generate")
    if "assistant_model" in given:
        raise _unserved("assistant_model", "be left out, the drafter is this repository's", "one", "Leave it out")
    drafter = load(name, model)
    most = drafter.config.block_size
    num_drafts = most if num_assistant_tokens is None else num_assistant_tokens
    if not 1 <= num_drafts <= most:
        raise _unserved("num_assistant_tokens", f"lie in [1, {most}]", num_drafts, "Lower it, or leave it out")
    _take_stop_strings(model, given, tokenizer)

    def decode(model: Any, input_ids: Tensor, **options: Any) -> Tensor:
        return _decode(model, input_ids, drafter, num_drafts, streamer, **options)

    return model.generate(**given, custom_generate=decode)


def load(name: Any, model: Any) -> StandaloneDrafter:
    """Return the drafter of a folder or hub name on the target's device, in its dtype; it is kept with the target."""
    if not isinstance(name, str):
        raise _unserved("custom_generate", "name the drafter's folder or repository", name, "Pass `drafter=` as well")
    loaded = _DRAFTERS.setdefault(model, {})
    if name not in loaded:
        drafter = StandaloneDrafter(FIELDS)
        # the confidence head decides how much is drafted, which is always all here
        weights = load_file(str(cached_file(name, "model.safetensors")))
        weights = {key: x for key, x in weights.items() if not key.startswith("confidence_head.")}
        drafter.load_state_dict(weights)
        loaded[name] = drafter.eval()
    dtype = model.dtype if model.dtype.is_floating_point else torch.float32
    return loaded[name].to(device=model.get_input_embeddings().weight.device, dtype=dtype)


def _take_stop_strings(model: Any, given: dict[str, Any], tokenizer: Any) -> None:
    """Make stop strings a criterion: what `generate` hands to a function leaves the tokenizer out."""
    config = given.get("generation_config") or model.generation_config
    strings = given.pop("stop_strings", None) or config.stop_strings
    if strings is None:
        return
    if tokenizer is None:
        raise _unserved("tokenizer", "be given with `stop_strings`", None, "Pass the target's tokenizer")
    if config.stop_strings is not None:
        given["generation_config"] = copy.deepcopy(config)
        given["generation_config"].stop_strings = None
    others = given.get("stopping_criteria") or []
    given["stopping_criteria"] = StoppingCriteriaList([*others, StopStringCriteria(tokenizer, strings)])


def _unserved(name: str, rule: str, value: Any, remedy: str = _WHOLE_PACKAGE) -> ValueError:
    return ValueError(f"`{name}` must {rule}, got {value!r}. {remedy}.")


def _check(model: Any, input_ids: Tensor, config: Any, inputs: dict[str, Any]) -> None:
    text = model.config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ())
    mask = inputs.get("attention_mask")
    cache = inputs.get("cache", inputs.get("past_key_values"))
    for holds, name, rule, value in (
        (not model.config.is_encoder_decoder, "model", "be a decoder", type(model).__name__),
        (
            not getattr(model, "_is_stateful", False) and kinds <= _PLAIN_LAYERS,
            "model",
            "keep keys and values alone, which can be taken back",
            type(model).__name__,
        ),
        (config.num_beams == 1, "num_beams", "be 1", config.num_beams),
        (len(input_ids) == 1, "input_ids", "have one row", len(input_ids)),
        (mask is None or bool(mask.all()), "attention_mask", "hide nothing", "padding"),
        (input_ids.shape[1] > 0, "input_ids", "hold a prompt", tuple(input_ids.shape)),
        (not config.return_dict_in_generate, "return_dict_in_generate", "be False", True),
        (cache is None or cache.get_seq_length() == 0, "past_key_values", "be empty", "a cache that was used"),
        (config.cache_implementation in (None, "dynamic"), "cache_implementation", "be left out", "another"),
        (set(inputs) <= _KNOWN_INPUTS, "inputs", "be text alone", sorted(set(inputs) - _KNOWN_INPUTS)),
    ):
        if not holds:
            raise _unserved(name, rule, value)


def _decode(
    model: Any,
    input_ids: Tensor,
    drafter: StandaloneDrafter,
    num_drafts: int,
    streamer: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    **inputs: Any,
) -> Tensor:
    _check(model, input_ids, generation_config, inputs)
    parameters = inspect.signature(model.forward).parameters
    # transformers 5.24 renamed the argument; without a configuration no layer forgets what may be taken back
    options = {"cache" if "cache" in parameters else "past_key_values": (cache := DynamicCache()), "use_cache": True}
    target = TargetAdapter(model, drafter.config.target_layer_ids)
    context = StandaloneContext(drafter, target)
    warpers = [one for one in logits_processor if isinstance(one, _WARPERS)]
    sampler = StandaloneSampler(warpers if generation_config.do_sample else None)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    drafts, probs = input_ids.new_empty(1, 0), None
    block, is_done = input_ids, False
    with target:
        while True:
            start = input_ids.shape[1] - block.shape[1] if block is not input_ids else 0
            only_last = {"logits_to_keep": 1} if block is input_ids and "logits_to_keep" in parameters else {}
            logits = model(torch.cat([block, drafts], dim=1), **options, **only_last).logits
            logits = logits[:, -1 - drafts.shape[1] :].float().to(input_ids.device)
            hidden_states = target.pop_context_hidden_states()
            length = input_ids.shape[1]
            for k in range(drafts.shape[1] + 1):
                scores = logits_processor(input_ids, logits[:, k])
                token, is_draft = sampler.decide(scores, k, drafts, probs)
                input_ids = torch.cat([input_ids, token[:, None]], dim=1)
                if streamer is not None:
                    streamer.put(token.cpu())
                is_done = bool(stopping_criteria(input_ids, None).all())
                if is_done or not is_draft:
                    break
            if is_done:
                break
            # the last token is the next anchor, and was not passed yet
            num_rejected = length + drafts.shape[1] - (input_ids.shape[1] - 1)
            if num_rejected:
                cache.crop(-num_rejected)
            context.extend(hidden_states[:, : input_ids.shape[1] - 1 - start], start)
            room = min(num_drafts, (generation_config.max_length or sys.maxsize) - input_ids.shape[1] - 1)
            block, drafts, probs = input_ids[:, -1:], input_ids.new_empty(1, 0), None
            if room > 0:
                drafts, probs = context.draft(block[:, 0], input_ids.shape[1] - 1, room, sampler)
    if streamer is not None:
        streamer.end()
    return input_ids


class StandaloneSampler:
    """Draw drafts, and decide between them and the target.

    Args:
        warpers: what the drafter's scores pass before a draft is drawn; None for greedy decoding.
    """

    def __init__(self, warpers: list[Any] | None):
        self._warpers = warpers

    def __call__(self, k: int, logits: Tensor, so_far: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a draft `(1)` and its distribution `(1, V)`, None if greedy."""
        if self._warpers is None:
            return logits.argmax(-1), None
        scores = logits.float()
        for warper in self._warpers:
            scores = warper(so_far, scores)
        probs = scores.softmax(-1)
        return torch.multinomial(probs, 1)[:, 0], probs

    def decide(self, scores: Tensor, k: int, drafts: Tensor, probs: Tensor | None) -> tuple[Tensor, bool]:
        """Return the token `(1)` after the first `k` drafts for the target's scores `(1, V)`, and if it is draft k.

        A draft x is taken with chance min(1, p_t(x) / p_d(x)), and else a token is drawn from max(p_t - p_d, 0).
        """
        is_drafted = k < drafts.shape[1]
        if self._warpers is None:
            token = scores.argmax(-1)
            return token, is_drafted and bool(token == drafts[:, k])
        target_probs = scores.softmax(-1)
        if is_drafted and probs is not None:
            draft, draft_probs = drafts[:, k], probs[:, k].to(target_probs)
            if bool(torch.rand_like(target_probs[:, 0]) * draft_probs[0, draft] < target_probs[0, draft]):
                return draft, True
            left = (target_probs - draft_probs).clamp_min(0)
            # equal distributions reject with probability zero, yet rounding may
            target_probs = left if bool(left.sum() > 0) else target_probs
        return torch.multinomial(target_probs, 1)[:, 0], False
