"""Train a drafter with Transformers' `Trainer`: one frozen target, conversations the target wrote.

B sequences, N blocks per sequence, K block_size, T tokens, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import EarlyStoppingCallback, PreTrainedModel, ProgressCallback, Trainer, TrainerCallback

from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel
from dspark_hf.training.anchors import BlockTargets, sample_blocks, stack_blocks
from dspark_hf.training.arguments import DSparkTrainingArguments
from dspark_hf.training.checkpoints import check_output, check_same_drafter, last_whole_checkpoint
from dspark_hf.training.conversations import Conversation, ConversationDataset, collate
from dspark_hf.training.losses import DraftLosses, Slots, TargetHead, draft_losses, slot_weights
from dspark_hf.training.metrics import DraftMetrics
from dspark_hf.training.optimizers import MuonAdamW, split_parameters
from dspark_hf.training.progress import LiveProgress, TimeLimit
from dspark_hf.training.states import StateCache, StateSource


class DSparkTrainer(Trainer):
    """Train a drafter on the target's own conversations with the paper's objective (Eq. 8-12).

    The target is frozen; its embedding and head are borrowed and its hidden states computed online, or read from a
    cache on disk (`state_cache_gb`). It may sit on another device than the drafter. Whatever `Trainer` offers works:
    accumulation, gradient checkpointing, `accelerate launch`, TensorBoard, callbacks. A run resumes to the same
    losses.

    Memory: a tensor with a vocabulary-sized dimension never has more than 256 rows in the loss, forward or backward.

    Args:
        drafter: the drafter, fp32; mixed precision is `bf16=True` in `args`.
        target: the frozen target, on its own device.
        args: how to train.
        conversations: what to train on.
        held_out: what `evaluate` measures.
        processing_class: the target's tokenizer, saved beside the drafter.
        callbacks: further callbacks.

    Raises:
        ValueError: if drafter and target do not belong together, if the target's head is quantised, or if no
            conversation holds two of the target's own tokens in a row.

    Example:

        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from dspark_hf import DSparkAssistantModel
        >>> from dspark_hf.training.arguments import DSparkTrainingArguments
        >>> from dspark_hf.training.conversations import Conversation
        >>> from dspark_hf.training.trainer import DSparkTrainer
        >>> target = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, eos_token_id=None))
        >>> texts = [Conversation(torch.randint(2, 60, (20,)), torch.arange(20) >= 4) for _ in range(8)]
        >>> drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
        >>> args = DSparkTrainingArguments(tempfile.mkdtemp(), max_steps=2, report_to="none", use_cpu=True)
        >>> trainer = DSparkTrainer(drafter, target, args, texts[2:], texts[:2])
        >>> trainer.train().global_step
        2
    """

    args: DSparkTrainingArguments

    def __init__(
        self,
        drafter: DSparkAssistantModel,
        target: PreTrainedModel,
        args: DSparkTrainingArguments,
        conversations: Sequence[Conversation],
        held_out: Sequence[Conversation] = (),
        *,
        processing_class: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.target = TargetAdapter(target.eval().requires_grad_(False), drafter.target_layer_ids)
        drafter.check_target(self.target)
        if drafter.config.owns_embeddings:
            # as wide as the vocabulary, and frozen as the target's are
            drafter.embed_tokens.requires_grad_(False)
        if drafter.config.owns_head:
            drafter.lm_head.requires_grad_(False)
        if args.confidence_only:
            _freeze_all_but_confidence(drafter)
        # the usual attributes of a drafter being trained; `generate` and `save_pretrained` need none of them
        self._drafter = drafter
        self._held_out = _usable(held_out)
        usable = _usable(conversations)
        if not usable:
            raise ValueError(
                f"`conversations` must hold two of the target's own tokens in a row, got {len(conversations)} without "
                "any. Check the loss masks, or write more text with `dspark-hf data`."
            )
        super().__init__(
            model=drafter,
            args=args,
            data_collator=collate,
            train_dataset=ConversationDataset(usable),
            eval_dataset=ConversationDataset(self._held_out) if self._held_out else None,
            processing_class=processing_class,
            callbacks=[*callbacks, *_stop_rules(args)],
        )
        if args.compile_drafter:
            # in place: parameters keep their names. Lengths and numbers of blocks differ from batch to batch
            drafter.compile(dynamic=True)
        # the loss is a mean over a batch's slots: Trainer divides it by the number of accumulated batches
        self.model_accepts_loss_kwargs = False
        self._progress = LiveProgress()
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(self._progress)
        self._dtype = torch.bfloat16 if args.bf16 else drafter.dtype
        self._read_vocabulary()
        self.add_callback(_VocabularyFirst(self))
        self._states = StateSource(
            self.target, dtype=self._dtype, cache=self._state_cache(), temperature=args.temperature
        )
        self._metrics = DraftMetrics(drafter.block_size)

    def train(  # type: ignore[override]  # every further argument is passed on
        self, resume_from_checkpoint: str | bool | None = True, **kwargs: Any
    ) -> Any:
        """Train; by default continue from the last whole checkpoint in `output_dir`, if there is one.

        Raises:
            ValueError: if `output_dir` holds folders under the names of checkpoints that are none of a drafter, or of
                another drafter where training is to go on.
        """
        output_dir = Path(str(self.args.output_dir))
        check_output(output_dir)
        if resume_from_checkpoint is True:
            check_same_drafter(output_dir, self._drafter.config)
            found = self.newest_checkpoint()
            resume_from_checkpoint = None if found is None else str(found)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._progress.close()

    def newest_checkpoint(self) -> Path | None:
        """Return the last whole checkpoint in `output_dir`, or None; damaged ones are moved out of the way."""
        # one process moves them, before the others look
        with self.args.main_process_first(local=False):
            return last_whole_checkpoint(Path(str(self.args.output_dir)))

    @property
    def best_tau(self) -> float:
        """The best held-out expected tau so far, 0.0 before the first evaluation."""
        return max((record.get("eval_expected_tau", 0.0) for record in self.state.log_history), default=0.0)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the objective (Eq. 12) of one batch."""
        losses = self._draft_losses(model, inputs, self.args.seed * 1_000_003 + self.state.global_step, self._metrics)
        return (losses.total, losses) if return_outputs else losses.total

    def take_steps(self, conversations: Sequence[Conversation], num_steps: int) -> float:
        """Take optimiser steps on other conversations, outside of `train`; return the mean loss.

        For text that a target writes while it changes itself: head and states are those of this moment, the optimiser
        and its rate go on. Nothing is scheduled, logged or saved.

        Raises:
            ValueError: if no conversation holds two of the target's own tokens in a row.
        """
        usable = _usable(conversations)
        if not usable:
            raise ValueError(
                f"`conversations` must hold two of the target's own tokens in a row, got {len(conversations)} without "
                "any. Check the loss masks."
            )
        self._read_vocabulary()
        dataset, optimizer, total = ConversationDataset(usable), self.create_optimizer(), 0.0
        self._drafter.train()
        for _ in range(num_steps):
            generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
            chosen = torch.randperm(len(dataset), generator=generator)[: self.args.train_batch_size].tolist()
            batch = self._prepare_inputs(collate([dataset[index] for index in chosen]))
            with torch.enable_grad(), self.accelerator.autocast():
                loss = self.compute_loss(self._drafter, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._drafter.parameters(), self.args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            self.state.global_step += 1
            total += loss.item()
        self._drafter.eval()
        return total / max(num_steps, 1)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return loss, expected tau and accept rates on the held-out conversations, always on the same blocks.

        The rates also go into the drafter's configuration, for decoding to start from; where the confidence head is
        trained alone, those that it has stay, since drafts do.

        Raises:
            ValueError: if there are none.
        """
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("`held_out` must hold conversations to evaluate on, got none. Pass some to the trainer.")
        self._drafter.eval()
        metrics = DraftMetrics(self._drafter.block_size)
        process, step = self.accelerator.process_index, self.accelerator.num_processes
        mine = [dataset[index] for index in range(process, len(dataset), step)]
        for start in range(0, len(mine), self.args.eval_batch_size):
            batch = self._prepare_inputs(collate(mine[start : start + self.args.eval_batch_size]))
            with self.accelerator.autocast():
                self._draft_losses(self._drafter, batch, self.args.seed, metrics)
        found = self._summary(metrics)
        rates = [found.get(f"accept_rate_{position}", 0.0) for position in range(1, self._drafter.block_size + 1)]
        config = self._drafter.config
        if not (self.args.confidence_only and config.accept_rates):
            # rounding may leave the interval by a hair
            config.accept_rates = [min(max(rate, 0.0), 1.0) for rate in rates]
        summary = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(summary))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, summary)
        return summary

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; beside Trainer's own numbers, what `DraftMetrics` gathered since the last time."""
        if "loss" in logs:
            summary = self._summary(self._metrics)
            logs = {**summary, **logs}
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """Return the optimiser over the drafter's trainable weights."""
        if self.optimizer is None:
            hidden, rest = split_parameters(self._drafter)
            rate, decay = self.args.learning_rate, self.args.weight_decay
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            # without hidden matrices to train there is nothing for Muon
            if self.args.drafter_optimizer == "muon" and hidden:
                self.optimizer = MuonAdamW(hidden, rest, lr=rate, weight_decay=decay, betas=betas)
            else:
                self.optimizer = AdamW([*hidden, *rest], lr=rate, weight_decay=decay, betas=betas)
        return self.optimizer

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: Trainer's estimate knows only models that read `input_ids`."""
        return 0

    def _summary(self, metrics: DraftMetrics) -> dict[str, float]:
        return metrics.summary(lambda sums: self.accelerator.reduce(sums, reduction="sum"))

    def _draft_losses(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], seed: int, metrics: DraftMetrics
    ) -> DraftLosses:
        """Return the losses of one batch; `seed` and the sequences' numbers decide which blocks are drawn."""
        drafter, device = self._drafter, inputs["input_ids"].device
        input_ids, lengths = inputs["input_ids"], inputs["lengths"].tolist()
        sequences = [row[:length].cpu() for row, length in zip(input_ids, lengths, strict=True)]
        states = self._states.get(sequences)
        blocks = self._blocks(inputs, lengths, seed)
        anchors, valid = blocks.anchors.to(device), blocks.valid.to(device)
        previous_positions = blocks.previous_positions.to(device)
        output = model(
            states.context.to(device, drafter.dtype),
            input_ids.gather(1, anchors),
            anchors,
            input_ids.gather(1, previous_positions.flatten(1)).view_as(previous_positions),
            self.target,
        )
        labels = input_ids.gather(1, blocks.label_positions.to(device).flatten(1)).view_as(previous_positions)
        # a row of the batch's states, all sequences behind each other
        rows = previous_positions + torch.arange(len(input_ids), device=device)[:, None, None] * input_ids.shape[1]
        slots = Slots(
            labels=self._draft_ids[labels[valid]],
            target_rows=rows[valid],
            target_states=states.last.to(device).flatten(0, 1),
            target_lse=states.lse.to(device).flatten(),
            weights=slot_weights(valid, self.args.loss_decay_gamma)[valid],
        )
        head = drafter.markov_head
        losses = draft_losses(
            output.hidden_states[valid],
            None if output.latents is None else output.latents[valid],
            None if head is None else head.markov_w2.weight,
            None if output.confidence_logits is None else output.confidence_logits[valid],
            self._head,
            slots,
            self.args.loss_weights,
            draft_head=self._draft_head,
            temperature=self.args.temperature,
            compiled=self.args.compile_loss,
        )
        metrics.add(losses, valid.flatten(0, 1))
        return losses

    def _blocks(self, inputs: dict[str, Tensor], lengths: list[int], seed: int) -> BlockTargets:
        blocks = []
        for index, mask, length in zip(inputs["index"].tolist(), inputs["loss_mask"].cpu(), lengths, strict=True):
            generator = torch.Generator().manual_seed(seed * 1_000_033 + index)
            blocks.append(sample_blocks(mask[:length], self.args.num_anchors, self._drafter.block_size, generator))
        return stack_blocks(blocks)

    def _read_vocabulary(self) -> None:
        """Read what follows from the drafter's proposable tokens; a checkpoint may bring others than it began with."""
        self._head = self._target_head()
        self._draft_head = self._drafters_head(self._head)
        self._draft_ids = self._token_to_draft_id()

    def _drafters_head(self, lent: TargetHead) -> TargetHead:
        """Return the head that the drafter drafts with."""
        config = self._drafter.config
        if config.owns_head:
            weight = self._drafter.lm_head.weight.detach().to(self.args.device, self._dtype)
            return TargetHead(weight, None, cap=config.final_logit_softcapping)
        return TargetHead(lent.weight, lent.bias) if config.borrows_bare_weights else lent

    def _target_head(self) -> TargetHead:
        ids = self._drafter.draft_token_ids
        ids = torch.arange(self.target.vocab_size) if ids is None else ids
        rows = self.target.head_rows(ids)
        if rows is None:
            raise ValueError(
                "`target` must have an output head in floating point to train a drafter, got a quantised one. Load it "
                'with its head left out of the quantisation, for example `llm_int8_skip_modules=["lm_head"]`.'
            )
        device = self.args.device
        weight, bias = rows[0].to(device, self._dtype), rows[1]
        return TargetHead(
            weight, None if bias is None else bias.to(device), self.target.logit_factor, self.target.logit_cap
        )

    def _token_to_draft_id(self) -> Tensor:
        ids, device = self._drafter.draft_token_ids, self.args.device
        if ids is None:
            return torch.arange(self.target.vocab_size, device=device)
        table = torch.full((self.target.vocab_size,), -1, device=device)
        table[ids.to(device)] = torch.arange(len(ids), device=device)
        return table

    def _state_cache(self) -> StateCache | None:
        if self.args.state_cache_gb == 0:
            return None
        folder = self.args.state_cache_dir or Path(str(self.args.output_dir)) / "states"
        max_bytes = int(self.args.state_cache_gb * 1e9 / self.args.world_size)
        return StateCache(
            folder, self.target, dtype=self._dtype, max_bytes=max_bytes, temperature=self.args.temperature
        )


class _VocabularyFirst(TrainerCallback):
    """Let a trainer read the vocabulary anew once a checkpoint is loaded, if one is."""

    def __init__(self, trainer: DSparkTrainer):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._read_vocabulary()


def _freeze_all_but_confidence(drafter: DSparkAssistantModel) -> None:
    if drafter.confidence_head is None:
        raise ValueError(
            "`confidence_only` must be False for a drafter without a confidence head, got True. Leave it out."
        )
    drafter.requires_grad_(False)
    drafter.confidence_head.requires_grad_(True)


def _usable(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Return the conversations in which at least one block can start."""
    return [one for one in conversations if bool((one.loss_mask[:-1] & one.loss_mask[1:]).any())]


def _stop_rules(args: DSparkTrainingArguments) -> list[TrainerCallback]:
    rules: list[TrainerCallback] = []
    if args.early_stopping_patience is not None:
        rules.append(EarlyStoppingCallback(early_stopping_patience=args.early_stopping_patience))
    if args.max_minutes is not None:
        rules.append(TimeLimit(args.max_minutes))
    return rules
