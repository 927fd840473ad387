"""A drafter comes by its name, or by the name of its target, with the text that plain `generate` gives."""

from __future__ import annotations

import gc
import json
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, pipeline

import dspark_hf
from dspark_hf import DSparkAssistantModel, LookupAssistant, load_drafter_for, register_drafter
from dspark_hf.demo.packaged import PACKAGED_MODELS
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.provenance import fingerprint
from dspark_hf.registry import entries
from dspark_hf.registry.entries import DRAFTERS_VARIABLE, known_drafters
from dspark_hf.registry.finding import assistant_named
from dspark_hf.registry.matching import find_entry
from tests.tiny import tiny_target

DRAFTERS = Path(dspark_hf.__file__).parents[1] / "drafters"
PROMPT = torch.tensor([[5, 6, 7, 8, 5, 6]])
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def target(tmp_path: Path) -> PreTrainedModel:
    """A target that was loaded from a folder."""
    tiny_target("llama", eos_token_id=2).save_pretrained(tmp_path / "tiny-target")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-target")


@pytest.fixture
def folder(target: PreTrainedModel, tmp_path: Path) -> Path:
    """A drafter's folder that says whose it is."""
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    drafter.save_pretrained(tmp_path / "drafter")
    return tmp_path / "drafter"


def test_a_folder_by_name(target: PreTrainedModel, folder: Path) -> None:
    """`generate(assistant_model="folder")` fails, writes another text, or reads the folder at every call."""
    plain = target.generate(PROMPT, **OPTIONS)
    assert torch.equal(target.generate(PROMPT, **OPTIONS, assistant_model=str(folder)), plain)
    drafter = assistant_named(str(folder), target)
    assert type(drafter) is DSparkAssistantModel
    assert drafter.last_statistics.num_rounds > 0
    assert assistant_named(str(folder), target) is drafter


def test_the_text_assistant_by_name(target: PreTrainedModel, tmp_path: Path) -> None:
    """Names work for drafters alone, and a smaller language model has to be loaded by hand."""
    tiny_target("llama", eos_token_id=2, num_hidden_layers=1).save_pretrained(tmp_path / "small")
    plain = target.generate(PROMPT, **OPTIONS)
    assert torch.equal(target.generate(PROMPT, **OPTIONS, assistant_model=str(tmp_path / "small")), plain)


def test_dtype_follows_the_target(target: PreTrainedModel, folder: Path) -> None:
    """A drafter that was loaded for a target in fp32 assists it in another dtype after the target was changed."""
    assert assistant_named(str(folder), target).dtype == torch.float32
    assert assistant_named(str(folder), target.to(torch.bfloat16)).dtype == torch.bfloat16


def test_drafters_go_with_their_target(target: PreTrainedModel, folder: Path) -> None:
    """A drafter that was loaded by name stays in memory when its target is gone."""
    # not the fixture's, which pytest holds
    other = AutoModelForCausalLM.from_pretrained(target.name_or_path)
    drafter = weakref.ref(assistant_named(str(folder), other))
    assert drafter() is not None
    del other
    gc.collect()
    assert drafter() is None


def test_auto_finds_a_registered_drafter(target: PreTrainedModel, folder: Path, own_drafters: Path) -> None:
    """The user names a drafter for a target, and `"auto"` does not find it."""
    entry = register_drafter(folder)
    assert entry.target == target.name_or_path
    assert json.loads(own_drafters.read_text(encoding="utf-8"))["drafters"][0]["drafter"] == str(folder)
    drafter = load_drafter_for(target)
    assert drafter.name_or_path == str(folder)
    plain = target.generate(PROMPT, **OPTIONS)
    assert torch.equal(target.generate(PROMPT, **OPTIONS, assistant_model="auto"), plain)
    assert drafter.last_statistics.num_rounds > 0
    # twice is once
    register_drafter(folder)
    assert len(json.loads(own_drafters.read_text(encoding="utf-8"))["drafters"]) == 1


def test_the_fingerprint_goes_before_the_name(target: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    """A fine-tune gets the drafter of the model whose name it bears, or a moved target gets none."""
    register_drafter(folder)
    moved = AutoModelForCausalLM.from_pretrained(target.name_or_path)
    moved.config._name_or_path = "elsewhere"
    assert isinstance(load_drafter_for(moved), DSparkAssistantModel)
    other = AutoModelForCausalLM.from_pretrained(target.name_or_path)
    with torch.no_grad():
        other.get_input_embeddings().weight.neg_()
    assert fingerprint(TargetAdapter(other)) != fingerprint(TargetAdapter(target))
    assert isinstance(load_drafter_for(other), LookupAssistant)


def test_names_where_there_is_no_fingerprint(target: PreTrainedModel, folder: Path) -> None:
    """A target's own name, its folder's, or that of the hub's cache leads to no drafter."""
    register_drafter(folder, "someone/Tiny-Target")
    # the last part of the name of a folder that is here
    assert isinstance(load_drafter_for(target), DSparkAssistantModel)
    for name, is_found in (
        ("someone/tiny-target", True),
        ("/cache/models--someone--Tiny-Target/snapshots/0123", True),
        ("another/tiny-target", False),
    ):
        model = AutoModelForCausalLM.from_pretrained(target.name_or_path)
        model.config._name_or_path = name
        assert isinstance(load_drafter_for(model), DSparkAssistantModel) == is_found, name


def test_a_folder_of_drafters(
    target: PreTrainedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of drafters is not searched, or one damaged folder hides the others."""
    place = tmp_path / "mine"
    place.mkdir()
    folder.rename(place / "tiny")
    (place / "broken").mkdir()
    (place / "broken" / "config.json").write_text("{", encoding="utf-8")
    monkeypatch.setenv(DRAFTERS_VARIABLE, str(place))
    assert isinstance(load_drafter_for(target), DSparkAssistantModel)
    # entries go into the folder's file
    register_drafter(place / "tiny", "someone/else")
    assert [entry.target for entry in known_drafters()][:2] == ["someone/else", target.name_or_path]


def test_nothing_known_is_said(target: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody learns that no drafter was found, or the call fails where text could be looked up."""
    plain = target.generate(PROMPT, **OPTIONS)
    assert torch.equal(target.generate(PROMPT, **OPTIONS, assistant_model="auto"), plain)
    target.generate(PROMPT, **OPTIONS, assistant_model="auto")
    said = [one for one in caplog.messages if "No drafter is known for" in one]
    assert len(said) == 1
    assert "register_drafter" in said[0]
    with pytest.raises(ValueError, match="`target` must have a drafter that is known. No drafter is known for .*tiny"):
        load_drafter_for(target, lookup=False)


def test_a_name_that_leads_nowhere(target: PreTrainedModel, tmp_path: Path) -> None:
    """A slip in a name ends in a message that does not repeat it, or in a search on the hub."""
    with pytest.raises(ValueError, match=r"`assistant_model` must be .*no folder of this name is here"):
        target.generate(PROMPT, **OPTIONS, assistant_model=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"`assistant_model` must be left out of `generate_batch`.* got auto"):
        target.generate_batch([[5, 6]], assistant_model="auto")


def test_a_drafter_that_cannot_be_had(
    target: PreTrainedModel, own_drafters: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a network the error does not say what was wanted, for whom, and who said so; or a download is silent."""
    own_drafters.write_text(
        json.dumps({"drafters": [{"target": target.name_or_path, "drafter": "nobody/nothing"}]}), encoding="utf-8"
    )
    # nothing listens there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    message = r'`assistant_model="auto"` must lead to .* got \'nobody/nothing\' for .*own-drafters.json'
    with pytest.raises(ValueError, match=message):
        target.generate(PROMPT, **OPTIONS, assistant_model="auto")
    assert any("fetching the drafter 'nobody/nothing'" in one for one in caplog.messages)


def test_a_drafter_of_another_shape(target: PreTrainedModel, folder: Path) -> None:
    """A drafter that cannot fit ends in the middle of a pass, and nobody knows where it came from."""
    register_drafter(folder, "someone/wide")
    wide = tiny_target("llama", hidden_size=64)
    wide.config._name_or_path = "someone/wide"
    with pytest.raises(ValueError, match=r'`assistant_model="auto"` must .* got .*drafter.* for someone/wide'):
        load_drafter_for(wide)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("[]", "holds no JSON object"),
        ('{"drafters": 3}', 'has no list "drafters"'),
        ('{"drafters": [{"target": "a/b"}]}', "whose drafter is None"),
        ('{"drafters": [{"target": "a/b", "drafter": "c/d", "name": "e"}]}', "which has other fields"),
    ],
)
def test_damaged_registry_files_are_named(
    content: str, message: str, target: PreTrainedModel, folder: Path, own_drafters: Path
) -> None:
    """A registry file with a slip is passed over, or written over."""
    own_drafters.write_text(content, encoding="utf-8")
    for call in (lambda: load_drafter_for(target), lambda: register_drafter(folder)):
        with pytest.raises(ValueError, match=rf"must lead to whole files of drafters, got .*own-drafters.*{message}"):
            call()
    assert own_drafters.read_text(encoding="utf-8") == content


def test_a_place_that_is_not_there(target: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip in `DSPARK_HF_DRAFTERS` is passed over."""
    monkeypatch.setenv(DRAFTERS_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=f"`{DRAFTERS_VARIABLE}` must name a folder .*nowhere"):
        load_drafter_for(target)


def test_a_drafter_that_does_not_say_whose_it_is(tmp_path: Path) -> None:
    """An entry without a target is written."""
    drafter = DSparkAssistantModel.from_target(tiny_target(), num_hidden_layers=1, markov_rank=4)
    drafter.config.target_fingerprint = None
    drafter.save_pretrained(tmp_path / "drafter")
    with pytest.raises(ValueError, match="`target` must be given for a drafter that does not say whose it is"):
        register_drafter(tmp_path / "drafter")


def test_the_packages_own_registry() -> None:
    """A pair of the package's list is damaged, or a drafter of the repository is missing from it."""
    own = entries.read_registry(Path(entries.__file__).with_name("drafters.json"))
    shipped = {path.parent for path in DRAFTERS.glob("*/config.json")}
    if not shipped:
        pytest.skip("a source archive holds no weights")
    assert shipped == {Path(entry.drafter) for entry in own if Path(entry.drafter).is_absolute()}
    for entry in own:
        if Path(entry.drafter) in shipped:
            fields = json.loads(Path(entry.drafter, "config.json").read_text(encoding="utf-8"))
            assert fields["base_model_name_or_path"] == entry.target
    assert len({(entry.target, entry.fingerprint) for entry in own}) == len(own)


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGED_MODELS)
def test_packaged_models_find_their_shipped_drafters(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packaged model, whose weights are not quite the hub's, is answered by looked-up drafts alone."""
    model = PACKAGED_MODELS[name]
    pytest.importorskip("gguf")
    if find_spec(model.module) is None or not any(DRAFTERS.glob("*/config.json")):
        pytest.skip("needs the packaged weights, and the drafters of a clone")
    monkeypatch.delenv(DRAFTERS_VARIABLE)
    target = _packaged_embedding(model.find_gguf(tmp_path))
    target.config.name_or_path = "/somewhere/else"
    weight = target.get_input_embeddings().weight.detach()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        target.set_input_embeddings(torch.nn.Embedding.from_pretrained(weight.to(dtype)))
        entry = find_entry(target, entries.known_drafters())
        assert entry is not None and Path(entry.drafter).name == model.drafter
    target.set_input_embeddings(torch.nn.Embedding.from_pretrained(-weight))
    assert find_entry(target, entries.known_drafters()) is None


def _packaged_embedding(file: Path) -> LlamaForCausalLM:
    """Return a model of a GGUF file's sizes that has nothing but its embedding."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(file)
    kind = reader.fields["general.architecture"].contents()
    num_layers = reader.fields[f"{kind}.block_count"].contents()
    (table,) = (tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    width, num_tokens = (int(size) for size in table.shape)
    with torch.device("meta"):
        sizes = {"vocab_size": num_tokens, "hidden_size": width, "num_hidden_layers": num_layers}
        target = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=width // 64))
    weight = torch.from_numpy(dequantize(table.data, table.tensor_type))
    target.set_input_embeddings(torch.nn.Embedding.from_pretrained(weight))
    return target


def test_folders_without_a_drafter_are_passed_over(monkeypatch, tmp_path) -> None:
    """In a source archive, where a drafter's folder holds its card alone, "auto" ends in an error of that folder."""
    (tmp_path / "drafters" / "mine").mkdir(parents=True)
    registry = tmp_path / "package" / "registry" / "drafters.json"
    registry.parent.mkdir(parents=True)
    registry.write_text('{"drafters": [{"target": "a/b", "drafter": "../../drafters/mine"}]}', encoding="utf-8")
    monkeypatch.setattr(entries, "_PACKAGE_FILE", registry)
    assert not any(entry.target == "a/b" for entry in entries.known_drafters())
    (tmp_path / "drafters" / "mine" / "config.json").write_text("{}", encoding="utf-8")
    assert any(entry.target == "a/b" for entry in entries.known_drafters())


def test_names_in_pipelines(target: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    """`pipeline(assistant_model="auto")` asks the hub for a model called auto."""
    register_drafter(folder)
    for name in ("auto", str(folder)):
        # without a tokenizer in the drafter's folder: it is the target's
        generator = pipeline("text-generation", model=target, tokenizer=_tokenizer(), assistant_model=name)
        assert generator.assistant_model is load_drafter_for(target)
        assert generator.assistant_tokenizer is None
        found = generator("w5 w6 w7", return_tensors=True, **OPTIONS)[0]["generated_token_ids"]
        assert found == target.generate(torch.tensor([[5, 6, 7]]), **OPTIONS)[0].tolist()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(WordLevel({f"w{token}": token for token in range(64)}, unk_token="w4"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="w1", eos_token="w2", pad_token="w0", unk_token="w4"
    )
