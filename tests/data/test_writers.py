"""The target's answers are what plain `generate` writes, row by row, and say truly how they ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from dspark_hf import DSparkAssistantModel
from dspark_hf.data.writers import Answer, LocalWriter, Sampling
from dspark_hf.prompts import Prompt, encode_prompt, user_turn
from tests.thinning import slow
from tests.tiny import tiny_target
from tests.training.tiny_tokenizer import WORDS, tiny_tokenizer

# ragged, and most of them longer than the sliding window of eight
PROMPTS = [
    Prompt(text=" ".join(f"w{7 + (3 * row + 5 * index) % 57}" for index in range(length)))
    for row, length in enumerate((3, 12, 7, 10, 1, 5, 9))
]
NUM_TOKENS = 18


def _write(writer: LocalWriter, prompts: Sequence[Prompt] = PROMPTS, **options: Any) -> list[Answer]:
    options = {"sampling": Sampling(), "max_new_tokens": NUM_TOKENS, "seed": 0, **options}
    answers = dict(writer.write(prompts, **options))
    assert sorted(answers) == list(range(len(prompts)))
    return [answers[index] for index in range(len(prompts))]


def _alone(target: PreTrainedModel, tokenizer: Any, prompt: Prompt, **options: Any) -> list[int]:
    input_ids = encode_prompt(prompt, tokenizer)[None]
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": 0, **options}
    output = target.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    return output[0, input_ids.shape[1] :].tolist()


def _ending_target(family: str, tokenizer: Any) -> PreTrainedModel:
    """Return a target whose answers end at different lengths: frequent words of its own are its ends."""
    target = tiny_target(family)
    texts = [_alone(target, tokenizer, prompt) for prompt in PROMPTS[:3]]
    target.generation_config.eos_token_id = [tokenizer.eos_token_id, texts[0][1], texts[1][5], texts[2][17]]
    return target


@pytest.mark.parametrize(
    ("family", "batch_size"),
    [("llama", 32), ("gemma3_text", 3)]
    + [slow("llama", 1), slow("llama", 3), slow("gemma3_text", 1), slow("gemma3_text", 32)]
    + [slow("gemma2", batch_size) for batch_size in (1, 3, 32)],
)
def test_answers_are_what_each_row_alone_writes(family: str, batch_size: int) -> None:
    """The training data would not be the target's words: a wrong cache row, position, mask or end."""
    tokenizer = tiny_tokenizer(chat_template=None)
    target = _ending_target(family, tokenizer)
    expected = [_alone(target, tokenizer, prompt) for prompt in PROMPTS]
    assert len({len(token_ids) for token_ids in expected}) > 2
    answers = _write(LocalWriter(target, tokenizer, batch_size=batch_size))
    assert [list(answer.token_ids or ()) for answer in answers] == expected
    ends = set(target.generation_config.eos_token_id)
    assert [answer.is_finished for answer in answers] == [token_ids[-1] in ends for token_ids in expected]
    assert [answer.num_tokens for answer in answers] == [len(token_ids) for token_ids in expected]


def test_finished_rows_make_room() -> None:
    """Short answers would cost as much as the longest one."""
    tokenizer = tiny_tokenizer(chat_template=None)
    target = _ending_target("llama", tokenizer)
    widths = []
    target.register_forward_hook(
        lambda module, args, kwargs, output: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    answers = _write(LocalWriter(target, tokenizer, batch_size=3))
    steps = [num_rows for num_rows, width in widths if width == 1]
    # the prompt of one token, and the steps in which a row was written
    assert sum(steps) == sum(answer.num_tokens - 1 for answer in answers) + 1
    assert max(steps) == 3


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"min_new_tokens": 14}, id="counts_from_the_start"),
        pytest.param({"cache_implementation": "static"}, id="static_cache", marks=pytest.mark.slow),
        pytest.param({"guidance_scale": 1.5}, id="guidance"),
    ],
)
def test_settings_of_the_target_are_kept(change: dict[str, Any]) -> None:
    """A setting of the target's own would be refused, or count from elsewhere than the start of an answer."""
    tokenizer = tiny_tokenizer(chat_template=None)
    target = _ending_target("llama", tokenizer)
    target.generation_config.update(**change)
    answers = _write(LocalWriter(target, tokenizer, batch_size=3))
    assert [list(answer.token_ids or ()) for answer in answers] == [
        _alone(target, tokenizer, prompt) for prompt in PROMPTS
    ]


def test_a_drafter_changes_no_word() -> None:
    """A drafter would change what the next drafter learns."""
    tokenizer = tiny_tokenizer(chat_template=None)
    target = _ending_target("llama", tokenizer)
    torch.manual_seed(0)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, block_size=4, markov_rank=8)
    calls = []
    drafter.fc.register_forward_hook(lambda *_: calls.append(1))
    assert _write(LocalWriter(target, tokenizer, drafter=drafter)) == _write(LocalWriter(target, tokenizer))
    assert calls


def test_small_batches_keep_the_order() -> None:
    """An answer would be stored with another prompt."""
    tokenizer = tiny_tokenizer(chat_template=None)
    target = _ending_target("llama", tokenizer)
    assert _write(LocalWriter(target, tokenizer, batch_size=2)) == _write(LocalWriter(target, tokenizer))


def test_chat_ends_with_the_templates_token() -> None:
    """An answer would run on behind its end, into turns that nobody asked for."""
    tokenizer, target = tiny_tokenizer(), tiny_target("llama")
    prompts = [user_turn(f"w{index}") for index in range(10, 26)]
    answers = _write(LocalWriter(target, tokenizer), prompts, sampling=Sampling(1.0), max_new_tokens=200)
    ends = {WORDS.index("<end>"), WORDS.index("<eos>")}
    finished = [answer for answer in answers if answer.is_finished]
    assert finished
    for answer in finished:
        assert answer.token_ids is not None and answer.token_ids[-1] in ends
        assert not ends & set(answer.token_ids[:-1])
        assert "<" not in answer.text


def test_text_ends_an_answer_too() -> None:
    """A user turn of a template that ends it in plain text would swallow the answer."""
    tokenizer, target = tiny_tokenizer(chat_template=None), tiny_target("llama")
    whole = _write(LocalWriter(target, tokenizer))[0].text
    stop = " ".join(whole.split()[6:8])
    answer = _write(LocalWriter(target, tokenizer), stop=stop)[0]
    # it goes on to no more than the stop
    assert answer.is_finished and answer.num_tokens <= 8
    assert answer.text.strip() == whole.partition(stop)[0].strip()


def test_a_special_token_ends_an_answer_too() -> None:
    """A user turn would go on behind the token that ends it, if that token ends no answer."""
    tokenizer, target = tiny_tokenizer(chat_template=None), tiny_target("llama")
    whole = _write(LocalWriter(target, tokenizer))[0]
    assert whole.token_ids is not None
    stop = WORDS[whole.token_ids[5]]
    answer = _write(LocalWriter(target, tokenizer), stop=stop)[0]
    assert answer.is_finished and answer.num_tokens <= 6


def test_sampling_ignores_the_targets_defaults() -> None:
    """Training would see the target's distribution cut, at every temperature alike."""
    tokenizer, target = tiny_tokenizer(chat_template=None), tiny_target("llama")
    target.generation_config.update(do_sample=True, top_k=1, temperature=0.1, min_p=0.9, eos_token_id=2)
    greedy = _write(LocalWriter(target, tokenizer))
    assert [list(answer.token_ids or ()) for answer in greedy] == [
        _alone(target, tokenizer, prompt) for prompt in PROMPTS
    ]
    assert _write(LocalWriter(target, tokenizer), sampling=Sampling(1.0)) != greedy


def test_the_same_seed_writes_the_same() -> None:
    """A run could not be repeated, or all of its batches would be alike."""
    writer = LocalWriter(tiny_target("llama"), tiny_tokenizer(chat_template=None))
    first, again, other = (_write(writer, sampling=Sampling(0.7, 0.95), seed=seed) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hot", "must be greedy, TEMPERATURE or TEMPERATURE,TOP_P, got 'hot'"),
        ("1,2,3", "must be greedy"),
        ("-1", "`temperature` must be finite and not negative, got -1.0"),
        ("nan", "`temperature` must be finite"),
        ("1,0", r"`top_p` must lie in \(0, 1\], got 0.0"),
    ],
)
def test_a_wrong_sampling_is_named(text: str, message: str) -> None:
    """A typing error would sample in another way than asked."""
    with pytest.raises(ValueError, match=message):
        Sampling.parse(text)


@pytest.mark.parametrize("name", ["greedy", "1.0", "0.7,0.95"])
def test_a_sampling_is_written_as_it_is_read(name: str) -> None:
    """A continued run would not know which answers are there."""
    assert str(Sampling.parse(name)) == name
