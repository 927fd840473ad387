"""Other doors of Transformers that lead to `generate`: what they pass on, and what they leave behind."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    pipeline,
)

from dspark_hf import DSparkAssistantModel
from tests.tiny import tiny_config, tiny_target
from tests.training.tiny_tokenizer import tiny_tokenizer

# a word of the tiny tokenizer
IMAGE = 60
OPTIONS = {"max_new_tokens": 12, "do_sample": False}


def _drafter(target: PreTrainedModel) -> DSparkAssistantModel:
    return DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)


def test_pipeline_of_text_and_images() -> None:
    """A drafter in `generate_kwargs` changes what is said of an image, or does not draft."""
    image_module = pytest.importorskip("PIL.Image")
    # torchvision would be another way to read images; without it the first name stands for the second
    clip = pytest.importorskip("transformers.models.clip")
    processor_class = getattr(clip, "CLIPImageProcessorPil", clip.CLIPImageProcessor)
    images = processor_class(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    tokenizer = tiny_tokenizer()
    # as many of them as an image has patches stand without a space between them
    tokenizer.add_tokens([f"w{IMAGE}"], special_tokens=True)
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token=f"w{IMAGE}",
        num_additional_image_tokens=1,
    )
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16)
    config = LlavaConfig(text_config=tiny_config("llama"), vision_config=vision, image_token_id=IMAGE)
    target = LlavaForConditionalGeneration(config).eval()
    drafter = _drafter(target)
    image = image_module.new("RGB", (8, 8), (200, 10, 30))

    def ask(generate_kwargs: dict[str, Any], **options: Any) -> Any:
        pipe = pipeline("image-text-to-text", model=target, processor=processor, **options)
        return pipe(images=image, text=f"w{IMAGE} w10 w11", generate_kwargs={**OPTIONS, **generate_kwargs})

    plain = ask({})
    # Transformers drops it there, as the page on other packages says
    assert ask({}, assistant_model=drafter) == plain and drafter.last_statistics is None
    assert ask({"assistant_model": drafter, "scheduler": "fixed"}) == plain
    assert drafter.last_statistics is not None and drafter.last_statistics.num_verified > 0


@pytest.mark.slow
def test_transformers_serve(tmp_path: Path) -> None:
    """Its server breaks where the package is imported, or takes a drafter and ignores it without a word."""
    serve = pytest.importorskip("transformers.cli.serve")
    target, tokenizer = tiny_target(eos_token_id=2), tiny_tokenizer()
    for one in (target, tokenizer):
        one.save_pretrained(tmp_path / "target")
    _drafter(target).save_pretrained(tmp_path / "drafter")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = str(tmp_path / "target")
    server = serve.Serve(folder, device="cpu", host="127.0.0.1", port=port, non_blocking=True)
    messages = [{"role": "user", "content": "w10 w11"}]

    def ask(**fields: Any) -> Any:
        body = {"model": folder, "messages": messages, "max_tokens": 8, "temperature": 0, **fields}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.loads(reply.read())

    try:
        _wait_for(port)
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        output = target.generate(**prompt, max_new_tokens=8, do_sample=False)
        expected = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert ask()["choices"][0]["message"]["content"] == expected
        with pytest.raises(HTTPError) as failure:
            ask(assistant_model=str(tmp_path / "drafter"))
        with failure.value as error:
            assert error.code == 422 and "assistant_model" in error.read().decode()
    finally:
        server.kill_server()


def _wait_for(port: int) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except URLError:
            assert time.monotonic() < end
            time.sleep(0.05)
