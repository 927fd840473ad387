"""The table of passes with packed weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import benchmarks.packing as benchmark
from dspark_hf.generation import lean_passes, packing
from tests.tiny import tiny_target

CONTEXT = 32


@pytest.mark.skipif(not packing.can_pack(), reason="no products with packed weights here")
def test_every_pass_is_timed_in_every_way(tmp_path, monkeypatch):
    """All rows are of the same products, or a pass stands behind what another one has added."""
    monkeypatch.setattr(packing, "LEAST_BYTES", 0)
    target = tiny_target("qwen3")
    products: list[Any] = []
    passes: list[tuple[int, int]] = []
    multiply, forward = packing._multiply, target.model.forward

    def note_product(*args: Any) -> Any:
        products.append(args)
        return multiply(*args)

    def note_pass(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs[benchmark.CACHE_KEY]
        passes.append((kwargs["input_ids"].shape[1], 0 if cache is None else cache.get_seq_length()))
        return forward(*args, **kwargs)

    grouped: list[Any] = []
    attend = lean_passes.scaled_dot_product_attention

    def note_heads(*args: Any, **kwargs: Any) -> Any:
        grouped.append(args)
        return attend(*args, **kwargs)

    monkeypatch.setattr(packing, "_multiply", note_product)
    monkeypatch.setattr(lean_passes, "scaled_dot_product_attention", note_heads)
    monkeypatch.setattr(target.model, "forward", note_pass)
    monkeypatch.setattr(benchmark, "load_packaged", lambda *_: SimpleNamespace(title="A target", target=target))
    # time goes on by a second a product with packed weights
    monkeypatch.setattr(benchmark, "choose_clock", lambda **_: lambda: float(len(products)))
    benchmark.main(models="a", dtypes="fp32", contexts=str(CONTEXT), repeats=3, output=tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    num_layers = sum(type(module) is torch.nn.Linear for module in target.modules())
    assert f"| A target, fp32 | {CONTEXT} | as loaded |" + " 0 |" * len(benchmark.WIDTHS) in text
    assert f"| A target, fp32 | {CONTEXT} | packed |" + f" {1000 * num_layers} |" * len(benchmark.WIDTHS) in text
    assert len(grouped) == len(benchmark.WIDTHS) * 4 * target.config.num_hidden_layers
    prefill = [(CONTEXT, 0)]
    assert passes == [one for width in benchmark.WIDTHS for one in prefill + [(width, CONTEXT)] * 12]
