"""Attention by groups of heads: what Transformers' own function gives, for our passes alone."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dspark_hf import DSparkAssistantModel, LookupAssistant, generate_stream
from dspark_hf.generation import lean_passes as module
from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.generation.lean_passes import lean_passes
from dspark_hf.generation.requests.request import Request
from tests.generation.prompts import ragged_prompts
from tests.tiny import tiny_target


@pytest.fixture
def grouped(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of queries that are attended to by groups, as they come."""
    seen: list[tuple[int, ...]] = []
    attend = module.scaled_dot_product_attention

    def count(query, *args, **kwargs):
        seen.append(tuple(query.shape))
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(module, "scaled_dot_product_attention", count)
    return seen


def _states(batch_size: int, width: int, num_slots: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    query = torch.randn(batch_size, width, 6, 16).to(dtype).transpose(1, 2)
    # as a cache with room behind them gives them out
    keys, values = (torch.randn(batch_size, 2, num_slots + 3, 16).to(dtype)[:, :, :num_slots] for _ in range(2))
    return query, keys, values


def _mask(kind: str | None, batch_size: int, width: int, num_slots: int) -> torch.Tensor | None:
    if kind is None:
        return None
    seen = torch.rand(1 if kind == "shared" else batch_size, 1, width, num_slots) < 0.6
    seen[..., 0] = True
    return torch.zeros(seen.shape).masked_fill(~seen, -1e30) if kind == "additive" else seen


LAYER: Any = SimpleNamespace(num_key_value_groups=3, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("width", "kind"), [(1, None), (1, "own"), (5, "own"), (5, "shared"), (5, "additive")])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_is_transformers_own_attention(grouped, dtype, width, kind, batch_size):
    """Queries of a group are laid out in another order than masks, or heads come back in another one."""
    query, keys, values = _states(batch_size, width, 11, dtype)
    mask = _mask(kind, batch_size, width, 11)
    mask = mask.to(dtype) if kind == "additive" and mask is not None else mask
    with torch.no_grad():
        expected, _ = sdpa_attention_forward(LAYER, query, keys, values, mask, scaling=0.3)
        with lean_passes():
            found, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](LAYER, query, keys, values, mask, scaling=0.3)
    assert grouped == [(batch_size, 2, 3 * width, 16)] and weights is None
    assert found.is_contiguous() and found.shape == expected.shape
    # the sums of 11 products, and of 16
    torch.testing.assert_close(found, expected, rtol=0, atol=16 * torch.finfo(dtype).eps * float(values.abs().max()))


@pytest.mark.parametrize(
    ("width", "kind", "options", "num_shared"),
    [
        # tokens of a prompt, which see no later ones
        (5, None, {}, 3),
        (65, "own", {}, 3),
        (5, "own", {"dropout": 0.5}, 3),
        (5, "own", {"position_bias": torch.zeros(1, 1, 5, 11)}, 3),
        (5, "own", {}, 1),
    ],
)
def test_leaves_to_transformers_what_it_does_not_know(grouped, width, kind, options, num_shared):
    """A pass of another kind is attended to without what it asks for."""
    num_slots = max(11, width)
    query, keys, values = _states(2, width, num_slots, torch.float32)
    if num_shared == 1:
        keys, values = (x.repeat_interleave(3, dim=1) for x in (keys, values))
    layer: Any = SimpleNamespace(num_key_value_groups=num_shared, is_causal=True)
    given = layer, query, keys, values, _mask(kind, 2, width, num_slots)
    with torch.no_grad(), lean_passes():
        torch.manual_seed(1)
        found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](*given, **options)
        torch.manual_seed(1)
        expected, _ = sdpa_attention_forward(*given, **options)
    assert torch.equal(found, expected) and not grouped


def test_queries_that_all_rows_share_are_left_to_transformers(grouped):
    """Learned queries are taken for one row's, and the others' results for further values of it."""
    query, keys, values = _states(3, 5, 11, torch.float32)
    given = LAYER, query[:1], keys, values, _mask("own", 3, 5, 11)
    with torch.no_grad(), lean_passes():
        found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](*given)
        expected, _ = sdpa_attention_forward(*given)
    assert torch.equal(found, expected) and len(found) == 3 and not grouped


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """The rows of masks that are laid out for groups, as they come."""
    seen: list[int] = []
    joined = torch.cat

    def count(parts, dim):
        seen.append(sum(part.shape[2] for part in parts))
        return joined(parts, dim=dim)

    monkeypatch.setattr(module.torch, "cat", count)
    return seen


def _is_as_without_groups(query, keys, values, mask, layer: Any = LAYER) -> None:
    found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](layer, query, keys, values, mask)
    expected, _ = sdpa_attention_forward(layer, query, keys, values, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_mask_is_laid_out_once_for_all_layers(made):
    """Each layer lays out its mask again: a twentieth of a pass."""
    query, keys, values = _states(1, 5, 11, torch.float32)
    full, window = _mask("own", 1, 5, 11), _mask("own", 1, 5, 11)
    with torch.no_grad(), lean_passes():
        for mask in (full, window, window, full, full, window):
            _is_as_without_groups(query, keys, values, mask)
    assert made == [15, 15]


def test_a_mask_that_changed_is_laid_out_anew(made):
    """A mask is written to between passes, or is asked for by heads of another number, and taken for what it was."""
    query, keys, values = _states(1, 5, 11, torch.float32)
    mask = _mask("own", 1, 5, 11)
    assert mask is not None
    pairs: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    with torch.no_grad(), lean_passes():
        _is_as_without_groups(query, keys, values, mask)
        mask.logical_not_()[..., 0] = True
        _is_as_without_groups(query, keys, values, mask)
        _is_as_without_groups(query[:, :4], keys, values, mask, pairs)
        # what is written to is not counted here
        with torch.inference_mode():
            own = mask.clone()
            for _ in range(2):
                _is_as_without_groups(query, keys, values, own)
                own.logical_not_()[..., 0] = True
    assert made == [15, 15, 10, 15, 15]


def test_gradients_take_the_usual_way(grouped):
    """Whoever trains in the thread of a call, as from a streamer, computes gradients of something else."""
    query, keys, values = _states(1, 5, 11, torch.float32)
    with lean_passes():
        ALL_ATTENTION_FUNCTIONS["sdpa"](LAYER, query, keys, values, _mask("own", 1, 5, 11))
    assert not grouped


def test_is_there_for_as_long_as_anyone_uses_it():
    """A call that ends takes it away from another, or leaves it behind."""
    inside, may_end = threading.Event(), threading.Event()

    def call() -> None:
        with lean_passes():
            inside.set()
            may_end.wait(30)

    other = threading.Thread(target=call)
    with lean_passes(), lean_passes():
        other.start()
        inside.wait(30)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is module._attend
    may_end.set()
    other.join(30)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_other_threads_attend_as_ever(grouped):
    """A plain pass beside a call is another one than without it."""
    query, keys, values = _states(1, 5, 11, torch.float32)
    given = LAYER, query, keys, values, _mask("own", 1, 5, 11)

    @torch.no_grad()
    def run() -> None:
        ALL_ATTENTION_FUNCTIONS["sdpa"](*given)

    with lean_passes():
        other = threading.Thread(target=run)
        other.start()
        other.join(30)
        assert not grouped
        run()
    assert grouped


def test_a_function_of_the_user_s_is_called(monkeypatch):
    """Somebody's own attention is replaced behind their back."""
    calls = []

    def attend(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)
    target = tiny_target("qwen3")
    target.generate(torch.tensor([[3, 9, 4]]), assistant_model=LookupAssistant(), max_new_tokens=12, do_sample=False)
    assert calls and ALL_ATTENTION_FUNCTIONS["sdpa"] is attend


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_text_is_plain_generate_s(grouped, family, num_rows):
    """Passes over drafts are not attended to by groups at all, or the text changes."""
    target = tiny_target(family)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    options = {**ragged_prompts(num_rows), "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(**options)
    assert not grouped
    assert torch.equal(target.generate(**options, assistant_model=drafter, scheduler="fixed"), plain)
    assert max(shape[2] for shape in grouped) > target.config.num_attention_heads // target.config.num_key_value_heads
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_streams_attend_by_groups_in_their_own_passes(grouped):
    """A stream's passes copy keys, or the caller's own passes between two rounds do not."""
    target = tiny_target("qwen3")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    request = Request(torch.tensor([3, 9, 4]), options={"max_new_tokens": 16, "do_sample": False})
    stream = generate_stream(target, [request], drafter=drafter, scheduler="fixed")
    [result] = list(stream)
    assert grouped and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    plain = target.generate(torch.tensor([[3, 9, 4]]), max_new_tokens=16, do_sample=False)
    assert result.token_ids.tolist() == plain[0].tolist()


def test_compiled_passes_are_left_alone(grouped):
    """Plain and assisted calls in turns compile each other's passes anew."""
    target = tiny_target("qwen3")
    config = CompileConfig(backend="eager", fullgraph=False)
    # CPUs would not compile otherwise
    config._compile_all_devices = True
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static", "compile_config": config}
    target.generate(torch.tensor([[3, 9, 4]]), assistant_model=LookupAssistant(), **options)
    assert not grouped


def test_an_error_leaves_nothing_behind():
    """A call that fails leaves its attention to all others."""
    target = tiny_target("qwen3")

    class Broken(DynamicCache):
        def crop(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("broken")

    ids, cache = torch.tensor([[3, 9, 4]]), Broken(config=target.config)
    with pytest.raises(RuntimeError, match="broken"):
        target.generate(ids, assistant_model=LookupAssistant(), max_new_tokens=12, **{CACHE_KEY: cache})
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward and not module._THREADS
