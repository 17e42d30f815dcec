"""`guard serve`."""

import logging
from pathlib import Path
from typing import Any

import click

from guard.cli import options


@click.command()
@click.option("--profile", type=options.PATH, help="The calibrated profile of the model.")
@click.option("--model", type=options.PATH, help="What guard export wrote: serve it, or embed with it.")
@click.option("--upstream", metavar="HOST:PORT", help="Forward to this Open Inference Protocol server.")
@click.option("--embedding-output", metavar="NAME", help="Upstream output that carries the embedding.")
@click.option("--name", help="Model name in requests.  [default: classifier]")
@click.option("--input", help="Name of the input tensor.  [default: image]")
@click.option("--listen", metavar="HOST:PORT", help="For inference.  [default: 127.0.0.1:8001]")
@click.option("--metrics", metavar="HOST:PORT", help="For Prometheus.  [default: 127.0.0.1:8002]")
@click.option(
    "--mode",
    type=click.Choice(["shadow", "tag", "block"]),
    help="Count only; say so in the reply; refuse flagged requests.  [default: tag]",
)
@click.option(
    "--failure-policy",
    type=click.Choice(["open", "closed"]),
    help="Serve or refuse what could not be checked.  [default: open in shadow mode, else closed]",
)
@click.option(
    "--neighbours",
    type=click.Choice(["exact", "compressed", "approximate"]),
    help="How banks are searched; the others save time in large banks.  [default: exact]",
)
@click.option("--state", type=options.PATH, help="Folder for evidence log and monitor state.  [default: none is kept]")
@click.option("--thumbnails/--no-thumbnails", default=None, help="Keep small pictures of flagged images there.")
@click.option("--second-looks", type=float, help="Flagged images per second that are looked at again.  [default: 0]")
@click.option("--sample", type=int, help="Embeddings to sample for guard calibrate.  [default: 0]")
@click.option("--run-length", type=float, help="Images between false alarms of the monitor.  [default: 1e7]")
@click.option("--screening/--no-screening", default=None, help="Off: all is unchecked, to measure the cost.")
@click.option("--timeout", type=float, help="Seconds that screening may take.  [default: 1]")
@click.option("--max-message-bytes", type=int, help="Largest request or reply.  [default: 67108864]")
@click.option("--max-pixels", type=int, help="Largest encoded image, decoded.  [default: 50000000]")
@click.option("--max-batch", type=int, help="Most images in a request.  [default: 256]")
@click.option("--max-concurrent", type=int, help="Most requests at once.  [default: 256]")
@click.option("--workers", type=int, help="Threads that decode, embed and screen.  [default: 2]")
@click.option("--drain", type=float, help="Seconds for running requests after SIGTERM.  [default: 10]")
@click.option("--config", type=options.PATH, help='TOML file with the names above, as profile = "…".')
def serve(config: Path | None, **values: Any) -> None:  # noqa: ANN401 - every option of the settings
    """Serve a vetted model, or stand before the server that does, and screen every request.

    Settings come from the command line, then GUARD_… variables, then the configuration file.
    Prints one line of JSON when it serves; SIGTERM drains and ends it.
    """
    from guard.sidecar import Settings
    from guard.sidecar import serve as run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    run(Settings.load(config, **values))
