"""What trains a drafter: conversations, anchors, losses, optimizers, the trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspark_hf.lazy import lazy_names

if TYPE_CHECKING:
    from dspark_hf.training.adapting import adapt_drafter
    from dspark_hf.training.arguments import DSparkTrainingArguments
    from dspark_hf.training.conversations import Conversation, read_conversations, split_held_out
    from dspark_hf.training.recipe import build_drafter, save_trained
    from dspark_hf.training.rollouts import RolloutDrafter
    from dspark_hf.training.trainer import DSparkTrainer

__all__ = [
    "Conversation",
    "DSparkTrainer",
    "DSparkTrainingArguments",
    "RolloutDrafter",
    "adapt_drafter",
    "build_drafter",
    "read_conversations",
    "save_trained",
    "split_held_out",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Conversation": "conversations",
        "DSparkTrainer": "trainer",
        "DSparkTrainingArguments": "arguments",
        "RolloutDrafter": "rollouts",
        "adapt_drafter": "adapting",
        "build_drafter": "recipe",
        "read_conversations": "conversations",
        "save_trained": "recipe",
        "split_held_out": "conversations",
    },
)
