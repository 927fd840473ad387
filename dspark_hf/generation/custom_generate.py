"""The door into the decoding loop that needs no patch of Transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from dspark_hf.generation.decoding import decode
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.scheduling.interface import Scheduler


class CustomGenerate(Drafter):
    """A drafter that `generate` runs as a decoding method of the user's: `custom_generate=drafter.decode`."""

    def decode(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        scheduler: Scheduler | str | None = None,
        drafts: str | None = None,
        sampling: str | None = None,
        draft_tree: int | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the decoding loop without a patch: `target.generate(**inputs, custom_generate=drafter.decode)`.

        Mind what Transformers drops on this way: `streamer=` and `tokenizer=`, and with the latter `stop_strings=`.
        """
        knobs: dict[str, Any] = {
            "scheduler": scheduler,
            "drafts": drafts,
            "sampling": sampling,
            "draft_tree": draft_tree,
        }
        return decode(model, input_ids, drafter=self, **knobs, **kwargs)
