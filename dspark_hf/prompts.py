"""Prompts: what they look like in a file, what a chat template writes around them, the token ids a target reads.

Legend: B prompts, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_hf.damage import is_text, parse_line, read_lines

__all__ = ["Prompt", "encode_prompt", "read_prompts", "user_turn"]

Message = dict[str, str]

_LAYOUTS = (
    '`{"turns": ["..."]}`, `{"messages": [{"role": "user", "content": "..."}]}`, `{"prompt": "..."}`, '
    '`{"prompt": [...]}` or `{"user": "..."}`'
)


@dataclass(frozen=True)
class Prompt:
    """What a target is to answer, or to continue: exactly one of the two fields is set.

    Args:
        messages: a conversation that ends with a user turn; it goes through the target's chat template.
        text: raw text to continue; no chat template touches it.

    Example:

        >>> user_turn("Name a planet.").messages
        ({'role': 'user', 'content': 'Name a planet.'},)
        >>> Prompt(text="Once upon a time").messages is None
        True
    """

    messages: tuple[Message, ...] | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.text is None):
            raise ValueError(
                f"`Prompt` must have either `messages` or `text`, got messages={self.messages!r} and "
                f"text={self.text!r}. Set one of the two."
            )


def user_turn(text: str) -> Prompt:
    """Return the prompt that is one user turn."""
    return Prompt(messages=({"role": "user", "content": text},))


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """Return the prompts of a file, at most `limit` of them.

    A `.txt` file holds a user turn on every line. Any other file is JSON Lines, each line in one of these layouts:

    - `{"turns": ["...", ...]}`: the first is a user turn; the later ones follow answers that are not there yet;
    - `{"messages": [{"role": ..., "content": ...}, ...]}`: a conversation, up to its last user turn;
    - `{"prompt": [{"role": ..., "content": ...}, ...]}`: likewise;
    - `{"prompt": "..."}`: raw text to continue, as in TRL, for chat models too;
    - `{"user": "..."}`: a user turn.

    Other fields are ignored, and so are empty lines.

    Raises:
        ValueError: if it is no file, a line is no UTF-8 or has another layout, or there is no prompt at all.
    """
    path = Path(path)
    prompts = list(islice(_parse_lines(path), limit))
    if not prompts and limit != 0:
        raise ValueError(f"`{path}` must hold at least one prompt, got an empty file. Write one prompt a line.")
    return prompts


def _parse_lines(path: Path) -> Iterator[Prompt]:
    for number, line in read_lines(path):
        if path.suffix == ".txt":
            yield user_turn(line.strip())
            continue
        record = parse_line(path, number, line, "Correct the line, or name the file .txt if each line is a prompt.")
        try:
            yield parse_prompt(record)
        except ValueError as error:
            raise ValueError(f"`{path}`, line {number}: {error}") from error


def parse_prompt(record: Any) -> Prompt:
    """Return the prompt of one record; `read_prompts` lists the layouts.

    Raises:
        ValueError: if the record has another layout.
    """
    if isinstance(record, Mapping):
        turns, prompt, user = record.get("turns"), record.get("prompt"), record.get("user")
        if isinstance(turns, list) and turns and _is_text(turns[0]):
            return user_turn(turns[0])
        if "messages" in record:
            return _conversation(record["messages"])
        if _is_text(prompt):
            return Prompt(text=prompt)
        if isinstance(prompt, list) and prompt:
            return _conversation(prompt)
        if _is_text(user):
            return user_turn(str(user))
    got = sorted(record) if isinstance(record, Mapping) else record
    raise ValueError(f"a prompt must be one of {_LAYOUTS}, none of it empty, got {_short(got)}. Rewrite it as one.")


def _conversation(messages: Any) -> Prompt:
    if not isinstance(messages, Sequence) or not all(_is_message(message) for message in messages):
        raise ValueError(
            f"messages must be objects with a `role` and a `content` that are text, got {_short(messages)}. "
            "Leave out parts that are not text."
        )
    is_user = [message["role"] == "user" for message in messages]
    if True not in is_user:
        raise ValueError(
            f"messages must hold a user turn, got the roles {[message['role'] for message in messages]}. Add one."
        )
    length = len(messages) - is_user[::-1].index(True)
    return Prompt(messages=tuple({key: message[key] for key in ("role", "content")} for message in messages[:length]))


def _is_text(value: Any) -> bool:
    return is_text(value) and bool(value.strip())


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(is_text(value.get(key)) for key in ("role", "content"))


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def encode_prompt(prompt: Prompt, tokenizer: Any, template_options: Mapping[str, Any] | None = None) -> Tensor:
    """Return the token ids of a prompt, `(T,)` int64, at least one.

    Messages go through the tokenizer's chat template, up to where the answer starts, which is told the
    `template_options`; a tokenizer without one gets their text. Raw text gets the tokenizer's own special tokens; text
    that yields no token becomes the BOS token.

    Raises:
        ValueError: if nothing is left to start from, or the template cannot write these messages.
    """
    if prompt.messages is not None and has_chat_template(tokenizer):
        rendered = apply_template(tokenizer, list(prompt.messages), opens_answer=True, options=template_options)
        # the template wrote the special tokens already
        token_ids = tokenizer(rendered, add_special_tokens=False).input_ids
    else:
        token_ids = tokenizer(plain_text(prompt)).input_ids
    if not token_ids and tokenizer.bos_token_id is None:
        raise ValueError(
            "`prompt` must have at least one token, got none from a tokenizer without a BOS token. Give it some text."
        )
    return torch.tensor(token_ids or [tokenizer.bos_token_id], dtype=torch.long)


def apply_template(
    tokenizer: Any, messages: list[Any], *, opens_answer: bool, options: Mapping[str, Any] | None = None
) -> str:
    """Return messages as the tokenizer's chat template writes them, up to where an answer starts or without that.

    The template is told the `options` besides.

    Raises:
        ValueError: if the template cannot write them: many refuse unknown roles, or turns of one role in a row.
    """
    # a template is a program, which may fail in any way
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=opens_answer, tokenize=False, **(options or {})
        )
    except (TemplateError, TypeError, LookupError, AttributeError) as error:
        roles = [message.get("role") for message in messages if isinstance(message, Mapping)]
        raise ValueError(
            f"messages must be such that the target's chat template can write them, got the roles {_short(roles)}. "
            f"Correct them. ({_short(str(error))})"
        ) from error


def pad_left(prompts: Sequence[Tensor], device: torch.device, pad_token_id: int = 0) -> dict[str, Tensor]:
    """Return prompts `(T,)` as the inputs of a model: `input_ids` and `attention_mask` `(B, longest)` on `device`.

    Padding is masked, so that any token will do.
    """
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether the tokenizer has a chat template."""
    return getattr(tokenizer, "chat_template", None) is not None


def template_names(tokenizer: Any) -> set[str]:
    """Return all names that stand in the tokenizer's chat template; none without a template."""
    # imported here: only chats with options need it
    from jinja2 import Environment, TemplateSyntaxError

    if not has_chat_template(tokenizer):
        return set()
    try:
        # words alone: Transformers adds tags that this environment does not know
        return {value for _, kind, value in Environment().lex(tokenizer.get_chat_template()) if kind == "name"}
    except (TemplateSyntaxError, ValueError):
        return set()


def plain_text(prompt: Prompt) -> str:
    """Return a prompt without its roles: the raw text, or what the messages say, a blank line between them."""
    if prompt.messages is None:
        return prompt.text or ""
    return "\n\n".join(message["content"] for message in prompt.messages)


# letters and digits alone: no template trims or escapes them
_PLACEHOLDER = "PLACEHOLDER0OF0A0TURN"


def user_opening(tokenizer: Any) -> str:
    """Return the text in front of a user turn, such that the tokenizer reads it with the template's special tokens.

    Raises:
        ValueError: if the template does not write a user turn once, as it is.
    """
    rendered = _render_turn(tokenizer, "user")
    if rendered.count(_PLACEHOLDER) != 1:
        raise ValueError(
            f"`chat_template` must write a user turn once, as it is, got {rendered[:80]!r}. Give prompts instead of "
            "letting the target write them."
        )
    opening = rendered.partition(_PLACEHOLDER)[0]
    bos = tokenizer.bos_token
    if bos and opening.startswith(bos):
        # a tokenizer that writes the BOS token itself would double it
        rest = opening[len(bos) :]
        if tokenizer(rest).input_ids == tokenizer(opening, add_special_tokens=False).input_ids:
            return rest
    return opening


def turn_end(tokenizer: Any, role: str) -> str:
    """Return what ends a turn of `role`: a special token's text, else the template's next line, else nothing.

    It is `"<|im_end|>"` in many templates, `"[/INST]"` behind a user turn of Mistral's.
    """
    rest = _render_turn(tokenizer, role).rpartition(_PLACEHOLDER)[2].strip()
    token_ids = tokenizer(rest, add_special_tokens=False).input_ids if rest else []
    if token_ids and token_ids[0] in special_token_ids(tokenizer):
        token = tokenizer.convert_ids_to_tokens(token_ids[0])
        # words that are no tokens become the unknown one
        if rest.startswith(token):
            return token
    return rest.split("\n")[0].strip()


def end_token_id(tokenizer: Any) -> int | None:
    """Return the token that ends an answer: what the chat template writes behind it, else the EOS token.

    The two differ for Gemma, whose turns end in `<end_of_turn>` and whose documents end in `<eos>`.
    """
    if has_chat_template(tokenizer) and (end := turn_end(tokenizer, "assistant")):
        token_id = tokenizer.convert_tokens_to_ids(end)
        if token_id in special_token_ids(tokenizer) and tokenizer.convert_ids_to_tokens(token_id) == end:
            return token_id
    return tokenizer.eos_token_id


def special_token_ids(tokenizer: Any) -> set[int]:
    """Return the ids that stand for no text: special tokens, and added ones that are marked as special."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _render_turn(tokenizer: Any, role: str) -> str:
    messages = [{"role": "user", "content": _PLACEHOLDER if role == "user" else "-"}]
    if role == "assistant":
        messages.append({"role": "assistant", "content": _PLACEHOLDER})
    # behind a user turn some templates write nothing but the opening of the answer
    return apply_template(tokenizer, messages, opens_answer=role == "user")
