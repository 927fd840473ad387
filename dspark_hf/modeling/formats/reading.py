"""What the packagings of drafters share: names of tensors, keys of configurations, and what shapes tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

# what stands before a drafter's own names: the model inside a causal LM, and the heads in early SpecForge files
_PREFIXES = ("model.", "logit_head.")
# the target's, kept by some trainers; the drafter reads neither
_TARGETS_OWN = ("verifier_norm.weight", "verifier_lm_head.weight")
# keys of a configuration, in SGLang's order
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "base_model_name_or_path", "target_fingerprint")
_SECTIONS = ("dspark_config", "dflash_config")


@dataclass(frozen=True)
class Packaging:
    """One way of packing a drafter into a folder.

    `recognises` tells it by the fields of a `config.json`; `translate` turns them, and the shapes of the tensors under
    our names, into `DSparkConfig`'s fields.
    """

    name: str
    recognises: Callable[[dict[str, Any]], bool]
    translate: Callable[[dict[str, Any], Shapes], dict[str, Any]]


class Unreadable(ValueError):
    """A drafter's folder lacks something, or asks for something that is not supported."""

    def __init__(self, rule: str, found: str):
        super().__init__(
            f"`pretrained_model_name_or_path` must {rule}, got {found}. Fetch it anew, or convert it with the tool "
            "that wrote it."
        )


def our_name(name: str) -> str | None:
    """Return our name of a drafter's tensor, or None for one that is the target's alone."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return None if name in _TARGETS_OWN else name


def find_key(fields: Mapping[str, Any], key: str) -> Any:
    """Return a key of a drafter's configuration from wherever it stands, or None."""
    sections = [fields.get(section) for section in _SECTIONS]
    places: list[tuple[Mapping[str, Any], str]] = [(fields, f"dspark_{key}")]
    places += [(section, key) for section in sections if isinstance(section, dict)]
    for place, name in (*places, (fields, key)):
        if place.get(name) is not None:
            return place[name]
    return None


def need_key(fields: Mapping[str, Any], key: str, packaging: str) -> Any:
    """Return a key of a drafter's configuration.

    Raises:
        ValueError: if it is nowhere.
    """
    value = find_key(fields, key)
    if value is None:
        raise Unreadable(f"say `{key}` in its configuration", f"a drafter in the layout of {packaging} without")
    return value


def need_shape(shapes: Shapes, name: str, packaging: str) -> tuple[int, ...]:
    """Return the shape of a matrix or a vector.

    Raises:
        ValueError: if the drafter does not hold it, or holds it in packed bits.
    """
    if name in shapes:
        return tuple(shapes[name])
    packed = [other for other in shapes if other.endswith("qweight")]
    if packed:
        raise Unreadable(
            "hold weights in floating point, or in fewer bits as compressed-tensors writes them",
            f"a drafter in the layout of {packaging} with quantised ones ('{sorted(packed)[0]}'), which are not read",
        )
    raise Unreadable(f"hold the tensor '{name}'", f"a drafter in the layout of {packaging} without")


def common_fields(
    fields: Mapping[str, Any], shapes: Shapes, packaging: str, *, vocab_size: int | None = None
) -> dict[str, Any]:
    """Return the fields of `DSparkConfig` that hold for every packaging with layers like Qwen 3's or Gemma 4's.

    `fields` describe the layers, and may be copied from the target: what shapes tell is taken from them.
    """
    hidden_size = need_shape(shapes, "norm.weight", packaging)[0]
    query = need_shape(shapes, "layers.0.self_attn.q_proj.weight", packaging)[0]
    key = need_shape(shapes, "layers.0.self_attn.k_proj.weight", packaging)[0]
    norm = shapes.get("layers.0.self_attn.q_norm.weight")
    head_dim = norm[0] if norm is not None else _integer(fields, "head_dim", packaging)
    if need_shape(shapes, "layers.0.self_attn.o_proj.weight", packaging)[1] != query:
        raise Unreadable("have plain attention", f"a drafter in the layout of {packaging} whose attention is gated")
    if fields.get("rms_norm_eps") is None:
        raise Unreadable("say `rms_norm_eps` in its configuration", f"a drafter in the layout of {packaging} without")
    return {
        "model_type": "dspark",
        "vocab_size": vocab_size or _vocab_size(fields, shapes, packaging),
        "hidden_size": hidden_size,
        "intermediate_size": need_shape(shapes, "layers.0.mlp.gate_proj.weight", packaging)[0],
        "num_hidden_layers": len({name.split(".")[1] for name in shapes if name.startswith("layers.")}),
        "num_attention_heads": query // head_dim,
        "num_key_value_heads": key // head_dim,
        "head_dim": head_dim,
        "hidden_act": fields.get("hidden_act") or fields.get("hidden_activation") or "silu",
        "rms_norm_eps": fields["rms_norm_eps"],
        "max_position_embeddings": fields.get("max_position_embeddings") or 32768,
        "attention_bias": "layers.0.self_attn.q_proj.bias" in shapes,
        "use_qk_norm": norm is not None,
        "attention_k_eq_v": "layers.0.self_attn.v_proj.weight" not in shapes,
        "owns_embeddings": "embed_tokens.weight" in shapes,
        "owns_head": "lm_head.weight" in shapes,
        "draft_vocab_size": shapes["d2t"][0] if "d2t" in shapes else None,
        "initializer_range": fields.get("initializer_range", 0.02),
        **head_fields(shapes, hidden_size),
        **{name: fields.get(name) for name in _KEPT},
        "dtype": fields.get("dtype") or fields.get("torch_dtype"),
    }


def head_fields(shapes: Shapes, hidden_size: int) -> dict[str, Any]:
    """Return the fields of the Markov and the confidence head that the tensors tell of."""
    confidence_width = tuple(shapes.get("confidence_head.proj.weight", (1, 0)))[1]
    kind = "gated" if "markov_head.gate_proj.weight" in shapes else "vanilla"
    return {
        "markov_rank": tuple(shapes.get("markov_head.markov_w1.weight", (0, 0)))[1],
        "markov_head_type": "rnn" if "markov_head.joint_proj.weight" in shapes else kind,
        "enable_confidence_head": confidence_width > 0,
        "confidence_head_with_markov": confidence_width > hidden_size,
        "confidence_head_bias": confidence_width == 0 or "confidence_head.proj.bias" in shapes,
    }


def _integer(fields: Mapping[str, Any], name: str, packaging: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or value < 1:
        raise Unreadable(f"say `{name}` in its configuration", f"{value!r} in a drafter in the layout of {packaging}")
    return value


def _vocab_size(fields: Mapping[str, Any], shapes: Shapes, packaging: str) -> int:
    for name in ("embed_tokens.weight", "markov_head.markov_w1.weight", "t2d"):
        if name in shapes:
            return shapes[name][0]
    return _integer(fields, "vocab_size", packaging)


def rope_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_parameters` as a Qwen 3 layer takes them from a configuration, in the form of any Transformers.

    A partial rotation is left out: those layers turn whole heads, whatever a copied field says.
    """
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(given, dict):
        return given  # checked with all other fields
    for kind in ("sliding_attention", "full_attention"):
        if isinstance(given.get(kind), dict):
            given = given[kind]
            break
    parameters = {name: value for name, value in given.items() if name not in ("type", "partial_rotary_factor")}
    parameters.setdefault("rope_type", given.get("type") or "default")
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = fields.get("rope_theta") or 10000.0
    if parameters["rope_type"] == "default":
        return {"rope_type": "default", "rope_theta": parameters["rope_theta"]}
    if parameters.get("original_max_position_embeddings") is None and parameters["rope_type"] in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = fields.get("max_position_embeddings")
    return parameters


def check_context_width(fields: dict[str, Any], shapes: Shapes, packaging: str) -> None:
    """Raise a `ValueError` unless `fc` reads exactly the tapped layers of a target as wide as the drafter."""
    width, read = need_shape(shapes, "fc.weight", packaging)
    ids = fields["target_layer_ids"]
    if isinstance(ids, (list, tuple)) and read != len(ids) * width:
        raise Unreadable(
            f"read {len(ids)} layers of {width} numbers, as its configuration says",
            f"a drafter in the layout of {packaging} whose `fc` takes {read} numbers",
        )


def check_full_attention(fields: Mapping[str, Any], num_layers: int, packaging: str) -> None:
    """Raise a `ValueError` if a file whose windows are not known to mean the same as ours has sliding layers."""
    types = fields.get("layer_types")
    # a list of another length is the target's
    if isinstance(types, list) and len(types) == num_layers and "sliding_attention" in types:
        raise Unreadable(
            "see its whole context in every layer",
            f"a drafter in the layout of {packaging} with sliding layers, which are read of speculators only",
        )
