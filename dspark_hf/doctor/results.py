"""What a diagnosis says, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from dspark_hf.doctor.display import parts

# what can be the matter, and the exit status of `dspark-hf doctor`; 1 and 2 are those of errors and of wrong options
EXIT_STATUS: Mapping[str, int] = {
    "fits": 0,
    # the drafter is right, its configuration is not
    "slots": 3,
    "taps": 3,
    "positions": 3,
    "rotation": 3,
    "mask": 3,
    # the two do not belong together
    "sizes": 4,
    "tokenizer": 4,
    "target": 4,
    "refused": 4,
    # they do, nearly
    "revision": 5,
    "quantised": 5,
    "thinking": 5,
    "weak": 5,
    "untrained": 6,
    # a fault of ours
    "text": 7,
}


@dataclass(frozen=True)
class Check:
    """One thing that was compared: whether it is right (None: cannot be told), and what was found, in words."""

    name: str
    is_right: bool | None
    found: str


@dataclass(frozen=True)
class Trial:
    """What becomes of the drafts under one reading of the drafter, teacher-forced on the target's own text.

    Attributes:
        label: the reading, in words.
        cause: a key of `EXIT_STATUS` if the reading differs from the configuration, else `"fits"`.
        settings: fields of the drafter's configuration that say so.
        num_reached: blocks whose draft k was reached, by position.
        num_accepted: how many of these drafts were accepted, by position.
        gain: by how many drafts a block is accepted further than the same one read as configured, None for that one.
        gain_error: the gain's standard error over the places, None if it is not known.
    """

    label: str
    cause: str
    settings: dict[str, Any]
    num_reached: tuple[int, ...]
    num_accepted: tuple[int, ...]
    gain: float | None = None
    gain_error: float | None = None

    @property
    def tau(self) -> float:
        """Tokens per round, bonus included; NaN without a block."""
        return 1 + sum(self.num_accepted) / self.num_reached[0] if self.num_reached[0] else float("nan")

    @property
    def accept_rates(self) -> tuple[float, ...]:
        """Share of the drafts that are accepted given that they are reached, by position."""
        return tuple(a / n if n else 0.0 for a, n in zip(self.num_accepted, self.num_reached, strict=True))

    @property
    def survival(self) -> tuple[float, ...]:
        """Share of the blocks whose draft k is reached and accepted, by position."""
        return tuple(accepted / max(self.num_reached[0], 1) for accepted in self.num_accepted)


@dataclass(frozen=True)
class Costs:
    """What steps cost here, one row: milliseconds by width of a pass and by number of drafts, and what they promise.

    `break_even` holds the tau from which on drafting pays, `speed` the tokens per second over plain steps' that the
    measured acceptance promises, both by number of drafts.
    """

    context_length: int
    pass_ms: dict[int, float]
    draft_ms: dict[int, float]
    break_even: dict[int, float]
    speed: dict[int, float]


@dataclass(frozen=True)
class Verdict:
    """What is the matter: a key of `EXIT_STATUS`, and one sentence."""

    cause: str
    sentence: str

    @property
    def exit_status(self) -> int:
        """The exit status of `dspark-hf doctor`."""
        return EXIT_STATUS[self.cause]


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        target: name of the target.
        drafter: name of the drafter.
        verdict: the cause, and one sentence.
        checks: what was compared without drafting.
        trials: the drafter's readings, the configured one first; empty if it cannot draft for this target at all.
        thinking: the configured reading on text with the chat template's switch on and off; empty without a switch.
        expected_rate: share of first drafts that the confidence head expects to be accepted, or None without one.
        is_identical: whether the greedy text is the same with and without the drafter, or None if it was not tried.
        costs: what steps cost here, or None if that was not measured.
        advice: what to set, in words.
        seconds: how long the diagnosis took.
    """

    target: str
    drafter: str
    verdict: Verdict
    checks: tuple[Check, ...]
    trials: tuple[Trial, ...] = ()
    thinking: tuple[Trial, ...] = ()
    expected_rate: float | None = None
    is_identical: bool | None = None
    costs: Costs | None = None
    advice: tuple[str, ...] = field(default_factory=tuple)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, with the exit status, tau and the rates by position written out."""
        fields = asdict(self)
        fields["verdict"]["exit_status"] = self.verdict.exit_status
        for name in ("trials", "thinking"):
            for written, trial in zip(fields[name], getattr(self, name), strict=True):
                rates = [round(rate, 4) for rate in trial.accept_rates]
                # JSON knows no NaN
                written |= {"tau": round(trial.tau, 4) if trial.num_reached[0] else None, "accept_rates": rates}
        return fields

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from parts(self, console)
