"""What a client may ask for: every field is honoured, or refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from dspark_hf.damage import is_text
from dspark_hf.serving.errors import shorten
from dspark_hf.serving.generation_fields import read_generation_config

# fields of the API that have one value here, and what to do where another was meant
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "Send a request for each answer: they are decoded together."),
    "best_of": ((1,), "Send a request for each answer."),
    "echo": ((False,), "The prompt is not scored: leave it out."),
    "suffix": (("",), "Text is continued, not filled in: leave it out."),
    "tools": (([],), "Tools are not parsed: leave it out."),
    "functions": (([],), "Tools are not parsed: leave it out."),
    "tool_choice": (("none",), "Tools are not parsed: leave it out."),
    "parallel_tool_calls": ((False,), "Tools are not parsed: leave it out."),
    "response_format": (({"type": "text"},), "Answers are not constrained: leave it out."),
    "modalities": ((["text"],), "Answers are text: leave it out."),
    "store": ((False,), "Nothing is stored: leave it out."),
    "service_tier": (("auto", "default"), "Requests are served in order: leave it out."),
}
_MOST_STOPS = 4
_LONGEST_STOP = 256
_MOST_BIASES = 1024
_LARGEST_SEED = 2**63 - 1


def _whole(text: str) -> str:
    # JSON can hold halves of characters, which no tokenizer reads
    if not is_text(text):
        raise ValueError(f"text must be of whole characters, got {shorten(text)}. Correct it.")
    return text


Text = Annotated[str, AfterValidator(_whole)]


class _Body(BaseModel):
    # strict: "1" is no number, and true is none either
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        """Null is the API's way to leave a field out."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class LoadBody(_Body):
    """A model that a client waits for."""

    model: str


class StreamOptions(_Body):
    """What a stream tells besides the text."""

    include_usage: bool = False


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Body):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    @property
    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class GenerationBody(_Body):
    """What both kinds of requests may ask for; None is the target's own."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: Annotated[int, Field(ge=-_LARGEST_SEED, le=_LARGEST_SEED)] | None = None
    stop: Text | list[Text] | None = None
    # labels for whoever asks; they say nothing of the answer
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="before")
    @classmethod
    def _check_fixed(cls, values: Any) -> Any:
        values = read_generation_config(values)
        if not isinstance(values, dict):
            return values
        for name in values.keys() & FIXED.keys():
            value, (allowed, remedy) = values[name], FIXED[name]
            # true equals 1, and is no number
            if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
                rule = " or ".join(map(repr, allowed))
                raise ValueError(f"`{name}` must be {rule}, got {shorten(value)}. {remedy}")
        return {name: value for name, value in values.items() if name not in FIXED}

    @model_validator(mode="after")
    def _check_together(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` must come with `stream`, got it alone. Leave out one of the two.")
        if len(self.stops) > _MOST_STOPS or not all(1 <= len(stop) <= _LONGEST_STOP for stop in self.stops):
            raise ValueError(
                f"`stop` must be up to {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} characters, got others. Shorten it."
            )
        if self.temperature is not None and 0 < self.temperature < 0.01:
            raise ValueError(
                f"`temperature` must be 0 (greedy) or at least 0.01, got {self.temperature}. Lower ones overflow."
            )
        if len(self.logit_bias) > _MOST_BIASES or not all(
            key.isascii() and key.isdigit() and len(key) < 10 for key in self.logit_bias
        ):
            raise ValueError(f"`logit_bias` must have up to {_MOST_BIASES} token ids as keys, got others. Correct it.")
        return self


class ChatBody(GenerationBody):
    """A chat to answer."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    # vLLM's word for what the chat template is told besides
    chat_template_kwargs: dict[str, Any] = {}

    @property
    def most_tokens(self) -> int | None:
        """Length of the answer at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def has_asked_for_length(self) -> bool:
        """Whether it is a wish, and no default."""
        return self.most_tokens is not None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to tell of each token; None if no probabilities are asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError(
                "`top_logprobs` must come with `logprobs`: true, got it alone. Set it, or leave this out."
            )
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError(
                f"`max_completion_tokens` must agree with `max_tokens`, got {self.max_completion_tokens} and "
                f"{self.max_tokens}. Leave out one of the two."
            )
        return self


class CompletionBody(GenerationBody):
    """A text to continue."""

    prompt: Text | list[int] | list[Text] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def most_tokens(self) -> int:
        """Length of the continuation at most; the API's own default is this short."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def has_asked_for_length(self) -> bool:
        """Whether it is a wish, and no default."""
        return self.max_tokens is not None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to tell of each token; None if no probabilities are asked for."""
        return self.logprobs

    @property
    def one_prompt(self) -> str | list[int]:
        """The prompt: text or token ids."""
        is_nested = isinstance(self.prompt, list) and bool(self.prompt) and not isinstance(self.prompt[0], int)
        return self.prompt[0] if is_nested else self.prompt  # type: ignore[return-value]

    @model_validator(mode="after")
    def _check_prompt(self) -> CompletionBody:
        prompt = self.prompt
        if isinstance(prompt, list) and not (prompt and (isinstance(prompt[0], int) or len(prompt) == 1)):
            raise ValueError(f"`prompt` must be one prompt, got {len(prompt)}. Send a request for each.")
        return self
