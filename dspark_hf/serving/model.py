"""The model that is served: how it reads prompts, where its answers end, how it samples unless told otherwise."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from dspark_hf.prompts import Prompt, encode_prompt, end_token_id, has_chat_template, template_names
from dspark_hf.serving.errors import ApiError, shorten
from dspark_hf.serving.schemas import ChatBody, CompletionBody, GenerationBody

# positions of a target that does not say how many it has
_DEFAULT_CONTEXT = 4096
# what the target's own generation configuration may ask of sampling, and is not carried over
_UNSERVED = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None}


@dataclass(frozen=True)
class ServedModel:
    """A target with its tokenizer, by the name that clients call it.

    Args:
        name: what clients put into `model`.
        target: the target.
        tokenizer: its tokenizer.
        context: positions for a prompt and its answer; None: the target's own.

    Raises:
        ValueError: if the target's generation configuration samples in a way that requests cannot be served in.
    """

    name: str
    target: PreTrainedModel
    tokenizer: Any
    context: int | None = None
    _end_ids: tuple[int, ...] = field(init=False, default=())
    _chat_end_id: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        config: Any = self.target.generation_config
        for name, neutral in _UNSERVED.items():
            value = getattr(config, name, None)
            if value is not None and value != neutral:
                raise ValueError(
                    f"`generation_config` of the target must leave out `{name}` to be served, got {value}. Remove it "
                    "from generation_config.json."
                )
        own = getattr(self.target.config.get_text_config(), "max_position_embeddings", None)
        context = self.context or own or _DEFAULT_CONTEXT
        if own is not None and context > own:
            raise ValueError(f"`--context` must be at most the target's {own} positions, got {context}. Lower it.")
        ends = config.eos_token_id
        object.__setattr__(self, "context", context)
        object.__setattr__(
            self, "_end_ids", tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
        )
        if has_chat_template(self.tokenizer):
            object.__setattr__(self, "_chat_end_id", end_token_id(self.tokenizer))

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the target can read."""
        embeddings: Any = self.target.get_input_embeddings()
        return int(embeddings.weight.shape[0])

    def end_ids(self, body: GenerationBody) -> list[int]:
        """Return the tokens that end an answer: the target's, and in a chat the end of a turn."""
        ends = self._end_ids
        if isinstance(body, ChatBody) and self._chat_end_id is not None:
            ends = (*ends, self._chat_end_id)
        return list(dict.fromkeys(ends))

    def read(self, body: GenerationBody) -> list[int]:
        """Return the tokens of the prompt; long ones take a while.

        Raises:
            ApiError: if the chat template cannot write it, or its tokens are none of the target's.
        """
        try:
            ids = self._encode(body)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages" if isinstance(body, ChatBody) else "prompt") from error
        vocab_size = self.vocab_size
        wrong = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
        if wrong is not None:
            message = f"`prompt` must hold tokens in [0, {vocab_size - 1}], got {wrong}. Encode it for this model."
            raise ApiError(400, message, param="prompt")
        return ids

    def _encode(self, body: GenerationBody) -> list[int]:
        if isinstance(body, ChatBody):
            if not has_chat_template(self.tokenizer):
                raise ValueError(
                    f"`messages` must be for a model with a chat template, got {self.name}, which has none. Send a "
                    "`prompt` to /v1/completions."
                )
            # developer is the API's newer word, which few templates know
            roles = {"developer": "system"}
            messages = tuple({"role": roles.get(one.role, one.role), "content": one.text} for one in body.messages)
            self._check_template_options(body.chat_template_kwargs)
            return encode_prompt(Prompt(messages=messages), self.tokenizer, body.chat_template_kwargs).tolist()
        assert isinstance(body, CompletionBody)
        prompt = body.one_prompt
        if isinstance(prompt, list):
            if not prompt:
                raise ValueError("`prompt` must have at least one token, got none. Add some.")
            return prompt
        return encode_prompt(Prompt(text=prompt), self.tokenizer).tolist()

    def _check_template_options(self, options: Mapping[str, Any]) -> None:
        # what the tokenizer's method itself takes would be more than a word to the template: another template, for one
        taken = {"conversation", "messages", *inspect.signature(self.tokenizer.apply_chat_template).parameters}
        names = (template_names(self.tokenizer) - taken) if options else set()
        for name in options:
            if name not in names:
                raise ValueError(
                    "`chat_template_kwargs` must name something that the target's chat template asks for, got "
                    f"{shorten(name)}. Leave it out, or correct it."
                )

    def room(self, body: ChatBody | CompletionBody, prompt_length: int) -> int:
        """Return how many tokens the answer may have.

        Raises:
            ApiError: if prompt and answer are longer than the context.
        """
        assert self.context is not None
        room, asked = self.context - prompt_length, body.most_tokens
        if room < 1 or (asked is not None and asked > room and body.has_asked_for_length):
            wish = "" if asked is None else f" and {asked} asked for"
            raise ApiError(
                400,
                f"prompt and answer must fit into {self.context} tokens, got {prompt_length} in the prompt{wish}. "
                "Shorten one of the two.",
                param="messages" if isinstance(body, ChatBody) else "prompt",
                code="context_length_exceeded",
            )
        return room if asked is None else min(room, asked)
