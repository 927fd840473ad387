"""The benchmark of compiled passes runs on a processor too, where it shows nothing but that it runs."""

from __future__ import annotations

import typer
from typer.testing import CliRunner

from benchmarks import gpu


def test_a_page_is_written(tmp_path):
    """The one command ends in an error, or without speeds, once a GPU is at hand."""
    app = typer.Typer()
    app.command()(gpu.main)
    page = tmp_path / "gpu.md"
    arguments = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--rows", "1,2", "--runs", "1"]
    arguments += ["--new-tokens", "8", "--seconds", "0.001", "--output", str(page)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert text.count("not begun") == 9
    assert "- hardware: " in text


def test_speeds_and_shares():
    """A way is missing from the table, or its speed or what its drafter does."""
    target = gpu.stable_target("tiny", gpu.torch.float32, "cpu")
    trained = gpu.DSparkAssistantModel.from_target(target)
    drafter = gpu.SimulatedDrafter(trained, [0.9] * trained.block_size)
    drafter.scheduler, drafter.drafts = "fixed", "model"
    prompts = gpu.torch.randint(2, 99, (2, 5))
    drafter.script, drafter.num_padded = target.generate(prompts, max_new_tokens=12, do_sample=False), [0, 0]
    ways = (gpu.STATIC, gpu.OURS_STATIC)
    options = [gpu.options_of(way, compiles_anywhere=False) for way in ways]
    options[1]["assistant_model"] = drafter
    results = [gpu.measure(target, way, prompts, 12, 1, one) for way, one in zip(ways, options, strict=True)]
    assert not any(one.obstacle for one in results)
    assert results[1].tau > 2
    assert all(one.speed > 0 for one in results)
    lines = gpu.table(results)
    assert len(lines) == 4
    assert "nan" not in "".join(lines)
