"""`guard top`."""

import glob
import re
import signal
from pathlib import Path

import click

from guard.cli import options
from guard.cli.console import Console
from guard.errors import UsageError

_ENDS = (signal.SIGINT, signal.SIGTERM)


@click.command()
@click.argument("addresses", nargs=-1, required=True, metavar="ADDRESS…")
@click.option(
    "--listen",
    metavar="HOST:PORT",
    default="127.0.0.1:8003",
    show_default=True,
    help="Loopback address at which the page is served. Port 0 lets the system choose.",
)
@click.option(
    "--tls",
    metavar="system|FILE",
    help="Connect with TLS. The value says which certificate authorities are trusted: system for those of this "
    "machine, or a PEM file.",
)
@click.option("--tls-certificate", type=options.PATH, help="PEM file of the certificate that guard top presents.")
@click.option("--tls-key", type=options.PATH, help="PEM file of the private key for --tls-certificate.")
@click.option("--server-name", metavar="NAME", help="Host name that the certificates of the sidecars must carry.")
@options.as_json
def top(
    addresses: tuple[str, ...],
    listen: str,
    tls: str | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    server_name: str | None,
    *,
    as_json: bool,
) -> None:
    """Serve a page that shows running sidecars: their state, their models, and flagged requests as they come.

    Each ADDRESS is the --admin address of a sidecar: HOST:PORT, or unix:PATH. For a sidecar with several --processes,
    unix:PATH stands for all of them that run when guard top starts. It is the page of guard serve --dashboard, for any
    number of sidecars. Ctrl-C ends it.
    """
    from guard.sidecar.addresses import is_loopback
    from guard.sidecar.host.dashboard import Access, Remote, serve_dashboard
    from guard.sidecar.transport.channels import Endpoint
    from guard.sidecar.transport.tls import client_credentials

    if (tls_certificate is None) != (tls_key is None):
        raise UsageError("--tls-certificate and --tls-key must be given together")
    if tls is None and (tls_certificate is not None or server_name is not None):
        raise UsageError("--tls-certificate and --server-name need --tls")
    try:
        if not is_loopback(listen):
            raise UsageError(
                f"the page shows what attackers want to know, so --listen takes a loopback address, not {listen}"
            )
        processes = dict.fromkeys(process for address in addresses for process in _processes(address))
    except ValueError as error:
        raise UsageError(str(error)) from error
    credentials = client_credentials(tls, tls_certificate, tls_key)
    sources = [Remote(Endpoint(address, credentials, server_name), _sidecar(address)) for address in processes]
    console = Console(as_json=as_json)
    # Blocked before other threads start, which inherit that: a signal that one of them took would not wake this one.
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    with serve_dashboard(listen, sources, Access()) as actual:
        console.result({"page": f"http://{actual}/", "sidecars": list(processes)}, f"http://{actual}/")
        signal.sigwait(_ENDS)


def _processes(address: str) -> list[str]:
    """The addresses of the processes of one sidecar.

    Raises:
        ValueError: It is not an address.
    """
    from guard.sidecar.addresses import socket_path, split_address

    path = socket_path(address)
    if path is None:
        split_address(address)
        return [address]
    several = sorted(
        (
            each
            for each in path.parent.glob(f"{glob.escape(path.name)}.*")
            if each.is_socket() and each.suffix[1:].isdecimal()
        ),
        key=lambda each: int(each.suffix[1:]),
    )
    return [address] if path.exists() or not several else [f"unix:{each}" for each in several]


def _sidecar(process: str) -> str:
    """What the processes of one sidecar have in common: `unix:PATH` of `unix:PATH.3`; the address itself over TCP."""
    return re.sub(r"\.[0-9]+$", "", process) if process.startswith("unix:") else process
