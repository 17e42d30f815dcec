"""The program `guard`: one thin module per command."""

import sys

import click

from guard import __version__
from guard.cli import beginning  # noqa: F401 - before what takes time to load
from guard.cli.attack import attack
from guard.cli.calibrate import calibrate
from guard.cli.certify import certify
from guard.cli.convert import convert
from guard.cli.demo import demo
from guard.cli.doctor import doctor
from guard.cli.evaluate import evaluate
from guard.cli.export import export
from guard.cli.log import log
from guard.cli.repair import repair
from guard.cli.scan import scan
from guard.cli.serve import serve
from guard.cli.top import top
from guard.cli.triggers import triggers
from guard.cli.verify import verify
from guard.cli.vet import vet
from guard.errors import GuardError, UsageError

__all__ = ["cli", "main"]

EXAMINING = {"jinja2", "markupsafe", "matplotlib", "onnxscript", "open_clip", "scipy", "sklearn", "torch"}
"""Modules that only the extra `vet` installs."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="guard")
def cli() -> None:
    """Find backdoors in CLIP image classifiers, and requests that carry a trigger.

    Exit codes: 0 no evidence of a backdoor, or success; 1 backdoored, or failure; 2 wrong usage; 3 inconclusive; 4
    unreadable or refused input.
    """


for command in (
    vet, calibrate, export, certify, verify, repair, convert, scan, serve, top, log, triggers, attack, evaluate, doctor,
    demo,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    """Run the program; every expected error becomes one line and an exit code."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = 2
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("guard: interrupted; the same command will reuse finished training and searches", err=True)
        code = 130
    except GuardError as error:
        click.echo(f"guard: {error}", err=True)
        code = error.exit_code
    except ModuleNotFoundError as error:
        # The serving part can be installed without the packages that vetting needs.
        if error.name is None or error.name.partition(".")[0] not in EXAMINING:
            raise
        click.echo(f"guard: this needs {error.name}; install it with: pip install 'clip-guard[vet]'", err=True)
        code = UsageError.exit_code
    sys.exit(code or 0)
