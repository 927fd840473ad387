"""`dspark-hf train` from the command line to a drafter that drafts."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dspark_hf import DSparkAssistantModel
from dspark_hf.cli.train import describe_result, train
from dspark_hf.demo.tiny import write_tiny_pair

app = typer.Typer()
app.command()(train)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny target and text that it wrote."""
    folder = tmp_path_factory.mktemp("train")
    path, _ = write_tiny_pair(folder)
    target, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    prompts = torch.randint(4, 60, (24, 3))
    texts = target.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_new_tokens=20, min_new_tokens=20
    )
    records = [
        {"prompt": tokenizer.decode(row[:3]), "completion": tokenizer.decode(row[3:]), "finished": False}
        for row in texts
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def _arguments(folder: Path, output: str, *further: str) -> list[str]:
    given = {
        "--target": str(folder / "target"),
        "--data": str(folder / "texts.jsonl"),
        "--output": str(folder / output),
        "--max-steps": "6",
        "--layers": "1",
        "--markov-rank": "4",
        "--anchors": "8",
        "--held-out": "4",
        "--every": "2",
        "--batch-size": "2",
        "--accumulate": "1",
        "--draft-vocab": "40",
    }
    if "--drafter" in further:
        # what it has decides
        del given["--layers"], given["--markov-rank"]
    return [part for pair in given.items() if pair[0] not in further for part in pair] + list(further)


def _run(folder: Path, output: str, *further: str) -> tuple[int, str]:
    result = CliRunner().invoke(
        app, _arguments(folder, output, *further), env={"COLUMNS": "500", "NO_COLOR": "1", "CUDA_VISIBLE_DEVICES": ""}
    )
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_trains_a_drafter_that_drafts(folder: Path) -> None:
    """The command would not do what its help says, or its result would not load beside the target."""
    code, output = _run(folder, "small", "--tensorboard")
    assert code == 0, output
    assert "Held-out tau" in output
    # six steps are too few to tell how fast they are
    assert re.search(
        r"expected held-out tau 1\.\d\d, about \d\.\d\d times plain speed after 6 steps \(96 blocks", output
    )
    assert "A guess: no run that this rests on had 96 blocks (fitted on 51,000 to 1,640,000)" in output
    assert re.search(r"The forecast was 1\.\d\d, \d+% off\.", output)
    assert f"Next: dspark-hf eval --target {folder / 'target'} --drafter {folder / 'small' / 'drafter'}" in output
    drafter = DSparkAssistantModel.from_pretrained(folder / "small" / "drafter")
    assert drafter.dtype == torch.bfloat16
    assert drafter.config.draft_vocab_size == 40
    assert drafter.config.markov_over_draft_vocab
    assert list((folder / "small").rglob("events.out.tfevents*"))
    log = (folder / "small" / "drafter" / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in log] == [2, 4, 6]
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    tokenizer = AutoTokenizer.from_pretrained(folder / "small" / "drafter")
    inputs = tokenizer("baba dufo", return_tensors="pt")
    plain = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(plain, target.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=drafter))


def test_folders_of_others_are_left_alone(folder: Path) -> None:
    """Somebody's folder is removed, without a word, because of its name."""
    thesis = folder / "project" / "drafter" / "thesis.txt"
    export = folder / "project" / "checkpoint-500" / "model.safetensors"
    for path in (thesis, export):
        path.parent.mkdir(parents=True)
        path.write_text("precious")
    code, output = _run(folder, "project")
    assert code == 2
    assert "must be a folder that only training writes to" in output
    assert thesis.read_text() == export.read_text() == "precious"


@pytest.mark.slow
@pytest.mark.parametrize("head", ["gated", "rnn", "none"])
def test_all_heads(head: str, folder: Path) -> None:
    """A kind of head could not be trained from the command line."""
    code, output = _run(folder, head, "--markov-head", head, "--preset", "paper", "--draft-vocab", "0")
    assert code == 0, output
    config = DSparkAssistantModel.from_pretrained(folder / head / "drafter").config
    assert (config.markov_rank == 0) == (head == "none")
    assert head in ("none", config.markov_head_type)
    assert config.draft_vocab_size is None


def test_goes_on_from_a_drafter_and_from_an_interruption(folder: Path) -> None:
    """Another run would begin anew although a trained drafter, or a checkpoint, is there."""
    code, output = _run(folder, "longer", "--max-steps", "4")
    assert code == 0, output
    # more steps in the same folder: only these are run
    code, output = _run(folder, "longer", "--max-steps", "6")
    assert code == 0, output
    lines = (folder / "longer" / "drafter" / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]
    # options that make another drafter are told before anything is done
    code, output = _run(folder, "longer", "--max-steps", "8", "--layers", "2")
    assert code == 2
    assert "got one with `num_hidden_layers` 1 in" in output
    drafter = folder / "longer" / "drafter"
    code, output = _run(folder, "further", "--drafter", str(drafter), "--learning-rate", "0", "--max-steps", "2")
    assert code == 0, output
    before, after = (
        DSparkAssistantModel.from_pretrained(path).state_dict() for path in (drafter, folder / "further" / "drafter")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "/nowhere"), "`--target` must be the folder or hub name of a causal language model"),
        (("--data", "/nowhere.jsonl"), "`--data` must be files, got '/nowhere.jsonl'"),
        (("--target-layers", "1;2"), "`--target-layers` must be numbers with commas between them, got '1;2'"),
        (("--target-device", "nowhere"), "`--device` must be auto or a device PyTorch can use here, got 'nowhere'"),
        (("--drafter", "/nowhere"), "/nowhere"),
        (("--temperature", "0"), "`temperature` must be at least 0.2 and finite, got 0.0. Only `confidence_only` can"),
        (
            ("--drafter", "/nowhere", "--markov-head", "rnn"),
            "`--markov-head` must be left out with `--drafter`, got rnn",
        ),
    ],
)
def test_mistakes_are_told(arguments: tuple[str, ...], message: str, folder: Path) -> None:
    """A mistake would cost time or end in a traceback."""
    code, output = _run(folder, "mistake", *arguments)
    assert code == 2
    assert message in output


@pytest.mark.slow
def test_two_processes_train_what_one_would(folder: Path) -> None:
    """With `accelerate launch` processes would see the same data, drift apart or write over each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port, "-m", "dspark_hf"]
    # four texts to train on, so that every step sees them all, in whatever order
    lines = (folder / "texts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
    common = ("--data", str(folder / "few.jsonl"), "--no-bf16", "--dtype", "fp32", "--anchors", "100")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [sys.executable, "-m", *launch, "train", *_arguments(folder, "two", *common)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    code, output = _run(folder, "one", *common, "--batch-size", "4")
    assert code == 0, output
    two, one = (
        [json.loads(line) for line in (folder / name / "drafter" / "training_log.jsonl").open(encoding="utf-8")]
        for name in ("two", "one")
    )
    assert [record["step"] for record in two] == [2, 4, 6]
    # and of equal length: two batches of two weigh as one of four
    taus = [[record["eval_expected_tau"] for record in log] for log in (two, one)]
    assert taus[0] == pytest.approx(taus[1], abs=5e-3)


@pytest.mark.parametrize(("tau", "is_useless"), [(1.0, True), (1.04, True), (2.2, False)])
def test_the_end_says_what_tau_means(tau: float, is_useless: bool) -> None:
    """A drafter that is never right is reported like one that helps."""
    assert ("of no use" in describe_result("target", Path("drafter"), tau)) == is_useless


def test_ctrl_c_says_how_to_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped ends without a word of what is kept."""
    from dspark_hf.training.trainer import DSparkTrainer

    def interrupt(self: DSparkTrainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DSparkTrainer, "train", interrupt)
    code, output = _run(folder, "stopped")
    assert code == 130
    assert "The same command goes on from the newest checkpoint" in output


@pytest.fixture(scope="module")
def fine_tune(folder: Path) -> Path:
    """A fine-tune of the tiny target that gained tokens, under a name of its own."""
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    target.resize_token_embeddings(72)
    target.save_pretrained(folder / "fine-tune")
    AutoTokenizer.from_pretrained(folder / "target").save_pretrained(folder / "fine-tune")
    return folder / "fine-tune"


def test_an_existing_drafter_is_adapted(folder: Path, fine_tune: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A fine-tune needs a drafter from nothing, or the adapted one still bears its old target's name."""
    further = ("--drafter", str(folder / "drafter"), "--target", str(fine_tune), "--draft-vocab", "30")
    code, output = _run(folder, "adapted", *further, "--layers", "2")
    assert code == 0, output
    drafter = DSparkAssistantModel.from_pretrained(folder / "adapted" / "drafter")
    # a second layer begins at zero, and learns
    assert drafter.layers[1].mlp.down_proj.weight.any()
    config = drafter.config
    assert (config.vocab_size, config.draft_vocab_size) == (72, 30)
    assert config.base_model_name_or_path == str(fine_tune)
    assert "The drafter's held-out tau on this text: 1." in output
    assert "before." in output
    assert (
        config.target_fingerprint != DSparkAssistantModel.from_pretrained(folder / "drafter").config.target_fingerprint
    )


def test_an_adaptation_that_goes_on_knows_where_it_began(folder: Path, fine_tune: Path) -> None:
    """What an evening brings is told on the first of two evenings only."""
    further = ("--drafter", str(folder / "drafter"), "--target", str(fine_tune), "--every", "1")
    _, output = _run(folder, "two-evenings", *further, "--max-minutes", "0.00001")
    before = re.search(r"The drafter's held-out tau on this text: (\d\.\d\d)", output)
    assert before is not None, output
    code, output = _run(folder, "two-evenings", *further)
    assert code == 0, output
    # it is that of the drafter as it was given
    assert "on this text" not in output
    assert f"It was {before[1]} before." in output
    assert re.search(r"expected held-out tau \d\.\d\d.* after 6 steps", output)
    log = (folder / "two-evenings" / "drafter" / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4, 5, 6]


def test_an_adapter_that_cannot_be_read_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA's owner gets a traceback for a package that is missing, or a name that is."""
    (folder / "unread").mkdir()
    config = folder / "unread" / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": str(folder / "target")}), encoding="utf-8")
    monkeypatch.setitem(sys.modules, "peft", None)
    code, output = _run(folder, "mistake", "--target", str(folder / "unread"))
    assert code == 2
    assert "`peft` must be installed to read the adapter" in output
    config.write_text("{}", encoding="utf-8")
    code, output = _run(folder, "mistake", "--target", str(folder / "unread"))
    assert code == 2
    assert "`base_model_name_or_path` must name a model" in output


def test_an_adapter_is_a_target(folder: Path) -> None:
    """A LoRA cannot be named as the target, or a drafter is trained for the model without it."""
    peft = pytest.importorskip("peft")
    from dspark_hf.loading import load_target, load_tokenizer

    base = AutoModelForCausalLM.from_pretrained(folder / "target")
    base.resize_token_embeddings(70)
    options = {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "init_lora_weights": False,
    }
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, **options))
    tuned.save_pretrained(folder / "lora")
    loaded = load_target(str(folder / "lora"), dtype="fp32")
    ids = torch.tensor([[5, 9, 7, 69]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, tuned.eval()(ids).logits)
    assert load_tokenizer(str(folder / "lora")).vocab_size == 68
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "target"), prompts).save_pretrained(
        folder / "prompts"
    )
    with pytest.raises(ValueError, match="`target` must be an adapter of a model's layers, such as LoRA's, got"):
        load_target(str(folder / "prompts"))
    code, output = _run(folder, "for-lora", "--drafter", str(folder / "drafter"), "--target", str(folder / "lora"))
    assert code == 0, output
    config = DSparkAssistantModel.from_pretrained(folder / "for-lora" / "drafter").config
    assert config.base_model_name_or_path == str(folder / "lora")
