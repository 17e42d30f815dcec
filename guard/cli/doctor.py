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
@click.option(
    "--config",
    type=options.PATH,
    help="Configuration file of the sidecar. The GUARD_… environment variables are read as well.",
)
@click.option(
    "--upstream",
    metavar="ADDRESS",
    help="Address of the inference server behind the sidecar. It takes precedence over the configuration, and is "
    "enough without one.",
)
@click.option(
    "--rest-port",
    "rest_ports",
    type=click.IntRange(1, 65_535),
    metavar="PORT",
    multiple=True,
    help="Another port on which to look for a REST interface of the upstream server, besides 8000, 8080 and 5000. The "
    "option can be repeated.",
)
@options.as_json
@click.pass_context
def doctor(
    ctx: click.Context, config: Path | None, upstream: str | None, rest_ports: tuple[int, ...], *, as_json: bool
) -> None:
    """Check the installation and the GPU, and look for ways around the sidecar.

    Run it where the sidecar runs, before the start or during operation. With the configuration of the sidecar, it
    reports what guard serve --check reports, and looks for ways around the screening that the upstream server leaves
    open: a REST interface, its gRPC port at other addresses, models without a profile, shared memory, and a socket that
    everybody can use. It changes nothing. It cannot see network policies or other machines.

    The exit code is 0 if all is well and 1 if there is a warning. If a check failed, it is the code with which a start
    would end.
    """
    # gRPC's own lines on standard error do not have the form of the findings.
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
        found.append(
            Finding("settings", Status.WARNING, "the settings were not checked, because the sidecar cannot be imported")
        )
    code = next((finding.exit_code for finding in found if finding.exit_code), 0)
    code = code or int(any(finding.status is Status.WARNING for finding in found))
    console.findings(found, {"healthy": code == 0})
    ctx.exit(code)


def _deployment(config: Path | None, upstream: str | None, rest_ports: Sequence[int]) -> Sequence[Finding]:
    """Findings about the settings of a sidecar, if there are any, and about its upstream server."""
    from guard.diagnostics.exposure import REST_PORTS, exposures
    from guard.diagnostics.preflight import preflight
    from guard.sidecar.inference.proxy import upstream_endpoint
    from guard.sidecar.model_settings import RENAMED
    from guard.sidecar.setting_sources import ENVIRONMENT_PREFIX
    from guard.sidecar.settings import Settings
    from guard.sidecar.transport.channels import Endpoint

    ports = tuple(dict.fromkeys((*REST_PORTS, *rest_ports)))
    names = {f"{ENVIRONMENT_PREFIX}{name}".upper() for name in (*Settings.model_fields, *RENAMED)}
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
    """Turn the finding that a port or the folder is taken into a good one if the sidecar itself is running there."""
    from guard.diagnostics.rest import fetch
    from guard.sidecar.addresses import split_address

    places = {
        "listen": settings.listen,
        "metrics": settings.metrics,
        "admin": settings.admin,
        "dashboard": settings.dashboard,
        "lock": settings.state_dir,
    }
    if finding.exit_code and finding.subject in places:
        status, body = fetch(*split_address(settings.metrics), "/metrics") or (0, b"")
        if status == 200 and b"guard_" in body:
            return Finding(finding.subject, Status.OK, f"{places[finding.subject]} is taken by a running sidecar")
    return finding
