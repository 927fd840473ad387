"""Several rows of different lengths over one preallocated cache, for any target with ordinary attention.

A row's token at position p lies in slot p; left padding is gone. Each pass writes at per-row slots and the attention
mask is built from slots and lengths, so a rollback is a change of length.

B batch, T tokens, C slots, H key/value heads, E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel

from dspark_hf.generation.compat import (
    CACHE_KEY,
    attention_implementation,
    empty_cache_like,
    mask_length,
)
from dspark_hf.generation.ragged_store import RaggedLengths
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.interface import TargetPass
from dspark_hf.generation.targets.padding import full_mask, pack_order, run_packed
from dspark_hf.generation.targets.ragged_cache import RaggedCache, RaggedLayer


class RaggedTarget:
    """Run the target on a batch of left-padded rows, each at its own length.

    Args:
        adapter: the target, entered by the caller.
        input_ids: the prompts `(B, P)`.
        generation_config: the prepared generation configuration.
        model_kwargs: what `generate` prepared for the forward pass: the cache, and the attention mask `(B, S)`, S at
            least P where the cache came with tokens; None means no padding.

    Raises:
        ValueError: if the target, its cache or an input cannot be handled row by row.
    """

    def __init__(
        self,
        adapter: TargetAdapter,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ):
        self._adapter = adapter
        self._model: PreTrainedModel = adapter.model
        _check_inputs(adapter, generation_config, model_kwargs)
        cache, attention_mask = model_kwargs[CACHE_KEY], model_kwargs.get("attention_mask")
        self._given = cache
        self._wants_hidden_states = bool(generation_config.output_hidden_states)
        self.cache = RaggedCache(adapter.model, len(input_ids))
        past_length = int(cache.get_seq_length())
        mask = full_mask(input_ids, attention_mask, past_length, mask_length(generation_config, attention_mask))
        if mask.shape[1] == input_ids.shape[1]:
            input_ids = input_ids[:, past_length:]
        _check_positions(model_kwargs.get("position_ids"), mask, past_length)
        self._num_padded = (mask.shape[1] - mask.long().sum(-1)).tolist()
        self._new_mask = mask[:, past_length:]
        self._prompt_ids = input_ids
        # those of the next pass, or the one of every token in it
        self._token_types: Tensor | None = None
        given_types = _embedded_types(adapter, model_kwargs.get("token_type_ids"))
        if given_types is not None:
            given_types = given_types[:, -self._new_mask.shape[1] :].expand(len(input_ids), -1)
            self._token_types = given_types.gather(1, pack_order(self._new_mask)[0])
            self._last_types = given_types[:, -1:]
        if past_length:
            _adopt(self.cache, cache, mask[:, :past_length])
        self._width = 0

    @property
    def has_token_types(self) -> bool:
        """Whether tokens are embedded with a type, which rows of another run may lack."""
        return self._token_types is not None

    def prefill(self) -> TargetPass:
        """Process the prompts, packed to slot 0, with logits of every row's last token."""
        target_pass = run_packed(self._run, self._prompt_ids, self._new_mask)
        if self._token_types is not None:
            self._token_types = self._last_types
        self.cache.lengths.add(target_pass.num_tokens)
        return target_pass

    def verify(self, token_ids: Tensor) -> TargetPass:
        """Process every row's anchor and drafts `(B, W)`."""
        width = token_ids.shape[1]
        self._width = width
        return self._run(token_ids, [width] * len(token_ids), torch.arange(width, device=token_ids.device), num_real=1)

    def _run(
        self, token_ids: Tensor, num_tokens: list[int], kept_logits: Tensor, num_real: int | None = None
    ) -> TargetPass:
        """Run over `token_ids` `(B, T)`; `num_real` of each row are no padding, if `num_tokens` does not say so."""
        positions = self.cache.lengths.device[:, None] + torch.arange(token_ids.shape[1], device=token_ids.device)
        keeps, types = self._adapter.accepts("logits_to_keep"), self._token_types
        outputs = self._model(
            input_ids=token_ids,
            position_ids=self._known(positions, num_tokens if num_real is None else [num_real] * len(num_tokens)),
            attention_mask=self._masks(token_ids.shape[1]),
            use_cache=True,
            output_hidden_states=self._wants_hidden_states or None,
            return_dict=True,
            **{CACHE_KEY: self.cache},
            **({"logits_to_keep": kept_logits} if keeps else {}),
            **({} if types is None else {"token_type_ids": types.expand(-1, token_ids.shape[1])}),
        )
        return TargetPass(
            logits=outputs.logits if keeps else outputs.logits[:, kept_logits],
            context_hidden_states=self._adapter.pop_context_hidden_states(),
            positions=positions,
            num_tokens=num_tokens,
            hidden_states=outputs.get("hidden_states"),
        )

    def _known(self, positions: Tensor, num_real: list[int]) -> Tensor:
        """Return `positions` `(B, T)`, those of padding drawn back to the last one that a learned embedding knows."""
        limit, lengths = getattr(self._adapter.config, "max_position_embeddings", None), self.cache.lengths.host
        if limit is None or max(lengths) + positions.shape[1] <= limit:
            return positions
        # drafts end at the limit; a text that has come past it, as rotary embeddings let it, has all its positions
        last = [
            limit - 1 if length + count <= limit else length + positions.shape[1]
            for length, count in zip(lengths, num_real, strict=True)
        ]
        return positions.minimum(torch.tensor(last, device=positions.device)[:, None])

    def _masks(self, num_tokens: int) -> Tensor | dict[str, Tensor]:
        kinds = {"sliding_attention" if window else "full_attention": window for window in self.cache.windows}
        masks = {kind: self._mask(num_tokens, window) for kind, window in kinds.items()}
        # a model with one kind of layer takes one mask, a hybrid one a mask per kind
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, num_tokens: int, window: int | None) -> Tensor:
        lengths = self.cache.lengths
        slots = torch.arange(max(lengths.host) + num_tokens, device=lengths.device.device)
        query = (lengths.device[:, None] + torch.arange(num_tokens, device=slots.device))[..., None]
        visible = slots <= query
        if window:
            visible &= slots > query - window
        visible = visible[:, None]
        if attention_implementation(self._model) != "eager":
            return visible
        dtype = self._model.dtype
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

    def keep(self, num_kept: Sequence[int]) -> None:
        """Lengthen every row by its kept tokens."""
        self.cache.lengths.add(num_kept)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch."""
        self.cache.select_rows(rows)
        if self._token_types is not None:
            self._token_types = self._token_types[rows]

    def append_rows(self, other: RaggedTarget) -> None:
        """Append the rows of another run of the same target, which ends there; neither has token types."""
        self.cache.append_rows(other.cache)

    def returned_cache(self) -> Cache:
        """Return a cache as plain `generate` would: left-padded rows; what follows a finished row's end is zero.

        A cache that the user brought is filled in place.
        """
        starts, lengths = self._num_padded, self.cache.lengths.host
        width = max(start + length for start, length in zip(starts, lengths, strict=True))
        padded = empty_cache_like(self._model)
        for index, layer in enumerate(self.cache.layers):
            if isinstance(layer, RaggedLayer) and layer.store.keys is not None and layer.store.values is not None:
                keys = _left_padded(layer.store.keys, starts, lengths, width)
                values = _left_padded(layer.store.values, starts, lengths, width)
                padded.update(keys, values, index)
        self._given.layers = padded.layers
        return self._given

    def release(self) -> None:
        """Nothing: a cache of the user's is filled only when it is returned."""


_TEXT_INPUTS = ("attention_mask", "position_ids", "use_cache", "logits_to_keep", "token_type_ids", CACHE_KEY)


def _check_inputs(adapter: TargetAdapter, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    others = sorted(
        name
        for name, value in model_kwargs.items()
        # transformers 5.24: mm_encoder_outputs is an empty dict where there are no images
        if value is not None
        and not (isinstance(value, dict) and not value)
        and name not in _TEXT_INPUTS
        and not name.startswith("output_")
    )
    if others or not adapter.accepts("position_ids"):
        raise ValueError(
            "`assistant_model` must be left out for several rows, or padded ones, unless the target takes "
            f"`position_ids` and the input is text alone, got {others or type(adapter.model).__name__}. Generate the "
            "rows one by one, unpadded."
        )
    if generation_config.return_dict_in_generate and generation_config.output_attentions:
        raise ValueError(
            "`output_attentions` must be False for several rows, or padded ones, when a drafter assists, got True. "
            "Generate the rows one by one, unpadded."
        )


def _check_positions(position_ids: Tensor | None, mask: Tensor, past_length: int) -> None:
    """Raise a `ValueError` unless `position_ids` count the real tokens of `mask` `(B, S)`, as positions do here."""
    new = mask[:, past_length:]
    implied = (mask.long().cumsum(-1) - 1)[:, past_length:]
    # vision-language models have several planes of them
    given = implied if position_ids is None else position_ids[..., -new.shape[1] :]
    is_other = (given != implied) & new
    if bool(is_other.any()):
        some = given.expand_as(is_other)[is_other][:8].tolist()
        raise ValueError(
            "`position_ids` must count the tokens that `attention_mask` leaves, for several rows, or padded ones, "
            f"when a drafter assists, got {some}. Leave them out, or generate the rows one by one, unpadded."
        )


def _embedded_types(adapter: TargetAdapter, token_type_ids: Tensor | None) -> Tensor | None:
    """Return the token types that the target embeds, None if it has none or they only tell text from images."""
    if token_type_ids is None or adapter.config is adapter.model.config:
        return token_type_ids
    if bool(token_type_ids.any()):
        raise ValueError(
            "`token_type_ids` must be 0, those of text, for several rows, or padded ones, when a drafter assists, got "
            f"{int(token_type_ids.max())}. Generate the rows one by one, unpadded."
        )
    return None


def _adopt(ragged: RaggedCache, given: Any, mask: Tensor) -> None:
    """Fill a ragged cache from a left-padded one whose tokens `mask` `(B, S)` marks."""
    order, counts = pack_order(mask)
    lengths = RaggedLengths(len(mask), mask.device)
    for layer, source in zip(ragged.layers, given.layers, strict=True):
        if not isinstance(layer, RaggedLayer) or source.keys is None:
            continue
        # a sliding layer kept its window only; earlier slots are never looked at again
        missing = mask.shape[1] - source.keys.shape[2]
        states = [torch.nn.functional.pad(x, (0, 0, missing, 0)) for x in (source.keys, source.values)]
        index = order[:, None, :, None].expand(-1, states[0].shape[1], -1, -1)
        keys, values = (x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in states)
        layer.store.write(keys, values, lengths.host, lengths.device)
    ragged.lengths.set(counts)


def _left_padded(states: Tensor, starts: list[int], lengths: list[int], width: int) -> Tensor:
    padded = states.new_zeros(states.shape[0], states.shape[1], width, states.shape[3])
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        padded[row, :, start : start + length] = states[row, :, :length]
    return padded
