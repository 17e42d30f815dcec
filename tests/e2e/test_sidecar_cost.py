import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGETS = {
    "direct",
    "bytes-only proxy",
    "guard, unread",
    "shadow",
    "tag",
    "block",
    "shadow, no screening",
    "tag, no screening",
}


def test_every_kind_of_proxy_is_compared_with_a_direct_call_and_a_bare_proxy(tmp_path: Path) -> None:
    tiny = ["--requests", "10", "--seconds", "0.05", "--banks", "200"]
    command = [sys.executable, "-m", "benchmarks.sidecar_cost", "--parts", "proxy", *tiny, "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)

    found: dict[str, list[list[str]]] = {}
    for line in (tmp_path / "sidecar-cost.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in TARGETS:
            found.setdefault(cells[0], []).append(cells[1:])
    assert found.keys() == TARGETS
    for name, rows in found.items():
        assert len(rows) == 2, "one row for each size of request"
        for p50, p95, added, _, rate in rows:
            assert 0 < float(p50) <= float(p95)
            assert float(rate) > 0
            # How much is added is what the benchmark finds out; only the direct call is compared with itself.
            assert float(added) == 0 or name != "direct"
