"""Try an installed wheel, in an environment that has it without its extras.

python scripts/smoke.py WHEEL SOURCE

SOURCE is the tree that the wheel was built from.
"""

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

GUARD = str(Path(sys.executable).with_name("guard"))


def run(*command: str, codes: tuple[int, ...] = (0,)) -> str:
    """What a command prints; its exit code must be one of `codes`."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode not in codes:
        sys.exit(f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout}{result.stderr}")
    return result.stdout


def check_contents(wheel: Path, source: Path) -> None:
    """Every file of the package is in the wheel (templates, tables, types), and nothing else."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {str(path.relative_to(source)) for path in (source / "guard").rglob("*") if path.is_file()}
    if names != files:
        sys.exit(f"{wheel.name} lacks {sorted(files - names)} and has {sorted(names - files)} besides")


def main() -> None:
    """Fail with a message if anything is not as it should be."""
    wheel, source = map(Path, sys.argv[1:])
    check_contents(wheel, source)
    if importlib.util.find_spec("torch"):
        sys.exit("torch is installed; only what serves should be")
    version = wheel.name.split("-")[1]
    if run(GUARD, "--version") != f"guard, version {version}\n":
        sys.exit(f"guard --version does not say {version}")
    run(GUARD, "--help")
    run(sys.executable, "-c", "import guard.sidecar, guard.testing, guard.profiles, guard.evidence")
    # 1 is for warnings: a machine without a GPU is no fault of the wheel.
    findings = json.loads(run(GUARD, "doctor", "--json", codes=(0, 1)))["findings"]
    if failed := [finding for finding in findings if finding["status"] == "failed"]:
        sys.exit(f"guard doctor: {failed}")
    sys.stdout.write(f"{wheel.name} works with Python {sys.version.split()[0]}\n")


if __name__ == "__main__":
    main()
