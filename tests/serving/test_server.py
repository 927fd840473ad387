"""A real server, asked by the real `openai` client: the texts are plain `generate`'s, and each fails for itself."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from transformers.cli.chat import Chat, RichInterface

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.noise import KeyedNoise
from tests.closeness import assert_same_up_to_rounding
from tests.serving.running import END, EOS, NAME, Running, serve, wait_until
from tests.tiny import VOCAB_SIZE, tiny_target

# every word is another length of prompt
QUESTIONS = [" ".join(f"w{10 + (7 * i + k) % 50}" for k in range(1 + i % 9)) for i in range(24)]
COUNT = 12


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """One server for all tests that leave it as it was."""
    with serve() as running:
        yield running


def _chat(running: Running, content: str, **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": COUNT, **options}
    return running.client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": content}], **options
    )


def _body(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": [{"role": "user", "content": "w10 w11"}], "max_tokens": 4, **fields}


def _streamed(chunks: Any) -> tuple[str, list[str]]:
    """Return text and finish reasons of a stream."""
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(
        getattr(one, "text", None) or getattr(getattr(one, "delta", None), "content", "") or "" for one in choices
    )
    return text, [one.finish_reason for one in choices if one.finish_reason]


def _check_all(running: Running, questions: list[str], num_threads: int) -> None:
    with ThreadPoolExecutor(num_threads) as clients:
        # every third one as a stream
        jobs = [clients.submit(_chat, running, content, stream=i % 3 == 0) for i, content in enumerate(questions)]
        answers = [job.result() for job in jobs]
        texts = list(
            clients.map(lambda one: _streamed(one)[0] if isinstance(one, openai.Stream) else _text(one), answers)
        )
    for content, text in zip(questions, texts, strict=True):
        assert text == running.text(running.plain(running.ids(content), COUNT))


def _text(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def test_texts_are_those_of_generate(running):
    """Requests that are decoded together are mixed, or say something else than plain `generate`."""
    _check_all(running, QUESTIONS[:12], num_threads=12)
    assert running.engine.num_running == running.engine.num_waiting == 0


@pytest.mark.slow
def test_two_hundred_at_once():
    """Under load requests are lost or mixed."""
    with serve(engine_options={"max_waiting": 256}) as crowded:
        questions = [f"{QUESTIONS[i % 24]} w{10 + i // 24}" for i in range(200)]
        _check_all(crowded, questions, num_threads=200)
        assert (
            crowded.metric('dspark_requests_total{end="length"}') + crowded.metric('dspark_requests_total{end="stop"}')
            == 200
        )


def test_usage_and_endings(running):
    """A client is told other numbers of tokens, or another end, than there were."""
    ended = next(one for one in map(str, QUESTIONS) if END in running.plain(running.ids(one), 200))
    ids = running.plain(running.ids(ended), 200)
    for count, reason in ((200, "stop"), (len(ids) - 1, "length")):
        answer = _chat(running, ended, max_tokens=count)
        assert answer.choices[0].finish_reason == reason
        assert answer.usage.completion_tokens == min(count, len(ids))
        assert answer.usage.prompt_tokens == running.ids(ended).shape[1]
        chunks = list(_chat(running, ended, max_tokens=count, stream=True, stream_options={"include_usage": True}))
        assert _streamed(chunks) == (_text(answer), [reason])
        assert chunks[-1].usage == answer.usage and not chunks[-1].choices
        assert all(chunk.usage is None for chunk in chunks[:-1])
        assert chunks[0].choices[0].delta.role == "assistant"


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(running, is_stream):
    """A stop string is missed where it spans tokens, stands in the text, or leaks into a stream."""
    whole = running.text(running.plain(running.ids("w10 w11"), 20))
    # within a word, over two words, and one that only begins in the text
    for stop in (whole[5:8], whole[9:14], whole[-3:] + "?"):
        answer = _chat(running, "w10 w11", max_tokens=20, stop=[stop, "never"], stream=is_stream)
        text, reasons = _streamed(answer) if is_stream else (_text(answer), [answer.choices[0].finish_reason])
        assert (text, reasons) == ((whole.partition(stop)[0], ["stop"]) if stop in whole else (whole, ["length"]))


def test_nothing_is_written_behind_a_stop_string(running):
    """A request with a stop string keeps its row until its last token."""
    before = running.brake.num_passes
    first = running.text(running.plain(running.ids("w10 w11"), 1))
    used = running.brake.num_passes
    answer = _chat(running, "w10 w11", max_tokens=200, stop=first)
    assert (_text(answer), answer.usage.completion_tokens) == ("", 1)
    wait_until(lambda: running.engine.num_running == 0)
    assert used - before == 1 and running.brake.num_passes - used <= 2


def test_numbers_add_up(running):
    """Prometheus reads other numbers of requests, tokens or drafts than there were."""

    def read() -> dict[str, float]:
        ends = {end: running.metric(f'dspark_requests_total{{end="{end}"}}') for end in ("length", "refused")}
        steps = ("drafted", "verified", "accepted")
        drafts = {step: running.metric(f'dspark_drafts_total{{step="{step}"}}') for step in steps}
        names = ("dspark_prompt_tokens_total", "dspark_generated_tokens_total", "dspark_request_seconds_count")
        return {**ends, **drafts, **{name: running.metric(name) for name in names}}

    before = read()
    # two words by turns: looked-up drafts are right
    bias = {"33": 100, "34": 99}
    assert (
        _chat(running, "w10", logit_bias=bias, frequency_penalty=1, max_tokens=40).choices[0].finish_reason == "length"
    )
    assert running.ask("/v1/chat/completions", _body(n=2))[0] == 400
    change = {name: value - before[name] for name, value in read().items()}
    assert (change["length"], change["refused"], change["dspark_request_seconds_count"]) == (1, 1, 1)
    assert change["dspark_prompt_tokens_total"] == running.ids("w10").shape[1]
    assert change["dspark_generated_tokens_total"] == 40
    assert change["drafted"] >= change["verified"] >= change["accepted"] >= 0
    tau = running.metric("dspark_round_tokens_total") / running.metric("dspark_rounds_total")
    assert running.metric("dspark_tokens_per_round") == pytest.approx(tau)


def _reference_logprobs(running: Running, ids: torch.Tensor, new: list[int]) -> torch.Tensor:
    full = torch.cat([ids, torch.tensor([new])], dim=1)
    with torch.no_grad():
        logits = running.model.target(full).logits[0, ids.shape[1] - 1 : -1]
    return torch.log_softmax(logits.float(), dim=-1)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.7, "seed": 3}, {"temperature": 1.5}])
def test_logprobs_are_the_target_s(running, options):
    """Probabilities are those of a draft that was rejected, of a neighbour, or after temperature."""
    answer = _chat(running, "w10 w11", logprobs=True, top_logprobs=3, **options)
    entries = answer.choices[0].logprobs.content
    new = running.model.tokenizer.convert_tokens_to_ids([one.token for one in entries])
    logprobs = _reference_logprobs(running, running.ids("w10 w11"), new)
    assert_same_up_to_rounding(torch.tensor([one.logprob for one in entries]), logprobs[range(len(new)), new])
    for entry, (values, top) in zip(entries, zip(*logprobs.topk(3), strict=True), strict=True):
        assert [other.token for other in entry.top_logprobs] == running.model.tokenizer.convert_ids_to_tokens(top)
        assert_same_up_to_rounding(torch.tensor([other.logprob for other in entry.top_logprobs]), values)


def test_logprobs_of_a_stream_and_of_a_text(running):
    """A stream leaves tokens out, or a text's offsets point elsewhere."""
    whole = _chat(running, "w10 w11", logprobs=True).choices[0].logprobs.content
    chunks = list(_chat(running, "w10 w11", logprobs=True, stream=True, stop="never"))
    parts = [one for chunk in chunks for one in (chunk.choices[0].logprobs or _Nothing).content]
    assert [one.token for one in parts] == [one.token for one in whole]
    # passes of other widths round otherwise
    assert_same_up_to_rounding(*(torch.tensor([one.logprob for one in entries]) for entries in (parts, whole)))
    text = running.client.completions.create(
        model=NAME, prompt="w10 w11", max_tokens=6, temperature=0, logprobs=0
    ).choices[0]
    special = running.model.tokenizer.all_special_tokens
    pairs = zip(text.logprobs.tokens, text.logprobs.text_offset, strict=True)
    for token, offset in ((token, offset) for token, offset in pairs if token not in special):
        assert text.text[offset:].lstrip().startswith(token)


class _Nothing:
    content: tuple[Any, ...] = ()


def test_a_seed_decides_the_text(running):
    """The same seed gives another text beside other requests, or every seed gives the same."""
    options = {"temperature": 1.0, "max_tokens": 10}
    alone = _text(_chat(running, "w10", seed=5, **options))
    with ThreadPoolExecutor(8) as clients:
        jobs = [clients.submit(_chat, running, "w10", seed=seed, **options) for seed in (5, 6, 7, 5, 8, 5)]
        crowd = [_text(job.result()) for job in jobs]
    assert [crowd[0], crowd[3], crowd[5]] == [alone] * 3
    assert len({*crowd}) == 4
    # the target's own distribution with the seed's noise, token by token
    noise, ids = KeyedNoise(5), running.ids("w10")
    new: list[int] = []
    while len(new) < 10 and not {EOS, END} & {*new[-1:]}:
        with torch.no_grad():
            scores = running.model.target(torch.cat([ids, torch.tensor([new], dtype=torch.long)], dim=1)).logits
        new.append(int(noise.add_to(scores[:, -1:], [0], [len(new)]).argmax()))
    assert alone == running.text(new)


def test_sampling_comes_from_the_request(running):
    """`top_k`, `top_p`, `min_p`, a bias or a penalty is dropped without a word."""
    greedy = _text(_chat(running, "w10"))
    for narrow in ({"top_k": 1}, {"min_p": 1.0}):
        assert _text(_chat(running, "w10", temperature=1.3, extra_body=narrow)) == greedy
    assert _text(_chat(running, "w10", temperature=1.3, top_p=1e-6)) == greedy
    assert _text(_chat(running, "w10", logit_bias={"33": 100}, max_tokens=3)) == "w33 w33 w33"
    words = _text(_chat(running, "w10", logit_bias={"33": 9, "34": 8}, presence_penalty=2, max_tokens=8)).split()
    assert words == _penalised(running, {33: 9.0, 34: 8.0}, presence=2.0, count=8)
    words = _text(_chat(running, "w10", logit_bias={"33": 9, "34": 8}, frequency_penalty=1.5, max_tokens=8)).split()
    assert words == _penalised(running, {33: 9.0, 34: 8.0}, frequency=1.5, count=8)


def _penalised(
    running: Running, biases: dict[int, float], *, presence: float = 0.0, frequency: float = 0.0, count: int
) -> list[str]:
    """Return words by the API's own formula, token by token."""
    ids, new = running.ids("w10"), []
    for _ in range(count):
        with torch.no_grad():
            logits = running.model.target(torch.cat([ids, torch.tensor([new], dtype=torch.long)], dim=1)).logits[0, -1]
        for token_id, bias in biases.items():
            logits[token_id] += bias
        for token_id in range(VOCAB_SIZE):
            times = new.count(token_id)
            logits[token_id] -= times * frequency + (times > 0) * presence
        new.append(int(logits.argmax()))
    return running.text(new).split()


def test_a_text_is_continued_and_tokens_are_taken(running):
    """Raw text goes through the chat template, or token ids are encoded again."""
    ids = torch.tensor([[10, 11, 12]])
    expected = running.text(running.plain(ids, 5, eos_token_id=EOS))
    for prompt in ("w10 w11 w12", [10, 11, 12], [[10, 11, 12]], ["w10 w11 w12"]):
        answer = running.client.completions.create(model=NAME, prompt=prompt, max_tokens=5, temperature=0)
        assert answer.choices[0].text == expected


def test_all_tokens_of_a_prompt_are_read(running):
    """A prompt of token ids loses those that could be padding."""
    ids = torch.tensor([[10, 0, 11, 0]])
    expected = running.text(running.plain(ids, 5, eos_token_id=EOS, attention_mask=torch.ones_like(ids)))
    for prompt in ([10, 0, 11, 0], "w10 <pad> w11 <pad>"):
        answer = running.client.completions.create(model=NAME, prompt=prompt, max_tokens=5, temperature=0)
        assert answer.choices[0].text == expected


def test_the_model_is_named(running):
    """A client that looks for models finds none, or another name is served in silence."""
    assert [model.id for model in running.client.models.list()] == [NAME]
    assert running.client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="`model` must be 'tiny' here, got 'gpt-4'"):
        running.client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "w10"}])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 2}, "`n` must be 1, got 2. Send a request for each answer"),
        ({"tools": [{"type": "function"}]}, "`tools` must be [], got"),
        ({"response_format": {"type": "json_object"}}, "`response_format` must be {'type': 'text'}, got"),
        ({"best_off": 3}, "`best_off` must be left out, got it."),
        ({"temperature": 3}, "`temperature` must be less than or equal to 2, got 3."),
        ({"temperature": float("nan")}, "`temperature` must be"),
        ({"temperature": 1e-6}, "`temperature` must be 0 (greedy) or at least 0.01"),
        ({"top_p": 0}, "`top_p` must be greater than 0, got 0."),
        ({"max_tokens": "7"}, "`max_tokens` must be a valid integer, got '7'."),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "`max_completion_tokens` must agree with `max_tokens`"),
        ({"max_tokens": 5000}, "must fit into 256 tokens, got 6 in the prompt and 5000 asked for."),
        ({"stop": ["a"] * 5}, "`stop` must be up to 4 texts"),
        ({"stop": ""}, "`stop` must be up to 4 texts of 1 to"),
        ({"stream_options": {"include_usage": True}}, "`stream_options` must come with `stream`"),
        ({"top_logprobs": 2}, "`top_logprobs` must come with `logprobs`"),
        ({"logit_bias": {"word": 1}}, "`logit_bias` must have up to 1024 token ids as keys"),
        ({"logit_bias": {"64": 1}}, "`logit_bias` must name tokens in [0, 63], got 64."),
        ({"chat_template_kwargs": {"thinking": True}}, "`chat_template_kwargs` must name something"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "`chat_template_kwargs` must name something"),
        ({"chat_template_kwargs": {"messages": []}}, "`chat_template_kwargs` must name something"),
        ({"seed": 2**64}, "`seed` must be less than or equal to"),
        ({"generation_config": "max_new_tokens"}, "`generation_config` must be a JSON object as text, got 'max_new"),
        ({"generation_config": '{"num_beams": 4}'}, "`generation_config` must hold do_sample, max_new_tokens, temp"),
        (
            {"generation_config": '{"max_new_tokens": 9}'},
            "`generation_config` must agree with `max_tokens`, got 9 and 4",
        ),
        ({"generation_config": '{"do_sample": 1}'}, "`generation_config` must have true or false as do_sample"),
        ({"messages": []}, "`messages` must"),
        ({"messages": [{"role": "tool", "content": "w"}]}, "`messages.0.role` must be 'system', 'developer'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "`messages.0.content.0.type` must be"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "text must be of whole characters"),
        ({"\ud800": 1}, "the body must be a JSON object"),
    ],
    ids=lambda value: next(iter(value)).encode("ascii", "replace").decode() if isinstance(value, dict) else "",
)
def test_what_is_not_served_is_refused_by_name(running, fields, message):
    """A field is dropped in silence, or its refusal does not say which it is and what to do."""
    status, _, text = running.ask("/v1/chat/completions", _body(**fields))
    assert (status, message in json.loads(text)["error"]["message"]) == (400, True), text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ["w10", "w11"]}, "`prompt` must be one prompt, got 2."),
        ({"prompt": []}, "`prompt` must be one prompt, got 0."),
        ({"prompt": [10, 64]}, "`prompt` must hold tokens in [0, 63], got 64."),
        ({"prompt": "w10", "echo": True}, "`echo` must be False, got True."),
        ({}, "`prompt` must be given, got none."),
    ],
)
def test_texts_are_refused_by_name(running, fields, message):
    """A prompt of strangers breaks the target, or only its first part is continued."""
    status, _, text = running.ask("/v1/completions", {"model": NAME, **fields})
    assert (status, message in json.loads(text)["error"]["message"]) == (400, True), text


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 20000, b'{"model": ' + b"9" * 6000 + b"}"]
)
def test_what_is_no_body_is_refused(running, body):
    """A broken body is an error of the server, or ends it."""
    status, _, text = running.ask("/v1/chat/completions", body, {"Content-Length": str(len(body))})
    assert status == 400 and json.loads(text)["error"]["message"], text


def test_transformers_chat_is_answered(running, monkeypatch, tmp_path):
    """Transformers' own terminal is refused for what it sends, or is answered by other settings than it asks for."""
    shown = []
    lines = iter(["w10 w11", "!exit"])
    # its client asks nobody else
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(RichInterface, "input", lambda self: next(lines))
    stream_output = RichInterface.stream_output

    async def show(self: RichInterface, stream: Any) -> Any:
        shown.append(await stream_output(self, stream))
        return shown[-1]

    monkeypatch.setattr(RichInterface, "stream_output", show)
    monkeypatch.setattr(RichInterface, "confirm", lambda self, message, default=False: False)
    Chat(NAME, f"{running.url}/v1", ["do_sample=False", f"max_new_tokens={COUNT}"], save_folder=str(tmp_path))
    expected = running.text(running.plain(running.ids("w10 w11"), COUNT))
    assert [text for text, _ in shown] == [expected]


def test_null_and_the_only_value_say_nothing(running):
    """Clients that send all fields of the API with their defaults are refused."""
    fields = {
        "n": 1,
        "tools": [],
        "stop": None,
        "response_format": {"type": "text"},
        "top_logprobs": None,
        "user": "u",
    }
    assert running.ask("/v1/chat/completions", _body(**fields))[0] == 200


def test_an_address_that_is_not_there_is_told_what_is(running):
    """Who asks for embeddings, or forgets `/v1`, is not told what this server can do."""
    with pytest.raises(openai.NotFoundError) as failure:
        running.client.embeddings.create(model=NAME, input="w1")
    assert failure.value.code == "unknown_url"
    assert "got 'POST /v1/embeddings'" in failure.value.message
    for address in (
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "GET /v1/models",
        "GET /health",
        "GET /metrics",
    ):
        assert address in failure.value.message
        method, path = address.split()
        # each of them is there
        assert running.ask(path, {} if method == "POST" else None)[0] != 404
    status, headers, body = running.ask("/v1/chat/completions")
    assert status == 405 and headers["Allow"] == "POST"
    assert "got 'GET /v1/chat/completions'" in json.loads(body)["error"]["message"]


def test_a_body_has_a_size():
    """Anybody fills the memory with one request, with its length said or not."""
    with serve(max_body_bytes=4096) as small:
        assert small.ask("/v1/chat/completions", b"x" * 5000)[0] == 413
        with socket.create_connection(small.url.removeprefix("http://").split(":")) as connection:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            connection.sendall(head + b"1000\r\n" + b"x" * 4096 + b"\r\n1\r\nx\r\n")
            assert connection.recv(64).startswith(b"HTTP/1.1 413")
        assert small.ask("/v1/chat/completions", _body())[0] == 200


def test_pages_of_strangers_are_not_answered():
    """A page in somebody's browser asks a server without a key, by plain text or by a name that leads here."""
    with serve(is_local=True) as local:
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
            assert local.ask("/v1/chat/completions", _body(), {"Host": host})[0] == 200
        for host in ("evil.example:8000", "127.0.0.1.evil.example", ""):
            assert local.ask("/v1/chat/completions", _body(), {"Host": host})[0] == 403
        plain = json.dumps(_body()).encode()
        assert local.ask("/v1/chat/completions", plain, {"Content-Type": "text/plain"})[0] == 400


def test_a_key_is_asked_for():
    """A server with a key answers without it, or with a part of it."""
    with serve(api_key="secret") as guarded:
        assert _text(_chat(guarded, "w10"))
        for headers in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
            for path, body in (("/v1/chat/completions", _body()), ("/v1/models", None), ("/metrics", None)):
                assert guarded.ask(path, body, headers)[0] == 401
        assert guarded.ask("/health")[0] == 200


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_drafts_are_as_many_as_were_asked_for(num_drafts):
    """`--num-drafts` is taken and forgotten, or changes the text."""
    target = tiny_target()
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4, block_size=5)
    drafter.drafts = "model"
    options = {"scheduler": "fixed", "num_drafts": num_drafts}
    with serve(target=target, drafter=drafter.eval(), engine_options=options) as few:
        text = _chat(few, "w10 w11", max_tokens=8).choices[0].message.content
        assert text == few.text(few.plain(few.ids("w10 w11"), 8))
        wait_until(lambda: few.metric("dspark_rounds_total") > 0)
        drafted = few.metric('dspark_drafts_total{step="drafted"}')
        # the last round may have room for fewer
        assert num_drafts / 2 < drafted / few.metric("dspark_rounds_total") <= num_drafts
