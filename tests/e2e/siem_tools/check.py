"""Check each line of a file as a Detection Finding of OCSF; run by a Python that has its models."""

import sys
from pathlib import Path

from py_ocsf_models.events.findings.detection_finding import DetectionFinding  # type: ignore[import-not-found]

for line in Path(sys.argv[1]).read_text("utf-8").splitlines():
    DetectionFinding.model_validate_json(line)
