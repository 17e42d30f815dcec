"""Several processes on one port."""

import json
import os
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import grpc
import pytest

from guard.errors import UsageError
from guard.sidecar.host.processes import supervise
from tests.integration.sidecar.conftest import WAIT_SECONDS, environment, eventually
from tests.integration.sidecar.workers import TRACE


@dataclass
class Group:
    """The program of several processes, and channels to each of them."""

    process: subprocess.Popen[bytes]
    line: dict[str, Any]
    gate: Path
    errors: Path
    channels: dict[int, grpc.Channel] = field(default_factory=dict)
    asked: int = 0

    def get(self, path: str, accept: str = "*/*") -> tuple[int, str]:
        with closing(HTTPConnection(str(self.line["metrics"]), timeout=WAIT_SECONDS)) as connection:
            connection.request("GET", path, headers={"Accept": accept})
            reply = connection.getresponse()
            return reply.status, reply.read().decode()

    def series(self, name: str) -> dict[str, float]:
        """Values by labels."""
        found = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        return {labels: float(value) for labels, value in found}

    def who(self, channel: grpc.Channel) -> int:
        self.asked += 1
        return int(channel.unary_unary("/toy.Toy/Who")(b"", timeout=WAIT_SECONDS))

    def reach(self, stack: ExitStack, number: int) -> None:
        """Open connections until so many processes have answered."""

        def reached() -> bool:
            # Channels of one process would otherwise share a connection.
            channel = grpc.insecure_channel(str(self.line["listen"]), [("grpc.use_local_subchannel_pool", 1)])
            self.channels.setdefault(self.who(stack.enter_context(channel)), channel)
            return len(self.channels) == number

        eventually(reached, f"an answer of each of {number} processes")

    def index(self, pid: int) -> str:
        """The label of a process."""
        (labels,) = (labels for labels in self.series("toy_info") if f'pid="{pid}"' in labels)
        return str(re.findall('process="(.)"', labels)[0])


def command(gate: Path, fault: str = "") -> list[str]:
    if fault:
        (gate / "fault").write_text(fault, encoding="utf-8")
    return [sys.executable, "-m", "tests.integration.sidecar.workers", str(gate)]


@contextmanager
def running(folder: Path) -> Iterator[Group]:
    """The group, with its sockets below `folder`."""
    errors, temporary = folder / "errors.log", folder / "t"
    temporary.mkdir()
    with errors.open("wb") as file, ExitStack() as stack:
        process = subprocess.Popen(
            command(folder), stdout=subprocess.PIPE, stderr=file, env={**environment(), "TMPDIR": str(temporary)}
        )
        stack.callback(process.communicate)
        stack.callback(process.kill)
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], WAIT_SECONDS)[0], "it did not start"
        line = process.stdout.readline()
        assert line, errors.read_text(encoding="utf-8")
        group = Group(process, json.loads(line), folder, errors)
        group.reach(stack, 2)
        yield group


def end(group: Group) -> None:
    """It must end well, and have said nothing more on standard output."""
    assert group.process.wait(WAIT_SECONDS) == 0, group.errors.read_text(encoding="utf-8")
    assert group.process.stdout is not None
    assert group.process.stdout.read() == b""
    assert "Traceback" not in group.errors.read_text(encoding="utf-8")
    assert list((group.gate / "t").glob("guard-*")) == []


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a name that is short enough for sockets."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_processes_share_a_port_and_one_that_is_killed_comes_back_as_soon_as_it_can(folder: Path) -> None:
    with running(folder) as group, ExitStack() as stack:
        assert group.line["processes"] == 2
        assert group.get("/readyz") == (200, '{"ready": true}\n')
        assert group.get("/healthz") == (200, '{"alive": true}\n')
        counts = group.series("toy_requests_total")
        assert set(counts) == {'process="0"', 'process="1"'}
        assert min(counts.values()) >= 1
        assert sum(counts.values()) == group.asked
        assert group.series("guard_processes") == {"": 2} == group.series("guard_processes_configured")
        exemplars = [
            line for line in group.get("/metrics", "application/openmetrics-text")[1].splitlines() if TRACE in line
        ]
        assert len(exemplars) == 2
        assert "guard_processes 2.0\n" in group.get("/metrics?name[]=guard_processes")[1]
        (private,) = (folder / "t").glob("guard-*")
        assert stat.S_IMODE(private.stat().st_mode) == 0o700

        killed, other = group.channels
        index, kept = group.index(killed), f'process="{group.index(other)}"'
        before = group.series("toy_requests_total")[kept]
        (folder / "fault").write_text("refused", encoding="utf-8")
        os.kill(killed, signal.SIGKILL)
        refused = f"process {index} ended, and is started again: the profile is of another model"
        eventually(lambda: refused in group.errors.read_text(encoding="utf-8"), "a start that fails")
        assert group.get("/readyz")[0] == 200
        assert group.get("/healthz")[0] == 200
        assert group.who(group.channels.pop(other)) == other
        (folder / "fault").unlink()
        eventually(lambda: group.series("guard_processes") == {"": 2}, "the answer of the new process")
        restarts = group.series("guard_process_restarts_total")
        assert restarts[f'process="{index}"'] >= 2
        assert restarts[kept] == 0
        assert group.get("/readyz")[0] == 200
        assert group.series("toy_requests_total")[kept] == before + 1
        assert f"process {index} ended, and is started again: it was killed by signal 9" in group.errors.read_text(
            encoding="utf-8"
        )
        group.channels.clear()
        group.reach(stack, 2)
        assert killed not in group.channels
        assert other in group.channels
        group.process.terminate()
        end(group)


def test_a_process_that_hangs_is_left_out_of_a_scrape_and_said(folder: Path) -> None:
    with running(folder) as group:
        stopped, other = group.channels
        index, kept = group.index(stopped), f'process="{group.index(other)}"'
        os.kill(stopped, signal.SIGSTOP)
        shown = group.get("/metrics")[1]
        assert "\nguard_processes 1.0\n" in shown
        assert set(re.findall("^toy_requests_total{(.*)}", shown, re.MULTILINE)) == {kept}
        status, text = group.get("/readyz")
        assert (status, json.loads(text)["reason"]) == (503, f"process {index} does not answer")
        os.kill(stopped, signal.SIGCONT)
        eventually(lambda: group.get("/readyz")[0] == 200, "readiness")
        group.process.terminate()
        end(group)


@pytest.mark.parametrize("parent", ["told", "killed"])
def test_all_processes_drain(folder: Path, parent: str) -> None:
    with running(folder) as group, ThreadPoolExecutor(2) as callers:
        calls = {
            pid: callers.submit(channel.unary_unary("/toy.Toy/Wait"), b"", WAIT_SECONDS)
            for pid, channel in group.channels.items()
        }
        eventually(lambda: all((folder / str(pid)).exists() for pid in calls), "requests in both processes")
        if parent == "told":
            group.process.terminate()
            draining = [{"ready": False, "reason": f"process {index}: draining"} for index in (0, 1)]
            eventually(lambda: json.loads(group.get("/readyz")[1]) in draining, "the reason")
            assert group.get("/healthz")[0] == 200
            assert group.series("guard_processes") == {"": 2}
        else:
            group.process.kill()
            eventually(lambda: not answers(group.line["listen"]), "the end of listening")
        (folder / "open").touch()
        assert {pid: int(call.result(WAIT_SECONDS)) for pid, call in calls.items()} == {pid: pid for pid in calls}
        if parent == "told":
            end(group)
        else:
            eventually(lambda: not list((folder / "t").glob("*/*.sock")), "the end of both processes")


def answers(address: str) -> bool:
    """Whether anybody takes connections there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=WAIT_SECONDS).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("refused", 2, "guard: the profile is of another model"),
        ("killed", 4, "guard: process . could not start: it was killed by signal 9"),
    ],
)
def test_what_cannot_start_says_so_once_and_is_not_started_again(
    folder: Path, fault: str, code: int, message: str
) -> None:
    done = subprocess.run(
        command(folder, fault), capture_output=True, text=True, env=environment(), timeout=WAIT_SECONDS, check=False
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert re.fullmatch(message + "\n", done.stderr)


def test_a_signal_to_all_during_the_start_ends_all_without_a_word(folder: Path) -> None:
    process = subprocess.Popen(
        command(folder, "slow"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        start_new_session=True,
    )
    try:
        eventually(lambda: len(list(folder.glob("[0-9]*"))) == 2, "the start of both processes")
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=WAIT_SECONDS) == (b"", b"")
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_a_port_is_not_shared_with_other_servers_even_if_they_would(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UsageError, match="the port is taken"):
            supervise(print, count=2, listen=f"127.0.0.1:{other.getsockname()[1]}", metrics="127.0.0.1:0")
    with pytest.raises(UsageError, match="share a port, not a Unix socket"):
        supervise(print, count=2, listen=f"unix:{tmp_path / 'guard.sock'}", metrics="127.0.0.1:0")
