"""`guard doctor`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from guard.cli import options
from guard.cli.console import Console
from guard.diagnostics.findings import Finding, Status
from guard.errors import GuardError

if TYPE_CHECKING:
    from guard.sidecar import Settings


@click.command()
@click.option("--config", type=options.PATH, help="What guard serve is given; GUARD_… variables count here too.")
@click.option("--upstream", metavar="ADDRESS", help="The server behind the sidecar; alone, or over the configuration.")
@click.option(
    "--rest-port",
    "rest_ports",
    type=click.IntRange(1, 65_535),
    metavar="PORT",
    multiple=True,
    help="Look for REST of that server there too; several times for several.  [always: 8000, 8080, 5000]",
)
@options.as_json
@click.pass_context
def doctor(
    ctx: click.Context, config: Path | None, upstream: str | None, rest_ports: tuple[int, ...], *, as_json: bool
) -> None:
    """Check the installation, the GPU, the upstream, and that nothing bypasses the sidecar.

    Run it where the sidecar runs, before or while it does. With the sidecar's configuration it says all that guard
    serve --check says, and looks for ways around screening that the upstream server leaves open: REST, its gRPC port
    on other addresses, models without a profile, shared memory, an open socket. It changes nothing. It cannot see
    network policies, nor other machines.

    Exits with 0 if all is well, 1 if there is a warning, and with the code that a start would end with if something
    failed.
    """
    # As in guard serve.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from guard.diagnostics import installation

    console = Console(as_json=as_json)
    imports = installation.imports()
    found: list[Finding] = [*installation.packages(), imports]
    if installation.torch_is_installed():
        console.say("loading torch, which takes some seconds")
    found += installation.accelerators()
    if imports.status is Status.OK:
        found += _deployment(config, upstream, rest_ports)
    elif config is not None or upstream is not None:
        found.append(Finding("settings", Status.WARNING, "not looked at, since the sidecar cannot be imported"))
    code = next((finding.exit_code for finding in found if finding.exit_code), 0)
    code = code or int(any(finding.status is Status.WARNING for finding in found))
    console.findings(found, {"healthy": code == 0})
    ctx.exit(code)


def _deployment(config: Path | None, upstream: str | None, rest_ports: Sequence[int]) -> Sequence[Finding]:
    """The settings of a sidecar, if there are any, and its surroundings."""
    from guard.diagnostics.exposure import REST_PORTS, exposures
    from guard.diagnostics.preflight import preflight
    from guard.sidecar import Settings
    from guard.sidecar.inference.proxy import upstream_endpoint
    from guard.sidecar.transport.channels import Endpoint

    ports = tuple(dict.fromkeys((*REST_PORTS, *rest_ports)))
    names = {f"GUARD_{name}".upper() for name in Settings.model_fields}
    try:
        if config is None and not any(name.upper() in names and value for name, value in os.environ.items()):
            return exposures(Endpoint(upstream), rest_ports=ports) if upstream is not None else ()
        settings = Settings.load(config, upstream=upstream)
    except GuardError as error:
        return (_failure("settings", error),)
    found = [_running(finding, settings) for finding in preflight(settings)]
    if settings.upstream is None:
        return found
    try:
        found += exposures(
            upstream_endpoint(settings),
            known={each.model_name for each in settings.served},
            rest_ports=ports,
            own=(settings.listen,),
        )
    except GuardError as error:
        found.append(_failure("transport", error))
    return found


def _failure(subject: str, error: GuardError) -> Finding:
    return Finding(subject, Status.FAILED, str(error), error.exit_code)


def _running(finding: Finding, settings: "Settings") -> Finding:
    """A port that is taken is as it should be if this very sidecar runs."""
    from guard.diagnostics.rest import fetch
    from guard.sidecar.addresses import split_address

    if finding.exit_code and finding.subject in {"listen", "metrics"}:
        status, body = fetch(*split_address(settings.metrics), "/metrics") or (0, b"")
        if status == 200 and b"guard_" in body:
            address = settings.listen if finding.subject == "listen" else settings.metrics
            return Finding(finding.subject, Status.OK, f"{address} is taken by a running sidecar")
    return finding
