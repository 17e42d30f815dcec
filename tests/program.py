"""The program `guard`, run inside the test's own process.

A process of its own costs seconds, nearly all of them the import of torch. What depends on being one (signals, exit,
what is imported) is tested with processes.
"""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from subprocess import CompletedProcess
from unittest import mock

from guard.cli import main


def guard(*arguments: object) -> "CompletedProcess[str]":
    """Run `guard ARGUMENTS`, as a process would that is no terminal."""
    words = ["guard", *map(str, arguments)]
    out, error = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", words), redirect_stdout(out), redirect_stderr(error):
        try:
            main()
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    return CompletedProcess(words, code, out.getvalue(), error.getvalue())
