"""The commands behind `visattn`; each parses its options and calls one function of the package."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from visattn.benchmarks.settings import AGAINST, DTYPES
from visattn.benchmarks.settings import Settings as Bench
from visattn.compare import require_extra
from visattn.compare.settings import DEFAULTS, STRATEGIES, Settings
from visattn.devices import PRECISIONS
from visattn.errors import UserError, require
from visattn.registry import ROLES, list_blocks, resolve

__all__ = ["app"]

_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_Task = Annotated[
    str, typer.Option(help="classification, or segmentation: heads on one backbone, a class for every pixel.")
]
_Data = Annotated[
    str,
    typer.Option(
        help="cluttered-digits, a folder of images by class, or a name timm.data opens; for segmentation a folder with "
        "images/ and masks/."
    ),
]
_Backbone = Annotated[str, typer.Option(help="A network of timm, trained from scratch.")]
_At = Annotated[
    str,
    typer.Option(help="Modules that blocks go behind, names or patterns with commas. \\[default: deepest map of 7x7]"),
]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<index>.")]
_Precision = Annotated[str, typer.Option(help=f"One of: {', '.join(PRECISIONS)}.")]
_OutputStride = Annotated[
    int | None,
    typer.Option(help="Of the features under a segmentation head. \\[default: 8; images of less than 128: 4]"),
]
_SkipUnreadable = Annotated[bool, typer.Option("--skip-unreadable", help="Leave unreadable images out and count them.")]


def _defaults(option: str) -> str:
    """The defaults of an option that differ by task, for the help."""
    own = [f"{task} {defaults[option]}" for task, defaults in DEFAULTS.items() if option in defaults]
    return f"\\[default: {'; '.join([str(getattr(Settings, option)), *own])}]"


_Epochs = Annotated[int | None, typer.Option(help=f"Passes over the training images. {_defaults('epochs')}")]
_BatchSize = Annotated[int | None, typer.Option(help=f"Images in a training step. {_defaults('batch_size')}")]
_Lr = Annotated[float | None, typer.Option(help=f"Peak learning rate of AdamW. {_defaults('lr')}")]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.callback()
def visattn() -> None:
    """Vision attention for PyTorch: proven blocks, inserted without loss, compared on your images."""


@app.command("list")
def list_command(
    role: Annotated[str | None, typer.Option(help=f"One of: {', '.join(ROLES)}.")] = None,
) -> None:
    """List the blocks: names for `create` and `insert`, aliases, role and paper."""
    try:
        names = list_blocks(role)
    except ValueError as error:
        raise UserError(str(error)) from error
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "aliases", "role", "arXiv", "mechanism"):
        table.add_column(column, no_wrap=column != "mechanism")
    for name in names:
        card = resolve(name)
        table.add_row(name, ", ".join(card.aliases), card.role, card.paper.rsplit("/", 1)[-1], card.title)
    Console().print(table)


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="Mechanisms, short names, or cases; all by default.", metavar="NAME")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float64",
    impl: Annotated[str, typer.Option(help="Which implementation, such as auto or reference; all for each.")] = "auto",
    networks: Annotated[
        bool, typer.Option("--networks", help="Check the papers' whole networks, loaded from files, instead of blocks.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
    cases: Annotated[Path | None, typer.Option(help="Folder of recorded cases; the shipped ones by default.")] = None,
    debug: _Debug = False,
) -> None:
    """Compare the blocks with recorded results of the published code, on this machine."""
    require("numpy", extra="compare", purpose="visattn verify")
    from visattn.verify.report import verify as run

    passed = run(
        names or [],
        device=device,
        dtype=dtype,
        impl=impl,
        networks=networks,
        json_file=json_file,
        cases=cases,
        debug=debug,
    )
    if not passed:
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint: torch.save's or safetensors.", metavar="IN")],
    target: Annotated[Path, typer.Argument(help="The file to write.", metavar="OUT.safetensors")],
    debug: _Debug = False,
) -> None:
    """Write the tensors of a published checkpoint under our names, as safetensors; nothing else is read or run."""
    from visattn.checkpoints import convert_file

    try:
        typer.echo(convert_file(source, target))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Mechanisms, short names or blocks; all by default.", metavar="NAME")
    ] = None,
    networks: Annotated[
        bool, typer.Option("--networks", help="Time the papers' whole networks instead; NAMEs are theirs then.")
    ] = False,
    shapes: Annotated[str, typer.Option(help="paper, small, or map sizes such as 56x56,28x28.")] = Bench.shapes,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = Bench.device,
    dtype: Annotated[str, typer.Option(help=f"One of: {', '.join(DTYPES)}.")] = Bench.dtype,
    mode: Annotated[str, typer.Option(help="inference, training, or both with a comma.")] = ",".join(Bench.modes),
    against: Annotated[str, typer.Option(help=f"With commas, of: {', '.join(AGAINST)}.")] = ",".join(Bench.against),
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Also write the results to this file, or to <device>-<date>.json in this folder."),
    ] = None,
    no_gate: Annotated[
        bool, typer.Option("--no-gate", help="Time without checking results first; rows are marked unverified.")
    ] = False,
    debug: _Debug = False,
) -> None:
    """Time the blocks at the papers' shapes against their references, equal results checked first."""
    from visattn.benchmarks import report, run

    settings = Bench(
        names=tuple(names or ()),
        shapes=shapes,
        device=device,
        dtype=dtype,
        modes=_words(mode),
        against=_words(against),
        gate=not no_gate,
        json_file=json_file,
    )
    if networks:
        from visattn.benchmarks.networks import bench as bench_networks

        if not bench_networks(settings):
            raise typer.Exit(1)
        return
    content = run.bench(settings, debug=debug)
    report.show(content)
    if not run.passed(content):
        raise typer.Exit(1)


@app.command()
def audit(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")] = None,
    debug: _Debug = False,
) -> None:
    """Count parameters and multiply-adds of the papers' networks and compare them with the published ones."""
    require("timm", extra="compare", purpose="visattn audit")
    from visattn.models.audit import audit as run

    if not run(json_file):
        raise typer.Exit(1)


@app.command()
def compare(
    task: _Task = Settings.task,
    data: _Data = Settings.data,
    backbone: _Backbone = Settings.backbone,
    mechanisms: Annotated[str, typer.Option(help="Blocks to compare, with commas.")] = ",".join(Settings.mechanisms),
    at: _At = "",
    epochs: _Epochs = None,
    seeds: Annotated[int | None, typer.Option(help=f"Trainings of each arm. {_defaults('seeds')}")] = None,
    batch_size: _BatchSize = None,
    lr: _Lr = None,
    device: _Device = Settings.device,
    precision: _Precision = Settings.precision,
    out: Annotated[Path, typer.Option(help="The run folder; an unfinished run in it is continued.")] = Settings.out,
    output_stride: _OutputStride = None,
    skip_unreadable: _SkipUnreadable = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be done, with time, memory and disk; train nothing.")
    ] = False,
    debug: _Debug = False,
) -> None:
    """Train a backbone with each mechanism on your images and report which one helps, and what it costs."""
    import visattn.compare as comparison

    settings = Settings.of_task(
        task,
        data=data,
        backbone=backbone,
        mechanisms=_words(mechanisms),
        at=_words(at),
        epochs=epochs,
        seeds=seeds,
        batch_size=batch_size,
        lr=lr,
        device=device,
        precision=precision,
        out=out,
        output_stride=output_stride,
        skip_unreadable=skip_unreadable,
    )
    if plan:
        typer.echo(comparison.estimate(settings))
        return
    try:
        report = comparison.compare(settings)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    typer.echo(f"Report: {report}")


@app.command()
def train(
    task: _Task = Settings.task,
    data: _Data = Settings.data,
    backbone: _Backbone = Settings.backbone,
    mechanism: Annotated[str, typer.Option(help="A block, or plain for none.")] = "plain",
    at: _At = "",
    epochs: _Epochs = None,
    batch_size: _BatchSize = None,
    lr: _Lr = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation; compare starts from 0.")] = 0,
    device: _Device = Settings.device,
    devices: Annotated[int, typer.Option(help="How many of them, a process for each; they share every batch.")] = 1,
    strategy: Annotated[str, typer.Option(help=f"Lightning's: {', '.join(STRATEGIES)}.")] = "auto",
    precision: _Precision = Settings.precision,
    out: Annotated[Path, typer.Option(help="The folder of the training.")] = Path("visattn-train"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last whole epoch in --out; start where there is none.")
    ] = False,
    output_stride: _OutputStride = None,
    skip_unreadable: _SkipUnreadable = False,
    debug: _Debug = False,
) -> None:
    """Train one arm of a comparison in earnest: on several devices, past a kill, weights kept for predict."""
    require_extra("visattn train")
    from visattn import train as training

    trial = Settings.of_task(
        task,
        data=data,
        backbone=backbone,
        at=_words(at),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        device=device,
        precision=precision,
        out=out,
        output_stride=output_stride,
        skip_unreadable=skip_unreadable,
    )
    settings = training.TrainSettings(trial, mechanism, seed, devices, strategy, resume)
    try:
        weights = training.train(settings)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if weights is not None:
        typer.echo(f"Weights: {weights} (of the last epoch)")
        typer.echo(f"To use them: visattn predict {shlex.quote(str(weights))} IMAGES --out DIR")


@app.command()
def predict(
    weights: Annotated[
        Path, typer.Argument(help="weights.safetensors of train, or of a trial of compare.", metavar="WEIGHTS")
    ],
    images: Annotated[
        list[Path], typer.Argument(help="Image files, and folders with images in them or below.", metavar="IMAGES")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results; earlier ones of the same names are replaced.")],
    device: _Device = "auto",
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 16,
    debug: _Debug = False,
) -> None:
    """Say what is in images with a trained network: classes with probabilities, or a coloured mask for each."""
    require_extra("visattn predict")
    from visattn import predict as prediction

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        work = bar.add_task("images")
        found = prediction.predict(
            weights,
            images,
            out,
            device=device,
            batch_size=batch_size,
            on_batch=lambda done, of: bar.update(work, completed=done, total=of),
        )
    prediction.show(found, out)
    for path, reason in found.unreadable:
        typer.echo(f"visattn: cannot read {path}: {reason}", err=True)
    if found.unreadable:
        of = len(found.rows) + len(found.unreadable)
        typer.echo(f"visattn: {len(found.unreadable)} of {of} images could not be read.", err=True)
        raise typer.Exit(1)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
