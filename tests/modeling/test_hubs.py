"""A drafter goes to a hub with a card of what was measured, and comes back from one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from transformers import AutoModelForCausalLM, PreTrainedModel

from dspark_hf import DSparkAssistantModel, hubs
from dspark_hf.hubs import local_name
from dspark_hf.loading import load_drafter, load_target, load_tokenizer
from dspark_hf.modeling.card import describe, read_measured
from tests.hub import Handler, start_hub
from tests.tiny import tiny_target

PROMPT = torch.tensor([[5, 6, 7, 8]])
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
EVALUATION = {
    "dtype": "float32",
    "provenance": {"hardware": "2 cores", "date": "2026-11-29"},
    "sets": [
        {
            "name": "GSM8K",
            "temperature": 0.0,
            "drafters": [
                {
                    "acceptance": {"tau": {"value": 2.187}},
                    "speeds": [{"ratio": 1.204}],
                    "reliability": {"survival": {"ece": 0.0312}},
                }
            ],
        },
        {"name": "MBPP", "temperature": 0.7, "drafters": [{"acceptance": {"tau": None}, "speeds": []}]},
    ],
}


@pytest.fixture
def target(tmp_path: Path) -> PreTrainedModel:
    tiny_target("llama", eos_token_id=2).save_pretrained(tmp_path / "target")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "target")


@pytest.fixture
def folder(target: PreTrainedModel, tmp_path: Path) -> Path:
    """A drafter's folder with what training and evaluation leave there."""
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    drafter.config.sts_temperatures = [1.25] * 7
    drafter.save_pretrained(tmp_path / "drafter")
    log = '{"eval_expected_tau": 1.5, "step": 100}\n{"eval_expected_tau": 1.9412, "step": 1600}\n'
    (tmp_path / "drafter" / "training_log.jsonl").write_text(log, encoding="utf-8")
    (tmp_path / "drafter" / "evaluation.json").write_text(json.dumps(EVALUATION), encoding="utf-8")
    return tmp_path / "drafter"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, bytes]]]:
    """The repositories of a hub on this machine."""
    server, address = start_hub()
    # what HF_ENDPOINT and HF_HUB_CACHE set before the first import
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    # clients that were made before have an address of their own, and are kept
    everywhere = property(lambda client: address, lambda client, value: None)
    monkeypatch.setattr(HfApi, "endpoint", everywhere, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    yield Handler.files
    server.shutdown()
    server.server_close()


@pytest.fixture
def unreachable(hub: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests that a session makes, none of which gets through: each is one attempt."""
    asked: list[str] = []

    class Session:
        def _fail(self, url: str, *_: Any, **__: Any) -> None:
            asked.append(url)
            raise OSError("no network")

        head = get = request = stream = _fail

    monkeypatch.setattr(hubs, "_REACHED", set())
    monkeypatch.setattr(hubs, "get_session", Session)
    monkeypatch.setattr("huggingface_hub.utils._http.get_session", Session)
    return asked


@pytest.mark.parametrize("load", [DSparkAssistantModel.from_pretrained, load_drafter, load_target, load_tokenizer])
def test_without_a_network_a_name_is_asked_for_once(load: Any, unreachable: list[str]) -> None:
    """Without a network every look-up of every file is tried five times, with a pause before each."""
    with pytest.raises((ConnectionError, ValueError), match=r"fetch it with `hf download`.* HF_HUB_OFFLINE=1"):
        load("someone/unknown")
    assert len(unreachable) == 1


def test_without_a_network_the_cache_is_taken(
    folder: Path, hub: dict[str, dict[str, bytes]], request: pytest.FixtureRequest
) -> None:
    """A drafter that was fetched once is waited for, file by file, as soon as there is no network."""
    hub["someone/mine"] = {one.name: one.read_bytes() for one in folder.iterdir() if one.is_file()}
    online = DSparkAssistantModel.from_pretrained("someone/mine")
    asked = request.getfixturevalue("unreachable")
    cached = DSparkAssistantModel.from_pretrained("someone/mine")
    assert all(torch.equal(x, y) for x, y in zip(online.parameters(), cached.parameters(), strict=True))
    assert {url.count("/resolve/") for url in asked} == {0}


def test_the_card_says_what_was_measured(folder: Path) -> None:
    """A card claims nothing of what training and evaluation found, or what they did not find."""
    config = DSparkAssistantModel.from_pretrained(folder).config
    card = describe(config, measured=read_measured(folder), name="me/mine", tau={"chat": 1.9})
    for line in (
        "- Expected accepted length on text held out of training after 1,600 steps: 1.94",
        "- Confidence: calibrated with temperatures 1.25, 1.25, 1.25, 1.25, 1.25, 1.25, 1.25",
        "Measured on 2 cores, float32, 2026-11-29.",
        "| prompts | accepted length | speed against plain | error of the confidence |",
        "| GSM8K, greedy | 2.19 | 1.20 | 0.031 |",
        "| chat | 1.90 |  |  |",
        'target.generate(**inputs, assistant_model="me/mine")',
        '    \'{"method": "dspark", "model": "exported", "num_speculative_tokens": 7}\'',
    ):
        assert line in card.splitlines(), line
    assert "MBPP" not in card
    for name, content in (("evaluation.json", "{"), ("training_log.jsonl", "{\n")):
        (folder / name).write_text(content, encoding="utf-8")
    bare = describe(config, measured=read_measured(folder))
    assert "Measured" not in bare and "held out" not in bare
    assert bare == describe(config)


def test_to_a_hub_and_back(target: PreTrainedModel, folder: Path, hub: dict[str, dict[str, bytes]]) -> None:
    """An uploaded drafter lacks its code, its measurements or its card, or cannot be used by its name."""
    DSparkAssistantModel.from_pretrained(folder).push_to_hub("mine")
    files = hub["someone/mine"]
    assert set(files) >= {
        "README.md",
        "config.json",
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
        "dspark_hf_shim.py",
        "evaluation.json",
        "model.safetensors",
        "training_log.jsonl",
    }
    card = files["README.md"].decode()
    assert "| GSM8K, greedy | 2.19 | 1.20 | 0.031 |" in card
    assert 'assistant_model="someone/mine"' in card
    plain = target.generate(PROMPT, **OPTIONS)
    assert torch.equal(target.generate(PROMPT, **OPTIONS, assistant_model="someone/mine"), plain)
    ours = {"custom_generate": "someone/mine", "trust_remote_code": True}
    assert torch.equal(target.generate(PROMPT, **OPTIONS, **ours), plain)
    with pytest.raises(ValueError, match="`assistant_model` must be .* got 'someone/other', which cannot be read"):
        target.generate(PROMPT, **OPTIONS, assistant_model="someone/other")
    # a card that somebody wrote stays with its drafter
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmy own\n", encoding="utf-8")
    DSparkAssistantModel.from_pretrained(folder).push_to_hub("second")
    assert "my own" in hub["someone/second"]["README.md"].decode()


@pytest.fixture
def modelscope(folder: Path, target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """ModelScope's package with two models, and what was asked of it."""
    asked: list[tuple[str, Any]] = []

    def snapshot_download(model_id: str, revision: str | None = None) -> str:
        asked.append((model_id, revision))
        return {"me/drafter": str(folder), "me/target": target.name_or_path}[model_id]

    module = ModuleType("modelscope")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", module)
    return asked


def test_names_on_modelscope(target: PreTrainedModel, modelscope: list[tuple[str, Any]]) -> None:
    """A name on ModelScope is taken for one on Hugging Face's hub."""
    drafter = DSparkAssistantModel.from_pretrained("modelscope://me/drafter", revision="v1")
    assert modelscope == [("me/drafter", "v1")]
    plain = target.generate(PROMPT, **OPTIONS)
    assert torch.equal(target.generate(PROMPT, **OPTIONS, assistant_model="modelscope://me/drafter"), plain)
    assert torch.equal(load_drafter("modelscope://me/drafter").fc.weight, drafter.fc.weight)
    assert torch.equal(load_target("modelscope://me/target").generate(PROMPT, **OPTIONS), plain)
    with pytest.raises(ValueError, match="'modelscope://me/none' cannot be fetched from ModelScope"):
        DSparkAssistantModel.from_pretrained("modelscope://me/none")
    with pytest.raises(ValueError, match="must be followed by AUTHOR/MODEL, got 'modelscope://none'"):
        local_name("modelscope://none")


def test_without_modelscopes_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has not installed the package is not told what to do."""
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ValueError, match=r"`modelscope` must be installed .*'dspark-hf\[modelscope"):
        DSparkAssistantModel.from_pretrained("modelscope://me/drafter")
