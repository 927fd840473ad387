"""Drafter and target may differ in dtype and device, and the target may be quantised."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from dspark_hf import DSparkAssistantModel, Request, generate_stream
from dspark_hf.generation.targets.adapter import TargetAdapter
from tests.generation.call.test_remembering_processors import Budget
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.thinning import slow
from tests.tiny import VOCAB_SIZE, tiny_target

NEW_TOKENS = 12
FIELDS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "rnn": {"markov_head_type": "rnn"},
    "reduced vocabulary": {"draft_token_ids": range(0, VOCAB_SIZE, 3)},
}
# the head is left alone by default
QUANTISATIONS: dict[str, dict[str, Any]] = {
    # LLM.int8 finds its outlier columns over all tokens of a pass, so with outliers a token's numbers depend on its
    # neighbours; without them rows are independent
    "8 bits": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "8 bits, head too": {"load_in_8bit": True, "llm_int8_threshold": 0.0, "llm_int8_skip_modules": []},
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4 bits, head too": {"load_in_4bit": True, "llm_int8_skip_modules": []},
}


def _combinations(*quick: tuple[Any, str, int], values: Iterable[Any]) -> list[Any]:
    """Return every value with every kind of drafter and number of rows, of which those in `quick` run every time."""
    every = [(value, kind, num_rows) for value in values for kind in FIELDS for num_rows in (1, 3)]
    return [one if one in quick else slow(*one) for one in every]


WITH_HEAD = [name for name in QUANTISATIONS if "head" in name]


def _untrained(target: PreTrainedModel, **fields: Any) -> DSparkAssistantModel:
    options = {"num_hidden_layers": 1, "markov_rank": 8, "block_size": 5, "initializer_range": 0.5}
    return DSparkAssistantModel.from_target(target, **{**options, **fields})


def _greedy(target: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)


@pytest.fixture(scope="module")
def saved_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    # 4-bit blocks hold 64 weights of a row
    target = tiny_target(hidden_size=64, intermediate_size=128, head_dim=16)
    target.save_pretrained(folder)
    return folder


def _quantised(folder: Path, name: str) -> PreTrainedModel:
    config = BitsAndBytesConfig(**QUANTISATIONS[name])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("dtype", "kind", "num_rows"),
    _combinations(
        (torch.bfloat16, "vanilla", 3),
        (torch.float16, "reduced vocabulary", 1),
        (torch.float64, "rnn", 3),
        values=(torch.bfloat16, torch.float16, torch.float64),
    ),
    ids=str,
)
def test_drafter_of_another_dtype(dtype, kind, num_rows):
    """A drafter in another dtype than the target's raises an error or changes the text."""
    target = tiny_target()
    drafter = _untrained(target, **FIELDS[kind]).to(dtype)
    inputs = ragged_prompts(num_rows)
    assert torch.equal(_greedy(target, inputs, assistant_model=drafter), _greedy(target, inputs))
    sampled = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=True, assistant_model=drafter)
    assert sampled.shape == (num_rows, inputs["input_ids"].shape[1] + NEW_TOKENS)


@pytest.mark.parametrize(
    ("dtype", "kind", "num_rows"),
    _combinations(
        (torch.bfloat16, "rnn", 1),
        (torch.float16, "reduced vocabulary", 3),
        values=(torch.bfloat16, torch.float16),
    ),
    ids=str,
)
def test_target_of_another_dtype(dtype, kind, num_rows):
    """A fp32 drafter and a target in half precision raise an error, or give text that rounding does not explain."""
    target = tiny_target().to(dtype)
    drafter = _untrained(target, **FIELDS[kind]).float()
    inputs = ragged_prompts(num_rows)
    for options in ({"do_sample": True}, {"do_sample": False}):
        text = target.generate(**inputs, max_new_tokens=NEW_TOKENS, assistant_model=drafter, **options)
        assert text.shape == (num_rows, inputs["input_ids"].shape[1] + NEW_TOKENS)
    # passes of other widths round otherwise, so two logits this close may change places
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW_TOKENS), value=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = target(text, attention_mask=mask, position_ids=positions).logits[:, -NEW_TOKENS - 1 : -1].float()
    lost = logits.amax(-1) - logits.gather(-1, text[:, -NEW_TOKENS:, None]).squeeze(-1)
    assert float(lost.max()) <= 8 * torch.finfo(dtype).eps * float(logits.abs().max())


@pytest.mark.parametrize(
    ("quantisation", "kind", "num_rows"),
    _combinations(
        ("8 bits, head too", "reduced vocabulary", 3),
        ("4 bits", "rnn", 1),
        values=QUANTISATIONS,
    ),
)
def test_quantised_target(saved_target, quantisation, kind, num_rows):
    """A quantised target writes another text with a drafter than without."""
    target = _quantised(saved_target, quantisation)
    drafter = _untrained(target, **FIELDS[kind])
    inputs = ragged_prompts(num_rows)
    plain = _greedy(target, inputs)
    assert torch.equal(_greedy(target, inputs, assistant_model=drafter), plain)
    # a drafter that is often right accepts and rejects in turn
    script = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
    assert torch.equal(_greedy(target, inputs, assistant_model=script), plain)
    assert 0 < script.last_statistics.num_accepted < script.last_statistics.num_verified


@pytest.mark.parametrize("kind", ["vanilla", "reduced vocabulary"])
@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_drafts_use_the_head_of_a_quantised_target(saved_target, quantisation, kind):
    """Drafts come from packed weights read as numbers: they are noise, and nobody notices but for the speed."""
    target = _quantised(saved_target, quantisation)
    drafter = _untrained(target, **FIELDS[kind])
    states = torch.randn(2, 3, target.config.hidden_size)
    with torch.no_grad():
        expected = target.lm_head(states)
        if drafter.draft_token_ids is not None:
            expected = expected[..., drafter.draft_token_ids]
        logits = drafter.draft_head(TargetAdapter(target))(states)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantisation", WITH_HEAD)
def test_weights_of_a_quantised_head_are_lent_to_nobody(saved_target, quantisation):
    """The packed weights of a quantised head are handed out as if they were its rows."""
    target = _quantised(saved_target, quantisation)
    assert type(target.lm_head) is not torch.nn.Linear
    assert TargetAdapter(target).head_rows(torch.arange(4)) is None


@pytest.mark.parametrize("quantisation", ["8 bits", "4 bits"])
def test_quantised_layers_are_not_copied(saved_target, quantisation):
    """A warm start copies quantised codes into the drafter as if they were weights."""
    target = _quantised(saved_target, quantisation)
    with pytest.raises(ValueError, match="warm_start"):
        _untrained(target, warm_start=True)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize(("target_device", "drafter_device"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_drafter_on_another_device(target_device, drafter_device, kind, num_rows):
    """A drafter on another device than the target's raises an error or changes the text."""
    target = tiny_target().to(target_device)
    drafter = _untrained(target, **FIELDS[kind]).to(drafter_device)
    inputs = {name: tensor.to(target_device) for name, tensor in ragged_prompts(num_rows).items()}
    assert torch.equal(_greedy(target, inputs, assistant_model=drafter), _greedy(target, inputs))
    options = {"do_sample": True, "temperature": 0.8, "repetition_penalty": 1.2}
    target.generate(**inputs, max_new_tokens=NEW_TOKENS, assistant_model=drafter, **options)
    plain = _greedy(target, inputs, logits_processor=[Budget(8)])
    assert torch.equal(_greedy(target, inputs, logits_processor=[Budget(8)], assistant_model=drafter), plain)


@pytest.fixture(params=["cpu_offload", slow("disk"), "embedding on disk"])
def offloaded_target(request: pytest.FixtureRequest, saved_target: Path, tmp_path: Path) -> PreTrainedModel:
    """A target whose first weights, or all of them, are elsewhere until a module runs."""
    if request.param == "cpu_offload":
        return cpu_offload(tiny_target())
    rest = dict.fromkeys(("model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places = {"model.embed_tokens": "disk", **rest} if "embedding" in request.param else {"": "disk"}
    model = AutoModelForCausalLM.from_pretrained(saved_target, device_map=places, offload_folder=tmp_path)
    assert model.device.type == "meta"
    return model.eval()


@pytest.mark.parametrize(
    ("offloaded_target", "num_rows"),
    [
        ("cpu_offload", 3),
        ("embedding on disk", 1),
        slow("cpu_offload", 1),
        slow("embedding on disk", 3),
        slow("disk", 1),
        slow("disk", 3),
    ],
    indirect=["offloaded_target"],
)
def test_target_whose_first_weights_are_elsewhere(offloaded_target, num_rows):
    """Tokens are sent to the device that the first weights are said to lie on, which holds nothing."""
    inputs = ragged_prompts(num_rows)
    plain = _greedy(offloaded_target, inputs)
    drafter = _untrained(offloaded_target)
    assert drafter.device.type == "cpu"
    # this one measures costs, too
    scheduler = "hardware_aware" if num_rows == 1 else "fixed"
    assert torch.equal(_greedy(offloaded_target, inputs, assistant_model=drafter, scheduler=scheduler), plain)


def test_requests_for_an_offloaded_target(offloaded_target):
    """A stream fails each request, since it puts the prompt where the first weights are said to lie."""
    prompt = ragged_prompts(1)["input_ids"]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    (finished,) = generate_stream(
        offloaded_target, [Request(prompt[0].tolist(), options)], drafter=_untrained(offloaded_target)
    )
    assert finished.error is None
    assert torch.equal(finished.token_ids, offloaded_target.generate(prompt, **options)[0])


@pytest.mark.parametrize(
    ("scheduler", "num_rows"),
    [("adaptive", 1), ("threshold", 3)]
    + [slow("adaptive", 3), slow("threshold", 1), slow("hardware_aware", 1), slow("hardware_aware", 3)],
)
def test_default_device_is_elsewhere(scheduler, num_rows):
    """Numbers on the host are made on the user's default device, where they cannot be read."""
    target = tiny_target()
    inputs = ragged_prompts(num_rows)
    drafters = [_untrained(target, **FIELDS[kind]) for kind in FIELDS] + [_untrained(target, owns_embeddings=True)]
    with torch.device("meta"):
        plain = _greedy(target, inputs)
        for drafter in drafters if scheduler == "adaptive" else drafters[:1]:
            assert torch.equal(_greedy(target, inputs, assistant_model=drafter, scheduler=scheduler), plain)
