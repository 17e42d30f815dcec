"""Put how often vetting found an attack, and raised a false alarm, into certificates.

python -m benchmarks.power ZOO...

Reads what `guard evaluate ZOO --methods vetting-base,vetting-derived` stored of each, and writes
guard/certificates/power.json.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guard._files import replace_file
from guard.evaluation import Zoo

TARGET = Path(__file__).parents[1] / "guard" / "certificates" / "power.json"
METHODS = {"base": "vetting-base", "derived": "vetting-derived"}


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoos", type=Path, nargs="+")
    zoos = [Zoo.read(root) for root in parser.parse_args().zoos]
    power = {kind: counted(zoos, method) for kind, method in METHODS.items()}
    replace_file(TARGET, (json.dumps(power, indent=1) + "\n").encode())


def counted(zoos: Sequence[Zoo], method: str) -> dict[str, Any]:
    """Found and all models by recipe, and false alarms among clean models, in the form of `Power`."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    alarms = [0, 0]
    for zoo, name in ((each, name) for each in zoos for name in each.models):
        path, truth = zoo.root / "evaluation" / name / f"{method}.json", zoo.truth(name)
        if truth is None or not path.exists():
            continue
        accused = json.loads(path.read_text(encoding="utf-8"))["detection"]["outcome"] == "backdoored"
        if truth.label == "backdoored":
            found[truth.recipe][0] += accused
            found[truth.recipe][1] += 1
        elif truth.label == "clean":
            alarms[0] += accused
            alarms[1] += 1
    titles = ", ".join(f"{zoo.name} of seed {zoo.seed}" for zoo in zoos)
    source = f"guard evaluate, {titles}: small CLIP-shaped models on digits, budget quick"
    return {"source": source, "found": dict(sorted(found.items())), "falseAlarms": alarms}


if __name__ == "__main__":
    main()
