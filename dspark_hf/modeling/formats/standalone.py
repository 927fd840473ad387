"""A drafter's folder that needs no `dspark_hf`: its code in one file, `custom_generate/generate.py`.

The file is put together from our own modules, so that it drafts as they do. Whoever has Transformers can then write
`target.generate(**inputs, custom_generate="folder", trust_remote_code=True)`.
"""

from __future__ import annotations

import ast
import inspect
import os
import pprint
from pathlib import Path
from types import ModuleType
from typing import Any

from dspark_hf.files import write_whole
from dspark_hf.generation.drafting import chain
from dspark_hf.generation.targets import adapter, layers
from dspark_hf.modeling import backbone, draft_head, heads, rotary
from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.modeling.formats import standalone_loop
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel

_PARTS = (layers, adapter, chain, rotary, backbone, draft_head, heads, standalone_loop)
_OPENING = '''"""Generate with this repository's DSpark drafter, on PyTorch and Transformers alone (Apache-2.0).

target.generate(**inputs, custom_generate="FOLDER_OR_REPOSITORY", trust_remote_code=True)

Written by `dspark-hf export --to custom_generate`: do not edit. One text at a time, greedy or sampled, with the same
tokens or distribution as without. `pip install dspark-hf` brings batches, streams and schedulers for the same weights.
"""

# ruff: noqa
from __future__ import annotations
'''
_UNWRAP = '''

def unwrap(model):
    """Return the model as it is."""
    return model


class CandidateSampler:
    """What no sampler here is: one that draws among some tokens only."""

    takes_candidates = False
'''
_EMPTY_FIELDS = "FIELDS: dict[str, Any] = {}"


def write_standalone(drafter: DSparkAssistantModel, folder: str | os.PathLike) -> None:
    """Save a drafter whose `custom_generate/generate.py` needs no `dspark_hf`.

    The folder is loaded by `DSparkAssistantModel.from_pretrained` as every other.

    Raises:
        ValueError: if the drafter is DeepSeek-V4's, which comes with its target.
    """
    text = standalone_code(drafter.config)
    path = Path(folder, "custom_generate")
    write_whole(path / "generate.py", text.encode())
    # what Transformers brings
    write_whole(path / "requirements.txt", b"torch\ntransformers\nsafetensors\n")
    # one file of weights: the code reads no index
    drafter.save_pretrained(folder, max_shard_size="1TB")


def standalone_code(config: DSparkConfig) -> str:
    """Return the text of `custom_generate/generate.py` for a drafter's configuration.

    Raises:
        ValueError: if the drafter is DeepSeek-V4's.
    """
    if config.backbone_type == "deepseek_v4":
        raise ValueError(
            "`backbone_type` must be another than 'deepseek_v4' for a folder without dspark_hf, got that. Its target "
            "is served by dspark_hf: `DeepseekV4DSparkForCausalLM` with `use_dspark=True`."
        )
    parts = [_without_imports(module) for module in _PARTS]
    imports = sorted({line for _, lines in parts for line in lines})
    fields = pprint.pformat(_fields(config), width=110, sort_dicts=True)
    text = "\n\n".join(body.strip("\n") for body, _ in parts)
    assert text.count(_EMPTY_FIELDS) == 1
    text = text.replace(_EMPTY_FIELDS, f"FIELDS: dict[str, Any] = {fields}")
    return f"{_OPENING}\n{chr(10).join(imports)}\n{_UNWRAP}\n\n{text}\n"


def _fields(config: DSparkConfig) -> dict[str, Any]:
    names = [name for name in inspect.signature(DSparkConfig.__init__).parameters if name not in ("self", "kwargs")]
    worked_out = {
        "num_slots": config.num_slots,
        "num_draft_logits": config.num_draft_logits,
        "windows": [config.window_of(layer) for layer in range(config.num_hidden_layers)],
    }
    return {name: getattr(config, name) for name in names} | worked_out


def _without_imports(module: ModuleType) -> tuple[str, list[str]]:
    """Return a module's text without its docstring and its imports, and those of its imports that are not ours."""
    text = inspect.getsource(module)
    tree = ast.parse(text)
    lines = text.splitlines()
    taken: list[str] = []
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not is_docstring and not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        module_name = getattr(node, "module", None) or ""
        if not is_docstring and module_name != "__future__" and not module_name.startswith("dspark_hf"):
            taken.append(ast.unparse(node))
        assert node.end_lineno is not None
        for number in range(node.lineno - 1, node.end_lineno):
            lines[number] = ""
    return "\n".join(lines).strip("\n"), taken
