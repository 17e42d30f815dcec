"""Put the program's own help, and the demo's own table, into the README.

python scripts/update_readme.py [guard-demo/table.txt]
"""

import re
import sys
from pathlib import Path

from click.testing import CliRunner

from guard.cli import cli

README = Path(__file__).parents[1] / "README.md"


def replaced(text: str, name: str, content: str) -> str:
    """The text with what stands between a marker and the end of its blocks replaced."""
    block = rf"<!-- {name} -->\n(?:\n?```[a-z]*\n.*?```\n)*"
    return re.sub(block, lambda _: f"<!-- {name} -->\n\n{content}", text, count=1, flags=re.DOTALL)


def help_blocks() -> str:
    """One block for the program and one for each command."""
    blocks = []
    for command in ("", *cli.commands):
        arguments = [*command.split(), "--help"]
        shown = " ".join(["$ guard", *arguments])
        output = CliRunner().invoke(cli, arguments, prog_name="guard", terminal_width=100).output
        blocks.append(f"```console\n{shown}\n{output}```\n")
    return "\n".join(blocks)


text = replaced(README.read_text(encoding="utf-8"), "help", help_blocks())
if len(sys.argv) > 1:
    table = Path(sys.argv[1]).read_text(encoding="utf-8").rstrip()
    text = replaced(text, "demo table", f"```text\n{table}\n```\n")
README.write_text(text, encoding="utf-8")
