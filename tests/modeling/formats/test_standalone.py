"""The folder that needs no `dspark_hf` drafts as the package does, and leaves the target's text as it is."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.formats.standalone import standalone_code
from dspark_hf.modeling.formats.writing import export
from tests.generation import frequencies
from tests.modeling.drafting import draft_greedily
from tests.reference.sampling import SMALLEST_P_VALUE, p_value, text_probabilities
from tests.thinning import mostly_slow, slow
from tests.tiny import tiny_target

PROMPT = torch.tensor([[5, 6, 7, 8, 5, 6]])
DRAFTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "gated": ("llama", {"markov_head_type": "gated"}),
    "rnn": ("llama", {"markov_head_type": "rnn", "sample_from_anchor": False}),
    "no Markov head": ("llama", {"markov_rank": 0, "target_layer_ids": [-1, 1]}),
    "reduced": ("llama", {"draft_token_ids": range(3, 40), "markov_over_draft_vocab": True}),
    "own vocabulary": ("gemma2", {"owns_embeddings": True, "embed_scale": 2.5, "final_logit_softcapping": 9.0}),
    "window": (
        "mistral",
        {"context_window": 5, "sliding_layers": [1], "has_causal_sliding_layers": True, "num_hidden_layers": 2},
    ),
    "bare": ("gemma2", {"borrows_bare_weights": True}),
    "gemma3": ("gemma3_text", {}),
    "gemma4": ("gemma4_text", {}),
    "yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "rope_interleaved": True,
        },
    ),
}


def _pair(family: str, **fields: Any) -> tuple[PreTrainedModel, DSparkAssistantModel]:
    target = tiny_target(family)
    fields = {"num_hidden_layers": 1, "markov_rank": 4, "initializer_range": 0.3, **fields}
    return target, DSparkAssistantModel.from_target(target, **fields)


def _run(code: str) -> ModuleType:
    module = ModuleType("generate")
    exec(compile(code, "generate.py", "exec"), module.__dict__)
    return module


def _standalone(drafter: DSparkAssistantModel) -> tuple[ModuleType, Any]:
    module = _run(standalone_code(drafter.config))
    copied = module.StandaloneDrafter(module.FIELDS)
    state = {name: x for name, x in drafter.state_dict().items() if not name.startswith("confidence_head.")}
    copied.load_state_dict(state)
    return module, copied.eval()


@pytest.mark.parametrize("name", mostly_slow(DRAFTERS, ("gemma4", "gated", "window", "own vocabulary", "rnn")))
@torch.no_grad()
def test_drafts_are_the_packages(name: str) -> None:
    """The file drafts otherwise than `DSparkAssistantModel`, which costs speed and says nothing."""
    family, fields = DRAFTERS[name]
    target, drafter = _pair(family, **fields)
    adapter = TargetAdapter(target, drafter.target_layer_ids)
    module, copied = _standalone(drafter)
    context = torch.randn(1, 9, 32 * len(drafter.target_layer_ids))
    expected = draft_greedily(drafter, adapter, context, [9], [12])
    state = module.StandaloneContext(copied, module.TargetAdapter(target, drafter.target_layer_ids))
    # as over several rounds
    state.extend(context[:, :4], 0)
    state.extend(context[:, 4:], 4)
    seen: list[Tensor] = []

    def argmax(k: int, logits: Tensor, so_far: Tensor) -> tuple[Tensor, None]:
        seen.append(logits)
        return logits.argmax(-1), None

    token_ids, probs = state.draft(torch.tensor([12]), 9, drafter.block_size, argmax)
    assert probs is None
    torch.testing.assert_close(torch.stack(seen, dim=1), expected.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(token_ids, expected.token_ids)


class _Kept(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.has_ended = False

    def put(self, value: Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        self.has_ended = True


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, PreTrainedModel]:
    """The file as a module that has read a good drafter: the target's own last layer helps it."""
    target, drafter = _pair("llama", warm_start=True)
    module, copied = _standalone(drafter)
    monkeypatch.setattr(module, "load", lambda name, model: copied)
    return module, target


@pytest.mark.parametrize("family", ["llama", slow("gemma2"), "gemma4_text", slow("gpt2")])
def test_greedy_text_is_plain_text(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file changes the text of a family of targets, or its streamer tells another one."""
    target, drafter = _pair(family)
    module, copied = _standalone(drafter)
    monkeypatch.setattr(module, "load", lambda name, model: copied)
    for options in ({"max_new_tokens": 16}, {"max_new_tokens": 16, "repetition_penalty": 1.5}, {"max_new_tokens": 1}):
        plain = target.generate(PROMPT, do_sample=False, **options)
        streamer = _Kept()
        assert torch.equal(
            module.generate(target, inputs=PROMPT, do_sample=False, streamer=streamer, **options), plain
        )
        assert streamer.seen == plain[0].tolist()
        assert streamer.has_ended
    # the text stops inside a block
    end = int(plain[0, -1])
    options = {"max_new_tokens": 24, "eos_token_id": end, "do_sample": False}
    assert torch.equal(module.generate(target, inputs=PROMPT, **options), target.generate(PROMPT, **options))


def test_drafts_are_accepted(loaded: tuple[ModuleType, PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft is thrown away, and the text comes out right one token at a time."""
    module, target = loaded
    plain = target.generate(PROMPT, max_new_tokens=24, do_sample=False)[0]

    def right(self: Any, anchor: Tensor, position: int, num_drafts: int, sampler: Any) -> tuple[Tensor, None]:
        return plain[None, position + 1 : position + 1 + num_drafts], None

    monkeypatch.setattr(module.StandaloneContext, "draft", right)
    passes: list[int] = []
    hook = target.register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(module.generate(target, inputs=PROMPT, max_new_tokens=24, do_sample=False)[0], plain)
    hook.remove()
    # the prompt gives one token, every block of 7 drafts eight
    assert len(passes) == 1 + 3


def test_the_rule_of_acceptance(loaded: tuple[ModuleType, PreTrainedModel]) -> None:
    """A sampled token follows the drafter's distribution, or neither."""
    sampler = loaded[0].StandaloneSampler([])
    target_scores = torch.tensor([[0.5, 1.0, -1.0, 0.0, 0.3]])
    drafted = torch.tensor([[1.0, -1.0, 0.5, 0.2, float("-inf")]])
    tokens, num_taken = [], 0
    for _ in range(2000):
        draft, probs = sampler(0, drafted, draft_ids := torch.empty(1, 0, dtype=torch.long))
        assert probs is not None and draft_ids.shape == (1, 0)
        token, is_draft = sampler.decide(target_scores, 0, draft[:, None], probs[:, None])
        assert not is_draft or token == draft
        tokens.append(token)
        num_taken += is_draft
    target_probs, draft_probs = target_scores.softmax(-1)[0], drafted.softmax(-1)[0]
    assert p_value(torch.stack(tokens), target_probs) > SMALLEST_P_VALUE
    # no rule that looks at one draft takes more
    assert abs(num_taken / 2000 - float(torch.minimum(target_probs, draft_probs).sum())) < 0.05


@pytest.mark.slow
def test_sampling_follows_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled text has another distribution than the target's."""
    target = frequencies.small_target()
    module, copied = _standalone(frequencies.untrained_drafter(target))
    monkeypatch.setattr(module, "load", lambda name, model: copied)
    processors = LogitsProcessorList([frequencies.PrefixDependent()])
    prompt = frequencies.PROMPT[None]
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 0, "logits_processor": processors}
    samples = torch.cat([module.generate(target, inputs=prompt, **options) for _ in range(300)])[:, prompt.shape[1] :]
    probabilities = text_probabilities(target, frequencies.PROMPT, 4, processors=processors)
    assert frequencies.smallest_p_value(samples, probabilities, span=2) > SMALLEST_P_VALUE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": PROMPT.expand(2, -1)}, "`input_ids` must have one row, got 2"),
        ({"num_beams": 2}, "`num_beams` must be 1, got 2"),
        ({"return_dict_in_generate": True}, "`return_dict_in_generate` must be False"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}, "`attention_mask` must hide nothing"),
        ({"cache_implementation": "static"}, "`cache_implementation` must be left out"),
        ({"num_assistant_tokens": 8}, r"`num_assistant_tokens` must lie in \[1, 7\], got 8"),
        ({"stop_strings": ["a"]}, "`tokenizer` must be given with `stop_strings`"),
        ({"assistant_model": "x"}, "`assistant_model` must be left out"),
    ],
)
def test_what_it_does_not_serve(
    options: dict[str, Any], message: str, loaded: tuple[ModuleType, PreTrainedModel]
) -> None:
    """The file writes another text for what it does not know, without a word."""
    module, target = loaded
    passes: list[int] = []
    target.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match=message):
        module.generate(target, **{"inputs": PROMPT, "max_new_tokens": 4, "do_sample": False, **options})
    assert not passes


def test_a_state_that_cannot_be_taken_back() -> None:
    """A recurrent target's state runs ahead of its text."""
    target, drafter = _pair("llama")
    module, copied = _standalone(drafter)
    module.load = lambda name, model: copied
    target.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="`model` must keep keys and values alone"):
        module.generate(target, inputs=PROMPT, max_new_tokens=4)


def test_the_file_stands_alone(tmp_path: Path) -> None:
    """The file imports what its requirements do not name, defines a name twice, or cannot be saved again."""
    target, drafter = _pair("llama")
    export(drafter, "custom_generate", tmp_path / "one")
    text = (tmp_path / "one" / "custom_generate" / "generate.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names])
    }
    assert "dspark_hf" not in imported
    others = imported - {
        "__future__",
        "collections",
        "contextlib",
        "copy",
        "inspect",
        "sys",
        "threading",
        "types",
        "typing",
        "weakref",
    }
    requirements = (tmp_path / "one" / "custom_generate" / "requirements.txt").read_text(encoding="utf-8")
    assert others == set(requirements.split())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(names) == len(set(names))
    # saved again, in its place or elsewhere, a folder keeps or gets what makes it work
    again = DSparkAssistantModel.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "custom_generate" / "generate.py").read_text(encoding="utf-8") == text
    again.save_pretrained(tmp_path / "two")
    assert "import dspark_hf" in (tmp_path / "two" / "custom_generate" / "generate.py").read_text(encoding="utf-8")
    assert inspect.signature(_run(text).generate).parameters.keys() >= {"model", "streamer", "tokenizer"}
