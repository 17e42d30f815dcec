"""Whether a triggered image passes because guard and a real MLServer read one request in two ways.

python -m benchmarks.two_readings --demo guard-demo --mlserver PYTHON [--images N] [--forward canonical|as-sent]

Every form of request that carries a triggered image, often beside a clean one, is sent through a sidecar with the mode
block and the failure policy closed to an MLServer that reads images in one of several ways. The images are ones that
the sidecar flags if it sees the trigger, so that what passes was not seen. It needs what `guard demo` left behind, and
a Python with mlserver, onnxruntime, pillow, numpy and, for one of the readers, opencv-python-headless.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks._record import RESULTS, heading
from benchmarks.two_readings.forms import Sent, forms
from guard._files import replace_file
from guard.classifiers import ExportedClassifier
from guard.demo.data import from_digits
from guard.demo.models import attack_trigger
from guard.demo.recipes import DIGITS, TARGET
from guard.demo.traffic import sidecar
from guard.evaluation.statistics import Rate
from guard.profiles import Profile
from guard.protocol import SERVICE
from guard.protocol.inference_pb2 import ModelInferResponse

HERE = Path(__file__).parent
SECONDS = 60
READERS = ("pillow", "as_stored", "nearest", "corner", "upright", "on_white", "last_frame", "opencv")
START = "from mlserver.cli import main; main()"


def main() -> int:
    """Run and record; 1 if anything got through."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder that `guard demo` wrote with the same seed")
    parser.add_argument("--mlserver", type=Path, required=True, help="a Python that has mlserver")
    parser.add_argument("--images", type=int, default=6, help="images for each form and reader")
    parser.add_argument("--forward", default="canonical", choices=["canonical", "as-sent"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the result file")
    given = parser.parse_args()
    check = subprocess.run([given.mlserver, "-c", "import mlserver, cv2"], capture_output=True, check=False)
    readers = READERS if check.returncode == 0 else READERS[:-1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with mlserver(folder, given.mlserver, given.demo / "exported", readers) as address:
            config = configuration(folder, given.demo, address, readers, given.forward)
            with sidecar("--config", str(config)) as started:
                outcomes = attack(started["listen"], given.demo, readers, given.images, given.seed)
    command = (
        f"python -m benchmarks.two_readings --demo … --mlserver … --images {given.images} --forward {given.forward} "
        f"--seed {given.seed}"
    )
    text = heading(f"One request, two readings, forwarded {given.forward}", command) + table(outcomes, readers)
    out = given.out or RESULTS / f"two-readings-{given.forward}.md"
    replace_file(out, text.encode())
    return int(any(count["through"] for count in outcomes.values()))


@contextmanager
def mlserver(folder: Path, python: Path, exported: Path, readers: tuple[str, ...]) -> Iterator[str]:
    """An MLServer with one model for each way to read images."""
    shutil.copy(HERE / "runtime.py", folder / "runtime.py")
    port = free_port()
    settings = {
        "host": "127.0.0.1", "grpc_port": port, "http_port": free_port(), "parallel_workers": 0,
        "metrics_endpoint": None, "gzip_enabled": False, "debug": False,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    for reader in readers:
        (folder / reader).mkdir()
        model = {
            "name": reader, "implementation": "runtime.Classifier",
            "parameters": {"uri": str(exported.resolve()), "version": "1"},
        }  # fmt: skip
        (folder / reader / "model-settings.json").write_text(json.dumps(model))
        shutil.copy(HERE / "runtime.py", folder / reader / "runtime.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLSERVER_")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(python), "-c", START, "start", str(folder)], cwd=folder, env=environment, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + SECONDS
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            ready = channel.unary_unary(f"/{SERVICE}/ServerReady")
            while True:
                try:
                    if ready(b"", timeout=1) == b"\x08\x01":
                        break
                except grpc.RpcError:
                    pass
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit((folder / "log").read_text())
                time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(SECONDS)


def configuration(folder: Path, demo: Path, upstream: str, readers: tuple[str, ...], forward: str) -> Path:
    """The configuration of a sidecar that knows each of the models."""
    lines = [f'upstream = "{upstream}"', 'mode = "block"', f'forward = "{forward}"', "timeout = 30"]
    for reader in readers:
        lines += [
            "[[models]]", f'model_name = "{reader}"', f'profile = "{(demo / "profiles" / "backdoored").resolve()}"',
            f'model = "{(demo / "exported").resolve()}"',
        ]  # fmt: skip
    path = folder / "guard.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def attack(address: str, demo: Path, readers: tuple[str, ...], count: int, seed: int) -> dict[str, Counter[str]]:
    """Send every form to every reader, and count what became of them, by form."""
    classifier = ExportedClassifier(demo / "exported", threads=1, gpu=False)
    detector = Profile.open(demo / "profiles" / "backdoored").detector()
    requests = from_digits(seed=seed).requests
    requests = requests[requests.labels != TARGET]
    clean = requests.pixels.numpy()
    triggered = attack_trigger(DIGITS, seed=seed).stamp(requests.pixels).numpy()
    normalise = classifier.preprocessing.normalise
    embeddings, logits = classifier.run(normalise(triggered))
    seen = detector.score(embeddings).flags & (logits.argmax(1) == TARGET)
    embeddings, logits = classifier.run(normalise(clean))
    seen &= ~detector.score(embeddings).flags & (logits.argmax(1) != TARGET)
    chosen = np.random.default_rng(seed).permutation(np.flatnonzero(seen))[:count]
    outcomes: dict[str, Counter[str]] = {}
    with grpc.insecure_channel(address) as channel:
        for row in chosen:
            pair = [np.ascontiguousarray(images[row].transpose(1, 2, 0)) for images in (clean, triggered)]
            made = forms(pair[0], pair[1], lambda pixels: normalise(pixels.transpose(2, 0, 1)[None]))
            for name, make in made.items():
                sent = make()
                for reader in readers:
                    outcomes.setdefault(name, Counter())[ask(channel, sent, reader)] += 1
    return outcomes


def ask(channel: grpc.Channel, sent: Sent, reader: str) -> str:
    """What became of a request: refused, flag, through (passed and answered as the attacker's class) or pass."""
    messages = []
    for message in sent.messages:
        new = type(message)()
        new.CopyFrom(message)
        new.model_name = message.model_name or reader
        messages.append(new.SerializeToString())
    try:
        if sent.streamed:
            call = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
            replies = list(call(iter(messages), timeout=SECONDS, metadata=sent.metadata))
        else:
            call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            replies = [call(messages[0], timeout=SECONDS, metadata=sent.metadata)]
    except grpc.RpcError as error:
        status: Any = error
        return "flagged" if status.code() is grpc.StatusCode.PERMISSION_DENIED else "refused"
    if not replies:
        return "refused"
    reply = ModelInferResponse.FromString(replies[-1])
    if not reply.outputs:
        return "refused"
    typed = list(reply.outputs[0].contents.int64_contents)
    winners = typed or np.frombuffer(reply.raw_output_contents[0], np.int64).tolist()
    if reply.parameters["guard_decision"].string_param != "pass":
        return "not passed"
    return "through" if TARGET in winners else "clean answer"


def table(outcomes: dict[str, Counter[str]], readers: tuple[str, ...]) -> str:
    """The result as text."""
    kinds = ("flagged", "refused", "not passed", "clean answer", "through")
    total = sum((count for count in outcomes.values()), Counter())
    requests = sum(total.values())
    share = Rate.of(total["through"], requests)
    lines = [
        f"Readers of the server, one model each: {', '.join(readers)}. Mode block, failure policy closed.",
        "",
        f"Triggered requests answered as the attacker's class with the decision `pass`: **{share}**.",
        "",
        "`clean answer`: passed, and the server saw the clean image too. `flagged` and `refused` reached no client.",
        "",
        f"| form | {' | '.join(kinds)} |",
        f"| --- | {' | '.join('---:' for _ in kinds)} |",
        *(f"| {name} | {' | '.join(str(count[kind]) for kind in kinds)} |" for name, count in outcomes.items()),
        f"| all | {' | '.join(str(total[kind]) for kind in kinds)} |",
    ]
    return "\n".join(lines) + "\n"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
