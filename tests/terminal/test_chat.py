"""A chat in a terminal or a pipe: what it remembers, what its commands do, and what it refuses."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from rich.console import Console

from dspark_hf.prompts import read_prompts
from dspark_hf.terminal.asking import Ask
from dspark_hf.terminal.chat import COMMANDS, Chat
from dspark_hf.terminal.conversation import Conversation
from dspark_hf.terminal.parting import find_parting
from dspark_hf.terminal.replies import Speaker
from dspark_hf.terminal.template import read_template_options
from tests.terminal.speaking import NEW_TOKENS, speaker, word_tokenizer


def _asking(lines: Sequence[str | BaseException]) -> Ask:
    rest: Iterator[str | BaseException] = iter(lines)

    def ask() -> str:
        line = next(rest, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return ask


def _talk(
    *lines: str | BaseException, one: Speaker | None = None, as_json: bool = False, **options: Any
) -> tuple[str, str, bool]:
    """Return the answers, everything else, and whether all went well."""
    one = one or speaker()
    answers, notes = io.StringIO(), io.StringIO()
    consoles = [Console(file=file, width=200) for file in (answers, notes)]
    conversation = Conversation(one.tokenizer, **options)
    is_fine = Chat(one, conversation, *consoles, as_json=as_json).run(_asking(lines))
    return answers.getvalue(), notes.getvalue(), is_fine


def _plain(one: Speaker, messages: list[dict[str, str]]) -> str:
    inputs = one.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = one.target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return one.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]


def test_each_answer_knows_what_was_said():
    """A chat forgets its turns or its system prompt, or answers what plain `generate` would not."""
    one = speaker()
    shown, notes, is_fine = _talk("w9 w10 w11 w9", "w12 w13", one=one, system="w20 w21")
    system = [{"role": "system", "content": "w20 w21"}]
    first = _plain(one, system + _turns("w9 w10 w11 w9"))
    second = _plain(one, system + _turns("w9 w10 w11 w9", first, "w12 w13"))
    assert shown == f"{first}\n{second}\n" and is_fine
    assert second != _plain(one, _turns("w12 w13"))
    assert notes.count(f"{NEW_TOKENS} tokens") == 2 and "tau" in notes


def test_json_has_an_object_for_each_question():
    """A program cannot tell which answer belongs to which question, or what drafts came to."""
    one = speaker()
    shown, notes, is_fine = _talk("w9 w10 w11 w9", "/nonsense", "w9", one=one, as_json=True)
    first, failure, second = map(json.loads, shown.splitlines())
    assert first["text"] == _plain(one, _turns("w9 w10 w11 w9"))
    assert first["tokens"] == sum(first["by_source"].values()) == NEW_TOKENS
    assert set(first["by_source"]) == {"target", "drafter", "lookup"}
    assert first["tau"] >= 1 and first["tokens_per_second"] > 0 and first["ended_by"] == "length"
    assert "/nonsense" in failure["error"] and "text" in second
    assert not is_fine and notes == ""


def test_plain_gives_the_same_text_again():
    """`/plain` compares with another question, becomes a turn of its own, or finds a text that parts the same."""
    one = speaker()
    shown, notes, _ = _talk("w9 w10 w11 w9", "/plain", "w12 w13", one=one)
    first = _plain(one, _turns("w9 w10 w11 w9"))
    second = _plain(one, _turns("w9 w10 w11 w9", first, "w12 w13"))
    assert shown == f"{first}\n{first}\n{second}\n"
    assert f"{NEW_TOKENS} tokens ({NEW_TOKENS} target)" in notes and "Identical text." in notes
    sampled = speaker(temperature=1.0, seed=3)
    assert "need not be the same" in _talk("w9 w10", "/plain", one=sampled)[1]
    assert "/plain must follow an answer" in _talk("/plain")[1]


def test_seed_gives_the_same_text_again():
    """A seed means nothing, or every answer of a run is the same without one."""
    texts = [_talk("w9 w10", one=speaker(temperature=1.0, seed=seed))[0] for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_ctrl_c_stops_the_answer_and_not_the_chat():
    """Ctrl-C ends the chat, or the answer after it is another than it would be."""
    one = speaker()
    prompt = Conversation(one.tokenizer).encode("w9 w10 w11 w9")
    whole = one.reply(prompt, lambda piece, source: None)
    shown: list[str] = []

    def interrupt(piece: str, source: str) -> None:
        shown.append(piece)
        if len(shown) == 5:
            raise KeyboardInterrupt

    stopped = one.reply(prompt, interrupt)
    assert stopped.ended_by == "interrupt" and stopped.token_ids == whole.token_ids[:5]
    assert one.reply(prompt, lambda piece, source: None).token_ids == whole.token_ids
    # and at the prompt
    shown_text, notes, is_fine = _talk(KeyboardInterrupt(), "w9 w10 w11 w9", one=one)
    assert shown_text.strip() == whole.text and is_fine and "Ctrl-D" in notes


def test_a_conversation_is_saved_and_goes_on(tmp_path):
    """What was said is lost with the chat, or a file that is none of a chat is written over."""
    one, path = speaker(), tmp_path / "talk.json"
    first, _, _ = _talk("w9 w10", f"/save {path}", one=one, system="w20")
    (prompt,) = read_prompts(path)
    assert prompt.messages == ({"role": "system", "content": "w20"}, {"role": "user", "content": "w9 w10"})
    second = _plain(one, [{"role": "system", "content": "w20"}, *_turns("w9 w10", first.strip(), "w11")])
    assert _talk(f"/load {path}", "w11", one=one)[0].strip() == second
    # a conversation may be replaced, anything else not
    assert "Saved" in _talk("w11", f"/save {path}", one=one)[1]
    other = tmp_path / "other.json"
    for content in ("notes", "{}", '{"messages": [{"role": "user", "content": "w9"}]}'):
        other.write_text(content, encoding="utf-8")
        notes = _talk(f"/save {other}", f"/load {other}", one=one)[1]
        assert " ".join(notes.split()).count("Name another.") == 2 and other.read_text(encoding="utf-8") == content
    assert "must be followed by a file's name" in _talk("/save")[1]


def test_system_prompt_and_turns_can_be_dropped():
    """`/clear` keeps turns, or drops the system prompt; `/system` does not reach the next question."""
    one = speaker()
    lines = ["w9", "/system w20", "/clear", "w10", "/system -", "/clear", "w10", "//help w10", "/stats", "/quit", "w9"]
    answers = _talk(*lines, one=one)[0].splitlines()
    assert answers[1] == _plain(one, [{"role": "system", "content": "w20"}, *_turns("w10")])
    assert answers[2] == _plain(one, _turns("w10")) != answers[1]
    assert len(answers) == 4


def test_help_lists_every_command():
    """A command is there that nobody can find, or one is listed that is not obeyed."""
    notes = _talk("/help")[1]
    assert all(name in notes for name in COMMANDS)
    for name in COMMANDS:
        assert "must be a command" not in _talk(name)[1]
    assert "must be a command, got '/nonsense'" in _talk("/nonsense")[1]


def test_statistics_of_a_chat():
    """Numbers of one answer are taken for those of the chat."""
    one = speaker()
    notes = _talk("w9 w10 w9 w10", "w9 w10", "/stats", one=one)[1]
    assert f"2 answers, {2 * NEW_TOKENS} tokens" in notes and "drafter" in notes and "lookup" in notes
    assert f"1 answer, {NEW_TOKENS} tokens" in _talk("w9 w10", "/stats", one=one)[1]
    assert "/stats must follow an answer" in _talk("/stats")[1]


def test_a_template_is_told_what_it_asks_for():
    """An option that the template does not know is dropped without a word."""
    tokenizer = word_tokenizer()
    assert read_template_options(tokenizer, ["enable_thinking=true"], None) == {"enable_thinking": True}
    options = read_template_options(tokenizer, [], True)
    with_thinking, without = (Conversation(tokenizer, None, one).encode("w9").tolist() for one in (options, {}))
    assert with_thinking == [9, *without]
    plain = word_tokenizer()
    plain.chat_template = plain.chat_template.replace("enable_thinking", "false")
    for pairs, thinking, message in (
        (["reasoning=high"], None, "got 'reasoning', which is not in it"),
        (["enable_thinking"], None, "must be KEY=VALUE"),
        (["enable_thinking=1"], False, "must agree"),
    ):
        with pytest.raises(ValueError, match=message):
            read_template_options(tokenizer, pairs, thinking)
    for thinking in (True, False):
        with pytest.raises(ValueError, match="has no `enable_thinking`"):
            read_template_options(plain, [], thinking)
        with pytest.raises(ValueError, match="has no `enable_thinking`"):
            read_template_options(word_tokenizer(has_template=False), [], thinking)


def test_a_question_that_does_not_fit_is_told():
    """A chat that has grown too long ends in a traceback, or writes on beyond what the target knows."""
    one = speaker()
    long = " ".join(["w9"] * 300)
    shown, notes, is_fine = _talk(long, "w9", one=one)
    assert "must leave room for an answer in the target's 256 positions, got 3" in notes and not is_fine
    assert len(shown.splitlines()) == 1


def test_where_texts_part():
    """A text that parts is shown without the place, or with other tokens than the target's best."""
    one = speaker()
    prompt = torch.tensor([9, 10, 11])
    text = one.target.generate(prompt[None], max_new_tokens=8, do_sample=False)[0, 3:].tolist()
    assert find_parting(one.target, prompt, text, list(text)) is None
    logits = one.target(torch.cat([prompt, torch.tensor(text[:5])])[None]).logits[0, -1]
    best, second = logits.topk(2).indices.tolist()
    assert best == text[5]
    parting = find_parting(one.target, prompt, text, [*text[:5], second])
    assert (parting.index, parting.best, parting.tokens) == (5, (best, second), (best, second))
    assert parting.is_between_best and parting.num_steps > 100
    assert f"'w{best}'" in parting.describe(one.tokenizer) and "after 5 tokens" in parting.describe(one.tokenizer)
    third = logits.topk(3).indices[2].item()
    assert "with others" in find_parting(one.target, prompt, text, [*text[:5], third]).describe(one.tokenizer)
    # a target whose weights are all the same knows no better token
    with torch.no_grad():
        one.target.lm_head.weight[:] = 0.5
    tie = find_parting(one.target, prompt, [9, 10], [9, 11])
    assert tie.num_steps == 0 and "a tie" in tie.describe(one.tokenizer)
    # one that ends earlier
    assert find_parting(one.target, prompt, [9, 10], [9]).tokens == (10, None)
