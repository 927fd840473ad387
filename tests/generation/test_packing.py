"""Products with packed weights: the same text, of the weights as they are now, and no trace in the model."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import CompileConfig

from dspark_hf import DSparkAssistantModel, LookupAssistant, generate_stream
from dspark_hf.generation import packing
from dspark_hf.generation.packing import can_pack, pack_weights, packed_weights
from dspark_hf.generation.requests.request import Request
from dspark_hf.generation.scheduling.costs.online import OnlineCosts
from tests.generation.prompts import ragged_prompts
from tests.tiny import tiny_target

pytestmark = [
    pytest.mark.skipif(not can_pack(), reason="no products with packed weights here"),
    pytest.mark.usefixtures("small_models_too"),
]

HAS_BF16 = can_pack() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
DTYPES = [torch.float32, *([torch.bfloat16] if HAS_BF16 else [])]


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """The rows of every product with packed weights, as they are made."""
    seen: list[int] = []
    multiply = packing._multiply

    def count(states, packed, bias):
        seen.append(states.numel() // states.shape[-1])
        return multiply(states, packed, bias)

    monkeypatch.setattr(packing, "_multiply", count)
    return seen


def _generate(target: Any, drafter: Any, **options: Any) -> list[list[int]]:
    inputs = ragged_prompts(2)
    return target.generate(
        **inputs, max_new_tokens=16, do_sample=False, pad_token_id=0, assistant_model=drafter, **options
    ).tolist()


def _plain(target: Any) -> list[list[int]]:
    return _generate(target, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 8), (1, 40)])
def test_products_are_those_of_the_layer(products, dtype, has_bias, shape):
    """A product lacks its bias, or is that of another weight, or reads states that are a slice wrongly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, has_bias), nn.Linear(40, 17, has_bias)).to(dtype)
    # every other state: of no row the neighbours lie side by side
    states = torch.randn(*shape, 48).to(dtype)[..., ::2]
    exact = nn.Sequential(nn.Linear(24, 40, has_bias), nn.Linear(40, 17, has_bias)).double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    with torch.no_grad():
        plain, expected = model(states), exact(states.double())
        pack_weights(model)
        with packed_weights(model):
            found = model(states)
    assert products == [shape[0] * shape[1]] * 2
    # sums of 40 products round as often, in whatever order
    error = 40 * torch.finfo(dtype).eps * expected.abs().max()
    assert (found - expected).abs().max() <= error and (plain - expected).abs().max() <= error


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_moe"])
def test_text_is_plain_generate_s(products, family):
    """Text of packed weights is another one, or target and drafter are not packed at all."""
    target = tiny_target(family)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    assert _generate(target, drafter) == _plain(target)
    assert products
    # prompts, drafts and passes over both
    assert {1, 2} & set(products) and max(products) > 2
    assert not any("forward" in vars(module) for model in (target, drafter) for module in model.modules())


def test_plain_generate_is_left_alone(products):
    """What a call packs is used behind its back by calls without a drafter."""
    target = tiny_target("qwen3")
    _generate(target, LookupAssistant())
    products.clear()
    _plain(target)
    assert not products


@pytest.mark.parametrize(("count", "is_packed"), [(8, False), (9, True)])
def test_the_shortest_texts_are_not_worth_it(products, count, is_packed):
    """A call for a word or two takes several times as long as without a drafter."""
    target = tiny_target("qwen3")
    ids = torch.tensor([[3, 9, 4]])
    options = {"max_new_tokens": count, "do_sample": False}
    text = target.generate(ids, assistant_model=LookupAssistant(), **options)
    assert torch.equal(text, target.generate(ids, **options))
    assert bool(products) == is_packed


def test_a_first_text_that_ends_at_once_is_not_packed_for(products, monkeypatch):
    """A call for a yes or no takes several times as long as without a drafter, since it packs when all is said."""
    # longer than any pass over drafts
    target, ids = tiny_target("qwen3"), torch.arange(20)[None] % 7 + 5
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "assistant_model": LookupAssistant()}
    plain = target.generate(ids, **{**options, "assistant_model": None})
    ending = {**options, "eos_token_id": int(plain[0, 21])}
    widths, forward = [], target.model.forward

    def note(*args, **kwargs):
        widths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(target.model, "forward", note)
    assert target.generate(ids, **ending)[0].tolist() == plain[0, :22].tolist()
    # wide passes are dear without packed weights
    assert not products and widths == [20, 1]
    # a longer one is, from its second round on, and what follows from the start
    assert torch.equal(target.generate(ids, **options), plain)
    assert products and 20 not in products
    products.clear()
    target.generate(ids, **ending)
    assert 20 in products


@pytest.mark.parametrize("options", [{"scheduler": "fixed"}, {"scheduler": "hardware_aware"}, {"do_sample": True}])
def test_calls_that_repeat_or_measure_are_packed_for_from_the_start(products, options):
    """A seed gives another text in the first call, whose sums are rounded otherwise, or passes are timed unpacked."""
    target, ids = tiny_target("qwen3"), torch.arange(20)[None] % 7 + 5
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, **options}
    target.generate(ids, assistant_model=drafter, **options)
    assert 20 in products


def test_passes_before_packing_teach_nothing_about_costs(monkeypatch):
    """The first round's time stands for those of all passes of its width, and drafts seem dearer than they are."""
    taught = []
    observe = OnlineCosts.observe
    monkeypatch.setattr(
        OnlineCosts, "observe", lambda costs, outcome: (taught.append(outcome), observe(costs, outcome))[1]
    )
    target, ids, assistant = tiny_target("qwen3"), torch.tensor([[3, 9, 4]]), LookupAssistant()
    for num_untaught in (1, 0):
        taught.clear()
        target.generate(ids, assistant_model=assistant, max_new_tokens=30, do_sample=False)
        assert len(taught) == len(assistant.last_statistics.rounds) - num_untaught


def test_what_a_model_was_packed_as_is_not_used_when_it_is_packable_no_more(products):
    """A target that changes its dtype multiplies as it was before, beside a drafter that is to be packed yet."""
    target, ids = tiny_target("qwen3"), torch.tensor([[3, 9, 4]])
    options = {"max_new_tokens": 20, "do_sample": False}
    for _ in range(2):
        target.generate(ids, assistant_model=LookupAssistant(), **options)
    target.double()
    products.clear()
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4).float()
    assert not packing.pack_weights(target.half(), may_wait=True) and target not in packing._MODELS
    assert packing.pack_weights(drafter, may_wait=True) and packing.pack_weights(target, drafter, may_wait=True)


def _negate(target: Any) -> None:
    target.model.layers[0].mlp.down_proj.weight.data.neg_()


def _swap_rows(target: Any) -> None:
    weight = target.lm_head.weight.data
    weight.copy_(weight.flip(0))


def _set_one(target: Any) -> None:
    target.lm_head.weight.data[9] *= 30


def _load(target: Any) -> None:
    torch.manual_seed(5)
    target.load_state_dict({name: torch.randn_like(value) for name, value in target.state_dict().items()})


def _replace(target: Any) -> None:
    target.lm_head = nn.Linear(32, 64, bias=False)


def _swap_columns(target: Any) -> None:
    for layer in target.model.layers:
        weight = layer.mlp.down_proj.weight.data
        weight.copy_(weight.roll(4, 1))


def _flip_signs(target: Any) -> None:
    # of every other column: as integers, these cancel
    target.lm_head.weight.data[:, 1::2].neg_()


def _swap_unseen(target: Any) -> None:
    target.lm_head.weight.data = target.lm_head.weight.data.flip(0)


CHANGES = [_negate, _swap_rows, _set_one, _load, _replace, _swap_columns, _flip_signs, _swap_unseen]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("door", ["generate", "stream"])
def test_changed_weights_count_at_once(change, door):
    """A target is trained, or LoRA merged into it, and the text is still that of the weights before."""
    target = tiny_target("qwen3")

    def write() -> list[int]:
        ids = torch.tensor([3, 9, 4])
        if door == "generate":
            return target.generate(
                ids[None], max_new_tokens=12, do_sample=False, assistant_model=LookupAssistant()
            ).tolist()[0]
        options = {"max_new_tokens": 12, "do_sample": False}
        return stream_of(ids, options)

    stream = iter(())
    requests: list[Request | None] = []
    stream = generate_stream(target, iter(lambda: requests.pop() if requests else None, 0), max_rows=2)

    def stream_of(ids: torch.Tensor, options: dict[str, Any]) -> list[int]:
        requests.append(Request(ids, options=options))
        return next(stream).token_ids.tolist()

    before = write()
    change(target)
    plain = target.generate(torch.tensor([[3, 9, 4]]), max_new_tokens=12, do_sample=False).tolist()[0]
    assert plain != before
    assert write() == plain


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_change_of_a_weight_shows(dtype):
    """A weight is taken for the one that was packed, since its elements add up to the same."""
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    changes = (
        lambda: weight.data.copy_(weight.roll(4, 1)),
        lambda: weight.data.copy_(weight.roll(1, 0)),
        lambda: weight.data[:, 3::4].neg_(),
        lambda: weight.data[::9, 7].neg_(),
        lambda: weight.data[5, 5].mul_(1.01),
        lambda: weight.data.copy_(weight.roll(16, 1)),
    )
    # without its version, which a write through `.data` does not count
    states = {packing._state_of(weight)[4:]}
    for count, change in enumerate(changes, start=2):
        change()
        states.add(packing._state_of(weight)[4:])
        assert len(states) == count
    # and none, none
    assert packing._state_of(weight) == packing._state_of(weight)


def test_biases_and_weights_may_lie_anywhere(products):
    """A bias with gaps is read as if it had none; a weight in the middle of a buffer ends a call with an error."""
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 7), nn.Linear(7, 9))
    model[0].bias.data = torch.randn(80)[::2]
    model[1].bias.data = torch.randn(1).expand(7)
    buffer = torch.randn(1 + 7 * 40)
    model[1].weight.data = buffer[1:].view(7, 40)
    states = torch.randn(1, 3, 24)
    with torch.no_grad():
        plain = model(states)
        pack_weights(model)
        with packed_weights(model):
            assert torch.allclose(model(states), plain, atol=1e-5)
        assert len(products) == 3
        buffer.neg_()
        pack_weights(model)
        with packed_weights(model):
            found = model(states)
        assert torch.allclose(found, model(states), atol=1e-5)


def test_a_stream_leaves_forward_passes_alone(products):
    """What somebody sets between two requests of a stream is overwritten, and then gone."""
    target = tiny_target("qwen3")
    requests = [Request(torch.tensor([3, 9, 4]), options={"max_new_tokens": n, "do_sample": False}) for n in (10, 20)]
    stream = generate_stream(target, requests, max_rows=2)
    next(stream)
    calls = []
    own = target.lm_head.forward

    def forward(states):
        calls.append(states)
        return own(states)

    target.lm_head.forward = forward
    next(stream)
    assert calls and target.lm_head.forward is forward


def test_a_stream_sees_weights_that_change_between_two_requests():
    """Rows that stay in a stream go on with weights that are gone."""
    target = tiny_target("qwen3")
    requests = [Request(torch.tensor([3, 9, 4]), options={"max_new_tokens": n, "do_sample": False}) for n in (10, 30)]
    stream = generate_stream(target, requests, max_rows=2)
    next(stream)
    target.lm_head.weight.data.zero_()
    assert next(stream).token_ids.tolist()[-5:] == [0] * 5


def test_a_model_may_be_copied_during_a_call(products):
    """A snapshot of a model that is being used ends with an error, or multiplies with another model's weights."""
    target = tiny_target("qwen3")
    copies = []

    class Snapshot:
        def put(self, value: Any) -> None:
            copies.append(copy.deepcopy(target) if len(copies) < 4 else None)

        def end(self) -> None:
            pass

    text = target.generate(
        torch.tensor([[3, 9, 4]]),
        max_new_tokens=12,
        do_sample=False,
        assistant_model=LookupAssistant(),
        streamer=Snapshot(),
    )
    assert products
    copied = copies[3]
    target.lm_head.weight.data.zero_()
    assert torch.equal(copied.generate(torch.tensor([[3, 9, 4]]), max_new_tokens=12, do_sample=False), text)


def test_other_threads_multiply_as_ever(products):
    """A pass of another thread, which knows nothing of this call, is made of other products."""
    model = nn.Sequential(nn.Linear(24, 40))
    pack_weights(model)
    states = torch.randn(1, 3, 24)
    found = []

    @torch.no_grad()
    def run():
        found.append(model(states))

    with torch.no_grad(), packed_weights(model):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not products
        model(states)
        assert products
        # nested, and the outer one goes on
        with packed_weights(model):
            pass
        model(states)
        assert len(products) == 2
    run()
    assert torch.equal(found[0], found[1]) and len(products) == 2


def test_gradients_and_autocast_are_left_alone(products):
    """Products with packed weights have no gradient, and do not convert what they are given."""
    model = nn.Sequential(nn.Linear(24, 40))
    pack_weights(model)
    states = torch.randn(1, 3, 24)
    with packed_weights(model):
        model(states).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert model(states).dtype is torch.bfloat16
        with torch.no_grad():
            assert model(states[:, :0]).shape == (1, 0, 40)
            assert model(states[0, 0]).shape == (40,)
    assert not products and model[0].weight.grad is not None


class _Other(nn.Linear):
    pass


def test_layers_with_ways_of_their_own_are_left_alone(products):
    """A layer that scales, or is offloaded, or multiplies in another dtype, loses what makes it different."""
    own = nn.Linear(24, 24)
    own.forward = lambda states: states + 1  # type: ignore[method-assign]
    other, double, strided, pruned = _Other(24, 24), nn.Linear(24, 24).double(), nn.Linear(24, 24), nn.Linear(24, 24)
    strided.weight = nn.Parameter(torch.randn(24, 24).t())
    prune.l1_unstructured(pruned, "weight", 0.5)
    sharded = nn.Linear(24, 24, device="meta")
    models = [nn.Sequential(layer) for layer in (own, other, double, strided, pruned, sharded)]
    pack_weights(*models, LookupAssistant(), None)
    with torch.no_grad(), packed_weights(*models, LookupAssistant(), None):
        for model in models[:-1]:
            model(torch.zeros(2, 24, dtype=model[0].weight.dtype))
    assert not products
    assert torch.equal(own(torch.zeros(1)), torch.ones(1))


def test_a_forward_pass_that_comes_later_stays(products):
    """A layer whose forward pass somebody replaces between two calls loses it with the next one."""
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    pack_weights(model)
    with packed_weights(model):
        model[0].forward = lambda states: states + 1  # type: ignore[method-assign]
    pack_weights(model)
    with torch.no_grad(), packed_weights(model):
        model(torch.zeros(1, 24))
    assert len(products) == 1
    assert torch.equal(model[0](torch.zeros(1)), torch.ones(1))


def test_a_layer_that_is_moved_is_let_go(products):
    """A layer multiplies with weights of the dtype that it had, or of the device."""
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24))
    states = torch.randn(1, 3, 24)
    pack_weights(model)
    with torch.no_grad(), packed_weights(model):
        model(states)
        model[1].double()
        pack_weights(model)
        assert model[1](model[0](states).double()).dtype is torch.float64
    assert products == [3, 3, 3]
    model.double()
    pack_weights(model)
    assert not packing._MODELS


@pytest.mark.parametrize("limit", ["least", "share", "variable", "container"])
def test_not_every_model_is_packed(products, monkeypatch, tmp_path, limit):
    """A small model's copies are in the way, or a large one's fill the memory that the rest needs."""
    target = tiny_target("qwen3")
    _generate(target, LookupAssistant())
    assert products
    size = sum(layer.weight.nbytes for layer in target.modules() if isinstance(layer, nn.Linear))
    if limit == "least":
        monkeypatch.setattr(packing, "LEAST_BYTES", size + 1)
    elif limit == "share":
        monkeypatch.setattr(packing, "SHARE_OF_MEMORY", 0.9 * size / packing._memory_bytes())
    elif limit == "container":
        path = tmp_path / "memory.max"
        path.write_text(f"{size}\n")
        monkeypatch.setattr(packing, "_LIMITS", (tmp_path / "none", path))
    else:
        monkeypatch.setenv(packing.NO_PACKING_VARIABLE, "1")
    products.clear()
    _generate(target, LookupAssistant())
    assert not products


def test_the_default_device_may_be_elsewhere(products):
    """A user's default device decides where what is reckoned on the way is put."""
    target = tiny_target("qwen3")
    with torch.device("meta"):
        pack_weights(target)
    with torch.no_grad(), packed_weights(target):
        target(torch.tensor([[3, 9]]))
    assert products


def test_nothing_is_left_of_a_call_that_fails(products):
    """A target whose call was interrupted multiplies with packed weights for ever."""
    target = tiny_target("qwen3")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = target.lm_head.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        _generate(target, LookupAssistant())
    handle.remove()
    assert not any("forward" in vars(module) for module in target.modules())


def test_a_model_that_is_gone_leaves_nothing():
    """Packed weights keep their model in memory, or outlive it."""
    model = nn.Sequential(nn.Linear(24, 40))
    # a layer may know its model
    model[0].register_forward_hook(functools.partial(lambda owner, *_: None, model))
    pack_weights(model)
    with torch.no_grad(), packed_weights(model):
        model(torch.randn(1, 3, 24))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and not packing._MODELS


def test_compiled_passes_are_left_alone(products):
    """A pass that is compiled has products of its own, and would be compiled again when layers change."""
    target = tiny_target("qwen3")
    config = CompileConfig(backend="eager", fullgraph=False)
    # CPUs would not compile otherwise
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    _generate(target, LookupAssistant(), **options)
    assert not products
