"""A drafter's model card: what is known of it, what was measured, and how to use it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_hf.damage import read_object
from dspark_hf.modeling.configuration_dspark import DSparkConfig

# what training and evaluation leave in a drafter's folder
TRAINING_LOG = "training_log.jsonl"
EVALUATION = "evaluation.json"
# by which a card that nobody has edited is known: it names no repository
GENERATED = 'assistant_model="THIS_FOLDER"'


@dataclass(frozen=True)
class Measured:
    """What was measured of a drafter.

    Args:
        tau: accepted length by prompt set, tokens per round.
        speed: against plain `generate`, by prompt set.
        calibration_error: mean error of the confidence (ECE of the survival) by prompt set.
        where: the machine, its date and versions, in words.
        held_out_tau: expected accepted length on text held out of training.
        num_steps: steps of that training.
    """

    tau: dict[str, float]
    speed: dict[str, float]
    calibration_error: dict[str, float]
    where: str | None = None
    held_out_tau: float | None = None
    num_steps: int | None = None


def read_measured(folder: str | os.PathLike) -> Measured:
    """Return what `training_log.jsonl` and `evaluation.json` in a drafter's folder tell; what is not there is empty.

    A damaged file tells nothing: a card is no place to fail.
    """
    sets = _evaluated_sets(Path(folder, EVALUATION))
    log = _last_record(Path(folder, TRAINING_LOG))
    tau, steps = log.get("eval_expected_tau"), log.get("step")
    return Measured(
        tau={name: value for name, one in sets.items() if (value := _number(one, "acceptance", "tau", "value"))},
        speed={name: value for name, one in sets.items() if (value := _number(one, "speeds", 0, "ratio"))},
        calibration_error={
            name: value
            for name, one in sets.items()
            if (value := _number(one, "reliability", "survival", "ece")) is not None
        },
        where=_place(Path(folder, EVALUATION)),
        held_out_tau=float(tau) if isinstance(tau, int | float) else None,
        num_steps=steps if isinstance(steps, int) else None,
    )


def _evaluated_sets(file: Path) -> dict[str, Any]:
    """Return what an evaluation says of its first drafter, by prompt set and temperature in words."""
    sets = _fields(file).get("sets")
    found = {}
    for one in sets if isinstance(sets, list) else ():
        if isinstance(one, dict) and isinstance(one.get("drafters"), list) and one["drafters"]:
            heat = one.get("temperature")
            found[f"{one.get('name')}, {f'temperature {heat:g}' if heat else 'greedy'}"] = one["drafters"][0]
    return found


def _number(fields: Any, *path: str | int) -> float | None:
    for step in path:
        try:
            fields = fields[step]
        except (KeyError, IndexError, TypeError):
            return None
    return float(fields) if isinstance(fields, int | float) else None


def _place(file: Path) -> str | None:
    fields = _fields(file)
    provenance = fields.get("provenance")
    if not isinstance(provenance, dict):
        return None
    parts = [provenance.get("hardware"), fields.get("dtype"), provenance.get("date")]
    return ", ".join(str(part) for part in parts if part) or None


def _fields(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except ValueError:
        return {}


def _last_record(file: Path) -> dict[str, Any]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        record = json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def describe(
    config: DSparkConfig,
    *,
    data: str | None = None,
    tau: dict[str, float] | None = None,
    measured: Measured | None = None,
    name: str = "THIS_FOLDER",
) -> str:
    """Return a model card of what is known of a drafter.

    Args:
        config: its configuration.
        data: what it was trained on, in words.
        tau: measured accepted length by prompt set, tokens per round; added to what `measured` has.
        measured: what its folder tells, see `read_measured`.
        name: how it is called where the card stands: a repository on the hub.

    Example:

        >>> from dspark_hf import DSparkConfig
        >>> from dspark_hf.modeling.card import describe
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
        *_training(measured),
        *_calibration(config, measured),
        *_table(measured, tau or {}),
        *_usage(config, target or "TARGET", name),
    ]
    return "\n".join([*header, *lines, ""])


def _training(measured: Measured | None) -> list[str]:
    if measured is None or measured.held_out_tau is None:
        return []
    steps = "" if measured.num_steps is None else f" after {measured.num_steps:,} steps"
    return [f"- Expected accepted length on text held out of training{steps}: {measured.held_out_tau:.2f}"]


def _calibration(config: DSparkConfig, measured: Measured | None) -> list[str]:
    if not config.enable_confidence_head:
        return []
    temperatures = config.sts_temperatures
    fitted = (
        "no temperatures fitted"
        if temperatures is None
        else f"calibrated with temperatures {', '.join(f'{one:.2f}' for one in temperatures)}"
    )
    return [f"- Confidence: {fitted}"]


def _table(measured: Measured | None, tau: dict[str, float]) -> list[str]:
    """Return the measured values by prompt set, a column for what any set has."""
    columns: dict[str, tuple[dict[str, float], str]] = {
        "accepted length": ((measured.tau if measured else {}) | tau, "{:.2f}"),
        "speed against plain": (measured.speed if measured else {}, "{:.2f}"),
        "error of the confidence": (measured.calibration_error if measured else {}, "{:.3f}"),
    }
    columns = {title: column for title, column in columns.items() if column[0]}
    if not columns:
        return []
    sets = list(dict.fromkeys(name for values, _ in columns.values() for name in values))
    rows = [
        f"| {name} | "
        + " | ".join(form.format(values[name]) if name in values else "" for values, form in columns.values())
        + " |"
        for name in sets
    ]
    where = f"Measured on {measured.where}." if measured and measured.where else "Measured:"
    titles = f"| prompts | {' | '.join(columns)} |"
    return ["", where, "", titles, f"| --- |{' ---: |' * len(columns)}", *rows]


def _usage(config: DSparkConfig, target: str, name: str) -> list[str]:
    lines = [
        "",
        "## Transformers",
        "",
        "```python",
        "import dspark_hf",
        "from transformers import AutoModelForCausalLM",
        "",
        f'target = AutoModelForCausalLM.from_pretrained("{target}")',
        f'target.generate(**inputs, assistant_model="{name}")',
        "```",
        "",
        "`pip install dspark-hf` brings what this needs. Without the import:",
        f'`target.generate(**inputs, custom_generate="{name}", trust_remote_code=True)`.',
    ]
    if config.backbone_type == "deepseek_v4":
        return lines
    return [
        *lines,
        "",
        "## vLLM, SGLang, llama.cpp",
        "",
        "They read other layouts, which this writes:",
        "",
        "```bash",
        f"dspark-hf export {name} --to deepspec --target {target} --output exported",
        f"vllm serve {target} --speculative-config \\",
        f'    \'{{"method": "dspark", "model": "exported", "num_speculative_tokens": {config.block_size}}}\'',
        f"python -m sglang.launch_server --model-path {target} --speculative-algorithm DSPARK \\",
        "    --speculative-draft-model-path exported",
        "```",
        "",
        "llama.cpp converts the same folder to GGUF (`convert_hf_to_gguf.py`) for targets whose drafters it knows.",
    ]
