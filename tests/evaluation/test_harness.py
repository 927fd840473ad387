"""lm-evaluation-harness gives the scores of its own model `hf`, with the package itself."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from dspark_hf import DSparkAssistantModel
from tests.thinning import slow
from tests.tiny import tiny_target

END = "."
_LETTERS = string.ascii_letters + string.digits


QUESTIONS = ["ab", "hello", "Tokens", "speculate", "x7", "zyxwvut", "Q", "drafter1"]


def _words(**_: Any) -> dict[str, Any]:
    """Return the questions as a data set; what is right does not matter."""
    datasets = pytest.importorskip("datasets")
    return {"test": datasets.Dataset.from_list([{"question": text, "answer": text[0]} for text in QUESTIONS])}


def _task(**fields: Any) -> dict[str, Any]:
    return {
        "task": "words",
        "custom_dataset": _words,
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        **fields,
    }


WRITING = _task(
    output_type="generate_until",
    generation_kwargs={"until": ["e", "Qr"], "max_gen_toks": 20, "do_sample": False},
    metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
)
JUDGING = _task(
    output_type="multiple_choice", doc_to_choice=["a", "h", "T"], doc_to_target=0, metric_list=[{"metric": "acc"}]
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Save a target, its tokenizer of one token a character, and a drafter."""
    pytest.importorskip("lm_eval", minversion="0.4.12")
    target_folder, drafter_folder = (str(tmp_path_factory.mktemp(name)) for name in ("target", "drafter"))
    tokenizer = Tokenizer(WordLevel({one: index for index, one in enumerate(_LETTERS + END + "?")}, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    end = len(_LETTERS)
    # padding that is an end, as is common
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(target_folder)
    target = tiny_target(eos_token_id=end, pad_token_id=end)
    target.save_pretrained(target_folder)
    DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8).save_pretrained(drafter_folder)
    return target_folder, drafter_folder


def _scores(model: str, task: dict[str, Any], batch_size: int, arguments: str) -> tuple[Any, Any, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    # without those that the harness brings, which take half a minute to list
    tasks = TaskManager(include_defaults=False)
    options: dict[str, Any] = {"task_manager": tasks, "batch_size": batch_size, "device": "cpu", "bootstrap_iters": 0}
    # what it notes of the machine takes seconds to find out
    with patch("lm_eval.evaluator.add_env_info"):
        results = lm_eval.simple_evaluate(model, arguments, tasks=[task], **options)
    samples = [(one["resps"], one["filtered_resps"]) for one in results["samples"]["words"]]
    return results["results"]["words"], samples, results["config"]


@pytest.mark.parametrize("batch_size", [slow(1), 4])
@pytest.mark.parametrize("task", [WRITING, slow(JUDGING)], ids=["writing", "judging"])
def test_scores_are_those_of_the_harness(folders: tuple[str, str], task: dict[str, Any], batch_size: int) -> None:
    """Somebody publishes scores that the model does not have."""
    target, drafter = folders
    plain = _scores("hf", task, batch_size, f"pretrained={target}")
    ours = _scores(
        "dspark-hf", task, batch_size, f"pretrained={target},drafter={drafter},scheduler=fixed,draft_tree=5"
    )
    assert ours[:2] == plain[:2]
    if task is WRITING:
        texts = [answers[0][0] for answers, _ in plain[1]]
        # some stop early and some do not, or nothing is shown
        assert len({len(text) for text in texts}) > 2
        assert ours[2]["tau"] >= 1 and ours[2]["drafter"] == drafter and ours[2]["scheduler"] == "fixed"
        assert ours[2]["draft_tree"] == 5


def test_the_harness_itself_with_a_drafter(folders: tuple[str, str]) -> None:
    """The harness's own criteria, which end a batch as a whole, end it elsewhere with a drafter."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    target, drafter = folders
    model = HFLM(target, device="cpu", batch_size=4)
    kwargs = {"until": ["e", "Qr"], "max_gen_toks": 20}
    loaded = DSparkAssistantModel.from_pretrained(drafter)

    def answers(**more: Any) -> list[str]:
        requests = [Instance("generate_until", {}, (text, {**kwargs, **more}), 0) for text in QUESTIONS]
        return model.generate_until(requests, disable_tqdm=True)

    assert answers(assistant_model=loaded, scheduler="fixed") == answers()


def test_a_drafter_of_another_target_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    """Hundreds of prompts are read before anybody says that the drafter does not fit."""
    other = DSparkAssistantModel.from_target(tiny_target(hidden_size=64), num_hidden_layers=1, markov_rank=8)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`hidden_size`|hidden"):
        _scores("dspark-hf", WRITING, 1, f"pretrained={folders[0]},drafter={tmp_path}")
    with pytest.raises(ValueError, match="`drafter` must be a DSpark drafter"):
        _scores("dspark-hf", WRITING, 1, f"pretrained={folders[0]},drafter={folders[0]}")


@pytest.mark.slow
def test_the_command(folders: tuple[str, str], tmp_path: Path) -> None:
    """The command does not know the model, or loses an option on its way to the harness."""
    from dspark_hf.cli.main import app

    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(json.dumps({"question": text, "answer": text[0]}) for text in QUESTIONS))
    fields = {name: value for name, value in WRITING.items() if name not in ("custom_dataset", "test_split")}
    fields |= {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
    }
    # YAML reads JSON
    (tmp_path / "words.yaml").write_text(json.dumps(fields))
    arguments = f"pretrained={folders[0]},drafter={folders[1]},scheduler=fixed"
    words = ["--model", "dspark-hf", "--model_args", arguments, "--tasks", "words", "--include_path", str(tmp_path)]
    result = CliRunner().invoke(app, ["lm-eval", *words, "--device", "cpu", "--output_path", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "exact_match" in result.output
    (written,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(written.read_text())["config"]["drafter"] == folders[1]


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who lacks the harness is shown a stack of calls."""
    from importlib import util

    from dspark_hf.cli.main import app

    monkeypatch.setattr(util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["lm-eval", "--tasks", "gsm8k"])
    assert result.exit_code == 2 and 'pip install "dspark-hf[lm-eval]"' in result.output
