"""What Prometheus reads: requests by their end, tokens, drafts and what became of them, queue and times."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dspark_hf.generation.statistics import SpeculationStatistics
from dspark_hf.serving.engine import Engine

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Count what a server does; names begin with `dspark_`.

    Args:
        engine: what is asked for the requests that wait and run.
    """

    def __init__(self, engine: Engine):
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "dspark_requests",
            "Requests by their end: stop, length, cancelled (the client left), timeout, refused, queue_full, error.",
            ["end"],
            registry=registry,
        )
        self._prompt_tokens = Counter("dspark_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._new_tokens = Counter("dspark_generated_tokens", "Tokens of answers.", registry=registry)
        self._rounds = Counter("dspark_rounds", "Verify passes, summed over requests.", registry=registry)
        self._round_tokens = Counter("dspark_round_tokens", "Tokens that rounds gave.", registry=registry)
        self._drafts = Counter("dspark_drafts", "Drafts: proposed, verified, accepted.", ["step"], registry=registry)
        self._tau = Gauge("dspark_tokens_per_round", "Accepted length (tau) since the start.", registry=registry)
        self._acceptance = Gauge(
            "dspark_acceptance_ratio", "Share of verified drafts that was accepted since the start.", registry=registry
        )
        waiting = Gauge("dspark_requests_waiting", "Requests that wait for a row.", registry=registry)
        waiting.set_function(lambda: engine.num_waiting)
        running = Gauge("dspark_requests_running", "Requests that are decoded.", registry=registry)
        running.set_function(lambda: engine.num_running)
        self._first = Histogram(
            "dspark_time_to_first_token_seconds",
            "From a request to its first text.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._whole = Histogram(
            "dspark_request_seconds", "From a request to its end.", buckets=_SECONDS, registry=registry
        )
        self._total = SpeculationStatistics()

    def count_end(self, end: str, seconds: float | None = None) -> None:
        """Count a request that has ended, however it did; without `seconds` it had not begun."""
        self._requests.labels(end).inc()
        if seconds is not None:
            self._whole.observe(seconds)

    def count_first(self, seconds: float) -> None:
        """Count a request's first text."""
        self._first.observe(seconds)

    def count_tokens(self, prompt: int, answer: int, statistics: SpeculationStatistics | None) -> None:
        """Count the tokens of a request, and its rounds."""
        self._prompt_tokens.inc(prompt)
        self._new_tokens.inc(answer)
        if statistics is None:
            return
        self._rounds.inc(statistics.num_rounds)
        self._round_tokens.inc(statistics.num_committed)
        for step in ("drafted", "verified", "accepted"):
            self._drafts.labels(step).inc(getattr(statistics, f"num_{step}"))
        total = self._total
        for name in ("num_rounds", "num_committed", "num_verified", "num_accepted"):
            setattr(total, name, getattr(total, name) + getattr(statistics, name))
        if total.num_rounds:
            self._tau.set(total.tau)
        if total.num_verified:
            self._acceptance.set(total.num_accepted / total.num_verified)

    def render(self) -> bytes:
        """Return the text that Prometheus reads."""
        return generate_latest(self._registry)
