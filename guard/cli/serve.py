"""`guard serve`."""

import os
import signal
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from guard.cli import options
from guard.cli.console import Console
from guard.errors import UsageError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from guard.sidecar import Settings


class SettingsCommand(click.Command):
    """A command with an option for each setting of a sidecar.

    The options are made when they are needed: the settings belong to the sidecar, which takes long to import and
    cannot be imported at all where `guard doctor` is called to find out why.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The options of the settings, then those of the command itself."""
        return [*_options(), *super().get_params(ctx)]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line, and name the new option to those who give an old one."""
        from guard.sidecar.model_settings import RENAMED

        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            new = RENAMED.get(error.option_name.removeprefix("--"))
            if new is None:
                raise
            raise UsageError(f"{error.option_name} is now called {_option(new)}") from error


@cache
def _options() -> tuple[click.Option, ...]:
    # gRPC's own lines on standard error do not have the form of this log; a variable that is set brings them back.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from guard.sidecar.settings import Settings

    made = []
    for name, field in Settings.model_fields.items():
        if name == "models":
            continue  # entries of a file, which no option can hold
        kind, option = _value_type(field), _option(name)
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        flags = f"{option}/{_option(f'no_{name}')}" if kind is bool else option
        made.append(
            click.Option(
                [flags],
                type=None if kind is bool else _click_type(kind),
                # None: not given, so that the environment or the file decides.
                default=None,
                metavar=str(extra["metavar"]) if "metavar" in extra else None,
                help=f"{field.description}{_default(name, field)}",
            )
        )
    return tuple(made)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _value_type(field: "FieldInfo") -> Any:  # noqa: ANN401 - a type, or what typing has instead of one
    """The type of a setting, without the None of one that may be missing."""
    parts = get_args(field.annotation)
    return parts[0] if NoneType in parts else field.annotation


def _click_type(kind: Any) -> Any:  # noqa: ANN401 - as above
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if get_origin(kind) is tuple:
        return str  # with commas
    if issubclass(kind, StrEnum):
        return click.Choice([str(member) for member in kind])
    return options.PATH if kind is Path else kind


def _default(name: str, field: "FieldInfo") -> str:
    """The default in the form in which it would be given; nothing if the description tells what happens without."""
    value = field.default
    if value is None or value == ():
        return ""
    shown = _option(name if value else f"no_{name}").removeprefix("--") if isinstance(value, bool) else str(value)
    return f"  [default: {shown.removesuffix('.0')}]"


@click.command(
    cls=SettingsCommand, short_help="Serve a vetted model, or proxy the server that serves it, and screen requests."
)
@click.option(
    "--config",
    type=options.PATH,
    help="TOML file with settings. Its keys are the names of the options with underscores, such as state_dir.",
)
@click.option("--check", is_flag=True, help="Report whether the sidecar could start, and exit without serving.")
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
    """Serve a vetted model, or proxy the inference server that already serves it, and screen every request.

    An ADDRESS is HOST:PORT, or unix:PATH for a Unix socket. Every setting can also be given as an environment variable,
    such as GUARD_STATE_DIR, or in the configuration file. The command line takes precedence over the environment, and
    the environment over the file.

    The command prints one line of JSON as soon as it serves. SIGTERM lets running requests finish and ends it; SIGHUP
    makes it read certificates, profiles and models again.
    """
    from guard.sidecar import Settings
    from guard.sidecar import serve as run
    from guard.sidecar.telemetry.logs import configure

    if as_json and not check:
        raise UsageError("--json needs --check; without it, guard serve prints one line of JSON anyway")
    settings = Settings.load(config, **values)
    if check:
        ctx.exit(_check(settings, Console(as_json=as_json)))
    configure(settings.log_format)
    run(settings)
    # The state is saved. A second signal, which comes while the interpreter ends, must not make that a failure.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _check(settings: "Settings", console: Console) -> int:
    from guard.diagnostics.preflight import preflight

    findings = preflight(settings)
    code = next((finding.exit_code for finding in findings if finding.exit_code), 0)
    console.findings(findings, {"ready": code == 0})
    return code
