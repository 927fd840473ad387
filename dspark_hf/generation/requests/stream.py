"""Continuous batching: requests join a running batch as rows become free, and leave it when they are done."""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StopStringCriteria

from dspark_hf.generation.call.checks import check_request
from dspark_hf.generation.call.knobs import read_options
from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.drafting.lookup import Lookups, NoDrafter
from dspark_hf.generation.lean_passes import ThreadPasses, lean_passes
from dspark_hf.generation.packing import pack_weights, packed_weights
from dspark_hf.generation.requests.batch import RequestBatch
from dspark_hf.generation.requests.request import FinishedRequest, Request, RequestQueue
from dspark_hf.generation.requests.rows import RequestRow
from dspark_hf.generation.scheduling.interface import CallInfo, Schedule, Scheduler
from dspark_hf.generation.statistics import SpeculationStatistics
from dspark_hf.generation.targets.adapter import TargetAdapter, input_device
from dspark_hf.generation.targets.interface import RowwiseCache
from dspark_hf.generation.targets.padding import prompt_tokens
from dspark_hf.generation.targets.ragged import RaggedTarget, new_cache
from dspark_hf.generation.wrappers import unwrap

# between two looks for requests while none is being decoded
_IDLE_SECONDS = 0.005
# these belong to the stream, or would have to be handed back
_NOT_PER_REQUEST = (
    "assistant_model",
    "custom_generate",
    "scheduler",
    "drafts",
    "draft_tree",
    "past_key_values",
    "cache",
)


def generate_stream(
    target: PreTrainedModel,
    requests: Iterable[Request | None],
    *,
    drafter: Drafter | None = None,
    max_rows: int = 8,
    scheduler: Scheduler | str | None = None,
    drafts: str | None = None,
) -> RequestStream:
    """Decode requests together as they come, each by its own rules, and return an iterator of finished ones.

    A request joins the running batch when a row is free. Its text is the one that `target.generate` gives for it
    alone, under the same conditions as with `assistant_model=`.

    Args:
        target: the target.
        requests: any iterable, or a `RequestQueue`; asked for the next request only when a row is free. None means
            that nothing has arrived yet: decoding goes on meanwhile.
        drafter: the drafter; None decodes without drafts.
        max_rows: requests that are decoded at the same time.
        scheduler: as in `generate`, for all requests.
        drafts: as in `generate`, for all requests.

    Raises:
        ValueError: if the target cannot be decoded row by row, or an argument does not fit.

    Example:

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from dspark_hf import DSparkAssistantModel, Request, generate_stream
        >>> target = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, eos_token_id=None))
        >>> drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
        >>> sizes = {"long": 9, "short": 2}
        >>> requests = [Request([5, 6, 7], {"max_new_tokens": size}, key) for key, size in sizes.items()]
        >>> for finished in generate_stream(target, requests, drafter=drafter):
        ...     print(finished.request.key, len(finished.token_ids))
        short 5
        long 12
    """
    return RequestStream(target, requests, drafter=drafter, max_rows=max_rows, scheduler=scheduler, drafts=drafts)


class RequestStream(Iterator[FinishedRequest]):
    """The iterator that `generate_stream` returns: finished requests, in the order in which they finish.

    A request that fails comes with its `error`, and the others go on. If the target or the drafter fails, all requests
    inside come with that error, which is raised after the last of them. If `requests` raises, what is inside is
    decoded to its end first. `statistics` counts over all requests; it holds no origins and no rounds.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        requests: Iterable[Request | None],
        *,
        drafter: Drafter | None = None,
        max_rows: int = 8,
        scheduler: Scheduler | str | None = None,
        drafts: str | None = None,
    ):
        if max_rows < 1:
            raise ValueError(f"`max_rows` must be at least 1, got {max_rows}. A row is a request being decoded.")
        if not isinstance(unwrap(target), PreTrainedModel):
            raise _unfit(target)
        drafter = None if drafter is None else unwrap(drafter)
        self.statistics = SpeculationStatistics()
        drafter = NoDrafter() if drafter is None else drafter
        options = read_options(target.generation_config, drafter, target, scheduler, drafts, is_stream=True)
        self._adapter = TargetAdapter(target, options.target_layer_ids(drafter))
        drafter.check_target(self._adapter)
        target = self._adapter.model
        try:
            new_cache(target, 1)
        except ValueError as error:
            if not _has_own_rows(target):
                raise _unfit(target) from error
        self._drafter = drafter
        self._models = (target, drafter)
        self._has_packed, self._passes = False, ThreadPasses()
        self._options = options
        self.statistics.scheduler = options.scheduler.name
        self._max_rows = max_rows
        self._requests = requests
        self._source = iter(requests)
        self._is_exhausted = False
        self._schedule: Schedule | None = None
        self._batch: RequestBatch | None = None
        self._finished: deque[FinishedRequest] = deque()
        self._failure: BaseException | None = None

    def __next__(self) -> FinishedRequest:
        # meanwhile the target was the caller's
        self._has_packed = False
        while not self._finished:
            if self._is_exhausted and self._batch is None:
                failure, self._failure = self._failure, None
                raise failure or StopIteration
            try:
                self._step()
            except BaseException as error:
                self._end(error)
                if not isinstance(error, Exception):
                    raise
                self._failure = error
        return self._finished.popleft()

    def close(self) -> list[FinishedRequest]:
        """Cancel all requests inside, those in a `RequestQueue` too. Returns all that was not handed out yet."""
        self._end(None)
        self._failure = None
        rest = list(self._finished)
        self._finished.clear()
        return rest

    def __enter__(self) -> RequestStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @torch.no_grad()
    def _step(self) -> None:
        """Let requests in and decode one round."""
        self._let_requests_in()
        if self._batch is None:
            if not self._is_exhausted and not self._finished:
                time.sleep(_IDLE_SECONDS)
            return
        self._batch.drop_cancelled()
        if self._batch.rows:
            # hooks are there while the target runs only: between rounds it is the caller's
            self._pack()
            with self._adapter, packed_weights(*self._models), lean_passes(self._passes):
                self._batch.round()
        self._collect()

    def _let_requests_in(self) -> None:
        # one report at a time: a source of requests that all fail must not fill the memory with reports
        while not self._is_exhausted and not self._finished and self._has_room():
            try:
                request = next(self._source)
                if request is not None and not isinstance(request, Request):
                    raise TypeError(f"`requests` must give Request or None, got {type(request).__name__}.")
            except StopIteration:
                self._is_exhausted = True
                return
            except Exception as error:
                self._failure, self._is_exhausted = error, True
                return
            if request is None:
                return
            self._join(request)

    def _has_room(self) -> bool:
        return self._batch is None or len(self._batch.rows) < self._max_rows

    def _join(self, request: Request) -> None:
        if request.is_cancelled:
            self._report(request)
            return
        try:
            newcomer = self._prefilled(request)
        except BaseException as error:
            self._report(request, error=error)
            if not isinstance(error, Exception):
                raise
            return
        self._report_left(newcomer)
        if self._batch is None:
            self._batch = newcomer if newcomer.rows else None
        elif newcomer.rows:
            self._batch.append(newcomer)

    def _prefilled(self, request: Request) -> RequestBatch:
        """Return a batch of this request alone, with its first token."""
        row, target = self._prepared(request)
        # a target may be trained, or given other adapters, between two requests
        self._has_packed = False
        self._pack()
        with self._adapter, packed_weights(*self._models), lean_passes(self._passes):
            context = self._options.start_context(self._drafter, self._adapter, 1)
            schedule = self._schedule = self._schedule or self._options.scheduler.start(self._call(row))
            lookups = self._lookups(row, schedule)
            newcomer = RequestBatch(self._adapter, target, context, schedule, [row], self.statistics, lookups)
            newcomer.prefill()
        return newcomer

    def _pack(self) -> None:
        """Pack the weights as they are now, unless that was done since a request joined or the caller took one."""
        if not self._has_packed:
            pack_weights(*self._models)
            self._passes = ThreadPasses()
        self._has_packed = True

    def _lookups(self, row: RequestRow, schedule: Schedule) -> Lookups | None:
        if not self._options.num_looked_up:
            return None
        return Lookups([row.prompt], schedule.match_chances, min_match=self._drafter.min_match)

    def _call(self, row: RequestRow) -> CallInfo:
        return CallInfo(
            target=self._adapter,
            drafter=self._drafter,
            num_rows=self._max_rows,
            max_drafts=self._drafter.block_size,
            prompt_length=row.sequences.prompt_length,
            is_sampling=row.is_sampling,
        )

    def _prepared(self, request: Request) -> tuple[RequestRow, RaggedTarget]:
        """Return a request's row and its run of the target, as `generate` itself prepares them."""
        model: Any = self._adapter.model
        options = dict(request.options)
        wrong = sorted(set(options) & set(_NOT_PER_REQUEST))
        if wrong:
            raise ValueError(
                f"`options` of a request must leave out {wrong}. Arguments of the stream hold for all, and drafts of "
                "rows that share passes do not branch."
            )
        streamer, tokenizer = options.pop("streamer", None), options.pop("tokenizer", None)
        sampling, seed = options.pop("sampling", None), _read_seed(options.pop("seed", None))
        if tokenizer is not None and options.get("stop_strings") is not None:
            # transformers 5.24: generate drops the tokenizer on the way through `custom_generate`
            strings = StopStringCriteria(tokenizer, options.pop("stop_strings"))
            options["stopping_criteria"] = [*(options.get("stopping_criteria") or ()), strings]
        if isinstance(request.input_ids, (str, Mapping)):
            raise TypeError(
                f"`input_ids` of a request must be token ids, got {type(request.input_ids).__name__}. Pass "
                "`tokenizer(text).input_ids`, or the `input_ids` of what the tokenizer returned."
            )
        input_ids = _as_row(request.input_ids, self._adapter.device)
        if input_ids.numel() == 0:
            raise ValueError("`input_ids` of a request must hold a token at least, got none. Give it a prompt.")
        if options.get("attention_mask") is not None:
            # a tokenizer without `return_tensors` gives lists
            options["attention_mask"] = mask = _as_row(options["attention_mask"], self._adapter.device)
            if mask.shape != input_ids.shape:
                raise ValueError(
                    f"`attention_mask` of a request must have the shape of its `input_ids`, {tuple(input_ids.shape)}, "
                    f"got {tuple(mask.shape)}. Pass both as the tokenizer gives them, or leave the mask out."
                )
        prepared: dict[str, Any] = {}
        model.generate(input_ids, custom_generate=_keep_in(prepared), **options)
        input_ids, config = prepared.pop("input_ids"), prepared.pop("generation_config")
        processors, criteria = prepared.pop("logits_processor"), prepared.pop("stopping_criteria")
        # rows that share a pass share its width
        num_drafts = self._drafter.block_size
        check_request(model, input_ids, config, prepared, num_drafts=num_drafts, shares_passes=True)
        _check_options(input_ids, config, has_embeddings=prepared.get("inputs_embeds") is not None)
        speculation = read_options(
            config, self._drafter, model, self._options.scheduler, self._options.drafts, prepared[CACHE_KEY], sampling
        )
        if seed is not None and config.do_sample and not speculation.is_invariant:
            raise ValueError(
                f"`seed` of a request must come with `sampling='invariant'`, got {seed} alone. Other rules draw what "
                "the whole batch draws from."
            )
        target = RaggedTarget(self._adapter, input_ids, config, prepared, widest=speculation.most_drafts + 1)
        if target.has_token_types:
            raise ValueError(
                "`token_type_ids` must be left out in a stream, got some. Others in the pass may have none: call "
                "`target.generate` for this one."
            )
        if streamer is not None:
            streamer.put(input_ids.cpu())
        row = RequestRow(
            request,
            input_ids,
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=criteria,
            streamer=streamer,
            num_drafts=speculation.num_drafts,
            num_looked_up=speculation.num_looked_up,
            is_invariant=speculation.is_invariant,
            seed=seed,
            prompt=prompt_tokens(input_ids, prepared.get("attention_mask"))[0],
        )
        return row, target

    def _collect(self) -> None:
        """Report the rows that have left the batch."""
        if self._batch is not None:
            self._report_left(self._batch)
            if not self._batch.rows:
                self._batch = None

    def _report_left(self, batch: RequestBatch) -> None:
        for row in batch.take_left():
            self._drafter.review(self._adapter, row.statistics)
            self._report_row(row)

    def _report_row(self, row: RequestRow, error: BaseException | None = None) -> None:
        error = row.error or (None if row.is_finished else error)
        self._report(row.request, row.sequences.row(0), row.statistics, error)

    def _report(
        self,
        request: Request,
        token_ids: Tensor | None = None,
        statistics: SpeculationStatistics | None = None,
        error: BaseException | None = None,
    ) -> None:
        streamer = request.options.get("streamer")
        if streamer is not None:
            try:
                # whoever reads it waits for the end
                streamer.end()
            except Exception as late:
                error = error or late
        _clear_frames(error)
        self._finished.append(FinishedRequest(request, token_ids, statistics, error))

    def _end(self, error: BaseException | None) -> None:
        """Report all that is inside, with the error, or cancelled if there is none."""
        self._is_exhausted = True
        self._collect()
        batch, self._batch = self._batch, None
        for row in [] if batch is None else batch.rows:
            if error is None:
                row.request.cancel()
            self._report_row(row, error)
        if isinstance(self._requests, RequestQueue):
            self._requests.close()
            for request in self._requests:
                assert request is not None
                if error is None:
                    request.cancel()
                self._report(request, error=error)


def _clear_frames(error: BaseException | None) -> None:
    """Let go of the tensors in an error's finished frames: it may be kept for long. Its lines stay."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        traceback.clear_frames(error.__traceback__)
        seen.append(error)
        error = error.__cause__ or error.__context__


def _keep_in(prepared: dict[str, Any]) -> Callable[..., Tensor]:
    """Return a decoding method that decodes nothing and keeps what it is called with."""

    def keep(model: PreTrainedModel, input_ids: Tensor, **arguments: Any) -> Tensor:
        prepared.update(arguments, input_ids=input_ids)
        return input_ids

    return keep


def _check_options(input_ids: Tensor, generation_config: Any, *, has_embeddings: bool) -> None:
    if len(input_ids) != 1:
        raise ValueError(
            f"`input_ids` of a request must hold one prompt, to be continued once, got {len(input_ids)}. Make each a "
            "request of its own."
        )
    if has_embeddings:
        raise ValueError(
            "`inputs_embeds` must be left out in a stream, got some. A request's prompt is its `input_ids`: call "
            "`target.generate` for embeddings."
        )
    if generation_config.return_dict_in_generate:
        raise ValueError(
            "`return_dict_in_generate` must be False in a stream, got True. Finished requests come with statistics."
        )


def _read_seed(seed: Any) -> int | None:
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64):
        raise ValueError(f"`seed` of a request must be a whole number in [0, 2**64), got {seed!r}. Choose another.")
    return seed


def _as_row(values: Any, device: torch.device) -> Tensor:
    """Return what a request holds, `(T,)`, `(1, T)` or a list, as `(1, T)`."""
    tensor = torch.as_tensor(values, device=device)
    return tensor[None] if tensor.ndim == 1 else tensor


def _has_own_rows(target: Any) -> bool:
    """Return whether `generate` prepares a cache of the target's own whose rows have their own lengths."""
    prepared: dict[str, Any] = {}
    input_ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(target))
    target.generate(input_ids, custom_generate=_keep_in(prepared), max_new_tokens=1)
    return isinstance(prepared.get(CACHE_KEY), RowwiseCache)


def _unfit(target: PreTrainedModel) -> ValueError:
    return ValueError(
        "`target` must have full, sliding or chunked attention under 'eager' or 'sdpa', or ALiBi, and a cache of "
        f"Transformers, to decode requests that come and go, got {type(target).__name__}. Call `target.generate` for "
        "each, unpadded."
    )
