"""A drafter folder loads wherever Transformers loads one: by class, by Auto class, as remote code, by the Pipeline."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    pipeline,
)

import dspark_hf
from dspark_hf import DSparkAssistantModel, DSparkConfig
from dspark_hf.modeling import saved_folder
from tests.fresh import FreshInterpreter
from tests.tiny import tiny_target

REPOSITORY = Path(dspark_hf.__file__).parents[1]


@pytest.fixture
def drafter() -> DSparkAssistantModel:
    return DSparkAssistantModel.from_target(
        tiny_target("llama", eos_token_id=[2, 3]), num_hidden_layers=1, markov_rank=4, sts_temperatures=[1.5] * 7
    )


def _assert_equal(ours: DSparkAssistantModel, theirs: DSparkAssistantModel) -> None:
    assert type(ours) is type(theirs) is DSparkAssistantModel
    assert ours.config.to_json_string() == theirs.config.to_json_string()
    ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert ours_state.keys() == theirs_state.keys()
    assert all(torch.equal(ours_state[name], theirs_state[name]) for name in ours_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loader", [DSparkAssistantModel, AutoModel, AutoModelForCausalLM])
def test_round_trip(loader: type, dtype: torch.dtype, drafter: DSparkAssistantModel, tmp_path: Path) -> None:
    """A saved drafter would load as another class, in another dtype or with other weights."""
    drafter.to(dtype).save_pretrained(tmp_path)
    again = loader.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert not again.training
    _assert_equal(again, drafter)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DSparkConfig
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["README.md", "config.json", "custom_generate", "dspark_hf_shim.py", "model.safetensors"]


@pytest.mark.parametrize("loader", [DSparkAssistantModel, AutoModelForCausalLM])
def test_a_file_that_is_written_over_while_it_is_in_use(
    loader: type, drafter: DSparkAssistantModel, tmp_path: Path
) -> None:
    """A drafter that is saved anew, by a training run say, would change in the hands of whoever has loaded it."""
    drafter.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    for name, tensor in drafter.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=0, rtol=0)


def test_options_of_from_pretrained(drafter: DSparkAssistantModel, tmp_path: Path) -> None:
    """What Transformers offers while loading would not be offered for drafters."""
    drafter.save_pretrained(tmp_path / "there", max_shard_size="5KB")
    assert len(list((tmp_path / "there").glob("*.safetensors"))) > 1
    again, info = DSparkAssistantModel.from_pretrained(
        tmp_path,
        subfolder="there",
        dtype=torch.bfloat16,
        device_map="cpu",
        output_loading_info=True,
        attn_implementation="eager",
        sts_temperatures=[2.0] * 7,
    )
    assert not any(info.values())
    assert again.dtype == torch.bfloat16
    assert again.config.sts_temperatures == [2.0] * 7
    given = DSparkAssistantModel.from_pretrained(tmp_path / "there", config=drafter.config)
    _assert_equal(given, drafter)


def test_pickle_and_deepcopy(drafter: DSparkAssistantModel) -> None:
    """A drafter could not be sent to another process."""
    _assert_equal(pickle.loads(pickle.dumps(drafter)), drafter)
    _assert_equal(copy.deepcopy(drafter), drafter)


def test_remote_code_is_kept_until_taken_out(drafter: DSparkAssistantModel, tmp_path: Path) -> None:
    """A folder would not say what loading it needs, lose its shim when saved again, or never get rid of it."""
    drafter.save_pretrained(tmp_path / "first")
    loaded = DSparkAssistantModel.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    loaded.save_pretrained(tmp_path / "third", remote_code=False)
    for name, has_shim in (("first", True), ("second", True), ("third", False)):
        folder = tmp_path / name
        assert (folder / "dspark_hf_shim.py").exists() == has_shim
        assert (folder / "custom_generate" / "generate.py").exists() == has_shim
        assert ("auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))) == has_shim
        # with the package imported, its class is used without asking for trust
        assert type(AutoModel.from_pretrained(folder)) is DSparkAssistantModel


_LOAD_AS_REMOTE_CODE = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

folder, copy = sys.argv[1:]
assert not any(name.startswith("dspark_hf") for name in sys.modules)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
models = [cls.from_pretrained(folder, trust_remote_code=True) for cls in (AutoModel, AutoModelForCausalLM)]

import dspark_hf
assert type(config) is dspark_hf.DSparkConfig, type(config)
assert all(type(model) is dspark_hf.DSparkAssistantModel for model in models), models
models[0].save_pretrained(copy)
AutoModel.from_pretrained(copy, trust_remote_code=True)
"""


def test_remote_code_gives_the_installed_class(
    drafter: DSparkAssistantModel, fresh: FreshInterpreter, tmp_path: Path
) -> None:
    """Who loads with `trust_remote_code=True` and no import would get an error or a second copy of the class."""
    drafter.save_pretrained(tmp_path / "folder", remote_code=True)
    result = fresh.run(_LOAD_AS_REMOTE_CODE, str(tmp_path / "folder"), str(tmp_path / "copy"))
    assert result.returncode == 0, result.stderr
    # the package's own files are not copied along
    saved = sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert saved == ["README.md", "config.json", "custom_generate", "dspark_hf_shim.py", "model.safetensors"]
    _assert_equal(DSparkAssistantModel.from_pretrained(tmp_path / "copy"), drafter)


_LOAD_WITHOUT_THE_PACKAGE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dspark_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
from transformers import AutoModel

AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


def test_missing_package_is_named(drafter: DSparkAssistantModel, fresh: FreshInterpreter, tmp_path: Path) -> None:
    """Without the package, the error would not tell what to install."""
    drafter.save_pretrained(tmp_path / "folder", remote_code=True)
    result = fresh.run(_LOAD_WITHOUT_THE_PACKAGE, str(tmp_path / "folder"))
    assert result.returncode != 0
    message = result.stderr.splitlines()[-1]
    assert "ImportError" in result.stderr
    assert "dspark_hf" in message, result.stderr
    assert "pip install" in message


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{token}": token for token in range(64)}
    model = Tokenizer(WordLevel(words, unk_token="w4"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="w1", eos_token="w2", pad_token="w0", unk_token="w4"
    )


def test_a_folder_is_whole_for_its_use(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A saved drafter would not say whose it is, or could not be named in a pipeline for want of a tokenizer."""
    tiny_target("llama", eos_token_id=2).save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    drafter.save_pretrained(tmp_path / "drafter")
    again = DSparkAssistantModel.from_pretrained(tmp_path / "drafter")
    assert again.config.base_model_name_or_path == str(tmp_path / "target")
    assert again.config.target_fingerprint == drafter.config.target_fingerprint
    card = (tmp_path / "drafter" / "README.md").read_text(encoding="utf-8")
    assert "# DSpark drafter for target" in card
    assert "More Information Needed" not in card
    generator = pipeline(
        "text-generation", model=target, tokenizer=tokenizer, assistant_model=str(tmp_path / "drafter")
    )
    assert type(generator.assistant_model) is DSparkAssistantModel
    # a card that somebody wrote stays
    (tmp_path / "drafter" / "README.md").write_text("mine", encoding="utf-8")
    again.save_pretrained(tmp_path / "drafter")
    assert (tmp_path / "drafter" / "README.md").read_text(encoding="utf-8") == "mine"


class _Hub:
    """Stands for the hub: remembers what is uploaded."""

    files: ClassVar[dict[str, bytes]] = {}

    def __init__(self, token: str | None = None):
        self.token = token

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def file_exists(self, repo_id: str, name: str) -> bool:
        return f"{repo_id}/{name}" in self.files

    def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str) -> None:
        self.files[f"{repo_id}/{path_in_repo}"] = path_or_fileobj


def test_an_uploaded_drafter_has_its_card(drafter: DSparkAssistantModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository would get Transformers' empty card, or lose the card that somebody wrote."""
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(saved_folder, "HfApi", _Hub)
    monkeypatch.setattr(_Hub, "files", {})
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", lambda self, name, **options: calls.append((name, options)))
    drafter.push_to_hub("mine", private=True)
    assert _Hub.files["someone/mine/README.md"].decode() == saved_folder.describe(drafter.config, name="someone/mine")
    _Hub.files["someone/mine/README.md"] = b"my own"
    drafter.push_to_hub("mine")
    drafter.push_to_hub("other", create_pr=True)
    assert _Hub.files == {"someone/mine/README.md": b"my own"}
    assert calls == [("mine", {"private": True}), ("mine", {}), ("other", {"create_pr": True})]


def test_pipeline_loads_by_name(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """`pipeline(assistant_model="folder")` would not find the class, or would keep a second tokenizer."""
    target = tiny_target("llama", eos_token_id=2)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    drafter.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("w7 w9").input_ids == [7, 9]
    generator = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=str(tmp_path))
    assert type(generator.assistant_model) is DSparkAssistantModel
    assert generator.assistant_model.dtype == torch.float32
    assert generator.assistant_tokenizer is None
    options = {"max_new_tokens": 6, "do_sample": False}
    assisted = generator("w5 w6 w7", return_tensors=True, **options)[0]["generated_token_ids"]
    assert assisted == target.generate(torch.tensor([[5, 6, 7]]), **options)[0].tolist()
