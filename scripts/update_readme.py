"""Put the table that a demo printed into the README.

guard demo > table.txt; python scripts/update_readme.py table.txt
"""

import re
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
MARKER = "<!-- demo table -->"

table = Path(sys.argv[1]).read_text(encoding="utf-8").rstrip()
text = README.read_text(encoding="utf-8")
block = rf"{MARKER}\n(?:\n?```[a-z]*\n.*?```\n)*"
shown = f"{MARKER}\n\n```text\n{table}\n```\n"
README.write_text(re.sub(block, lambda _: shown, text, count=1, flags=re.DOTALL), encoding="utf-8")
