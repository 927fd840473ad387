"""What a chat template writes around a turn: how a user turn opens, and what ends a turn."""

from __future__ import annotations

from typing import Any

from dspark_hf.prompts import has_chat_template

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
    return tokenizer.apply_chat_template(messages, add_generation_prompt=role == "user", tokenize=False)
