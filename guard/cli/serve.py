"""`guard serve`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guard.cli import options
from guard.cli.console import Console
from guard.errors import UsageError

if TYPE_CHECKING:
    from guard.sidecar import Settings


@click.command()
@click.option("--profile", type=options.PATH, help="The calibrated profile of the model.")
@click.option("--model", type=options.PATH, help="What guard export wrote: serve it, or embed with it.")
@click.option("--upstream", metavar="ADDRESS", help="Forward to this Open Inference Protocol server.")
@click.option("--upstream-tls", metavar="system|FILE", help="TLS towards it: whose certificate authorities count.")
@click.option("--upstream-certificate", type=options.PATH, help="Certificate that guard shows it.")
@click.option("--upstream-key", type=options.PATH, help="Private key of that.")
@click.option("--upstream-server-name", metavar="NAME", help="Name in its certificate, if not that of its address.")
@click.option("--embedding-output", metavar="NAME", help="Upstream output that carries the embedding.")
@click.option("--name", help="Model name in requests.  [default: classifier]")
@click.option("--input", help="Name of the input tensor.  [default: image]")
@click.option("--processes", type=int, help="Processes that share the port.  [default: 1]")
@click.option("--admin", metavar="ADDRESS", help="For guard's own service.  [default: it is not served]")
@click.option("--listen", metavar="ADDRESS", help="For inference.  [default: 127.0.0.1:8001]")
@click.option("--socket-mode", metavar="OCTAL", help="Mode of its file, if it is a Unix socket.  [default: 600]")
@click.option("--tls-certificate", type=options.PATH, help="Take TLS only, with this certificate chain.")
@click.option("--tls-key", type=options.PATH, help="Private key of that.")
@click.option(
    "--tls-client-ca", type=options.PATH, help="Turn clients away without a certificate of these authorities."
)
@click.option("--metrics", metavar="HOST:PORT", help="/metrics, /healthz, /readyz.  [default: 127.0.0.1:8002]")
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
    type=click.Choice(["exact", "approximate"]),
    help="How banks are searched; approximate saves time in very large ones.  [default: exact]",
)
@click.option("--alpha", type=float, help="False-alarm rate.  [default: that of the calibration]")
@click.option("--checked-share", type=float, help="Share of requests that guard embeds and checks.  [default: 1]")
@click.option(
    "--require-vetted/--no-require-vetted", default=None, help='Let nothing pass whose verdict is not "no evidence".'
)
@click.option("--state", type=options.PATH, help="Folder for evidence log and monitor state.  [default: none is kept]")
@click.option("--thumbnails/--no-thumbnails", default=None, help="Keep small pictures of flagged images there.")
@click.option("--evidence-rows", type=int, help="Most records in the evidence log.  [default: 100000]")
@click.option("--evidence-bytes", type=int, help="Its largest size.  [default: 1073741824]")
@click.option("--evidence-days", type=float, help="Longest time that a record is kept.  [default: 90]")
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
@click.option("--version", help="Version of the upstream model that the profile is of.")
@click.option(
    "--stream-dialect", type=click.Choice(["auto", "triton", "mlserver"]), help="Of streams.  [default: auto]"
)
@click.option("--allow-model-control/--no-model-control", default=None, help="Let clients load and unload models.")
@click.option("--queue", type=int, help="Most requests that wait for a worker.  [default: 256]")
@click.option("--drain-delay", type=float, help="Seconds before that, with requests still taken.  [default: 0]")
@click.option(
    "--loop", type=click.Choice(["auto", "asyncio", "uvloop"]), help="auto: uvloop if there.  [default: auto]"
)
@click.option(
    "--log-format",
    type=click.Choice(["json", "text"]),
    help="Of standard error.  [default: text on a terminal, else json]",
)
@click.option("--config", type=options.PATH, help='TOML file with the names above, as profile = "…".')
@click.option("--check", is_flag=True, help="Look whether it could serve, say so and end.")
@options.as_json
@click.pass_context
def serve(
    ctx: click.Context,
    /,
    config: Path | None,
    *,
    check: bool,
    as_json: bool,
    **values: Any,  # noqa: ANN401 - every option of the settings
) -> None:
    """Serve a vetted model, or stand before the server that does, and screen every request.

    An ADDRESS is HOST:PORT, or unix:PATH for a Unix socket. Settings come from the command line, then
    GUARD_… variables, then the configuration file. Prints one line of JSON when it serves; SIGTERM
    drains and ends it.
    """
    # gRPC's own lines on standard error are not of our form; the variable, if set, brings them back.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from guard.sidecar import Settings
    from guard.sidecar import serve as run
    from guard.sidecar.telemetry.logs import configure

    if as_json and not check:
        raise UsageError("--json is for --check; guard serve says where it serves in JSON anyway")
    settings = Settings.load(config, **values)
    if check:
        ctx.exit(_check(settings, Console(as_json=as_json)))
    configure(settings.log_format)
    run(settings)


def _check(settings: "Settings", console: Console) -> int:
    from guard.diagnostics.preflight import preflight

    findings = preflight(settings)
    code = next((finding.exit_code for finding in findings if finding.exit_code), 0)
    console.findings(findings, {"ready": code == 0})
    return code
