"""From what was found to one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dspark_hf.doctor.results import Check, Trial, Verdict
from dspark_hf.doctor.trials import LARGE_GAIN

# the share of first drafts below which nearly nothing is accepted, and below which less than of any drafter of use
_NEXT_TO_NOTHING, _LITTLE = 0.1, 0.3
# by how much the confidence head may expect more than happens: one that was not calibrated is over-confident
_MOST_OVERCONFIDENT = 0.2
# names of checks
_TARGET_WEIGHTS, _DRAFTER_WEIGHTS = "target's weights", "drafter's weights"
_MISREAD: Mapping[str, str] = {
    "slots": "the wrong slot convention",
    "taps": "the wrong layers of the target",
    "mask": "the wrong mask token",
    "rotation": "the wrong rotation",
    "positions": "positions that are off by one",
}


def is_weak(trial: Trial, expected: float | None) -> bool:
    """Return whether fewer first drafts are accepted than of a drafter of use, or than its confidence expects."""
    rate = trial.accept_rates[0]
    return rate < _LITTLE or (expected is not None and expected - rate > _MOST_OVERCONFIDENT)


def judge_checks(checks: Sequence[Check]) -> Verdict | None:
    """Return the verdict where drafter and target cannot be tried together, or None."""
    sizes = next(check for check in checks if check.name == "sizes")
    if sizes.is_right is False and sizes.found.startswith("`"):
        return Verdict("sizes", f"The drafter is for a target of other sizes: {sizes.found}")
    return None


def judge(
    checks: Sequence[Check],
    configured: Trial,
    best: Trial,
    expected: float | None,
    *,
    doubtful: Trial | None = None,
    prefers_thinking: str | None,
    is_identical: bool | None,
    is_fp32: bool,
) -> Verdict:
    """Return what is the matter.

    `doubtful` is a reading that may be better than the best one, `prefers_thinking` says on which other text the
    drafter is much better, if there are such.
    """
    verdict = _judge(
        checks,
        configured,
        best,
        expected,
        prefers_thinking=prefers_thinking,
        is_identical=is_identical,
        is_fp32=is_fp32,
    )
    if doubtful is None or best.settings or verdict.cause in ("text", "untrained"):
        return verdict
    doubt = f"With {_settings(doubtful)} it may be better, by {_gain(doubtful)}: longer answers would tell."
    return Verdict(verdict.cause, f"{verdict.sentence} {doubt}")


def _judge(
    checks: Sequence[Check],
    configured: Trial,
    best: Trial,
    expected: float | None,
    *,
    prefers_thinking: str | None,
    is_identical: bool | None,
    is_fp32: bool,
) -> Verdict:
    wrong = {check.name: check.found for check in checks if check.is_right is False}
    rate, tau = configured.accept_rates[0], configured.tau
    accepted = f"{rate:.0%} of first drafts are accepted, tau {tau:.2f}"
    if is_identical is False and is_fp32:
        return Verdict(
            "text", "The greedy text differs with the drafter in fp32, which must not be: please report it."
        )
    if _DRAFTER_WEIGHTS in wrong:
        # whatever is accepted, or better, is so by chance
        return Verdict("untrained", f"The drafter is not trained: {wrong[_DRAFTER_WEIGHTS]}; {accepted}.")
    if best.settings and not _is_mild(best):
        return _misread(configured, best)
    if prefers_thinking is not None:
        return Verdict(
            "thinking",
            f"The drafter was trained on text with {prefers_thinking}, and this is text without: {accepted}; pass "
            f"`{prefers_thinking}` to the chat template.",
        )
    if rate < _NEXT_TO_NOTHING:
        return _useless(wrong, accepted)
    if "tokenizer" in wrong and ("fingerprint" in wrong or is_weak(configured, expected)):
        return _foreign_tokenizer(wrong, accepted)
    if "fingerprint" in wrong:
        return Verdict(
            "revision",
            "The drafter was made for another revision or fine-tune of this target, whose weights differ: "
            f"{accepted}; load the one it was made for.",
        )
    if is_weak(configured, expected):
        return _weak(wrong, accepted, expected)
    if best.settings:
        return _mildly_misread(best)
    return Verdict("fits", f"The drafter fits this target: {accepted}.")


def _is_mild(trial: Trial) -> bool:
    return trial.gain is not None and trial.gain <= LARGE_GAIN


def _settings(trial: Trial) -> str:
    return ", ".join(f"{name}={value}" for name, value in trial.settings.items())


def _gain(trial: Trial) -> str:
    """Return by how much a reading is better than the configured one, with the standard error, in words."""
    return f"{trial.gain or 0.0:.2f} ± {trial.gain_error or 0.0:.2f} drafts a block"


def _misread(configured: Trial, best: Trial) -> Verdict:
    return Verdict(
        best.cause,
        f"The drafter is this target's, read with {_MISREAD[best.cause]}: tau is {best.tau:.2f} instead of "
        f"{configured.tau:.2f} with {_settings(best)} (a gain of {_gain(best)}); {_remedy(best)}.",
    )


def _mildly_misread(best: Trial) -> Verdict:
    return Verdict(
        best.cause,
        f"The drafter fits this target, but seems to be read with {_MISREAD[best.cause]}, which costs little: with "
        f"{_settings(best)} it is better by {_gain(best)}; {_remedy(best)}. Ask its maker what is meant.",
    )


def _remedy(best: Trial) -> str:
    if "position_shift" in best.settings:
        shift = best.settings["position_shift"]
        return f"it was trained with its blocks moved by {shift:+d} ({_settings(best)})"
    return f"set {_settings(best)} in its configuration"


def _useless(wrong: Mapping[str, str], accepted: str) -> Verdict:
    if "tokenizer" in wrong:
        return _foreign_tokenizer(wrong, accepted)
    if "fingerprint" in wrong or "name" in wrong or "sizes" in wrong:
        found = wrong.get("fingerprint") or wrong.get("name") or wrong["sizes"]
        return Verdict("target", f"The drafter is for another target ({found}): {accepted}; load this one's.")
    if _TARGET_WEIGHTS in wrong:
        return _weak(wrong, accepted, None)
    return Verdict(
        "weak", f"No reading makes the drafter useful: {accepted}; it is for another target, or hardly trained."
    )


def _foreign_tokenizer(wrong: Mapping[str, str], accepted: str) -> Verdict:
    return Verdict(
        "tokenizer", f"The drafter is for another tokenizer: {wrong['tokenizer']}; {accepted}; load this target's."
    )


def _weak(wrong: Mapping[str, str], accepted: str, expected: float | None) -> Verdict:
    hoped = "" if expected is None else f", where its confidence expects {expected:.0%}"
    if _TARGET_WEIGHTS in wrong:
        return Verdict(
            "quantised",
            f"The target's weights are {wrong[_TARGET_WEIGHTS]}, which the drafter was hardly trained on: "
            f"{accepted}{hoped}; try the target as it was released.",
        )
    if "name" in wrong:
        return Verdict(
            "revision",
            f"The drafter seems to be for another revision or fine-tune ({wrong['name']}): {accepted}{hoped}.",
        )
    return Verdict(
        "weak",
        f"The drafter is read rightly, and of little use: {accepted}{hoped}; another revision of the target, other "
        "text, or a short training.",
    )
