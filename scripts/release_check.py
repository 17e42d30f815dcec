"""See whether this commit can be released.

python scripts/release_check.py VERSION

The tag vVERSION, the package's version and the newest heading of the changelog must agree, the changelog must have the
form of Keep a Changelog, nothing may be uncommitted, and the wheel must pass its smoke test.
"""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
RELEASE = re.compile(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d{2}-\d{2})")


def sections(changelog: str) -> dict[str, str]:
    """Text of each release, by its heading; the newest first."""
    parts = re.split(r"^## (.*)$", changelog, flags=re.MULTILINE)
    return {heading.strip(): text for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


def newest(changelog: str) -> str | None:
    """Version of the newest release; None if nothing was released, or some changes were not."""
    heading, text = next(iter(sections(changelog).items()), ("", ""))
    if heading == "[Unreleased]" and not text.strip():
        heading = [*sections(changelog), ""][1]
    found = RELEASE.fullmatch(heading)
    return ".".join(found.groups()[:3]) if found else None


def problems(changelog: str) -> list[str]:
    """What is against the form of Keep a Changelog 1.1.0."""
    found = [] if changelog.startswith("# Changelog\n") else ["the first line must be '# Changelog'"]
    headings = re.findall(r"^## (.*)$", changelog, flags=re.MULTILINE)
    found += [f"'{heading}' stands there twice" for heading in set(headings) if headings.count(heading) > 1]
    releases = []
    for place, heading in enumerate(headings):
        if release := RELEASE.fullmatch(heading):
            releases.append((tuple(map(int, release.groups()[:3])), release[4]))
        elif heading != "[Unreleased]" or place:
            found.append(f"'{heading}' must be '[VERSION] - YYYY-MM-DD', or '[Unreleased]' at the top")
    for (version, date), (older, earlier) in pairwise(releases):
        if version <= older or date < earlier:
            found.append(f"{'.'.join(map(str, version))} must not stand above {'.'.join(map(str, older))}")
    for heading, text in sections(changelog).items():
        found += [f"{heading}: {problem}" for problem in _problems_of_release(text, released=heading != "[Unreleased]")]
    return found


def _problems_of_release(text: str, *, released: bool) -> list[str]:
    before, *parts = re.split(r"^### (.*)$", text, flags=re.MULTILINE)
    kinds, entries = parts[::2], parts[1::2]
    found = [f"'{kind}' must be one of {', '.join(KINDS)}" for kind in kinds if kind not in KINDS]
    found += [f"'{kind}' stands there twice" for kind in set(kinds) if kinds.count(kind) > 1]
    if re.search(r"^[-*] ", before, flags=re.MULTILINE):
        found.append("an entry stands under no kind of change")
    found += [
        f"'{kind}' has no entry"
        for kind, text in zip(kinds, entries, strict=True)
        if not re.search(r"^- \S", text, flags=re.MULTILINE)
    ]
    if released and not kinds:
        found.append("it tells no change")
    return found


def _git(*arguments: str) -> str:
    return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Print each reason not to release, and end with 1 if there is one."""
    if len(sys.argv) != 2:
        sys.exit("usage: make release-check VERSION=1.2.3")
    version, changelog = sys.argv[1], (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = [f"CHANGELOG.md: {problem}" for problem in problems(changelog)]
    if newest(changelog) != version:
        found.append(f"CHANGELOG.md: the newest heading must be '[{version}] - DATE', with nothing unreleased above it")
    from guard import __version__

    if __version__ != version:
        found.append(f"guard.__version__ is {__version__}, not {version}")
    if _git("tag", "--list", f"v{version}") and _git("rev-list", "-1", f"v{version}") != _git("rev-parse", "HEAD"):
        found.append(f"the tag v{version} is of another commit")
    if others := [tag for tag in _git("tag", "--points-at", "HEAD", "--list", "v*").split() if tag != f"v{version}"]:
        found.append(f"this commit has the tag {others[0]}")
    if changes := _git("status", "--porcelain"):
        found.append(f"not everything is committed:\n{changes}")
    if not found and subprocess.run([ROOT / "scripts/smoke-wheel", sys.executable], check=False).returncode:
        found.append("the wheel failed its smoke test")
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()
