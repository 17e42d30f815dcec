"""README and guides are executed: each `guard` command in them runs, and each Python example does what it says.

The commands run in one directory, in the order of the pages, on a small model and images in place of the reader's. A
block that cannot run here is preceded by a comment in the page, `<!-- not executed: REASON -->`, for those who read
its source; nothing else is left out.
"""

import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as client
from numpy.typing import NDArray
from PIL import Image

from guard.classifiers import save
from guard.testing import InferenceServer
from tests.conftest import CLASSES, CONFIG, random_images, tiny_model
from tests.texts import TEXTS

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/serving.md", "docs/results.md", "docs/zoo.md", "docs/methods.md", "docs/limitations.md")
"""In the order in which a newcomer reads them. docs/api.md has a test of its own."""
BLOCK = re.compile(r"^( *)(<!-- not executed: [^>]+ -->\n+ *)?```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
"""Blocks of lists are indented."""
UPSTREAM, SERVED = "127.0.0.1:9000", "127.0.0.1:8001"
"""The addresses that the pages name; here they become those of free ports."""
WAIT_SECONDS = 120


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command."""
        return [shlex.split(line, comments=True) for line in self.text.replace("\\\n", " ").splitlines() if line]


def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        for indent, skipped, name, text in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
            if name == language and not skipped:
                found.append(Block(page, name, text.replace(f"\n{indent}", "\n").removeprefix(indent)))
    return found


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the pages assume: a model, its base, images and captions."""
    desk = tmp_path_factory.mktemp("desk")
    save(desk / "my-model", tiny_model(0), CONFIG, CLASSES)
    save(desk / "the-base-model", tiny_model(1), CONFIG, CLASSES)
    for folder, seed in (("unlabelled-images", 0), ("clean-images", 1)):
        (desk / folder).mkdir()
        for index, pixels in enumerate(random_images(512, seed=seed).numpy()):
            Image.fromarray(np.moveaxis(pixels, 0, 2)).save(desk / folder / f"{index:04}.png")
    for index, pixels in enumerate(random_images(240, seed=2).numpy()):
        labelled = desk / "labelled-images" / CLASSES.names[index % len(CLASSES.names)]
        labelled.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.moveaxis(pixels, 0, 2)).save(labelled / f"{index:04}.png")
    shutil.copy(desk / "clean-images" / "0000.png", desk / "cat.jpg")
    (desk / "captions.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return desk


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    """An inference server whose replies carry an embedding."""

    def answer(inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        return {"embedding": np.ones((len(inputs["image"]), 16), np.float32)}

    with InferenceServer(answer) as server:
        yield server.address


def environment(command: Sequence[str]) -> dict[str, str]:
    """Free ports for a sidecar; `guard doctor` would take such variables for a configuration."""
    ports = {"GUARD_LISTEN": "127.0.0.1:0", "GUARD_METRICS": "127.0.0.1:0"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GUARD_")}
    return kept | (ports if command[3] == "serve" else {})


def program(words: Sequence[str], upstream: str) -> list[str]:
    return [sys.executable, "-m", "guard", *(word.replace(UPSTREAM, upstream) for word in words[1:])]


def run_to_the_end(command: Sequence[str], desk: Path) -> None:
    done = subprocess.run(
        command, cwd=desk, env=environment(command), capture_output=True, text=True, timeout=600, check=False
    )
    # Verdicts have exit codes of their own, and `guard doctor` ends with 1 after a warning.
    allowed = {"vet": {0, 1, 3}, "doctor": {0, 1}}.get(command[3], {0})
    assert done.returncode in allowed, f"{shlex.join(command)}\n{done.stderr}"
    assert "Traceback" not in done.stderr


def run_until_it_answers(command: Sequence[str], desk: Path, example: str) -> None:
    """Start a command that runs until it is stopped, use it as its page says, and stop it."""
    follows = "--follow" in command
    with (desk / "stderr.log").open("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(command, cwd=desk, env=environment(command), stdout=subprocess.PIPE, stderr=errors)
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], WAIT_SECONDS)[0], f"{shlex.join(command)} says nothing"
            line = process.stdout.readline()
            assert line, (desk / "stderr.log").read_text(encoding="utf-8")
            if not follows:
                announced = json.loads(line)
                assert announced["event"] == "serving"
                if announced["upstream"] is None and "text" not in command:
                    exec(compile(example.replace(SERVED, announced["listen"]), "client", "exec"), {})  # noqa: S102
                    send_traffic(announced["listen"])
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=WAIT_SECONDS)
            assert process.returncode == 0
        finally:
            process.kill()
            process.communicate()


def send_traffic(address: str) -> None:
    """Clean images, for the sample of embeddings, and images unlike them, so that the evidence log has a record."""
    clean = random_images(200, seed=3).numpy() / 127.5 - 1
    noise = np.random.default_rng(0).choice([-2.0, 2.0], (8, 3, 16, 16))
    odd = np.concatenate([noise, 20 * noise, np.full((1, 3, 16, 16), -30.0)])
    assert decision(address, odd) == "flag"
    assert decision(address, clean) in {"pass", "flag"}


def decision(address: str, pixels: NDArray[np.float64]) -> str:
    images = client.InferInput("image", list(pixels.shape), "FP32")
    images.set_data_from_numpy(pixels.astype(np.float32))
    with client.InferenceServerClient(address) as connection:
        reply = connection.infer("classifier", [images])
    return str(reply.get_response().parameters["guard_decision"].string_param)


@pytest.fixture(autouse=True)
def _in_the_desk(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)


def test_the_commands_of_the_pages_run(desk: Path, upstream: str) -> None:
    (example,) = [block.text for block in blocks("python") if SERVED in block.text]
    ran = set()
    for block in blocks("sh"):
        for words in block.commands:
            if words[:1] == ["openssl"]:
                subprocess.run(words, cwd=desk, check=True, capture_output=True)
            if words[:1] != ["guard"]:
                continue
            command = program(words, upstream)
            ran.add(words[1])
            if (words[1] == "serve" and "--check" not in words) or "--follow" in words:
                run_until_it_answers(command, desk, example)
            else:
                run_to_the_end(command, desk)
    assert ran >= {"vet", "calibrate", "export", "certify", "serve", "log", "doctor"}


def test_every_other_command_of_the_pages_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for block in blocks("sh"):
        for words in block.commands:
            match words:
                case [] | ["guard", *_] | ["openssl", *_] | ["git", "clone", *_]:
                    continue
                case ["make", target, *_]:
                    assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
                case ["python", "-m", module, *_]:
                    assert find_spec(module) is not None, module
                case ["pip", "install", requirement]:
                    extra = re.fullmatch(r"(?:clip-guard|\.)\[(\w+)\]", requirement)
                    assert extra, requirement
                    assert re.search(rf"^{extra[1]} = \[", extras, re.MULTILINE), requirement
                case _:
                    pytest.fail(f"{block.page}: nobody checks {shlex.join(words)}")
