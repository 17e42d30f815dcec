"""Every document of some YAML files as JSON, one on each line; run by a Python that has PyYAML."""

import json
import sys
from pathlib import Path

import yaml  # type: ignore[import-untyped]

for path in sys.argv[1:]:
    for document in yaml.safe_load_all(Path(path).read_text("utf-8")):
        sys.stdout.write(json.dumps({"file": path, "document": document}) + "\n")
