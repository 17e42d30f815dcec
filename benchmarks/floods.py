"""Cheap floods against a sidecar with ordinary traffic beside them: latency, memory, and the time to obey SIGTERM.

python -m benchmarks.floods [--seconds S] [--pause S] [--floods scans,empty-4 ...] [--out DIR]

Each flood meets a sidecar of its own: first ordinary traffic alone, then the same traffic beside the flood, then
SIGTERM while both go on. The flood is sent by a process of its own from bytes that were made beforehand, again and
again with a pause. Client, flood and sidecar share the cores of one machine. The tower is open_clip's ViT-B-32 with
random weights.
"""

import argparse
import io
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

from benchmarks._record import RESULTS, heading
from benchmarks._synthetic import World, export_tower, image, write_profile
from guard.classifiers import ClassList, ExportedClassifier
from guard.protocol import SERVICE
from guard.protocol.inference_pb2 import ModelInferRequest

START_SECONDS, DEADLINE = 60, 30.0
DRAIN, MAX_RATIO, MAX_BEYOND_DRAIN = 1.0, 5.0, 2.0
MIB, NO_LIMIT = 2**20, [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
_INFER = f"/{SERVICE}/ModelInfer"
_IMAGES, _BANK = 64, 2000


def main() -> None:
    """Run and record; or, with --send, be the flood."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of the two halves of a measurement")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two rounds of a flood")
    parser.add_argument("--floods", default=",".join(FLOODS), help="which to run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--send", nargs=2, metavar=("ADDRESS", "METRICS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.floods.split(",")
    if unknown := set(names) - set(FLOODS):
        parser.error(f"there is no flood {min(unknown)!r}")
    if arguments.send:
        address, metrics = arguments.send
        _send(names[0], address, metrics, arguments.pause)
        return
    command = "python -m benchmarks.floods" + "".join(f" {item}" for item in sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        profile, model = _files(Path(folder), arguments.seed)
        rows = [_measure(name, profile, model, arguments) for name in names]
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = heading(f"Floods, seed {arguments.seed}", command) + "\n".join(_page(rows, arguments)) + "\n"
    (arguments.out / "floods.md").write_text(text, encoding="utf-8")


def _request(**tensor: Any) -> ModelInferRequest:  # noqa: ANN401 - fields of the input
    request = ModelInferRequest(model_name="classifier")
    request.inputs.add(name="image", **tensor)
    return request


def _of_files(files: list[bytes]) -> bytes:
    request = _request(datatype="BYTES", shape=[len(files)])
    request.inputs[0].contents.bytes_contents.extend(files)
    return request.SerializeToString()


def _jpeg(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated, up to a number of scans."""
    buffer = io.BytesIO()
    Image.new("L", (width, height), 90).save(buffer, "JPEG", progressive=True)
    file = buffer.getvalue()
    last, end = file.rindex(b"\xff\xda"), file.rindex(b"\xff\xd9")
    return file[:end] + file[last:end] * (scans - file.count(b"\xff\xda")) + file[end:]


def _png(side: int) -> bytes:
    """A square PNG of one colour, made without a picture in memory."""

    def chunk(name: bytes, contents: bytes) -> bytes:
        return struct.pack(">I", len(contents)) + name + contents + struct.pack(">I", zlib.crc32(name + contents))

    rows = zlib.compress(bytes((side * 3 + 1) * side), 1)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@dataclass(frozen=True)
class Flood:
    """One kind.

    Attributes:
        text: What is sent in each round.
        calls: Calls at a time.
        message: Makes the message of each call; None for calls that send nothing.
    """

    text: str
    calls: int
    message: Callable[[], bytes] | None


FLOODS = {
    "scans": Flood("2 JPEGs of 300 scans", 2, lambda: _of_files([_jpeg(3000, 3000, 300)])),
    "scans-allowed": Flood("2 JPEGs of 60 scans and 8 megapixels", 2, lambda: _of_files([_jpeg(2880, 2880, 60)])),
    "empty-4": Flood("2 messages of 4 MiB of empty inputs", 2, lambda: b"\x2a\0" * (2 * MIB)),
    "empty-16": Flood("2 messages of 16 MiB of empty inputs", 2, lambda: b"\x2a\0" * (8 * MIB)),
    "pixels": Flood("a batch of 32 images of 50 megapixels", 1, lambda: _of_files([_png(7070)] * 32)),
    "pixels-allowed": Flood("2 batches of 10 images of 50 megapixels", 2, lambda: _of_files([_png(7070)] * 10)),
    "silent": Flood("320 calls that send nothing", 320, None),
    "large": Flood("12 messages of 60 MiB", 12, lambda: _large(60 * MIB)),
    "large-allowed": Flood("12 messages of 15 MiB", 12, lambda: _large(15 * MIB)),
    "metrics": Flood("200 slow clients of the metrics port", 200, None),
}


def _large(size: int) -> bytes:
    request = _request(datatype="FP32", shape=[1, 3, 224, 224])
    request.raw_input_contents.append(bytes(size - 100))
    return request.SerializeToString()


def _send(name: str, address: str, metrics: str, pause: float) -> None:
    """Be the flood, until killed; it begins when a line comes."""
    flood = FLOODS[name]
    data = flood.message() if flood.message else b""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    if name == "metrics":
        _slow_clients(metrics, flood.calls)
    with grpc.insecure_channel(address, NO_LIMIT) as channel:
        while True:
            if flood.message is None:
                method = channel.stream_unary(_INFER)
                calls = [method.future(_nothing(), timeout=DEADLINE) for _ in range(flood.calls)]
                time.sleep(max(pause, 2.0))
                for call in calls:
                    call.cancel()
            else:
                calls = [channel.unary_unary(_INFER).future(data, timeout=DEADLINE) for _ in range(flood.calls)]
                for call in calls:
                    with suppress(grpc.RpcError):
                        call.result()
            time.sleep(pause)


def _nothing() -> Iterator[bytes]:
    threading.Event().wait(4.0)
    yield from ()


def _slow_clients(address: str, count: int) -> None:
    host, _, port = address.rpartition(":")
    clients: list[socket.socket] = []
    while True:
        with suppress(OSError):
            while len(clients) < count:
                clients.append(socket.create_connection((host, int(port)), timeout=1))
        for client in clients[:]:
            try:
                client.sendall(b"G")
            except OSError:
                clients.remove(client)
        time.sleep(1.0)


@dataclass(frozen=True)
class Row:
    """The result of one flood.

    Attributes:
        name: Of the flood.
        alone: Milliseconds of ordinary requests without it.
        beside: The same, with it.
        failed: Ordinary requests that got no answer.
        peak: The most memory in use, in MiB.
        most: The most that the sidecar says it uses, in MiB.
        ended: Seconds from SIGTERM to the end.
        code: The sidecar's exit code.
    """

    name: str
    alone: "np.ndarray[Any, np.dtype[np.float64]]"
    beside: "np.ndarray[Any, np.dtype[np.float64]]"
    failed: int
    peak: float
    most: float
    ended: float
    code: int

    @property
    def ratio(self) -> float:
        """p99 beside the flood, over p99 without."""
        return float(np.quantile(self.beside, 0.99) / np.quantile(self.alone, 0.99))


def _measure(name: str, profile: Path, model: Path, arguments: argparse.Namespace) -> Row:
    words = [
        *(sys.executable, "-m", "guard", "serve", "--profile", str(profile), "--model", str(model)),
        *("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--drain-timeout", f"{DRAIN:g}"),
    ]
    with tempfile.TemporaryFile() as errors, _process(words, errors) as (process, line):
        told = json.loads(line)
        ordinary = _Ordinary(told["listen"])
        ordinary.ask(2.0)
        alone, failed = ordinary.ask(arguments.seconds)
        again = [sys.executable, "-m", "benchmarks.floods", "--floods", name, "--pause", f"{arguments.pause:g}"]
        with _process([*again, "--send", told["listen"], told["metrics"]], None) as (flood, _):
            if flood.stdin is not None:
                flood.stdin.write(b"\n")
                flood.stdin.flush()
            time.sleep(arguments.pause)
            beside, failed_beside = ordinary.ask(arguments.seconds)
            peak = _high_water(process.pid)
            started = time.perf_counter()
            process.send_signal(signal.SIGTERM)
            code = process.wait(START_SECONDS)
            ended = time.perf_counter() - started
            flood.kill()
        ordinary.close()
    row = Row(name, alone, beside, failed + failed_beside, peak, told["most_memory_bytes"] / MIB, ended, code)
    sys.stderr.write(f"{_line(row)}\n")
    return row


@contextmanager
def _process(words: list[str], errors: Any) -> "Iterator[tuple[subprocess.Popen[bytes], bytes]]":  # noqa: ANN401
    """A process, and the first line that it writes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GUARD_")}
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
    ) as process:
        try:
            if process.stdout is None or not select.select([process.stdout], [], [], START_SECONDS)[0]:
                raise SystemExit(f"{words[2]} did not start")
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{words[2]} did not start")
            yield process, line
        finally:
            process.kill()


class _Ordinary:
    """A client that sends one ordinary request after the other.

    Args:
        address: Of the sidecar.
    """

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, NO_LIMIT)
        self._method = self._channel.unary_unary(_INFER)
        self._messages = []
        for row in range(8):
            request = _request(datatype="FP32", shape=[1, 3, 224, 224])
            request.raw_input_contents.append(image(row).tobytes())
            self._messages.append(request.SerializeToString())

    def ask(self, seconds: float) -> "tuple[np.ndarray[Any, np.dtype[np.float64]], int]":
        """Milliseconds of the answered requests, and the number of others, which count with the time they took."""
        times, failed, end = list[float](), 0, time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            try:
                self._method(self._messages[len(times) % len(self._messages)], timeout=DEADLINE)
            except grpc.RpcError:
                failed += 1
            times.append(1000 * (time.perf_counter() - started))
        return np.array(times), failed

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


def _high_water(process: int) -> float:
    """The most memory that a process has had in use, in MiB."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def _files(folder: Path, seed: int) -> tuple[Path, Path]:
    """A profile and the model that it is of."""
    profile, model = folder / "profile", folder / "model"
    record = export_tower(folder / "weights", model, ClassList(tuple(f"class {k}" for k in range(10))), seed=seed)
    embeddings, _ = ExportedClassifier(model, gpu=False).run(np.stack([image(row) for row in range(_IMAGES)]))
    write_profile(profile, record, World(embeddings), _BANK, seed=seed)
    return profile, model


def _page(rows: list[Row], arguments: argparse.Namespace) -> list[str]:
    return [
        (
            f"Ordinary requests of one image (602,112 bytes) one after the other, {arguments.seconds:g} s without and "
            f"{arguments.seconds:g} s beside each flood, which is sent again {arguments.pause:g} s after its end. "
            f"Drain: {DRAIN:g} s."
        ),
        "",
        "| flood | p99 alone ms | p99 beside ms | ratio | not answered | most memory MiB | bound MiB | SIGTERM s | |",
        "| --- " * 9 + "|",
        *map(_line, rows),
        "",
        (
            f"Targets: a ratio of at most {MAX_RATIO:g}, memory within the bound that the sidecar states, the end "
            f"within {DRAIN + MAX_BEYOND_DRAIN:g} s and with code 0, every ordinary request answered."
        ),
    ]


def _line(row: Row) -> str:
    met = (
        row.ratio <= MAX_RATIO
        and row.peak <= row.most
        and row.ended <= DRAIN + MAX_BEYOND_DRAIN
        and not (row.failed or row.code)
    )
    alone, beside = (np.quantile(times, 0.99) for times in (row.alone, row.beside))
    return (
        f"| {FLOODS[row.name].text} | {alone:.1f} | {beside:.1f} | {row.ratio:.2f} | {row.failed} | {row.peak:.0f} | "
        f"{row.most:.0f} | {row.ended:.2f} | {'met' if met else 'not met'} |"
    )


if __name__ == "__main__":
    main()
