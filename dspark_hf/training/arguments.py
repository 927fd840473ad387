"""How to train a drafter: Transformers' training arguments, and what DSpark adds to them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from dspark_hf.training.losses import LossWeights

OPTIMIZERS = ("adamw", "muon")
# below it nearly all gradients of the draft's distribution are zero, and the others large
_LEAST_TEMPERATURE = 0.2


@dataclass
class DSparkTrainingArguments(TrainingArguments):
    """Transformers' `TrainingArguments` with the paper's defaults and a drafter's own options.

    Args:
        num_anchors: blocks drawn from each sequence and step (512, as released). It bounds a step's cost and memory
            whatever the sequences' length.
        drafter_optimizer: `"muon"` (Muon for hidden matrices, AdamW for the rest) or `"adamw"`.
        loss_ce: weight of the cross-entropy (0.1, paper Eq. 12).
        loss_tv: weight of the total variation (0.9, paper Eq. 12).
        loss_confidence: weight of the confidence term (1.0, paper Eq. 12).
        loss_decay_gamma: slot k weighs `exp(-k / loss_decay_gamma)` (Eq. 9; 4.0, as released).
        temperature: what the drafter will be used at: both distributions are divided by it in the objective, and the
            confidence is that of a draft at this temperature. 1.0 is the paper's. 0 is greedy decoding, from which
            the confidence head alone can learn (`confidence_only`).
        confidence_only: train the confidence head alone, everything else frozen. On text that the drafter has not seen
            it unlearns the over-confidence of a drafter that knows its training text by heart; drafts stay the same.
        state_cache_gb: disk space for the target's hidden states, in GB; 0 computes them anew in every epoch.
        state_cache_dir: folder of those states; default `states` in `output_dir`.
        early_stopping_patience: stop after this many evaluations without a better held-out tau; None never does.
        max_minutes: evaluate, write a checkpoint and stop after this time; the same run goes on later, on the same
            schedule. None knows no limit.
        compile_loss: compile the vocabulary-sized part of the loss with `torch.compile`.
        compile_drafter: compile the drafter's own passes too. Both together nearly double the speed on a CPU, after a
            minute of compiling at the start.

    Raises:
        ValueError: if a field breaks its rule; the message names the field, the rule and the value.
    """

    num_anchors: int = field(default=512, metadata={"help": "Blocks drawn from each sequence and step."})
    drafter_optimizer: str = field(default="muon", metadata={"help": "'muon' or 'adamw'."})
    loss_ce: float = field(default=0.1, metadata={"help": "Weight of the cross-entropy."})
    loss_tv: float = field(default=0.9, metadata={"help": "Weight of the total variation."})
    loss_confidence: float = field(default=1.0, metadata={"help": "Weight of the confidence term."})
    loss_decay_gamma: float = field(default=4.0, metadata={"help": "Slot k weighs exp(-k / loss_decay_gamma)."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature that the drafter will be used at."})
    confidence_only: bool = field(default=False, metadata={"help": "Train the confidence head alone."})
    state_cache_gb: float = field(default=0.0, metadata={"help": "Disk space for the target's states, in GB."})
    state_cache_dir: str | None = field(default=None, metadata={"help": "Folder of the target's states."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without a better held-out tau before training stops."}
    )
    max_minutes: float | None = field(default=None, metadata={"help": "Time after which training stops for now."})
    compile_loss: bool = field(default=False, metadata={"help": "Compile the vocabulary-sized part of the loss."})
    compile_drafter: bool = field(default=False, metadata={"help": "Compile the drafter's own passes."})

    # the paper's schedule where it differs from Transformers' defaults
    learning_rate: float = field(default=6e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The schedule."})
    warmup_steps: float = field(default=0.04, metadata={"help": "Steps of warm-up; below 1, a share of all steps."})
    # a batch holds what a drafter needs under its own names
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False."})
    metric_for_best_model: str | None = field(default="eval_expected_tau", metadata={"help": "What is best."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "More is better."})

    def __post_init__(self) -> None:
        if self.drafter_optimizer not in OPTIMIZERS:
            raise ValueError(
                f"`drafter_optimizer` must be one of {OPTIMIZERS}, got {self.drafter_optimizer!r}. Choose one of them."
            )
        if self.num_anchors < 1:
            raise ValueError(f"`num_anchors` must be at least 1, got {self.num_anchors}. 512 is the paper's choice.")
        if self.state_cache_gb < 0:
            raise ValueError(f"`state_cache_gb` must be at least 0, got {self.state_cache_gb}. 0 keeps no states.")
        least = 0.0 if self.confidence_only else _LEAST_TEMPERATURE
        if not least <= self.temperature < math.inf:
            remedy = "1.0 is the paper's choice" if least == 0 else "Only `confidence_only` can learn from colder ones"
            raise ValueError(f"`temperature` must be at least {least} and finite, got {self.temperature}. {remedy}.")
        if self.confidence_only and self.metric_for_best_model == "eval_expected_tau":
            # the drafts, and so tau, stay what they are: the first evaluation would be the best for ever
            self.metric_for_best_model, self.greater_is_better = "eval_loss_confidence", False
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"`max_minutes` must be above 0, got {self.max_minutes}. Leave it out for no limit.")
        if not torch.accelerator.is_available():
            # bf16 on a CPU is refused unless the CPU is asked for
            self.use_cpu = True
        super().__post_init__()

    @property
    def loss_weights(self) -> LossWeights:
        """The weights of the loss terms; those of the drafts are 0 where the confidence head is trained alone."""
        of_drafts = (0.0, 0.0) if self.confidence_only else (self.loss_ce, self.loss_tv)
        return LossWeights(*of_drafts, self.loss_confidence, self.loss_decay_gamma)
