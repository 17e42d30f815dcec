"""The README is executed: its help blocks are the program's, and its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import guard
from guard.cli import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HELP_BLOCK = re.compile(r"```console\n\$ guard( ?[a-z]*) --help\n(.*?)```", re.DOTALL)


def help_of(command: str) -> str:
    arguments = [command.strip(), "--help"] if command.strip() else ["--help"]
    result = CliRunner().invoke(cli, arguments, prog_name="guard", terminal_width=100)
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize(("command", "block"), HELP_BLOCK.findall(README), ids=lambda value: str(value)[:12])
def test_help_blocks_are_the_programs_own(command: str, block: str) -> None:
    assert block == help_of(command)


def test_every_command_has_its_help_in_the_readme() -> None:
    assert {command.strip() for command, _ in HELP_BLOCK.findall(README)} == {"", *cli.commands}


def test_options_in_the_readmes_examples_exist() -> None:
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.match(r"(?:GUARD_\w+=\S+ )*guard (\w+)(.*)", line):
                command, rest = match.groups()
                known = {option for parameter in cli.commands[command].params for option in parameter.opts}
                assert set(re.findall(r"(?<=\s)--[a-z-]+", rest)) <= known, line


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_module_runs_as_a_program() -> None:
    result = subprocess.run([sys.executable, "-m", "guard", "--version"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"guard, version {guard.__version__}\n")
