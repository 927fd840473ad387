"""Models and prompts of an evaluation, cheap checks first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dspark_hf.console import printable
from dspark_hf.evaluation.settings import name_all
from dspark_hf.loading import check_num_drafts, load_drafter, load_target, load_tokenizer, read_drafter_config
from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel
from dspark_hf.prompts import Prompt, encode_prompt, read_prompts


@dataclass
class Models:
    """A target, its tokenizer, and the drafters to compare, by name; the first is the one in question."""

    target: Any
    tokenizer: Any
    drafters: dict[str, DSparkAssistantModel]


def read_prompt_sets(files: Sequence[Path], limit: int | None) -> dict[str, list[Prompt]]:
    """Return the prompts of every file, at most `limit` of each, under the files' stems.

    Raises:
        ValueError: if a file is missing, given twice, or holds something else than prompts.
    """
    for path in files:
        if not path.is_file():
            raise ValueError(f"`PROMPT_FILES` must be files, got {str(path)!r}, which is none. Correct the path.")
    named = name_all(list(files), "PROMPT_FILES", lambda path: printable(path.stem))
    return {name: read_prompts(path, limit) for name, path in named.items()}


def check_drafters(names: Sequence[str], num_drafts: int | None) -> dict[str, DSparkConfig]:
    """Return the drafters' configurations, by the name of their folder.

    Raises:
        ValueError: if one is no DSpark drafter, or proposes fewer drafts than `num_drafts`.
    """
    configurations = {}
    for short, path in name_all([Path(name) for name in names], "--drafter and --baseline", _folder_name).items():
        config = read_drafter_config(str(path), "--drafter and --baseline")
        check_num_drafts(num_drafts, config.block_size, short)
        configurations[short] = config
    return configurations


def load_models(target: str, drafters: Mapping[str, str], *, dtype: str, device: str) -> Models:
    """Load the target, its tokenizer and its drafters, given by name; drafters compute in the target's dtype.

    Raises:
        ValueError: if the dtype or the device is not there, or a model cannot be read.
    """
    loaded = load_target(target, dtype=dtype, device=device)
    tokenizer = load_tokenizer(target)
    assistants = {name: load_drafter(path, dtype=loaded.dtype).to(loaded.device) for name, path in drafters.items()}
    return Models(loaded, tokenizer, assistants)


def encode_sets(sets: Mapping[str, Sequence[Prompt]], models: Models, max_new_tokens: int) -> dict[str, list[Tensor]]:
    """Return every prompt's token ids `(1, T)`.

    Raises:
        ValueError: if a prompt leaves no room for its answer.
    """
    encoded = {
        name: [encode_prompt(prompt, models.tokenizer)[None] for prompt in prompts] for name, prompts in sets.items()
    }
    limit = getattr(models.target.config.get_text_config(), "max_position_embeddings", None)
    for name, prompts in encoded.items():
        for number, token_ids in enumerate(prompts, start=1):
            if limit is not None and token_ids.shape[1] + max_new_tokens > limit:
                raise ValueError(
                    f"prompts must leave room for `--max-new-tokens` in the target's {limit} positions, got prompt "
                    f"{number} of {name} with {token_ids.shape[1]} tokens and {max_new_tokens} new ones. Remove that "
                    "prompt, or lower `--max-new-tokens`."
                )
    return encoded


def _folder_name(path: Path) -> str:
    return printable(path.resolve().name if path.is_dir() else path.name)
