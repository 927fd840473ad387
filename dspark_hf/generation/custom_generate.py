"""The door into the decoding loop that needs no patch of Transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from dspark_hf.generation.compat import is_installed
from dspark_hf.generation.decoding import decode
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.scheduling.interface import Scheduler

NOT_INSTALLED = (
    "`assistant_model` must be left out while dspark_hf is not installed into Transformers, got a drafter. Call "
    "`dspark_hf.install()`, or pass `custom_generate=drafter.decode` instead."
)


class _NotInstalled(GenerationConfig):
    """Stands where Transformers' own loop copies an assistant's generation configuration, and says what is missing."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise ValueError(NOT_INSTALLED)


class CustomGenerate(Drafter):
    """A drafter that `generate` runs as a decoding method of the user's: `custom_generate=drafter.decode`."""

    recommended: Any = None

    @property
    def generation_config(self) -> Any:
        """The generation configuration whose knobs the drafter recommends, or None."""
        if is_installed():
            return self.recommended
        return _NotInstalled(**({} if self.recommended is None else self.recommended.to_dict()))

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.recommended = value

    def decode(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        scheduler: Scheduler | str | None = None,
        drafts: str | None = None,
        sampling: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the decoding loop without a patch: `target.generate(**inputs, custom_generate=drafter.decode)`.

        Mind what Transformers drops on this way: `streamer=` and `tokenizer=`, and with the latter `stop_strings=`.
        """
        return decode(model, input_ids, drafter=self, scheduler=scheduler, drafts=drafts, sampling=sampling, **kwargs)
