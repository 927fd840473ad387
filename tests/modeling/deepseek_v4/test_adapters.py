"""LoRA adapters beside weights that stay in FP8 and FP4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.closeness import assert_same_up_to_rounding, relative_difference
from tests.modeling.deepseek_v4.checkpoints import assert_same_bytes, load

TOKENS = torch.randint(200, (2, 30), generator=torch.Generator().manual_seed(0))


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def _load(folder: Path) -> Any:
    return load(folder, dtype=torch.float32, keep_quantized=True)


@pytest.mark.parametrize("modules", [["w1", "w2", "w3"], "all-linear"], ids=["experts", "all"])
def test_adapters_over_kept_weights_train(checkpoints, tmp_path, modules):
    """Adapters cannot be put beside kept weights, learn nothing, or come back otherwise than they were saved."""
    # here, as it takes seconds to import
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = _load(checkpoints["fp4"])
    before, stored = _logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = peft.LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    assert_same_up_to_rounding(_logits(adapted), before)
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(2):
        # as after loading, in evaluation mode: with a cache
        loss = adapted(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        # whatever some token reached; the first matrix has no gradient while the second is zero
        reached = [name for name, one in trained.items() if "lora_B" in name and one.grad is not None]
        assert len(reached) > len(trained) / 4
        assert all(trained[name].grad.abs().sum() > 0 for name in reached)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    after = _logits(adapted)
    assert relative_difference(after, before) > 0.01
    adapted.save_pretrained(tmp_path)
    assert_same_up_to_rounding(_logits(peft.PeftModel.from_pretrained(_load(checkpoints["fp4"]), tmp_path)), after)
    # the weights beneath are as they were stored
    assert_same_bytes(adapted.unload().state_dict(), stored)
