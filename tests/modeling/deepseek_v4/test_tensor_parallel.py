"""DeepSeek-V4 split over processes: what the plan names, and that a split model is the whole one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from torch import Tensor, distributed, multiprocessing
from torch.distributed.tensor import DTensor

from dspark_hf import DeepseekV4DSparkForCausalLM, DSparkAssistantModel
from tests.modeling.deepseek_v4.tiny import VOCAB, tiny_model

# Transformers' name of what its plan splits, and ours
NATIVE_NAMES = {
    "lm_head": ["head"],
    "model.embed_tokens": ["model.embed"],
    "model.layers.*.mlp.experts": [],
    "model.layers.*.mlp.experts.gate_up_proj": ["model.layers.*.ffn.experts.*.w1", "model.layers.*.ffn.experts.*.w3"],
    "model.layers.*.mlp.experts.down_proj": ["model.layers.*.ffn.experts.*.w2"],
}


def test_the_plan_names_modules_of_the_model() -> None:
    """A rule would be left out in silence, and every process hold the whole of what it names."""
    model = tiny_model()
    names = {re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name, _ in model.named_modules()}
    assert model.tp_plan["head"] == "colwise_gather_output"
    assert {rule.removeprefix("model.") for rule in model.tp_plan} == {*model.config.base_model_tp_plan, "head"}
    assert model.tp_plan.keys() <= names
    assert "base_model_tp_plan" not in model.config.to_dict()


def test_the_plan_covers_that_of_transformers() -> None:
    """Something that Transformers' own DeepSeek-V4 splits would be held whole by every process."""
    config = transformers.DeepseekV4Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, moe_intermediate_size=16, n_routed_experts=4
    )
    with torch.device("meta"):
        native = transformers.DeepseekV4ForCausalLM(config)
    ours = tiny_model().tp_plan
    assert {name for rule in native.tp_plan for name in NATIVE_NAMES[rule]} <= ours.keys()


def _outputs(model: DeepseekV4DSparkForCausalLM) -> dict[str, Any]:
    token_ids = torch.randint(1, VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(token_ids)
    mask[1, :7] = 0
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    torch.manual_seed(1)
    drafter = DSparkAssistantModel.from_target(model, num_hidden_layers=1, markov_rank=8, block_size=4)
    with torch.no_grad():
        logits = model(token_ids, attention_mask=mask).logits
    generated = model.generate(token_ids, **options)
    assisted = model.generate(token_ids, assistant_model=drafter, **options)
    model.train()(token_ids, attention_mask=mask, labels=token_ids).loss.backward()
    gradients = {name: _whole(x.grad) for name, x in model.named_parameters() if x.grad is not None}
    return {"logits": logits, "generated": generated, "assisted": assisted, "gradients": gradients}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _model() -> DeepseekV4DSparkForCausalLM:
    return tiny_model(3, output_router_logits=True, indexer_loss_coef=0.1)


def _run(rank: int, folder: Path) -> None:
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    whole = _model()
    config, _, mesh = whole.prepare_distribute_model(DistributedConfig(tp_size=2))
    model = whole.maybe_distribute_model(whole, config, mesh)
    expert = model.model.layers[2].ffn.experts[0]
    shapes = [tuple(part.weight.to_local().shape) for part in (expert.w1, expert.w2, model.head, model.model.embed)]
    torch.save({**_outputs(model), "shapes": shapes}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.24"),
    reason="older versions of Transformers split models while they load only",
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="Transformers would split over accelerators, not the CPU")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """A model split over processes would write other text, or learn something else."""
    multiprocessing.spawn(_run, args=(tmp_path,), nprocs=2)
    expected = _outputs(_model())
    assert torch.equal(expected["generated"], expected["assisted"])
    for rank in range(2):
        outputs = torch.load(tmp_path / f"{rank}.pt")
        # half an expert, half of the vocabulary
        assert outputs["shapes"] == [(16, 64), (64, 16), (VOCAB // 2, 64), (VOCAB // 2, 64)]
        torch.testing.assert_close(outputs["logits"], expected["logits"], atol=1e-4, rtol=1e-4)
        assert torch.equal(outputs["generated"], expected["generated"])
        assert torch.equal(outputs["assisted"], expected["generated"])
        assert outputs["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(outputs["gradients"][name], gradient, atol=1e-5, rtol=1e-3)
