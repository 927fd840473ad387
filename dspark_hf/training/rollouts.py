"""A drafter for the text that a model writes while it is itself being trained, as in reinforcement learning."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from dspark_hf.generation.wrappers import unwrap
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel
from dspark_hf.training.arguments import DSparkTrainingArguments
from dspark_hf.training.conversations import Conversation
from dspark_hf.training.trainer import DSparkTrainer

logger = logging.get_logger(__name__)


@dataclass
class RolloutRecord:
    """What was generated up to a step of the policy: `num_committed` tokens in `num_rounds` rounds of rows."""

    step: int
    num_committed: int = 0
    num_rounds: int = 0

    @property
    def tau(self) -> float:
        """Accepted length, tokens per round, the bonus token included; NaN where nothing was drafted."""
        return self.num_committed / self.num_rounds if self.num_rounds else float("nan")


class RolloutDrafter(TrainerCallback):
    """Let a trainer's model draft in its own `generate`, and teach the drafter what the model says by now.

    The door for trainers that call `model.generate` themselves and take no drafter, such as TRL's `GRPOTrainer`, whose
    `generation_kwargs` hold no models:

        GRPOTrainer(policy, ..., callbacks=[RolloutDrafter(drafter, adapt_every=10)])

    While the trainer trains, every `policy.generate(...)` without an assistant gets this one; afterwards the policy is
    as it was. The text follows the policy as before: drafts are verified by the very weights that are trained. Where
    rollouts come from elsewhere (vLLM, `generate_batch`), there is nothing to draft for.

    Args:
        drafter: a drafter of the policy as it was, on the policy's device; in fp32 if it is to be adapted.
        adapt_every: steps of the policy between adaptations on the newest text; None never adapts.
        adapt_steps: the drafter's optimiser steps each time.
        learning_rate: theirs, constant: what was learnt is to be kept.
        num_anchors: blocks drawn from each text and step.
        batch_size: texts a step.
        num_texts: how many of the newest texts are learnt from.
        seed: of order and blocks.

    Attributes:
        records: one `RolloutRecord` for every step of the policy.

    Raises:
        ValueError: if `adapt_every` or `adapt_steps` is below 1.
    """

    def __init__(
        self,
        drafter: DSparkAssistantModel,
        *,
        adapt_every: int | None = None,
        adapt_steps: int = 20,
        learning_rate: float = 1e-3,
        num_anchors: int = 128,
        batch_size: int = 4,
        num_texts: int = 256,
        seed: int = 0,
    ):
        for name, value in (("adapt_every", adapt_every), ("adapt_steps", adapt_steps)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}. `adapt_every=None` never adapts.")
        self.drafter = drafter
        self.records: list[RolloutRecord] = [RolloutRecord(0)]
        self._adapt_every = adapt_every
        self._adapt_steps = adapt_steps
        self._options = {
            "learning_rate": learning_rate,
            "num_anchors": num_anchors,
            "per_device_train_batch_size": batch_size,
            "seed": seed,
        }
        self._texts: deque[Conversation] = deque(maxlen=num_texts)
        self._teacher: DSparkTrainer | None = None
        self._policy: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._adapt_every is not None and args.world_size > 1:
            raise ValueError(
                f"`adapt_every` must be None where several processes train, got {self._adapt_every} with "
                f"{args.world_size}: their drafters would drift apart. Adapt between runs with `dspark-hf train "
                "--drafter`."
            )
        self._policy = unwrap(kwargs["model"])
        self._policy.generate = self._drafting(self._policy.generate)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._adapt_every is not None and state.global_step % self._adapt_every == 0 and self._texts:
            self._adapt(args)
        self.records.append(RolloutRecord(state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._policy is not None:
            # the class's own method is seen again
            vars(self._policy).pop("generate", None)
            self._policy = None

    def _drafting(self, generate: Any) -> Any:
        @functools.wraps(generate)
        def drafting(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("assistant_model") is not None or kwargs.get("custom_generate") is not None:
                return generate(*args, **kwargs)
            config = kwargs.get("generation_config")
            wants_dict = kwargs.get("return_dict_in_generate", getattr(config, "return_dict_in_generate", False))
            kwargs.update(assistant_model=self.drafter.eval(), return_dict_in_generate=True)
            output = generate(*args, **kwargs)
            record = self.records[-1]
            record.num_committed += output.statistics.num_committed
            record.num_rounds += output.statistics.num_rounds
            prompts = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            if self._adapt_every is not None and prompts is not None:
                self._remember(output.sequences, prompts, kwargs.get("attention_mask"), config)
            return output if wants_dict else output.sequences

        return drafting

    def _remember(self, sequences: Tensor, prompts: Tensor, mask: Tensor | None, config: Any) -> None:
        """Keep what each row wrote, without padding."""
        length = prompts.shape[1]
        known = self._policy.generation_config if config is None else config
        end_ids = torch.tensor(
            known.eos_token_id if known.eos_token_id is not None else [], dtype=torch.long
        ).flatten()
        kept = torch.ones_like(prompts) if mask is None else mask
        for row, is_prompt in zip(sequences.cpu(), kept.bool().cpu(), strict=True):
            written = row[length:]
            ends = torch.isin(written, end_ids).nonzero().flatten().tolist()
            written = written[: ends[0] + 1] if ends else written
            own = torch.cat([row[:length][is_prompt], written])
            if len(written) > 1:
                self._texts.append(Conversation(own, torch.arange(len(own)) >= len(own) - len(written)))

    def _adapt(self, args: Any) -> None:
        texts = list(self._texts)
        with _as_target(self._policy):
            if self._teacher is None:
                self._teacher = self._make_teacher(args, texts)
            loss = self._teacher.take_steps(texts, self._adapt_steps)
        logger.info(f"The drafter took {self._adapt_steps} steps on {len(texts)} texts: loss {loss:.3f}.")

    def _make_teacher(self, args: Any, texts: list[Conversation]) -> DSparkTrainer:
        with TemporaryDirectory() as folder:
            # accelerate's states are shared: what differs from the policy's would change that
            shared = ("bf16", "fp16", "use_cpu", "gradient_accumulation_steps")
            options = {**self._options, **{name: getattr(args, name) for name in shared}}
            arguments = DSparkTrainingArguments(folder, save_strategy="no", report_to="none", **options)
            return DSparkTrainer(self.drafter, self._policy, arguments, texts)


@contextmanager
def _as_target(policy: Any) -> Iterator[None]:
    """Let a model be the frozen target for a while, and put back what training has set."""
    was_training = {module: module.training for module in policy.modules()}
    needed = {parameter: parameter.requires_grad for parameter in policy.parameters()}
    policy.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training
        for parameter, is_needed in needed.items():
            parameter.requires_grad_(is_needed)
