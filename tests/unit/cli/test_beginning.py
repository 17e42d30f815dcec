"""Threads of a program in a container that may use fewer processors than the machine has."""

import os

import pytest

from guard.cli import beginning

NAMES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for name in NAMES:
        monkeypatch.setenv(name, "")


def test_libraries_are_told_what_the_container_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginning, "usable_cpus", lambda: 3)
    beginning.begin(["vet"], 2)
    assert [os.environ[name] for name in NAMES] == ["3"] * 3


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginning, "usable_cpus", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    beginning.begin(["vet"], 2)
    assert [os.environ[name] for name in NAMES] == ["8", "", ""]


def test_a_whole_machine_is_left_to_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginning, "usable_cpus", lambda: 64)
    beginning.begin(["vet"], 2)
    assert [os.environ[name] for name in NAMES] == [""] * 3
