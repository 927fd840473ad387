"""A tiny target and drafters that truly predict it, by taps, positions, rotation and masks.

After one of the first kind of tokens the target repeats what stood six tokens before; after one of the second it walks
a fixed circle of tokens. The drafters have learnt the repeating alone: they are of no use where the target walks.

They are trained in seconds, and stored: `python -m tests.doctor.world` trains them again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.targets.adapter import TargetAdapter
from tests.tiny import tiny_target

VOCAB_SIZE = 48
PERIOD = 6
FIRST_REPEATED, FIRST_WALKED = 8, 32
BLOCK_SIZE = 4
START, MASK = 1, 3
# a word of a prompt: what follows it in the target's chat template is text of the second kind
THINK = FIRST_WALKED
_LENGTH = 32
_FOLDER = Path(__file__).parent / "trained"
# of two drafters, how far their blocks were moved in training
SHIFTS = {"drafter": 0, "shifted": 1}


def repeating(count: int, generator: torch.Generator, length: int = _LENGTH) -> Tensor:
    """Return texts `(count, length)` that begin with token 1 and repeat six tokens."""
    words = torch.randint(FIRST_REPEATED, FIRST_WALKED, (count, PERIOD), generator=generator)
    repeated = words.repeat(1, length // PERIOD + 1)[:, : length - 1]
    return torch.cat([torch.full((count, 1), START), repeated], dim=1)


def walking(count: int, generator: torch.Generator, length: int = _LENGTH) -> Tensor:
    """Return texts `(count, length)` that begin with token 1 and walk the circle of the other tokens."""
    circle = torch.randperm(VOCAB_SIZE - FIRST_WALKED, generator=torch.Generator().manual_seed(5)) + FIRST_WALKED
    starts = torch.randint(len(circle), (count, 1), generator=generator)
    walked = circle[(starts + torch.arange(length - 1)) % len(circle)]
    return torch.cat([torch.full((count, 1), START), walked], dim=1)


def prompts(count: int = 2, seed: int = 9) -> list[Tensor]:
    """Return prompts of the first kind, `(10,)` each."""
    return list(repeating(count, torch.Generator().manual_seed(seed), 10))


def make_target(name: str | None = "target") -> PreTrainedModel:
    """Return the trained target, or with the name None a random one of its shape."""
    shape = {"vocab_size": VOCAB_SIZE, "head_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
    target = tiny_target("llama", seed=3, **shape, initializer_range=0.2)
    if name is not None:
        target.load_state_dict(_read(name))
    return target


def make_drafter(target: PreTrainedModel, name: str | None = "drafter", **fields: Any) -> DSparkAssistantModel:
    """Return a trained drafter, or with the name None a random one of its shape."""
    options = {"num_hidden_layers": 1, "markov_rank": 4, "block_size": BLOCK_SIZE, "target_layer_ids": [0]}
    options |= {"mask_token_id": MASK, "initializer_range": 0.1}
    drafter = DSparkAssistantModel.from_target(target, **{**options, **fields})
    if name is not None:
        drafter.load_state_dict(_read(name))
    return drafter


def make_tokenizer(*, is_reversed: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words w4, w5, ..., whose ids may be in the reverse order.

    Its chat template starts as all texts do, and with `enable_thinking` the second kind of text follows.
    """
    ids = list(range(VOCAB_SIZE))
    if is_reversed:
        ids[FIRST_REPEATED:] = ids[FIRST_REPEATED:][::-1]
    special = ("<pad>", "<start>", "<unk>", "<mask>")
    names = [*special, *(f"w{k}" for k in range(len(special), VOCAB_SIZE))]
    tokenizer = Tokenizer(models.WordLevel(dict(zip(names, ids, strict=True)), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", unk_token="<unk>", mask_token="<mask>"
    )
    fast.chat_template = (
        "{% if enable_thinking is defined and enable_thinking %}<start> w" + str(THINK) + "{% else %}"
        "<start> {{ messages[0]['content'] }}{% endif %}"
    )
    return fast


def _read(name: str) -> dict[str, Tensor]:
    return {key: value.float() for key, value in load_file(_FOLDER / f"{name}.safetensors").items()}


def _write(name: str, model: nn.Module) -> None:
    _FOLDER.mkdir(exist_ok=True)
    tensors = {key: value.detach().bfloat16().contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, _FOLDER / f"{name}.safetensors")


def _optimise(model: nn.Module, loss: Any, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        schedule.step()
    print(f"loss {float(value.detach()):.4f}")  # noqa: T201 (it is run by hand)


def _train_target() -> PreTrainedModel:
    target, generator = make_target(None), torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        texts = torch.cat([repeating(24, generator), walking(8, generator)])
        logits = target(texts[:, :-1]).logits
        # what is repeated cannot be known before
        repeated = nn.functional.cross_entropy(logits[:24, PERIOD:].flatten(0, 1), texts[:24, PERIOD + 1 :].flatten())
        walked = nn.functional.cross_entropy(logits[24:, 1:].flatten(0, 1), texts[24:, 2:].flatten())
        return repeated + walked

    _optimise(target.train(), loss, 600)
    return target.eval()


def _train_drafter(target: PreTrainedModel, shift: int) -> DSparkAssistantModel:
    torch.manual_seed(0)
    drafter, generator = make_drafter(target, None), torch.Generator().manual_seed(0)
    adapter = TargetAdapter(target, drafter.target_layer_ids)
    head = drafter.draft_head(adapter)

    def loss() -> Tensor:
        texts = repeating(16, generator)
        with adapter, torch.no_grad():
            target(texts)
            states = adapter.pop_context_hidden_states()
        anchors = torch.randint(PERIOD, _LENGTH - BLOCK_SIZE, (len(texts), 6), generator=generator)
        places = anchors[..., None] + torch.arange(BLOCK_SIZE + 1)
        blocks = texts.gather(1, places.flatten(1)).view_as(places)
        run_blocks = drafter.run_blocks
        # the blocks alone are moved: what they see of the context stays
        drafter.run_blocks = lambda ids, positions, *rest: run_blocks(ids, positions + shift, *rest)
        out = drafter(states, blocks[..., 0], anchors, blocks[..., :-1], adapter)
        del drafter.run_blocks
        logits = head(out.hidden_states) + drafter.markov_head.project(out.latents)
        right = (logits.argmax(-1) == blocks[..., 1:]).float()
        confidence = nn.functional.binary_cross_entropy_with_logits(out.confidence_logits, right)
        return nn.functional.cross_entropy(logits.flatten(0, -2), blocks[..., 1:].flatten()) + confidence

    _optimise(drafter.train(), loss, 200)
    return drafter.eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    _write("target", _train_target())
    for stored, moved in SHIFTS.items():
        _write(stored, _train_drafter(make_target(), moved))
