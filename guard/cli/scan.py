"""`guard scan`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from guard.cli import options
from guard.cli.console import Console

if TYPE_CHECKING:
    from guard.scan import ScanSummary

_NAMES = ("image", "caption", "key")


@click.command()
@click.argument("data", type=options.PATH)
@click.option(
    "--model",
    help="The model that was trained on DATA, as for guard vet. Without it, DATA is a file of embeddings.",
)
@click.option(
    "--out", type=options.PATH, default=Path("scan"), show_default=True, help="Folder to write the results to."
)
@click.option(
    "--method",
    type=click.Choice(["k-distance", "dao", "slof", "lid"]),
    default="k-distance",
    show_default=True,
    help="Score of the coarse stage.",
)
@click.option(
    "--reference",
    type=click.Choice(["sample", "batch", "shard", "global"]),
    default="sample",
    show_default=True,
    help="Where it looks for neighbours: random samples of the set, random batches of a shard with their captions as "
    "published, each shard by itself, or the whole set.",
)
@click.option(
    "--as-released",
    is_flag=True,
    help="Compute the score as the code of Huang et al. (ICLR 2025) does, with --reference batch.",
)
@click.option("--k", type=click.IntRange(min=2), default=16, show_default=True, help="Number of neighbours.")
@click.option(
    "--sample", type=click.IntRange(min=4), default=256, show_default=True, help="Number of images in each sample."
)
@click.option("--draws", type=click.IntRange(min=1), default=8, show_default=True, help="Number of samples.")
@click.option(
    "--reference-batch",
    type=click.IntRange(min=4),
    default=2048,
    show_default=True,
    help="Number of pairs in each batch, for --reference batch.",
)
@click.option(
    "--neighbours",
    type=click.Choice(["auto", "exact", "approximate"]),
    default="auto",
    show_default=True,
    help="Search of the whole set, for --reference global. An approximate search needs faiss and measures its recall; "
    "auto takes it above a million pairs.",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.1,
    show_default=True,
    help="Share of the pairs with the largest scores that the fine stage looks at. It should exceed the share of "
    "poisoned pairs.",
)
@click.option(
    "--most", type=click.IntRange(min=100), default=100_000, show_default=True, help="Largest number of these."
)
@click.option(
    "--words",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Number of words, the most common ones, whose images are searched for a common pattern by their pixels.",
)
@click.option("--image-column", default="image", show_default=True, help="Column of a table with paths of images.")
@click.option("--caption-column", default="caption", show_default=True, help="Column with captions.")
@click.option("--key-column", default="key", show_default=True, help="Column that names the pairs.")
@click.option(
    "--batch", type=click.IntRange(min=1), default=256, show_default=True, help="Pairs that are embedded at a time."
)
@options.engine
@options.seed
@options.device
@options.as_json
def scan(
    data: Path,
    model: str | None,
    out: Path,
    method: str,
    reference: str,
    k: int,
    sample: int,
    draws: int,
    reference_batch: int,
    neighbours: str,
    share: float,
    most: int,
    words: int,
    image_column: str,
    caption_column: str,
    key_column: str,
    batch: int,
    jobs: int,
    ray: str | None,
    seed: int,
    device: str | None,
    *,
    as_released: bool,
    as_json: bool,
) -> None:
    """Find the poisoned pairs of the training set DATA, and how many they are.

    DATA is a WebDataset tar file or a folder of them, a Parquet, CSV or TSV file with paths of images and captions or a
    folder of them, or a folder of images with captions in NAME.txt beside them; or, without --model, a file of
    embeddings (.npy, .safetensors, .parquet).

    The results are scores.parquet, keep.txt (the pairs to train on), summary.json and report.html. An interrupted scan
    continues where it stopped when the same command is given again.
    """
    from guard.classifiers.open_clip import import_open_clip
    from guard.distributed import engine
    from guard.scan import Columns, ScanSettings

    console = Console(as_json=as_json)
    settings = ScanSettings(
        method=method,  # type: ignore[arg-type]  # click has checked the choices
        reference=reference,  # type: ignore[arg-type]
        released=as_released,
        k=k,
        sample=sample,
        draws=draws,
        batch=reference_batch,
        search=neighbours,  # type: ignore[arg-type]
        share=share,
        most=most,
        words=words,
        seed=seed,
    )
    import_open_clip()
    from guard.scan.scanning import scan as run
    from guard.scan.writing import document

    summary = run(
        data,
        out,
        model=model,
        settings=settings,
        columns=Columns(image_column, caption_column, key_column),
        batch=batch,
        device=device,
        engine=engine(jobs, ray),
        say=console.say,
        progress=console.progress,
    )
    console.say(
        f"cost: {summary.embedding_seconds:.0f} s of embedding and {summary.scoring_seconds:.0f} s of scoring, of all "
        f"processes together; {console.seconds:.0f} s in all"
    )
    console.result(document(summary), _text(summary, out))


def _text(summary: "ScanSummary", out: Path) -> str:
    from guard.scan.writing import KEEP_FILE, REPORT_FILE

    lines = [
        f"poisoned pairs: about {summary.poisoned} ({summary.low} to {summary.high}) of {summary.pairs}",
        *(
            f"  {group.kind:9}  {len(group.pairs):7} pairs  {group.word or '–':20}  "
            + (f"pattern {group.pattern.excess:.1f}" if group.pattern else "no pictures")
            for group in summary.groups
            if group.kind != "cluster"
        ),
    ]
    if not summary.groups or all(group.kind == "cluster" for group in summary.groups):
        lines.append("  none was found, which does not mean that the set is clean")
    for item in summary.skipped[:5]:
        where = item.shard if item.key is None else f"{item.shard}: {item.key}"
        lines.append(f"left out: {where}: {item.reason}")
    if len(summary.skipped) > 5:
        lines.append(f"left out: {len(summary.skipped) - 5} more; the report lists them")
    return "\n".join([*lines, f"keep-list: {out / KEEP_FILE}", f"report: {out / REPORT_FILE}"])
