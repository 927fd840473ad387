"""Drafters in foreign packagings open by name, wherever Transformers opens a model by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
    pipeline,
)

from dspark_hf import DSparkAssistantModel, DSparkConfig
from dspark_hf.modeling.formats.auto import register_packagings
from tests.modeling.deepspec_layout import VOCAB_SIZE, Layout, deepspec_fields, deepspec_weights
from tests.modeling.formats.layouts import (
    lending_target,
    specforge_fields,
    speculators_fields,
    without_vocabulary,
    write,
)
from tests.thinning import slow
from tests.tiny import tiny_target

WEIGHTS = deepspec_weights(Layout())
FIELDS = {
    "DeepSpec": deepspec_fields(Layout()),
    "speculators": speculators_fields(),
    "SpecForge": specforge_fields(),
    "LiquidAI": specforge_fields("Lfm2DSparkDraftModel"),
    "z-lab": specforge_fields("DFlashDraftModel"),
}
_CODE = "from pathlib import Path\n\nPath(__file__).with_name('was_run').touch()\nraise RuntimeError\n"


def _folder(tmp_path: Path, name: str) -> Path:
    weights = WEIGHTS if name == "DeepSpec" else without_vocabulary(WEIGHTS)
    folder = write(tmp_path / name, FIELDS[name], weights)
    for file in ("config.py", "dspark.py"):
        (folder / file).write_text(_CODE, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "loader", "is_trusted"),
    [
        # every name with code that is trusted, and one without trust
        (pytest.param if is_trusted == (loader is AutoModel) and (is_trusted or name == "DeepSpec") else slow)(
            name, loader, is_trusted
        )
        for name in FIELDS
        for loader in (AutoModel, AutoModelForCausalLM)
        for is_trusted in (False, True)
    ],
)
def test_auto_classes_open_a_drafter(name: str, loader: Any, is_trusted: bool, tmp_path: Path) -> None:
    """A drafter's name would give a plain model of its target's kind, no model at all, or run the folder's code."""
    options: dict[str, Any] = {"trust_remote_code": True} if is_trusted else {}
    register_packagings()
    folder = _folder(tmp_path, name)
    expected = DSparkAssistantModel.from_pretrained(folder)
    drafter, info = loader.from_pretrained(folder, output_loading_info=True, dtype=torch.bfloat16, **options)
    assert type(drafter) is DSparkAssistantModel
    assert not any(info.values())
    assert drafter.dtype == torch.bfloat16
    for tensor, other in zip(drafter.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, other.to(tensor.dtype))
    assert type(AutoConfig.from_pretrained(folder, **options)) is DSparkConfig
    assert not (folder / "was_run").exists()


def test_other_models_open_as_before(tmp_path: Path) -> None:
    """Models that are no drafters would be read as such, or errors of Transformers be hidden."""
    target = tiny_target("qwen3")
    target.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(target)
    assert AutoConfig.from_pretrained(tmp_path, hidden_size=8).hidden_size == 8
    config, unused = AutoConfig.from_pretrained(tmp_path, return_unused_kwargs=True, other=3)
    assert (config.model_type, unused["other"]) == ("qwen3", 3)
    with pytest.raises(OSError, match="absent"):
        AutoConfig.from_pretrained(tmp_path / "absent")


@pytest.mark.parametrize("name", ["DeepSpec", "speculators", "SpecForge"])
def test_the_pipeline_opens_a_drafter(name: str, tmp_path: Path) -> None:
    """`pipeline(assistant_model=name)` would not find the class of a released drafter, or change the text."""
    words = {f"w{token}": token for token in range(VOCAB_SIZE)}
    model = Tokenizer(WordLevel(words, unk_token="w4"))
    model.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="w1", eos_token="w2", pad_token="w0", unk_token="w4"
    )
    folder = _folder(tmp_path, name)
    tokenizer.save_pretrained(folder)
    target = lending_target(WEIGHTS).model
    # else the Pipeline keeps the drafter's own tokenizer, and `generate` refuses it
    for name, token in (("bos", 1), ("eos", 2), ("pad", 0)):
        setattr(target.config, f"{name}_token_id", token)
    generator = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=str(folder))
    assert type(generator.assistant_model) is DSparkAssistantModel
    options = {"max_new_tokens": 6, "do_sample": False}
    assisted = generator("w5 w6 w7", return_tensors=True, **options)[0]["generated_token_ids"]
    assert assisted == target.generate(torch.tensor([[5, 6, 7]]), **options)[0].tolist()
    assert generator.assistant_model.last_statistics.num_rounds > 0


def test_a_drafter_read_as_another_model_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A drafter's folder read as a plain model assists without use, and without a word."""
    folder = _folder(tmp_path, "DeepSpec")
    assistant = Qwen3ForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    target = lending_target(WEIGHTS).model
    logger = logging.getLogger("transformers")
    logger.propagate, before = True, logger.propagate
    our_logger = logging.getLogger("dspark_hf")
    our_logger.propagate, ours_before = True, our_logger.propagate
    try:
        target.generate(torch.tensor([[5, 6]]), max_new_tokens=3, assistant_model=assistant)
    finally:
        logger.propagate, our_logger.propagate = before, ours_before
    assert "made of a Qwen3DSparkModel: without its DSpark heads" in caplog.text
