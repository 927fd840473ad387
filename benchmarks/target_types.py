"""Which of Transformers' causal LMs a drafter assists: every type, tiny and random, against plain `generate`.

python -m benchmarks.target_types

Greedy, one row and three, with a fresh drafter and with one that is right about two drafts of three. Every outcome is
identical text, a refusal in a sentence, or a fault. A run takes some minutes.
"""

from __future__ import annotations

import inspect
import signal
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from dspark_hf import DSparkAssistantModel
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.tiny import FAMILIES, tiny_target

NUM_LAYERS = 4
# every field that a configuration has of these is set; types and values follow what most families mean by the name
_SIZES: dict[int | float, str] = {
    64: "vocab_size unpadded_vocab_size vocab_size_per_layer_input text_vocab_size n_vocab entity_vocab_size",
    32: "hidden_size d_model n_embd dim emb_dim d_embed n_embed word_embed_proj_dim embedding_size "
    "input_embedding_size output_embedding_size shared_expert_intermediate_size mamba_d_inner",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_inner ffn_hidden_size dim_ff "
    "feed_forward_size block_ff_dim mlp_hidden_size",
    NUM_LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts mamba_n_heads mamba_num_heads linear_num_value_heads linear_num_key_heads index_n_heads "
    "global_num_attention_heads",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok moe_k num_experts_per_token moe_topk top_k_experts "
    "num_global_key_value_heads swa_num_key_value_heads",
    8: "head_dim attention_head_size v_head_dim qk_nope_head_dim qk_rope_head_dim linear_key_head_dim "
    "linear_value_head_dim hidden_size_per_layer_input index_head_dim dim_head global_head_dim d_kv swa_head_dim "
    "swa_v_head_dim sliding_window attention_window_size",
    16: "q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim mamba_d_state ssm_state_size laurel_rank",
    24: "moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size",
    1: "n_group topk_group n_shared_experts moe_num_shared_experts first_k_dense_replace mamba_n_groups n_groups",
    256: "max_position_embeddings n_positions max_seq_len n_ctx index_topk",
    0.4: "initializer_range init_std",
}
_FIELDS: dict[str, Any] = {name: value for value, names in _SIZES.items() for name in names.split()}
_TOKENS: dict[str, Any] = {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": None}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# what does not follow from the above
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blenderbot": {"num_hidden_layers": NUM_LAYERS},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
    "codegen": {"rotary_dim": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {
        "num_hidden_layers": NUM_LAYERS,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": NUM_LAYERS},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {
            "num_global_layers": 1,
            "attention_heads": 4,
            "vision_output_dim": 64,
            "image_size": 32,
            "patch_size": 16,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
    },
    "mpt": {"use_cache": True},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {"indexer_compress_ratio": 4, "indexer_budget": 64},
    "reformer": {"axial_pos_embds": False, "num_attention_heads": 2, "feed_forward_size": 48},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
_SECONDS_PER_TYPE = 60
_TITLES = (
    "identical",
    "identical for one row, several refused",
    "refused",
    "without a text of their own",
    "wrong",
    "not tried",
)
_REMARKS = [
    "A type that is not tried has no tiny model that this script could make of its configuration, or plain `generate`",
    "does not take it. Types whose layers choose keys by a top-k (DeepSeek-V3.2 and its kin, Doge) are identical",
    "here; beyond the number of keys that they choose, exact ties are cut by how many tokens a pass holds, so that",
    "plain texts with and without a cache part there, too.",
]
_PROMPT_AND_OUTPUT = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


@dataclass
class Outcome:
    """What became of a type: `one_row` and `three_rows` are verdicts, `notes` what was said."""

    model_type: str
    one_row: str
    three_rows: str
    notes: list[str]


def main(
    only: Annotated[list[str] | None, typer.Argument(help="Model types; default: all.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the page goes; docs/targets.md if all ran.")] = None,
) -> None:
    """Try every type, print what became of it, and write the page."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    types = sorted(
        {config_class.model_type for config_class in MODEL_FOR_CAUSAL_LM_MAPPING if config_class.model_type}
    )
    outcomes = []
    for model_type in only or types:
        outcome = try_type(model_type)
        outcomes.append(outcome)
        print(f"{model_type:28} {outcome.one_row:12} {outcome.three_rows:12} {' | '.join(outcome.notes)}", flush=True)
    if output is None and not only:
        output = FOLDER.parent / "docs" / "targets.md"
    if output is not None:
        write_page(_page(outcomes), output)


def try_type(model_type: str) -> Outcome:
    notes: dict[str, None] = {}
    try:
        with _time_limit(_SECONDS_PER_TYPE):
            model = _tiny(model_type)
            plain = [model.generate(**ragged_prompts(rows), **_PROMPT_AND_OUTPUT) for rows in (1, 3)]
    except Exception as error:
        return Outcome(model_type, "not tried", "not tried", [f"plain: {_first_line(error)}"])
    verdicts = []
    for rows, text in zip((1, 3), plain, strict=True):
        inputs = ragged_prompts(rows)
        found = []
        for make in (_scripted, _fresh):
            try:
                with _time_limit(_SECONDS_PER_TYPE):
                    drafter = make(model, text, num_padded(inputs))
                    written = model.generate(
                        **inputs, **_PROMPT_AND_OUTPUT, assistant_model=drafter, scheduler="fixed"
                    )
                found.append(_compared(model, inputs, text, written))
            except (ValueError, TypeError) as error:
                is_ours = str(error).startswith("`") and "must" in str(error)
                found.append("refused" if is_ours else "fault")
                notes[_first_line(error) if is_ours else repr(error)] = None
            except Exception as error:
                found.append("fault")
                notes[repr(error).splitlines()[0]] = None
        verdicts.append(_worst(found))
    one_row, three_rows = verdicts
    return Outcome(model_type, one_row, three_rows, list(notes))


def _worst(found: list[str]) -> str:
    order = ("fault", "differs", "refused", "plain varies", "tie", "identical")
    return next(verdict for verdict in order if verdict in found)


def _scripted(model: PreTrainedModel, text: Tensor, padded: list[int]) -> ScriptedDrafter:
    return ScriptedDrafter(model, text, padded, 0.67)


def _fresh(model: PreTrainedModel, text: Tensor, padded: list[int]) -> DSparkAssistantModel:
    return DSparkAssistantModel.from_target(model, num_hidden_layers=1, markov_rank=4)


def _compared(model: Any, inputs: dict[str, Tensor], plain: Tensor, written: Tensor) -> str:
    """Return whether texts are equal, part where plain's two best scores are equal up to rounding, or differ."""
    if torch.equal(plain, written):
        return "identical"
    options: dict[str, Any] = {**_PROMPT_AND_OUTPUT, "output_scores": True, "return_dict_in_generate": True}
    scores = torch.stack(model.generate(**inputs, **options).scores, dim=1)
    best = scores.topk(2, dim=-1).values
    gaps = best[..., 0] - best[..., 1]
    start = inputs["input_ids"].shape[1]
    parting = [
        (row, int(places.long().argmax())) for row, places in enumerate((plain != written)[:, start:]) if places.any()
    ]
    if all(gaps[where] <= 1e-3 * scores[where].std() for where in parting):
        return "tie"
    # a target whose own text depends on how many tokens a pass holds, or whose own scores move by more than what
    # decided, has no text to be equal to
    uncached = model.generate(**inputs, **options, use_cache=False)
    if not torch.equal(plain, uncached.sequences):
        return "plain varies"
    moved = (scores - torch.stack(uncached.scores, dim=1)).abs().amax(-1)
    return "plain varies" if all(gaps[where] <= moved[where] for where in parting) else "differs"


def _tiny(model_type: str) -> Any:
    if model_type in FAMILIES:
        return tiny_target(model_type)
    torch.manual_seed(0)
    config = _tiny_config(CONFIG_MAPPING[model_type], _SPECIAL.get(model_type, {}))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _tiny_config(config_class: type[PreTrainedConfig], special: dict[str, Any]) -> Any:
    defaults = config_class()
    fields = {name: value for name, value in _FIELDS.items() if _is_number(config_class, defaults, name)}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        # latent attention has as many of them as of queries
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    for name, inner_class in getattr(config_class, "sub_configs", {}).items():
        if inspect.isclass(inner_class) and isinstance(getattr(defaults, name, None), PreTrainedConfig):
            inner = type(getattr(defaults, name))
            fields[name] = _tiny_config(inner, special.get(name, {})).to_dict()
    fields |= {name: value for name, value in _TOKENS.items() if hasattr(defaults, name)}
    own = {name: value for name, value in special.items() if not isinstance(fields.get(name), dict)}
    config: Any = config_class(**{**fields, **own})
    config.is_decoder = True
    if getattr(config, "is_encoder_decoder", False):
        config.is_encoder_decoder = False
    return config


def _is_number(config_class: type[PreTrainedConfig], defaults: Any, name: str) -> bool:
    """Return whether a configuration has a field that holds a number, or a head's size that follows from others."""
    field = getattr(config_class, name, None)
    if isinstance(field, property) and field.fset is None:
        return False
    try:
        value = getattr(defaults, name)
    except (AttributeError, NotImplementedError):
        # there is none, or one that differs from layer to layer, or XLNet's
        return False
    if value is None:
        return name == "head_dim"
    return isinstance(value, int | float) and not isinstance(value, bool)


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def _page(outcomes: list[Outcome]) -> list[str]:
    """Return the page of all outcomes."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(_group(outcome), []).append(outcome)
    lines = [
        "# Targets",
        "",
        "Every type of Transformers' causal LMs, tiny and random, greedy in fp32: is the text with a drafter the one",
        "that plain `generate` gives? One row, and three of different lengths, with a fresh drafter and with one that",
        "is right about two drafts of three. What is not served is refused in a sentence.",
        "",
        *describe_run(),
        "",
        "| outcome | types |",
        "| --- | --- |",
        *(f"| {title} | {len(groups.get(title, []))} |" for title in _TITLES),
    ]
    for title in _TITLES:
        found = groups.get(title, [])
        if not found:
            continue
        lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
        if title == _TITLES[0]:
            lines += textwrap.wrap(", ".join(f"`{outcome.model_type}`" for outcome in found), 119)
        else:
            lines += ["| type | what is said |", "| --- | --- |"]
            lines += [f"| `{outcome.model_type}` | {_said(outcome)} |" for outcome in found]
    return [*lines, "", *_REMARKS]


def _group(outcome: Outcome) -> str:
    verdicts = (outcome.one_row, outcome.three_rows)
    if "not tried" in verdicts:
        return "not tried"
    if "fault" in verdicts or "differs" in verdicts:
        return "wrong"
    if "plain varies" in verdicts:
        return "without a text of their own"
    are_served = [verdict in ("identical", "tie") for verdict in verdicts]
    if all(are_served):
        return _TITLES[0]
    return "identical for one row, several refused" if are_served[0] else "refused"


def _said(outcome: Outcome) -> str:
    if "plain varies" in (outcome.one_row, outcome.three_rows):
        return (
            "with `use_cache=False` plain `generate` gives another text, or scores that part by more than what decides"
        )
    return textwrap.shorten(" ".join(dict.fromkeys(outcome.notes)).replace("|", "\\|"), 320)


if __name__ == "__main__":
    typer.run(main)
