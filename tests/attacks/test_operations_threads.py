"""Threads are counted by what a container may use, and nothing but the log writes to standard error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from guard import _cpus
from guard._cpus import usable_cpus
from guard.sidecar.settings import Settings


def quotas(tmp_path: Path, groups: str, files: dict[str, str]) -> list[float]:
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        file = tmp_path / "root" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return list(_cpus._quotas(tmp_path / "groups", tmp_path / "root"))


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, [1.5]),
        ("0::/\n", {"cpu.max": "max 100000\n"}, []),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, [2.0]),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000", "cpu.max": "100000 100000"}, [4.0, 1.0]),
        ("0::/../../pod/c\n", {"cpu.max": "50000 100000"}, [0.5]),
        ("3:cpu,c:/\n", {"cpu,c/cpu.cfs_quota_us": "300000", "cpu,c/cpu.cfs_period_us": "100000"}, [3.0]),
        ("3:cpuacct,cpu:/docker/1\n", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, [3.0]),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
        ("2:cpuset:/a\n1:memory:/a\n", {"cpuset/a/cpu.max": "100000 100000"}, []),
        ("0::/\n", {"cpu.max": "nonsense"}, []),
        ("0::/\n", {"cpu.max": "100000 0"}, []),
        ("nonsense\n\n", {}, []),
    ],
)  # fmt: skip
def test_quotas_of_both_versions_are_found(
    tmp_path: Path, groups: str, files: dict[str, str], expected: list[float]
) -> None:
    found = quotas(tmp_path, groups, files)
    assert sorted(set(found)) == sorted(expected)


@pytest.mark.parametrize(("quota", "threads"), [("50000", 1), ("150000", 2), ("max", 32)])
def test_what_is_least_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, threads: int) -> None:
    quotas(tmp_path, "0::/\n", {"cpu.max": f"{quota} 100000"})
    monkeypatch.setattr(_cpus, "_PROCESS", tmp_path / "groups")
    monkeypatch.setattr(_cpus, "_ROOT", tmp_path / "root")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    assert usable_cpus() == threads


@pytest.mark.parametrize(("given", "processes", "expected"), [(None, 1, 8), (None, 3, 2), (None, 16, 1), (5, 3, 5)])
def test_processes_share_the_processors(
    monkeypatch: pytest.MonkeyPatch, given: int | None, processes: int, expected: int
) -> None:
    monkeypatch.setattr("guard.sidecar.settings.usable_cpus", lambda: 8)
    assert Settings.model_construct(threads=given, processes=processes).forward_threads == expected


def test_a_model_uses_the_threads_that_there_are_and_writes_no_lines(exported: Path) -> None:
    """In a process that may use one processor; ONNX Runtime alone would start a thread for each of the machine."""
    program = (
        "import os, sys; from pathlib import Path\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from guard.classifiers import ExportedClassifier\n"
        "import threading; before = len(os.listdir('/proc/self/task'))\n"
        "ExportedClassifier(Path(sys.argv[1]), gpu=False)\n"
        "one = len(os.listdir('/proc/self/task')) - before\n"
        "kept = ExportedClassifier(Path(sys.argv[1]), gpu=False, threads=4)\n"
        "print(one, len(os.listdir('/proc/self/task')) - before - one)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(exported)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["0", "3"]
    assert done.stderr == ""


def test_a_damaged_model_is_an_error_and_no_line_of_another_form() -> None:
    program = (
        "import onnxruntime, guard.classifiers.exported\n"
        "try: onnxruntime.InferenceSession(b'damaged', providers=['CPUExecutionProvider'])\n"
        "except Exception: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("refused\n", "")
