"""The commands and links of the README exist."""

import re
import subprocess
import sys
from pathlib import Path

import click

from guard import __version__
from guard.cli import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_options_in_the_readmes_examples_exist() -> None:
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.match(r"(?:GUARD_\w+=\S+ )*guard (\w+)(.*)", line):
                command, rest = match.groups()
                called = cli.commands[command]
                known = {option for each in called.get_params(click.Context(called)) for option in each.opts}
                assert set(re.findall(r"(?<=\s)--[a-z-]+", rest)) <= known, line


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_module_runs_as_a_program() -> None:
    result = subprocess.run([sys.executable, "-m", "guard", "--version"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"guard, version {__version__}\n")
