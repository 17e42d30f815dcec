"""The processes of a soak, what they are given, and what they leave behind."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from guard.evidence import EVIDENCE_FILE, EvidenceLog
from guard.profiles import Profile
from guard.triggers import Patch
from guard.vetting import BUDGETS, ReconstructedTrigger, ReferenceModel, Verdict, Vetting
from tests.conftest import SIZE, random_images
from tests.toy import checkerboard, toy

ALPHA, TARGET = 0.01, 3
CLEAN, TRIGGERED = 4000, 1000
_CALIBRATION = 1000
_SECONDS = 60.0
"""For a process to start, to become ready and to end."""
_ROOT = Path(__file__).parents[2]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Pool:
    """Images, `CLEAN` clean ones before `TRIGGERED` triggered ones, and what is to become of them.

    Attributes:
        pixels: Shape [N, 3, S, S].
        embeddings: Shape [N, D].
        flags: Whether the profile's detector flags them, outside of any sidecar; shape [N].
    """

    pixels: Floats
    embeddings: Floats
    flags: NDArray[np.bool_]


class Program:
    """A process that says in one line of JSON where it serves.

    Args:
        command: To start it.
        log: Where its standard error goes.
    """

    def __init__(self, command: list[str], log: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GUARD_")}
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, cwd=_ROOT)
        self.pid, self.announced = self._process.pid, dict[str, Any]()

    def started(self) -> None:
        """Wait until it serves."""
        stream = self._process.stdout
        line = stream.readline() if stream and select.select([stream], [], [], _SECONDS)[0] else b""
        if not line:
            said = self._log.read_text(encoding="utf-8").strip().splitlines() or ["nothing"]
            raise SystemExit(f"a process did not start; it said: {said[-1]}")
        self.announced = json.loads(line)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the exit code."""
        self._process.send_signal(number)
        return self._process.wait(_SECONDS)

    def close(self) -> None:
        """Kill it if it still runs."""
        self._process.kill()
        self._process.communicate()


class Stage:
    """An upstream server and sidecars before it, in a folder of their own.

    Args:
        folder: Empty.
        seed: Of the images.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._programs = folder, list[Program]()
        self.pool = _prepare(folder, seed)
        # Not one that the system gives to connections: a client that tries again and again would meet itself there.
        self.ports = _free_ports(3)
        (folder / "arrivals").touch()

    def upstream(self) -> Program:
        """Start the upstream server, on the same port each time."""
        files = [str(self._folder / name) for name in ("weights.npy", "arrivals")]
        return self._start("benchmarks.soak.upstream", *files, f"127.0.0.1:{self.ports[0]}")

    def sidecar(self, place: int = 1, *, drain_delay: float = 0.0) -> Program:
        """Start a sidecar on one of two ports, 1 or 2, each with its own folder for state."""
        return self._start(
            *("guard", "serve", "--profile", str(self._folder / "profile"), "--mode", "tag"),
            *("--upstream", f"127.0.0.1:{self.ports[0]}", "--embedding-output", "embedding"),
            *("--listen", f"127.0.0.1:{self.ports[place]}", "--metrics", "127.0.0.1:0"),
            # Nothing may be pruned that is counted at the end, and a slow machine is no fault of the sidecar.
            *("--state-dir", str(self._folder / f"state-{place}"), "--evidence-rows", "100000000", "--timeout", "10"),
            *("--drain-delay", str(drain_delay), "--log-format", "text"),
        )

    def _start(self, module: str, *arguments: str) -> Program:
        log = self._folder / f"{len(self._programs)}.log"
        program = Program([sys.executable, "-m", module, *arguments], log)
        self._programs.append(program)
        program.started()
        return program

    def arrivals(self) -> dict[int, int]:
        """How often each number arrived at the upstream server."""
        numbers, counts = np.unique(np.fromfile(self._folder / "arrivals", "<i8"), return_counts=True)
        return dict(zip(numbers.tolist(), counts.tolist(), strict=True))

    def evidence(self) -> list[tuple[int, int]]:
        """Number and row of each image in the evidence logs."""
        logs = [EvidenceLog(state / EVIDENCE_FILE) for state in self._folder.glob("state-*")]
        return [(int(record.request_id), record.image) for log in logs for record in log.records()]

    def logged(self) -> Counter[str]:
        """The errors in the logs of the processes, without their times and tracebacks."""
        lines = (line for log in self._folder.glob("*.log") for line in log.read_text(encoding="utf-8").splitlines())
        return Counter(line.partition("ERROR")[2].strip(" :") for line in lines if "ERROR" in line)

    def close(self) -> None:
        """Kill what still runs."""
        for program in self._programs:
            program.close()


def ready(sidecar: Program) -> None:
    """Wait until a sidecar says that it is ready."""
    end = time.monotonic() + _SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"http://{sidecar.announced['metrics']}/readyz", timeout=_SECONDS):
                return
        except urllib.error.HTTPError as error:
            error.close()
        if time.monotonic() > end:
            raise SystemExit(f"a sidecar was not ready within {_SECONDS:g} s")
        time.sleep(0.05)


def _prepare(folder: Path, seed: int) -> Pool:
    """A profile of a classifier of one matrix, as after vetting; the matrix for the upstream server; images."""
    classifier = toy(target=TARGET)
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, : SIZE // 2, : SIZE // 2] = 1
    trigger = Patch(mask, ((checkerboard() + 1) / 2).expand(3, -1, -1).clone())
    found = ReconstructedTrigger("patch-1", TARGET, trigger, 9.0, 0.9, 1e-6, classifier.head[TARGET])
    vetting = Vetting(
        verdict=Verdict("backdoored", TARGET, 1e-6, ("patch",), 0.01, ("made for a soak",)),
        results=(),
        checks=(),
        triggers=(found,),
        effort=BUDGETS["quick"],
        images=(0, 0),
        reference_model=ReferenceModel("base", "0" * 64, 1.0, 0),
        device="cpu",
        seconds=0.0,
        passes=0,
    )
    images = random_images(_CALIBRATION + CLEAN + TRIGGERED, seed=seed)
    profile = Profile.build(classifier, vetting).calibrate(classifier, images[:_CALIBRATION], ALPHA)
    profile.save(folder / "profile")
    weights = classifier.model.visual.weight.detach().numpy().T
    np.save(folder / "weights.npy", weights)
    clean, others = images[_CALIBRATION:-TRIGGERED], images[-TRIGGERED:]
    pixels: Floats = torch.cat([clean, trigger.stamp(others)]).numpy().astype(np.float32) / np.float32(255)
    embeddings: Floats = pixels.reshape(len(pixels), -1) @ weights
    return Pool(pixels, embeddings, profile.detector().score(embeddings).flags)


def _free_ports(count: int) -> list[int]:
    span = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()
    low, high = map(int, span)
    generator, found = np.random.default_rng(), list[int]()
    while len(found) < count:
        port = int(generator.integers(10_000, 65_536))
        if low <= port <= high or port in found:
            continue
        with socket.socket() as listener:
            if listener.connect_ex(("127.0.0.1", port)):
                found.append(port)
    return found
