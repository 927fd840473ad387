"""The chat template writes what the encoder writes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dspark_hf.modeling.deepseek_v4.chat import chat_template, encode_messages, set_chat_template
from dspark_hf.modeling.deepseek_v4.chat.constants import DEFAULT_RELEASE
from tests.modeling.deepseek_v4.chat.conversations import (
    EFFORTS,
    argument_texts,
    case,
    conversations,
    json_values,
    tasks,
    texts,
    tools,
)
from tests.modeling.deepseek_v4.chat.test_encoding import AGREEING, MISTAKES


def tokenizer_of(release="0731"):
    """Return a tokenizer that knows no word, with the template of a release."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")))
    set_chat_template(tokenizer, release=release)
    return tokenizer


TOKENIZERS = {release: tokenizer_of(release) for release in ("preview", "0731", "0813")}


def render(messages, release="0731", add_generation_prompt=True, **options):
    """Return what the template of a release makes of a conversation."""
    options.update(tokenize=False, add_generation_prompt=add_generation_prompt)
    return TOKENIZERS[release].apply_chat_template(messages, **options)


def call_with(arguments):
    """Return a conversation that ends with a call."""
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": calls}]


@pytest.mark.parametrize("name", ["tools", "dropped_reasoning", "action_task"])
def test_published_cases(name):
    """Prompts of the template differ from what the targets were trained on."""
    published = case(name)
    prompt = published.pop("prompt")
    assert render(published.pop("messages"), **published) == prompt


@settings(deadline=None, max_examples=40)
@given(conversations, st.sampled_from(EFFORTS), st.booleans(), st.booleans(), tasks)
def test_random_conversations(messages, effort, drop_reasoning, add_generation_prompt, task):
    """The template and the encoder write different prompts."""
    release, said, _ = effort
    options = {
        "release": release,
        "drop_reasoning": drop_reasoning,
        "add_generation_prompt": add_generation_prompt,
        "reasoning_effort": said,
        "task": task,
    }
    assert render(messages, **options) == encode_messages(messages, **options)


@settings(deadline=None, max_examples=40)
@given(conversations, tools)
def test_tools_argument(messages, tools):
    """Tools passed as an argument land elsewhere than the encoder puts them."""
    messages[0].pop("tools", None)
    assert render(messages, tools=tools) == encode_messages(messages, tools=tools)


@settings(deadline=None, max_examples=40)
@given(argument_texts)
def test_argument_texts(text):
    """JSON text is read otherwise than Python reads it, or taken for JSON when it is not."""
    assert render(call_with(text)) == encode_messages(call_with(text))


@settings(deadline=None, max_examples=40)
@given(st.text(alphabet='{}[]:,"\\ \n\x00\xa0-+.eE019utrfalsnNI²/d8', max_size=10))
def test_broken_json(fragment):
    """Text that is nearly JSON is taken for JSON, or JSON of a rare form is not."""
    for text in ('{"a": ' + fragment + "}", '{"a": "' + fragment + '"}', '{"a": [1, ' + fragment + "]}"):
        assert render(call_with(text)) == encode_messages(call_with(text))


@pytest.mark.parametrize(
    "value",
    [
        '"\\ud83d\\ude00"',
        '"\\ud83d x"',
        "NaN",
        "-Infinity",
        "1E400",
        "-0",
        "1e5",
        "01",
        "1.",
        "1.2.3",
        "1e2e3",
        "+1",
        '"\\x"',
        "'a'",
        "[1,]",
    ],
)
def test_rare_json(value):
    """A rare form of JSON is read otherwise than Python reads it."""
    text = '{"a": ' + value + "}"
    assert render(call_with(text)) == encode_messages(call_with(text))


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(texts, json_values, max_size=3))
def test_decoded_arguments(arguments):
    """Decoded arguments and their JSON text give different prompts."""
    assert render(call_with(arguments)) == render(call_with(json.dumps(arguments)))


@pytest.mark.parametrize("mistake", sorted(MISTAKES.keys() - {"no messages", "function as tool"}))
def test_mistakes(mistake):
    """A mistake gives a wrong prompt in silence, or an error that does not help."""
    messages, options, _ = MISTAKES[mistake]
    if options.get("release") == "v4":
        with pytest.raises(ValueError, match="`release` must be one of preview, 0731, 0813, got 'v4'"):
            tokenizer_of(**options)
        return
    with pytest.raises(ValueError) as expected:
        encode_messages(messages, **options)
    with pytest.raises(TemplateError) as raised:
        render(messages, **options)
    # Jinja has no repr
    plain = [str(error.value).replace("'", "").split(", got")[0] for error in (expected, raised)]
    assert plain[0] == plain[1]


def test_functions_as_tools():
    """Python functions cannot be passed as tools."""

    def add(x: int, y: int = 0) -> int:
        """Add two numbers.

        Args:
            x: the first number
            y: the second number
        """
        return x + y

    assert '{"name": "add", "description": "Add two numbers.", ' in render(
        [{"role": "user", "content": "Hi"}], tools=[add]
    )


def test_continues_the_final_message():
    """A begun answer cannot be continued."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "reasoning_content": "A"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(messages, **options).endswith("<think>A</think>Hello")


def test_release_in_one_call():
    """The plain file cannot be used without the library, or its release cannot be chosen."""
    plain = chat_template("0731").partition("\n")[2]
    messages = [{"role": "user", "content": "Hi"}]
    for release, tokenizer in TOKENIZERS.items():
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=plain, tokenize=False, release=release, reasoning_effort="high"
        )
        assert rendered == render(messages, release, add_generation_prompt=False, reasoning_effort="high")


def test_saved_with_the_tokenizer(tmp_path):
    """A saved tokenizer forgets its chat template."""
    TOKENIZERS["preview"].save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == chat_template("preview")


@pytest.mark.parametrize(("switches", "effort"), AGREEING, ids=str)
def test_switches_of_other_engines_act(switches, effort):
    """A switch by another engine's name is passed over in silence, and the model thinks."""
    messages = [{"role": "user", "content": "Hi"}]
    assert render(messages, **switches) == encode_messages(messages, reasoning_effort=effort)


def test_one_release_is_the_default_everywhere():
    """The encoder, the template and its plain file mean different releases where none is named."""
    messages = [{"role": "user", "content": "Hi"}]
    plain = chat_template().partition("\n")[2]
    options = {"reasoning_effort": "high", "tokenize": False}
    unnamed = TOKENIZERS["0731"].apply_chat_template(messages, chat_template=plain, **options)
    assert chat_template() == chat_template(DEFAULT_RELEASE)
    assert unnamed == encode_messages(messages, reasoning_effort="high", add_generation_prompt=False)
    assert unnamed == render(messages, DEFAULT_RELEASE, add_generation_prompt=False, reasoning_effort="high")
    assert unnamed != render(messages, "preview", add_generation_prompt=False, reasoning_effort="high")


@pytest.mark.parametrize("effort", ["none", "max"])
def test_masks_of_assistant_tokens(checkpoints, effort):
    """Training on answers alone learns from nothing, or also from what the target does not write."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["bf16"])
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "system", "content": "Be brief.", "tools": [{"name": "f"}]},
        {"role": "user", "content": "Hé?"},
        {"role": "assistant", "content": "Wait.", "reasoning_content": "I call.", "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is 5 é.", "reasoning_content": "So."},
        {"role": "user", "content": "Thanks."},
    ]
    encoded = tokenizer.apply_chat_template(
        messages, reasoning_effort=effort, return_dict=True, return_assistant_tokens_mask=True
    )
    masks, runs = encoded["assistant_masks"], []
    for index, (token_id, is_written) in enumerate(zip(encoded["input_ids"], masks, strict=True)):
        if is_written:
            runs = runs if index and masks[index - 1] else [*runs, []]
            runs[-1].append(token_id)
    # an answer is what the prompt with it has more than the one that asks for it
    prompts = [encode_messages(messages[:end], reasoning_effort=effort) for end in (2, 3, 4, 5)]
    assert [tokenizer.decode(run) for run in runs] == [
        prompts[1].removeprefix(prompts[0]),
        prompts[3].removeprefix(prompts[2]),
    ]
