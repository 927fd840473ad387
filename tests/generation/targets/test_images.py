"""Several rows with images: token for token what plain `generate` says, over several turns."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, PreTrainedModel

from dspark_hf import DSparkAssistantModel
from tests.generation.drafters import ScriptedDrafter
from tests.thinning import mostly_slow, slow

VOCAB_SIZE = 80
IMAGE, VIDEO, VISION_START, VISION_END = 70, 71, 72, 73
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": None,
}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_QWEN: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_PATCHES = {"patch_size": 4, "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2}
_MODELS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "text_config": {**_TEXT, "rope_parameters": _SECTIONS, "rope_scaling": _SECTIONS},
        "vision_config": {**_PATCHES, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        **_QWEN,
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "rope_parameters": _SECTIONS, "rope_scaling": _SECTIONS},
        "vision_config": {
            **_PATCHES,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        **_QWEN,
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, "rope_parameters": _SECTIONS, "rope_scaling": _SECTIONS},
        "vision_config": {
            **_PATCHES,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **_QWEN,
    },
    "gemma3": {
        "text_config": {
            **_TEXT,
            "model_type": "gemma3_text",
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        "image_token_id": IMAGE,
        "image_token_index": IMAGE,
        "boi_token_index": VISION_START,
        "eoi_token_index": VISION_END,
        "mm_tokens_per_image": 4,
        "tie_word_embeddings": False,
        "initializer_range": 0.4,
    },
}
TYPES = tuple(_MODELS)
# tokens of one image, after merging
_NUM_TOKENS = 4


def _make(kind: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = AutoConfig.for_model(kind, **_MODELS[kind])
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        with torch.no_grad():
            for parameter in model.parameters():
                # Gemma 3's projector starts as zero
                if parameter.ndim == 1 or not parameter.any():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _inputs(kind: str, prefix: Tensor | None = None) -> dict[str, Any]:
    """Return three left-padded rows with one image, two images and one image, and other text around them."""
    generator = torch.Generator().manual_seed(5)
    image = [VISION_START, *[IMAGE] * _NUM_TOKENS, VISION_END]
    rows = [[5, 6, *image, 7], [8, *image, 9, 10, *image, 11, 12], [13, *image, 14, 15, 16]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    if kind == "gemma3":
        pixels = torch.randn(4, 3, 16, 16, generator=generator)
        types = {"token_type_ids": (ids == IMAGE).long()}
    else:
        # of each image four by four patches of two frames
        pixels = torch.randn(4 * 16, 3 * 2 * 4 * 4, generator=generator)
        types = {
            "mm_token_type_ids": (ids == IMAGE).int(),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 4),
        }
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, **types}


def _generate(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Any:
    options = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(**inputs, **options)


@pytest.mark.parametrize(
    ("accuracy", "kind"),
    [
        (pytest.param if case in ((1.0, "qwen3_vl"), (0.7, "qwen2_5_vl"), (0.7, "gemma3")) else slow)(*case)
        for case in product((1.0, 0.7), TYPES)
    ],
)
def test_rows_with_images_are_what_plain_generate_says(accuracy: float, kind: str) -> None:
    """A drafter changes the text of padded rows with images, or they are refused."""
    model, inputs = _make(kind), _inputs(kind)
    plain = _generate(model, inputs).sequences
    num_padded = (inputs["attention_mask"] == 0).sum(1).tolist()
    drafter = ScriptedDrafter(model, plain, num_padded, accuracy)
    drafted = _generate(model, inputs, assistant_model=drafter)
    assert torch.equal(plain, drafted.sequences)
    if accuracy == 1.0:
        assert drafted.statistics.tau > 3
    # the images are seen at all
    others = _generate(model, {**inputs, "pixel_values": -inputs["pixel_values"]}).sequences
    assert not torch.equal(plain, others)


@pytest.mark.parametrize("kind", mostly_slow(TYPES, ("qwen2_vl", "gemma3")))
def test_a_second_turn_goes_on_from_images(kind: str) -> None:
    """The cache of rows with images is another than plain `generate`'s, or the positions behind them are."""
    model, inputs = _make(kind), _inputs(kind)
    drafter = DSparkAssistantModel.from_target(model, num_hidden_layers=1, markov_rank=4, block_size=3)
    texts, follow = [], torch.tensor([[20, 21], [22, 23], [24, 25]])
    for options in ({}, {"assistant_model": drafter}):
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        first = _generate(model, inputs, past_key_values=cache, **options).sequences
        whole = torch.cat([first, follow], dim=1)
        mask = torch.ones_like(whole)
        mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        turn = {"input_ids": whole, "attention_mask": mask, "past_key_values": cache}
        texts.append(_generate(model, turn, **options).sequences)
    assert torch.equal(*texts)


def test_rows_that_end_early_leave_the_others_where_they_are() -> None:
    """A row that ends leaves the position of its images to another one."""
    model, inputs = _make("qwen2_5_vl"), _inputs("qwen2_5_vl")
    plain = _generate(model, inputs).sequences
    width = inputs["input_ids"].shape[1]
    # the first row ends with its fourth token
    options = {"eos_token_id": int(plain[0, width + 3]), "pad_token_id": 0}
    plain = _generate(model, inputs, **options).sequences
    drafter = DSparkAssistantModel.from_target(model, num_hidden_layers=1, markov_rank=4, block_size=3)
    assert torch.equal(plain, _generate(model, inputs, assistant_model=drafter, **options).sequences)
