"""`dspark-hf profile`: what passes and drafts cost on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dspark_hf.cli.hints import say_next
from dspark_hf.cli.options import Attention, Dtype, packaged_folder
from dspark_hf.console import progress_bar, say

if TYPE_CHECKING:
    from rich.progress import Progress

    from dspark_hf.generation.scheduling.costs.table import CostTable
    from dspark_hf.generation.scheduling.costs.workload import StepTimer
    from dspark_hf.profiling.grid import Grid


def profile(
    target: Annotated[
        str, typer.Option(help="Folder or hub name of the model to accelerate.", callback=packaged_folder)
    ],
    drafter: Annotated[
        str | None, typer.Option(help="Folder or hub name of its drafter; default: the target alone.")
    ] = None,
    rows: Annotated[str | None, typer.Option(help="Batch sizes; 1 is always among them. Default: 1,2,4,8.")] = None,
    widths: Annotated[
        str | None,
        typer.Option(
            help="Tokens per row of a pass; 1 and a whole block are always among them. Default: all to there."
        ),
    ] = None,
    contexts: Annotated[
        str | None, typer.Option(help="Tokens per row before the pass. Default: 128,1024, or what the target knows.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each step; the lower quartile is kept.")] = 10,
    dtype: Annotated[Dtype, typer.Option(help="auto is the target's own.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto is the GPU if there is one.")] = "auto",
    attention: Annotated[Attention, typer.Option(help="auto is what Transformers chooses.")] = Attention.auto,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the profile; default: the cache, where generate looks for it.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="PNG of the cost curve; default: none.")] = None,
) -> None:
    """Measure what passes and drafts cost here, for schedulers; Ctrl-C writes nothing."""
    # imported here, so that the help is instant
    from dspark_hf.files import write_whole
    from dspark_hf.generation.fast_passes import fast_passes
    from dspark_hf.generation.scheduling.costs.keys import drafter_key, profile_key
    from dspark_hf.generation.scheduling.costs.profile import describe_costs
    from dspark_hf.generation.scheduling.costs.storing import save_profile
    from dspark_hf.generation.scheduling.costs.workload import StepTimer
    from dspark_hf.generation.targets.adapter import TargetAdapter
    from dspark_hf.loading import load_target
    from dspark_hf.profiling.cost_tables import print_costs
    from dspark_hf.profiling.plots import draw_costs

    console = Console()
    try:
        grid = _check_request(target, drafter, (rows, widths, contexts), output, figure)
        with console.status("Loading the models ..."):
            model = load_target(target, dtype=dtype.value, device=device, attention=attention.value)
            assistant = None if drafter is None else _load_drafter(drafter, model)
        # passes are tapped even without a drafter, as they are with one
        layers = [0] if assistant is None else assistant.target_layer_ids
        adapter = TargetAdapter(model, layers)
        if assistant is not None:
            assistant.check_target(adapter)
        with adapter, fast_passes(model, assistant):
            workload = StepTimer(adapter, assistant)
            _check_sizes(workload, grid)
            with progress_bar(console) as progress:
                table, notes = _measure(workload, grid, repeats, progress)
            key, drafter_name = profile_key(adapter), None if assistant is None else drafter_key(assistant)
        path = save_profile(key, drafter_name, table, describe_costs(adapter), output)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except OSError as error:
        place = "`DSPARK_HF_PROFILES` or the cache" if output is None else "`--output`"
        raise typer.BadParameter(
            f"{place} must be a folder that can be written to, got {str(output or error.filename)!r}. Name another "
            f"with `--output`. ({error})"
        ) from error
    except KeyboardInterrupt:
        typer.echo("\nStopped. Nothing was written.", err=True)
        raise typer.Exit(130) from None
    print_costs(table, console)
    console.print(f"{type(model).__name__}, {key.dtype}, {key.attention} attention, {key.device}", highlight=False)
    for note in notes:
        console.print(note, soft_wrap=True)
    say(console, f"Profile: {path}")
    if output is not None:
        say(console, f"generate finds it with DSPARK_HF_PROFILES={output}")
    if figure is not None:
        try:
            write_whole(figure, draw_costs(table, f"{Path(target).name}, {key.dtype}, {key.device}"))
        except OSError as error:
            raise typer.BadParameter(
                f"`--figure` must be a file that can be written, got {str(figure)!r}. Name another. ({error})"
            ) from error
        say(console, f"Figure: {figure}")
    say_next(console, "chat", target, *(() if drafter is None else ("--drafter", drafter)))


def _check_request(
    target: str,
    drafter: str | None,
    sizes: tuple[str | None, str | None, str | None],
    output: Path | None,
    figure: Path | None,
) -> "Grid":
    """Return what to measure, after all checks that need no model."""
    from transformers import AutoConfig

    from dspark_hf.damage import first_line
    from dspark_hf.figures import check_plotting
    from dspark_hf.loading import check_folder, check_slip, read_drafter_config
    from dspark_hf.profiling.grid import make_grid

    if output is not None and output.exists() and not output.is_dir():
        raise ValueError(f"`--output` must be a folder, got the file {str(output)!r}. Name another.")
    if figure is not None:
        check_plotting()
        if figure.suffix.lower() != ".png" or figure.is_dir():
            raise ValueError(f"`--figure` must be a file that ends in .png, got {str(figure)!r}. Name another.")
    # the sizes first: what can be told without a file is told without one
    make_grid(*sizes, block_size=None, max_positions=None)
    block_size = None if drafter is None else read_drafter_config(drafter).block_size
    check_slip(target, "--target")
    check_folder(target, "--target")
    try:
        config = AutoConfig.from_pretrained(target).get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`--target` must be the folder or hub name of a causal language model, got {target!r}, which cannot be "
            f"read. Correct it. ({first_line(error)})"
        ) from error
    return make_grid(*sizes, block_size=block_size, max_positions=getattr(config, "max_position_embeddings", None))


def _load_drafter(drafter: str, target: Any) -> Any:
    from dspark_hf.loading import load_drafter

    if drafter == target.name_or_path:
        # DeepSeek-V4's own, whose weights may stay in the checkpoint's formats
        return target.dspark
    return load_drafter(drafter, dtype=target.dtype).to(target.device)


def _check_sizes(workload: "StepTimer", grid: "Grid") -> None:
    """Run a plain step, and the most rows and the widest pass once, on hardly any context."""
    rows, width = grid.rows[-1], grid.widths[-1]
    # a target that no drafter can assist says so whatever the sizes
    workload.verify_seconds(1, 1, 1)
    try:
        workload.verify_seconds(rows, 1, width)
    except ValueError as error:
        raise ValueError(
            f"`--rows` and `--widths` must be what the target can run, got {rows} and {width}. Lower them. ({error})"
        ) from error
    except RuntimeError as error:
        # what does not fit is left out when it is measured
        if not _is_out_of_memory(error):
            raise


def _measure(workload: "StepTimer", grid: "Grid", repeats: int, progress: "Progress") -> "tuple[CostTable, list[str]]":
    """Return the costs, and what could not be measured for lack of memory."""
    from dspark_hf.damage import first_line
    from dspark_hf.generation.scheduling.costs.profile import measure_costs
    from dspark_hf.generation.scheduling.costs.table import CostCurves, CostTable

    steps_per_shape = (repeats + 1) * (len(grid.widths) + len(grid.drafts))
    task = progress.add_task("measuring", total=len(grid.shapes) * steps_per_shape)
    table, notes = CostTable(CostCurves({})), []
    for index, shape in enumerate(grid.shapes):
        name = f"{shape[0]} x {shape[1]:,}"
        progress.update(task, description=f"{name:>12}", completed=index * steps_per_shape)
        try:
            measured = measure_costs(
                workload,
                grid.passes(shape),
                grid.blocks(shape),
                repeats=repeats,
                advance=lambda: progress.advance(task),
            )
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            if index == 0:
                raise ValueError(
                    f"`--contexts` must leave the smallest size enough memory, got {shape[1]:,} tokens of one row. "
                    f"Lower it. ({first_line(error)})"
                ) from error
            notes.append(f"Left out for lack of memory: {shape[0]} rows on {shape[1]:,} tokens.")
            continue
        table = table.merged_with(measured)
    return table, notes


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    # torch 2.13: on the CPU, an error without a class of its own
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
