"""Signals: SIGTERM in the first moments of a container, and SIGHUP at any moment."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from guard.cli.beginning import begin
from guard.sidecar.host.server import _keep_fresh
from tests.integration.sidecar.conftest import (
    Floats,
    Launcher,
    Sidecar,
    connected,
    environment,
    eventually,
    infer_request,
    launch,
    served_profile,
)

__all__ = ["launch", "served_profile"]
"""Fixtures."""


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Signals as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_process_of_a_container_ends_at_sigterm_from_the_beginning() -> None:
    begin(["vet"], process=1)
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM


def test_other_processes_are_left_as_they_are() -> None:
    # Whatever started the tests may have chosen to ignore a signal.
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)]
    begin(["vet"], process=7)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)] == before


def test_a_sidecar_outlives_sighup_from_the_beginning() -> None:
    begin(["serve"], process=7)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_both_are_set_before_anything_large_is_loaded() -> None:
    program = (
        "import sys, signal, os; os.getpid = lambda: 1; sys.argv = ['guard', 'serve']; import guard.cli\n"
        "print(callable(signal.getsignal(signal.SIGTERM)), signal.getsignal(signal.SIGHUP) is signal.SIG_IGN,\n"
        "      sorted({'grpc', 'numpy', 'onnxruntime', 'pydantic', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "True True []"


def told(sidecar: Sidecar, times: int) -> bool:
    return sidecar.stderr.count("SIGHUP: ") >= times


@pytest.mark.parametrize("processes", [1, 2])
def test_sighup_reads_files_again_and_ends_nothing(
    launch: Launcher,
    exported: Path,
    served_profile: Path,
    processes: int,
) -> None:
    arguments = ("--model", exported, "--profile", served_profile, "--processes", str(processes))
    with launch(*arguments) as sidecar, connected(sidecar.address) as client:
        for expected in (processes, 2 * processes, 3 * processes):
            sidecar.process.send_signal(signal.SIGHUP)
            eventually(partial(told, sidecar, expected), "the reading")
            assert client.call("ServerLive") is not None
        assert sidecar.process.poll() is None


def test_sighup_while_it_starts_ends_nothing(exported: Path, served_profile: Path) -> None:
    """Sent again and again until the sidecar serves, which it must do."""
    command = [sys.executable, "-m", "guard", "serve", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
    command += ["--model", str(exported), "--profile", str(served_profile)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment()) as process,
        ExitStack() as stack,
    ):
        stack.callback(process.kill)
        assert process.stdout is not None
        ignored = Path(f"/proc/{process.pid}/status")
        eventually(lambda: _ignores(ignored, signal.SIGHUP) or process.poll() is not None, "the beginning")
        os.set_blocking(process.stdout.fileno(), False)

        def serves() -> bool:
            process.send_signal(signal.SIGHUP)
            return bool(process.stdout and process.stdout.read())

        eventually(serves, "a sidecar that serves")
        process.terminate()
        assert process.wait(30) == 0


def _ignores(status: Path, number: int) -> bool:
    line = next(line for line in status.read_text().splitlines() if line.startswith("SigIgn:"))
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


def test_running_requests_survive_sighup(
    launch: Launcher, exported: Path, served_profile: Path, upstream_images: Floats
) -> None:
    with launch("--model", exported, "--profile", served_profile) as sidecar, connected(sidecar.address) as client:
        for row in range(20):
            sidecar.process.send_signal(signal.SIGHUP)
            assert client.infer(infer_request(upstream_images[row : row + 1])).response.outputs


@pytest.fixture
def upstream_images(exported: Path) -> "Floats":
    from guard.classifiers import ExportedClassifier
    from tests.conftest import random_images

    return ExportedClassifier(exported, threads=1, gpu=False).preprocessing.normalise(random_images(20).numpy())


class Untouched:
    """Models whose files never change."""

    async def refresh(self, *, again: bool = False) -> None:
        """Do nothing."""

    def recertify(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize("turns", range(6))
async def test_sigterm_right_after_sighup_is_not_lost(turns: int) -> None:
    """The waiting for both must not take the end of one for the end of the other."""
    asked = asyncio.Event()
    watching = asyncio.ensure_future(_keep_fresh(Untouched(), None, asked, 60.0))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asked.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    watching.cancel()
    done, _ = await asyncio.wait({watching}, timeout=5)
    watching.cancel()
    assert done
    assert watching.cancelled()
