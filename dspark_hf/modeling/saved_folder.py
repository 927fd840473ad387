"""What a saved drafter's folder holds beside weights and configuration: a model card and the target's tokenizer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.utils.hub import cached_file

from dspark_hf.modeling.configuration_dspark import DSparkConfig

_CARD = "README.md"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def complete_folder(folder: str | os.PathLike, config: DSparkConfig) -> None:
    """Write a model card, and copy the target's tokenizer if it lies on this machine; what is there already stays."""
    path = Path(folder)
    if not (path / _CARD).exists():
        (path / _CARD).write_text(describe(config), encoding="utf-8")
    if config.base_model_name_or_path and not any((path / name).exists() for name in _TOKENIZER_FILES):
        _copy_tokenizer(config.base_model_name_or_path, path)


def _copy_tokenizer(target: str, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        try:
            # nothing is fetched: a drafter can be saved without a network
            found = cached_file(target, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError):
            return
        if found is not None:
            shutil.copyfile(found, folder / name)


def upload_card(repo_id: str, config: DSparkConfig, *, private: bool | None = None, token: Any = None) -> None:
    """Give a hub repository a drafter's model card, unless it has one; the repository is made if it is not there."""
    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if not api.file_exists(repository, _CARD):
        api.upload_file(path_or_fileobj=describe(config).encode(), path_in_repo=_CARD, repo_id=repository)


def describe(config: DSparkConfig, *, data: str | None = None, tau: dict[str, float] | None = None) -> str:
    """Return a model card of what is known of a drafter.

    Args:
        config: its configuration.
        data: what it was trained on, in words.
        tau: measured accepted length by prompt set, tokens per round.

    Example:

        >>> from dspark_hf import DSparkConfig
        >>> from dspark_hf.modeling.saved_folder import describe
        >>> config = DSparkConfig(vocab_size=64, hidden_size=32, num_attention_heads=4, base_model_name_or_path="a/b")
        >>> print(describe(config, tau={"GSM8K": 3.1}).splitlines()[1])
        base_model: a/b
    """
    target = config.base_model_name_or_path
    is_on_hub = target is not None and not os.path.isabs(target) and target.count("/") <= 1
    header = ["---", *([f"base_model: {target}"] if is_on_hub else []), "library_name: dspark-hf"]
    header += ["pipeline_tag: text-generation", "tags:", "- dspark", "- speculative-decoding", "---", ""]
    shown = Path(target).name if target else "its target"
    head = "no Markov head" if config.markov_rank == 0 else f"{config.markov_head_type} Markov head"
    words = "all tokens" if config.draft_vocab_size is None else f"{config.draft_vocab_size:,} tokens"
    lines = [
        f"# DSpark drafter for {shown}",
        "",
        f"Drafts up to {config.block_size} tokens a round for {shown}, which verifies them: the text stays its own.",
        "",
        f"- {config.num_hidden_layers} layers of the kind {config.backbone_type}, reading the target's layers "
        f"{', '.join(map(str, config.target_layer_ids))} of {config.num_target_layers}",
        f"- {head}, {'a' if config.enable_confidence_head else 'no'} confidence head, {words} proposable",
        *([f"- Trained on {data}"] if data else []),
        *[f"- Accepted length on {name}: {value:.2f} tokens per round" for name, value in (tau or {}).items()],
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "from dspark_hf import DSparkAssistantModel",
        "",
        f'target = AutoModelForCausalLM.from_pretrained("{target or "TARGET"}")',
        'drafter = DSparkAssistantModel.from_pretrained("THIS_FOLDER")',
        "target.generate(**inputs, assistant_model=drafter)",
        "```",
        "",
        "`pip install dspark-hf` brings the class.",
    ]
    return "\n".join([*header, *lines, ""])
