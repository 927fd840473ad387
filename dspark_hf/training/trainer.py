"""A small trainer: one drafter, one frozen target, conversations the target wrote.

K block_size, N blocks per sequence, P slots.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dspark_hf.generation.target import TargetAdapter
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel
from dspark_hf.training.anchors import sample_blocks
from dspark_hf.training.checkpoint import read_if_there, write_whole
from dspark_hf.training.data import Conversation
from dspark_hf.training.losses import DraftLosses, LossWeights, Slots, TargetHead, draft_losses, slot_weights
from dspark_hf.training.states import StateSource


@dataclass
class TrainingOptions:
    """How to train.

    Args:
        max_steps: optimiser steps in all.
        sequences_per_step: sequences whose gradients make one step.
        anchors_per_sequence: blocks drawn from each sequence (512 as released, on long sequences).
        learning_rate: peak of the cosine schedule (6e-4, as released).
        warmup_steps: steps of linear warm-up.
        max_grad_norm: gradients are clipped to this norm.
        optimizer: `"adamw"`, or `"muon"` (Muon for the hidden matrices, AdamW for the rest).
        loss: weights of the loss terms.
        dtype: what the products are computed in; weights and optimiser state stay fp32.
        max_cache_gb: memory for the target's hidden states, in GB; what does not fit is computed anew.
        eval_steps: steps between evaluations on the held-out conversations.
        save_steps: steps between checkpoints.
        seed: seed of data order and anchors.
    """

    max_steps: int = 1000
    sequences_per_step: int = 8
    anchors_per_sequence: int = 128
    learning_rate: float = 6e-4
    warmup_steps: int = 40
    max_grad_norm: float = 1.0
    optimizer: str = "adamw"
    loss: LossWeights = field(default_factory=LossWeights)
    dtype: torch.dtype = torch.bfloat16
    max_cache_gb: float = 4.0
    eval_steps: int = 200
    save_steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"`optimizer` must be 'adamw' or 'muon', got {self.optimizer!r}. Choose one of the two.")


@dataclass
class Metrics:
    """Sums over slots and blocks; ratios are taken at the end, so that parts add up exactly."""

    loss_sum: float = 0.0
    num_sequences: int = 0
    accepted_length_sum: float = 0.0
    num_blocks: int = 0
    accept_rate_sum: Tensor | None = None
    num_valid: Tensor | None = None

    def add(self, losses: DraftLosses, valid: Tensor) -> None:
        """Count the blocks `valid` `(N, K)` of one sequence."""
        rate = losses.accept_rate.detach().view(valid.shape) * valid
        self.loss_sum += float(losses.total.detach())
        self.num_sequences += 1
        self.accepted_length_sum += float((rate.cumprod(-1).sum(-1) + 1).sum())
        self.num_blocks += len(valid)
        sums = (rate.sum(0), valid.sum(0))
        self.accept_rate_sum = sums[0] if self.accept_rate_sum is None else self.accept_rate_sum + sums[0]
        self.num_valid = sums[1] if self.num_valid is None else self.num_valid + sums[1]

    def summary(self) -> dict[str, Any]:
        """Return loss, expected tau (bonus included, tokens per round) and accept rate by position."""
        assert self.accept_rate_sum is not None and self.num_valid is not None
        rates = self.accept_rate_sum / self.num_valid.clamp_min(1)
        return {
            "loss": round(self.loss_sum / self.num_sequences, 4),
            "expected_tau": round(self.accepted_length_sum / self.num_blocks, 4),
            "accept_rate": [round(rate, 4) for rate in rates.tolist()],
        }


class DrafterTrainer:
    """Train a drafter on the target's own conversations with the paper's objective.

    The target is frozen, its embedding and head are borrowed, its hidden states are computed online. A run that is
    interrupted continues from its last checkpoint in `output_dir` with the same losses.

    Args:
        drafter: the drafter, fp32.
        target: the frozen target.
        conversations: what to train on.
        held_out: what to evaluate on.
        output_dir: receives `checkpoint.pt`, `log.jsonl` and the drafter in `drafter/`.
        options: how to train.
    """

    def __init__(
        self,
        drafter: DSparkAssistantModel,
        target: PreTrainedModel,
        conversations: Sequence[Conversation],
        held_out: Sequence[Conversation],
        output_dir: str | Path,
        options: TrainingOptions,
    ):
        self.drafter = drafter
        self.target = TargetAdapter(target.eval().requires_grad_(False), drafter.target_layer_ids)
        drafter.check_target(self.target)
        if drafter.config.owns_embeddings:
            # copies of the target's, and frozen like them
            drafter.embed_tokens.requires_grad_(False)
            drafter.lm_head.requires_grad_(False)
        self.conversations = list(conversations)
        self.held_out = list(held_out)
        self.output_dir = Path(output_dir)
        self.options = options
        self.step = 0
        self._optimizers = _build_optimizers(drafter, options)
        self._head = self._build_head()
        self._draft_ids = self._token_to_draft_id()
        cache_bytes = int(options.max_cache_gb * 1e9)
        self._states = StateSource(self.target, dtype=options.dtype, max_cache_bytes=cache_bytes)

    def train(self) -> dict[str, Any]:
        """Train to `max_steps`, then save the drafter. Returns the last evaluation."""
        self._resume()
        summary: dict[str, Any] = {}
        with tqdm(total=self.options.max_steps, initial=self.step, unit="step") as bar:
            while self.step < self.options.max_steps:
                metrics = self._train_step()
                self.step += 1
                shown = metrics.summary()
                bar.update()
                bar.set_postfix(loss=shown["loss"], tau=shown["expected_tau"])
                last = self.step == self.options.max_steps
                if last or self.step % self.options.eval_steps == 0:
                    summary = self.evaluate()
                    self._log({"step": self.step, "train": shown, "held_out": summary})
                if last or self.step % self.options.save_steps == 0:
                    self._save()
        self.drafter.eval().save_pretrained(self.output_dir / "drafter")
        return summary

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Return loss, expected tau and accept rate by position on the held-out conversations; `{}` without any."""
        if not self.held_out:
            return {}
        self.drafter.eval()
        metrics = Metrics()
        generator = torch.Generator().manual_seed(self.options.seed)
        for index, conversation in enumerate(self.held_out):
            self._sequence_losses(-1 - index, conversation, generator, metrics)
        return metrics.summary()

    def _train_step(self) -> Metrics:
        self.drafter.train()
        metrics = Metrics()
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + self.step)
        count = self.options.sequences_per_step
        for index in self._step_indices():
            losses = self._sequence_losses(index, self.conversations[index], generator, metrics)
            (losses.total / count).backward()
        nn.utils.clip_grad_norm_(self.drafter.parameters(), self.options.max_grad_norm)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.options.learning_rate * self._schedule()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return metrics

    def _step_indices(self) -> list[int]:
        # the order depends on seed and step only, so a resumed run sees the same sequences
        size, count = len(self.conversations), self.options.sequences_per_step
        first = self.step * count
        indices = []
        for position in range(first, first + count):
            epoch, offset = divmod(position, size)
            generator = torch.Generator().manual_seed(self.options.seed + 7919 * epoch)
            indices.append(int(torch.randperm(size, generator=generator)[offset]))
        return indices

    def _schedule(self) -> float:
        warmup, total = self.options.warmup_steps, self.options.max_steps
        if self.step < warmup:
            return (self.step + 1) / warmup
        progress = (self.step - warmup) / max(total - warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * progress))

    def _sequence_losses(
        self, index: int, conversation: Conversation, generator: torch.Generator, metrics: Metrics
    ) -> DraftLosses:
        drafter, options = self.drafter, self.options
        device = drafter.device
        states = self._states.get(index, conversation.input_ids)
        blocks = sample_blocks(conversation.loss_mask, options.anchors_per_sequence, drafter.block_size, generator)
        input_ids, valid = conversation.input_ids.to(device), blocks.valid.to(device)
        previous = input_ids[blocks.previous_positions.to(device)]
        anchors = blocks.anchors.to(device)
        with torch.autocast(device.type, options.dtype, enabled=options.dtype != drafter.dtype):
            output = drafter(
                states.context[None].to(device, drafter.dtype),
                input_ids[anchors][None],
                anchors[None],
                previous[None],
                self.target,
            )
        weights = slot_weights(valid, options.loss.decay)
        slots = Slots(
            labels=self._draft_ids[input_ids[blocks.label_positions.to(device)]].flatten(),
            target_rows=blocks.previous_positions.to(device).flatten(),
            target_states=states.last.to(device),
            target_lse=states.lse.to(device),
            weights=weights.flatten(),
        )
        head = drafter.markov_head
        losses = draft_losses(
            output.hidden_states[0].flatten(0, 1),
            None if output.latents is None else output.latents[0].flatten(0, 1),
            None if head is None else head.markov_w2.weight,
            None if output.confidence_logits is None else output.confidence_logits[0].flatten(),
            self._head,
            slots,
            options.loss,
        )
        metrics.add(losses, valid)
        return losses

    def _build_head(self) -> TargetHead:
        ids = self.drafter.draft_token_ids
        ids = torch.arange(self.target.vocab_size) if ids is None else ids
        rows = self.target.head_rows(ids)
        if rows is None:
            raise ValueError(
                "`target` must have an output head in floating point to train a drafter, got a quantised one. Load it "
                'with its head left out of the quantisation, for example `llm_int8_skip_modules=["lm_head"]`.'
            )
        device, dtype = self.drafter.device, self.options.dtype
        weight, bias = rows[0].to(device, dtype), rows[1]
        return TargetHead(
            weight, None if bias is None else bias.to(device), self.target.logit_factor, self.target.logit_cap
        )

    def _token_to_draft_id(self) -> Tensor:
        ids = self.drafter.draft_token_ids
        if ids is None:
            return torch.arange(self.target.vocab_size, device=self.drafter.device)
        table = torch.full((self.target.vocab_size,), -1, device=self.drafter.device)
        table[ids] = torch.arange(len(ids), device=self.drafter.device)
        return table

    def _log(self, record: dict[str, Any]) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with (self.output_dir / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
        tqdm.write(json.dumps(record))

    def _save(self) -> None:
        write_whole(
            self.output_dir / "checkpoint.pt",
            {
                "step": self.step,
                "drafter": self.drafter.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
                "options": {key: str(value) for key, value in asdict(self.options).items()},
            },
        )

    def _resume(self) -> None:
        state = read_if_there(self.output_dir / "checkpoint.pt")
        if state is None:
            return
        self.step = state["step"]
        self.drafter.load_state_dict(state["drafter"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _build_optimizers(drafter: DSparkAssistantModel, options: TrainingOptions) -> list[torch.optim.Optimizer]:
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in drafter.named_parameters():
        if not parameter.requires_grad:
            continue
        is_hidden_matrix = parameter.ndim == 2 and (name.startswith("layers.") or name == "fc.weight")
        (hidden if is_hidden_matrix and options.optimizer == "muon" else rest).append(parameter)
    adamw = torch.optim.AdamW(rest, lr=options.learning_rate, weight_decay=0.0)
    if not hidden:
        return [adamw]
    # the adjusted rate lets both optimisers share one schedule
    muon = torch.optim.Muon(hidden, lr=options.learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]
