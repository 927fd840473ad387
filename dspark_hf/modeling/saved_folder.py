"""What a saved drafter's folder holds beside weights and configuration: a model card and the target's tokenizer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from dspark_hf.modeling.card import EVALUATION, GENERATED, TRAINING_LOG, describe, read_measured
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


def complete_folder(folder: str | os.PathLike, config: DSparkConfig, origin: str | None = None) -> None:
    """Write a model card, and copy the target's tokenizer if it lies on this machine; what is there already stays.

    What was measured in `origin`, the folder that the drafter was loaded from, comes along, and the card says it.
    """
    path = Path(folder)
    for name in (TRAINING_LOG, EVALUATION):
        if origin and not (path / name).exists() and Path(origin, name).is_file():
            shutil.copyfile(Path(origin, name), path / name)
    if not (path / _CARD).exists():
        (path / _CARD).write_text(describe(config, measured=read_measured(path)), encoding="utf-8")
    if config.base_model_name_or_path and not any((path / name).exists() for name in _TOKENIZER_FILES):
        _copy_tokenizer(config.base_model_name_or_path, path)


def copy_mapped_weights(model: nn.Module) -> None:
    """Copy weights on the CPU out of the file that they were mapped from, into memory of their own.

    A drafter is read every round, between passes over all of the target's weights. Mapped pages may be slow to come
    back each time, after a machine was restored or while memory is short, and a file that is written over or cut
    while it is in use would change the drafter or end the process.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        # weights in fewer bits are classes of their own, which know how they lie
        if tensor.device.type == "cpu" and type(tensor.data) is Tensor:
            tensor.data = tensor.data.clone()


def _copy_tokenizer(target: str, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        try:
            # nothing is fetched: a drafter can be saved without a network
            found = cached_file(target, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError):
            return
        if found is not None:
            shutil.copyfile(found, folder / name)


def upload_card(
    repo_id: str, config: DSparkConfig, *, origin: str | None = None, private: bool | None = None, token: Any = None
) -> None:
    """Give a hub repository a drafter's model card, unless it has one; the repository is made if it is not there.

    The card says what was measured in `origin`, the folder that the drafter was loaded from. A card that somebody
    wrote there goes along instead.
    """
    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if not api.file_exists(repository, _CARD):
        own = Path(origin, _CARD) if origin else None
        # the card that saving writes names a folder, not the repository
        text = own.read_text(encoding="utf-8") if own and own.is_file() and not _is_generated(own) else None
        if text is None:
            text = describe(config, measured=read_measured(origin or ""), name=repository)
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo=_CARD, repo_id=repository)


def _is_generated(card: Path) -> bool:
    return GENERATED in card.read_text(encoding="utf-8", errors="replace")
