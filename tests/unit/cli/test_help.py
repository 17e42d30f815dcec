"""The help of the program: complete, in sentences, and the same as in docs/cli.md."""

import re
from pathlib import Path

import click
import pytest

from guard.cli import cli
from scripts.generate_docs import commands

DOCUMENT = Path(__file__).parents[3] / "docs" / "cli.md"
COMMANDS = {"guard": cli, **cli.commands}


def test_the_document_of_the_commands_is_the_programs_own_help() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == commands()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(name: str) -> None:
    text = COMMANDS[name].help or ""
    assert text[:1].isupper()
    assert text.rstrip().endswith(".")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_for_without_pointing_at_its_neighbours(name: str) -> None:
    command = COMMANDS[name]
    for option in command.get_params(click.Context(command)):
        if not isinstance(option, click.Option):
            continue
        text, _, default = (option.help or "").partition("  [")
        assert len(text.split()) > 2, option.opts
        assert text[0].isupper(), option.opts
        assert text.endswith("."), option.opts
        assert not default or default.endswith("]"), option.opts
        # Words that only the option before would explain.
        assert not re.search(r"^(Of|Its|Their|Them|There)\b|\b(of that|likewise)\b", text), option.opts


def test_the_help_names_no_command_that_does_not_exist_yet() -> None:
    planned = {"certify", "verify", "repair", "scan"} - set(cli.commands)
    assert not planned & set(re.findall(r"\bguard ([a-z]+)\b", commands()))
