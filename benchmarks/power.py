"""Put how often vetting found an attack, and raised a false alarm, into certificates.

python -m benchmarks.power ZOO [--evaluation FOLDER]

Reads what `guard evaluate ZOO --methods vetting-base,vetting-derived` stored, and writes guard/certificates/power.json.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from guard._files import replace_file
from guard.evaluation import Zoo

TARGET = Path(__file__).parents[1] / "guard" / "certificates" / "power.json"
METHODS = {"base": "vetting-base", "derived": "vetting-derived"}


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--evaluation", type=Path)
    given = parser.parse_args()
    zoo = Zoo.read(given.zoo)
    folder: Path = given.evaluation or given.zoo / "evaluation"
    power = {kind: counted(zoo, folder, method) for kind, method in METHODS.items()}
    replace_file(TARGET, (json.dumps(power, indent=1) + "\n").encode())


def counted(zoo: Zoo, folder: Path, method: str) -> dict[str, Any]:
    """Found and all models by recipe, and false alarms among clean models, in the form of `Power`."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    alarms = [0, 0]
    for name in zoo.models:
        path, truth = folder / name / f"{method}.json", zoo.truth(name)
        if truth is None or not path.exists():
            continue
        accused = json.loads(path.read_text(encoding="utf-8"))["detection"]["outcome"] == "backdoored"
        if truth.label == "backdoored":
            found[truth.recipe][0] += accused
            found[truth.recipe][1] += 1
        elif truth.label == "clean":
            alarms[0] += accused
            alarms[1] += 1
    source = f"guard evaluate, zoo {zoo.name} of seed {zoo.seed}, small CLIP-shaped models on digits, budget quick"
    return {"source": source, "found": dict(sorted(found.items())), "falseAlarms": alarms}


if __name__ == "__main__":
    main()
