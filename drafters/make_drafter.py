"""Text, training, calibration and evaluation of a drafter in one run of a few minutes; the next run goes on.

    python drafters/make_drafter.py --target FOLDER --work runs/smollm2 --minutes 9 \\
        --prompts questions.jsonl --calibrate others.jsonl --evaluate gsm8k_eval.jsonl --evaluate mbpp_eval.jsonl

Made for a GPU that is there for a short time. Everything is kept in `--work`: run it again, there or elsewhere, until
the drafter in `work/run/drafter` is good enough. A step that fails ends the run with its exit status.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

# shares of the time: text is what a small drafter lacks most, calibration and evaluation take what is left
TEXT_SHARE, TRAINING_SHARE, CALIBRATION_SHARE = 0.3, 0.45, 0.1
# two openings of code and of mathematics beside free ones, so that the text is as mixed as what users ask
OPENINGS = ("", "", "Write a Python function", "Write a function to", "Solve", "Explain", "What is", "How do I")


@dataclass
class Clock:
    """The run's time, in seconds."""

    seconds: float
    start: float

    def left_of(self, share: float) -> float:
        """Return the time until `share` of the whole is over; at least a second."""
        return max(self.start + share * self.seconds - monotonic(), 1.0)


def main() -> None:
    """Do the four steps, each within its share of the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="folder or hub name")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--prompts", help="prompts to answer beside the target's own, JSON Lines")
    parser.add_argument("--evaluate", action="append", default=[], help="held-out prompts; never trained on")
    parser.add_argument("--calibrate", help="further held-out prompts, to calibrate the confidence on")
    parser.add_argument("--batch-size", type=int, default=256, help="answers written at once")
    parser.add_argument("--max-steps", type=int, default=6000, help="length of the schedule over all runs")
    parser.add_argument("--no-own", action="store_true", help="answer --prompts only, write no prompts")
    parser.add_argument("--data", default="", help="further options of `dspark-hf data`")
    parser.add_argument("--train", default="", help="further options of `dspark-hf train`")
    arguments = parser.parse_args()
    clock = Clock(60 * arguments.minutes, monotonic())
    work, target = arguments.work, ["--target", arguments.target]
    work.mkdir(parents=True, exist_ok=True)

    held_out = [*arguments.evaluate, *([arguments.calibrate] if arguments.calibrate else [])]
    excluded = [part for path in held_out for part in ("--exclude", path)]
    text = [*target, "--batch-size", str(arguments.batch_size), "--dtype", "bf16", *excluded]
    text += arguments.data.split()
    files = [work / "answers.jsonl", work / "own.jsonl"]
    if arguments.prompts:
        share = TEXT_SHARE if arguments.no_own else TEXT_SHARE / 2
        _run(["data", *text, "--output", str(files[0]), "--prompts", arguments.prompts], clock.left_of(share))
    if not arguments.no_own:
        openings = [part for opening in OPENINGS for part in ("--opening", opening)]
        own = ["--output", str(files[1]), "--num-conversations", "1000000", *openings]
        _run(["data", *text, *own], clock.left_of(TEXT_SHARE))

    # a file may be empty still: the time was up before its first answer
    written = [path for path in files if path.is_file() and path.stat().st_size]
    data = [part for path in written for part in ("--data", str(path))]
    minutes = clock.left_of(TEXT_SHARE + TRAINING_SHARE) / 60
    training = [
        "--output",
        str(work / "run"),
        "--max-minutes",
        f"{minutes:.2f}",
        "--max-steps",
        str(arguments.max_steps),
    ]
    _run(["train", *target, *data, *training, *arguments.train.split()], clock.left_of(1.0))

    drafter = ["--drafter", str(work / "run" / "drafter")]
    if arguments.calibrate:
        calibration = ["--prompts", arguments.calibrate, "--temperature", "0", "--report", str(work / "calibration")]
        share = clock.left_of(TEXT_SHARE + TRAINING_SHARE + CALIBRATION_SHARE)
        # 1: it did not help, and nothing was saved
        _run(["calibrate", *target, *drafter, *calibration], share, accepted=(0, 1))
    if arguments.evaluate:
        options = ["--num-prompts", "20", "--repeats", "1", "--output", str(work / "evaluation")]
        # 1: partial, or a text that differs, which the report tells
        _run(["eval", *target, *drafter, *options, *arguments.evaluate], clock.left_of(1.0), accepted=(0, 1))


def _run(command: list[str], seconds: float, *, accepted: tuple[int, ...] = (0,)) -> None:
    """Run a command of ours; interrupt it after its time, which each of them takes as an order to save and stop."""
    print(f"== {' '.join(command)} (at most {seconds:.0f} s)", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "dspark_hf", *command])
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
        return
    if status not in accepted:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
