"""What damaged and hostile files do to guard: many mutations of each kind of file, from a seed.

python -m benchmarks.mutations --count 10000

A mutation flips bits, cuts, moves or repeats bytes, joins two files, or takes away or replaces a field. Each must be
refused with an error that guard raises on purpose, or be accepted and then hold what the kind promises:

- images: at most as many pixels as allowed, and pixels at a model's size;
- exported models, with a manifest that fits: no tensor in another file, no foreign operator, no function;
- safetensors: the same tensors that the library safetensors reads;
- class lists: at least two names, all different, all visible, that are read again as they were;
- configurations: a model whose embeddings and head are finite;
- requests: what is forwarded has one input, with the images that guard reads in it;
- replies of a stream: what counts as no answer has no output in any dialect;
- state: a start goes on with it or without it, and loses nothing new;
- certificates, signatures of models and certified files: nothing is admitted but what was signed, byte for byte;
- trust policies: none admits what somebody else signed.

Anything else counts: another exception is a crash, what does not hold is a wrong accept. Each kind runs in a process of
its own, so that the end of a process is a crash that is counted too.
"""

import argparse
import io
import json
import logging
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import open_clip
import torch
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, derive_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from benchmarks._record import RESULTS, heading
from guard._safetensors import open_tensors
from guard.certificates import PREDICATE_TYPE, Envelope, Policy, PrivateKey, Statement, files_of_model, verify
from guard.certificates.authorities import Authority
from guard.certificates.model_signing import check_bundle, write_bundle
from guard.classifiers import ClassList, ExportedClassifier, Preprocessing, decode, encode, export, load, save
from guard.classifiers.digest import sha256
from guard.classifiers.headers import read_headers
from guard.classifiers.preprocessing import MAX_PIXELS
from guard.errors import GuardError, ModelError, RequestError, StateError
from guard.protocol.dialects import FINAL, StreamDialect
from guard.protocol.inference_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from guard.protocol.messages import pack_bytes, parse_request, remove_own_names, with_elements
from guard.protocol.tensors import (
    add_output,
    encoded_inputs,
    find_input,
    float_images,
    raw_contents,
    unpack_bytes,
)
from guard.protocol.wire import REPLY_LIMITS, REQUEST, STREAM_REPLY, Limits, check_message
from tests.attacks.test_mutated_state import KINDS as STATE_KINDS
from tests.attacks.test_mutated_state import StateKind
from tests.attacks.test_mutated_state import mutated as changed

CHUNK = 500
"""Mutations after which a process reports; if it dies, this is how closely the place is known."""
SIZE = 16
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIZE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "size": SIZE, "interpolation": "bilinear"},
}
CLASSES = ClassList(("cat", "dog", "ship", "truck", "frog", "bird"), ("a photo of a {}.", "a {}."))
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e39, "", "x", "hf-hub:evil/model", "\u200b", "\ud7ff", [], {}, [[]],
    {"trust_remote_code": True}, [1, 2, 3], "../../etc/passwd", ["a"] * 100,
)  # fmt: skip
"""Values that are put in the place of others."""


@dataclass(frozen=True)
class Artefacts:
    """Whole files to start from.

    Attributes:
        model: An open_clip directory.
        exported: The same model as ONNX.
    """

    model: Path
    exported: Path


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        samples: Whole files.
        check: Reads a file and makes sure of what it promises; raises a `GuardError` for one that is refused, and
            `WrongAcceptError` for one that was accepted and does not hold what its kind promises.
        reshape: Takes away or replaces a field of a whole file.
    """

    samples: Sequence[bytes]
    check: Callable[[bytes], None]
    reshape: Callable[[bytes, random.Random], bytes]


class WrongAcceptError(Exception):
    """A file was accepted that should have been refused."""


@dataclass
class Outcome:
    """What became of the mutations of one kind.

    Attributes:
        accepted: Number of mutations that were accepted and hold what they promise.
        refused: Number of mutations that were refused.
        wrong: Wrong accepts, as texts that say how to repeat them.
        crashes: Exceptions that are not guard's own, and ends of processes, likewise.
        slowest: Seconds of the slowest mutation.
    """

    accepted: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def add(self, other: "Outcome") -> None:
        """Count another part of the same kind."""
        self.accepted += other.accepted
        self.refused += other.refused
        self.wrong += other.wrong
        self.crashes += other.crashes
        self.slowest = max(self.slowest, other.slowest)


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="mutations of each kind; of slow kinds a part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artefacts = make_artefacts(Path(folder))
        outcomes = {name: run(name, artefacts, given.seed, given.count // SLOW.get(name, 1)) for name in given.kinds}
    rows = [
        f"| {name} | {item.accepted + item.refused + len(item.wrong) + len(item.crashes):,} | {item.refused:,} | "
        f"{item.accepted:,} | {len(item.wrong)} | {len(item.crashes)} | {item.slowest:.2f} |"
        for name, item in outcomes.items()
    ]
    found = [f"- {name}: {text}" for name, item in outcomes.items() for text in item.crashes + item.wrong]
    text = heading(
        f"Mutated files, seed {given.seed}",
        f"python -m benchmarks.mutations --count {given.count} --seed {given.seed}"
        + ("" if len(given.kinds) == len(KINDS) else f" --kinds {shlex.join(given.kinds)}"),
    )
    lines = ["| kind | mutations | refused | accepted | wrong accepts | crashes | slowest (s) |", "| --- " * 7 + "|"]
    name = "mutations.md" if len(given.kinds) == len(KINDS) else f"mutations-{given.kinds[0].split()[0]}.md"
    (RESULTS / name).write_text(text + "\n".join([*lines, *rows, "", *found]).rstrip() + "\n", "utf-8")
    sys.exit(bool(found))


def make_artefacts(folder: Path) -> Artefacts:
    """A tiny model with random weights, and its export."""
    torch.manual_seed(0)
    towers = CONFIG["model_cfg"]
    save(folder / "model", open_clip.CLIP(16, towers["vision_cfg"], towers["text_cfg"]), CONFIG, CLASSES)
    pixels = torch.randint(0, 256, (256, 3, SIZE, SIZE), dtype=torch.uint8)
    export(load(str(folder / "model"), device="cpu"), folder / "exported", pixels)
    return Artefacts(folder / "model", folder / "exported")


def run(name: str, artefacts: Artefacts, seed: int, count: int) -> Outcome:
    """Mutations of one kind, in a process of their own."""
    whole = Outcome()
    todo = list(range(0, count, CHUNK))
    while todo:
        # What guard logs about damaged state is right, and thousands of lines.
        with ProcessPoolExecutor(1, get_context("spawn"), logging.disable, (logging.CRITICAL,)) as pool:
            while todo:
                start = todo.pop(0)
                stop = min(start + CHUNK, count)
                try:
                    whole.add(pool.submit(run_here, name, artefacts, seed, range(start, stop)).result())
                except BrokenProcessPool:
                    whole.crashes.append(f"the process ended within mutations {start} to {stop - 1} of seed {seed}")
                    break
    return whole


def run_here(name: str, artefacts: Artefacts, seed: int, numbers: Sequence[int]) -> Outcome:
    """Mutations of one kind, by their numbers, in this process."""
    found = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        kind = KINDS[name](artefacts, Path(folder))
        for number in numbers:
            source = random.Random(f"{name} {seed} {number}")  # noqa: S311 - repeatable, not secret
            data = mutated(kind, source)
            began = time.perf_counter()
            try:
                kind.check(data)
                found.accepted += 1
            except GuardError:
                found.refused += 1
            except WrongAcceptError as error:
                found.wrong.append(f"{error} (mutation {number} of seed {seed})")
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                found.crashes.append(f"{type(error).__name__}: {str(error)[:100]} (mutation {number} of seed {seed})")
            found.slowest = max(found.slowest, time.perf_counter() - began)
    return found


def mutated(kind: Kind, source: random.Random) -> bytes:
    """One file of a kind, changed one to four times."""
    data = source.choice(kind.samples)
    if source.random() < 0.3:
        data = kind.reshape(data, source)
    for _ in range(source.choice((0, 1, 1, 1, 2, 4)) if data else 0):
        data = source.choice(BYTE_CHANGES)(data, source, kind.samples)
    return data


def _place(data: bytes, source: random.Random) -> int:
    """A place in a file: half of the time near its start, where its structure is."""
    return source.randrange(min(len(data), 400) if source.random() < 0.5 else len(data)) if data else 0


def _flip(data: bytes, source: random.Random, __: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 8)) if changed else 0):
        changed[_place(data, source)] ^= 1 << source.randrange(8)
    return bytes(changed)


def _set(data: bytes, source: random.Random, _: Sequence[bytes]) -> bytes:
    changed, at = bytearray(data), _place(data, source)
    changed[at : at + 1] = bytes([source.choice((0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)))])
    return bytes(changed)


def _truncate(data: bytes, source: random.Random, _: Sequence[bytes]) -> bytes:
    return data[: _place(data, source)]


def _cut(data: bytes, source: random.Random, _: Sequence[bytes]) -> bytes:
    at = _place(data, source)
    return data[:at] + data[at + source.choice((1, 2, 4, 8, 64, 1000)) :]


def _repeat(data: bytes, source: random.Random, _: Sequence[bytes]) -> bytes:
    at, size = _place(data, source), source.choice((1, 4, 16, 300))
    return data[:at] + data[at : at + size] * source.choice((2, 3, 20)) + data[at + size :]


def _splice(data: bytes, source: random.Random, samples: Sequence[bytes]) -> bytes:
    other = source.choice(samples)
    start = _place(other, source)
    return data[: _place(data, source)] + other[start : start + source.choice((4, 40, 4000, len(other)))]


BYTE_CHANGES = (_flip, _flip, _set, _truncate, _cut, _repeat, _splice)


def reshaped_json(document: Any, source: random.Random) -> Any:  # noqa: ANN401 - any value of JSON
    """A JSON value of which one part was taken away, replaced, renamed or repeated."""
    places = list(_places(document))
    if not places:
        return source.choice(HOSTILE)
    part, key = source.choice(places)
    action = source.randrange(4)
    if action == 0:
        del part[key]
    elif action == 1:
        part[key] = source.choice(HOSTILE)
    elif isinstance(part, dict):
        value = part.pop(key) if action == 2 else part[key]
        part[source.choice((f"{key}_", key.upper(), "auto_map", "hf_tokenizer_name", "timm_model_name"))] = value
    else:
        part.insert(key, source.choice(HOSTILE) if action == 2 else part[key])
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401
    """Every place in a JSON value: what it is in, and its name or number there."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield document, key
        yield from _places(value)


def _reshape_json(data: bytes, source: random.Random) -> bytes:
    try:
        document = json.loads(data)
    except ValueError:  # a class list as text
        lines = data.split(b"\n")
        lines[source.randrange(len(lines))] = str(source.choice(HOSTILE)).encode()
        return b"\n".join(lines)
    return json.dumps(reshaped_json(document, source), ensure_ascii=source.random() < 0.5).encode()


def _images(_: Artefacts, __: Path) -> Kind:
    pixels = (np.arange(20 * 24 * 3) % 251).astype(np.uint8).reshape(20, 24, 3)
    image = Image.fromarray(pixels)
    forms: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (image, "PNG", {}), (image, "JPEG", {}), (image, "WEBP", {}), (image, "WEBP", {"lossless": True}),
        (image.convert("P"), "PNG", {}), (image.convert("L"), "PNG", {}), (image.convert("RGBA"), "PNG", {}),
        (image, "JPEG", {"progressive": True}), (image.convert("CMYK"), "JPEG", {}), (image.convert("1"), "PNG", {}),
    ]  # fmt: skip
    samples = []
    for form, name, options in forms:
        buffer = io.BytesIO()
        form.save(buffer, name, **options)
        samples.append(buffer.getvalue())
    preprocessing = Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3)

    def check(data: bytes) -> None:
        image = decode(data)
        if image.width * image.height > MAX_PIXELS:
            raise WrongAcceptError(f"{image.width}×{image.height} pixels")
        if preprocessing.pixels(image).shape != (3, SIZE, SIZE):
            raise WrongAcceptError("pixels of another shape")

    def reshape(data: bytes, source: random.Random) -> bytes:
        """Take away, repeat or move a part between two markers, which is a chunk or a segment or nearly."""
        marks = [at for at in range(8, len(data)) if data[at : at + 1] == b"\xff" or data[at : at + 4].isalpha()]
        if len(marks) < 2:
            return data
        start, stop = sorted(source.sample(marks, 2))
        part = data[start:stop]
        return data[:start] + part * source.choice((0, 2)) + data[stop:]

    return Kind(samples, check, reshape)


def _onnx(artefacts: Artefacts, folder: Path) -> Kind:
    directory = Path(shutil.copytree(artefacts.exported, folder / "exported"))
    manifest = json.loads((directory / "classifier.json").read_text("utf-8"))
    whole = (directory / "model.onnx").read_bytes()

    def check(data: bytes) -> None:
        (directory / "model.onnx").write_bytes(data)
        (directory / "classifier.json").write_text(json.dumps({**manifest, "model_sha256": sha256(data)}), "utf-8")
        ExportedClassifier(directory, threads=1, gpu=False)
        for message in _messages(onnx.ModelProto.FromString(data)):
            foreign = getattr(message, "domain", "") not in {"", "ai.onnx"} and not isinstance(message, onnx.ModelProto)
            if foreign or any(getattr(message, name, None) for name in ("external_data", "functions")):
                raise WrongAcceptError(f"a {type(message).__name__} that is not whole in itself")

    def reshape(data: bytes, source: random.Random) -> bytes:
        model = onnx.ModelProto.FromString(data)
        message = source.choice(list(_messages(model)))
        fields = [each for each, _ in message.ListFields()]
        action = source.randrange(4)
        if isinstance(message, onnx.TensorProto) and action < 3:
            message.data_location = onnx.TensorProto.EXTERNAL if action else onnx.TensorProto.DEFAULT
            message.external_data.add(key="location", value="secret")
        elif isinstance(message, onnx.NodeProto) and action == 0:
            message.domain = "com.microsoft"
        elif fields:
            message.ClearField(source.choice(fields).name)
        return bytes(model.SerializeToString())

    return Kind((whole,), check, reshape)


def _messages(message: Any) -> Iterator[Any]:  # noqa: ANN401 - protobuf's messages have no common public type
    yield message
    for each, value in message.ListFields():
        if each.message_type is not None:
            several = value.values() if hasattr(value, "values") else value if hasattr(value, "add") else [value]
            for inner in several:
                if hasattr(inner, "ListFields"):  # the values of a map may be plain
                    yield from _messages(inner)


def _safetensors(artefacts: Artefacts, folder: Path) -> Kind:
    whole = (artefacts.model / "open_clip_model.safetensors").read_bytes()
    small = {name: value for name, value in load_tensors(whole).items() if value.numel() < 1000}
    mixed = {
        "a": torch.ones(2, 3, dtype=torch.bfloat16),
        "b": torch.arange(4),
        "c": torch.zeros(0),
        "d": torch.ones(()),
    }
    path = folder / "weights.safetensors"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        with open_tensors(path, ModelError) as file:
            read = {name: (entry.shape, bytes(file.read(name))) for name, entry in file.entries.items()}
        try:
            known = load_tensors(data)
        except Exception as error:  # whatever the library says
            raise WrongAcceptError(f"the library safetensors refuses it: {str(error)[:80]}") from error
        if read.keys() != known.keys():
            raise WrongAcceptError("other tensors than the library safetensors finds")
        for name, value in known.items():
            raw = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
            if read.get(name) != (tuple(value.shape), raw):
                raise WrongAcceptError("tensors that the library safetensors reads otherwise")

    def reshape(data: bytes, source: random.Random) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(reshaped_json(json.loads(data[8 : 8 + length]), source)).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + length :]

    return Kind((save_tensors(small), save_tensors(mixed), save_tensors(mixed, {"format": "pt"})), check, reshape)


def _class_lists(_: Artefacts, folder: Path) -> Kind:
    texts = ("tench\ngoldfish\nshark\n", "\ufeffcrane\r\nlimpkin\r\ncrane\r\n", "猫\nкошка\nÜberraschung\n")
    samples = (*(text.encode() for text in texts), CLASSES.to_json().encode(), b'{"classes": ["crane", "x", "crane"]}')

    def check(data: bytes) -> None:
        path = folder / ("list.json" if data.lstrip()[:1] in {b"{", b"["} else "list.txt")
        path.write_bytes(data)
        classes = ClassList.read(path)
        if len(set(classes.names)) != len(classes.names) or len(classes.names) < 2:
            raise WrongAcceptError("names that are not different")
        if hidden := [name for name in classes.names if not name.strip() or "\n" in name or not name.isprintable()]:
            raise WrongAcceptError(f"the name {hidden[0]!a}")
        (folder / "again.json").write_text(classes.to_json(), "utf-8")
        if ClassList.read(folder / "again.json") != classes:
            raise WrongAcceptError("a list that is read otherwise when it is written again")

    return Kind(samples, check, _reshape_json)


def _configurations(artefacts: Artefacts, folder: Path) -> Kind:
    directory = Path(shutil.copytree(artefacts.model, folder / "model"))
    path = directory / "open_clip_config.json"
    image = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        classifier = load(str(directory), device="cpu")
        if not (classifier.embed(image).isfinite().all() and classifier.head.isfinite().all()):
            raise WrongAcceptError("a model that computes no finite numbers")
        if classifier.config != json.loads(data)["model_cfg"]:
            raise WrongAcceptError("another configuration than the file's")

    return Kind((path.read_bytes(), json.dumps(CONFIG, indent=1).encode()), check, _reshape_json)


def _requests(_: Artefacts, __: Path) -> Kind:
    preprocessing = Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3)
    buffer = io.BytesIO()
    Image.fromarray((np.arange(20 * 24 * 3) % 251).astype(np.uint8).reshape(20, 24, 3)).save(buffer, "PNG")
    images = np.linspace(-1, 1, 2 * 3 * SIZE * SIZE, dtype=np.float32).reshape(2, 3, SIZE, SIZE)
    files, samples = [buffer.getvalue()] * 2, []
    for raw in (True, False):
        for contents in ("files", "numbers"):
            request = ModelInferRequest(model_name="m", id="7")
            request.outputs.add(name="logits").parameters["classification"].int64_param = 3
            request.parameters["priority"].int64_param = 1
            tensor = request.inputs.add(name="image", datatype="BYTES", shape=[2])
            if contents == "numbers":
                tensor.datatype, tensor.shape[:] = "FP32", images.shape
            if raw:
                request.raw_input_contents.append(pack_bytes(files) if contents == "files" else images.tobytes())
            elif contents == "files":
                tensor.contents.bytes_contents.extend(files)
            else:
                tensor.contents.fp32_contents.extend(images.ravel().tolist())
            samples.append(request.SerializeToString())

    def read(request: ModelInferRequest) -> Any:  # noqa: ANN401 - an array, or files
        index = find_input(request, "image")
        tensor, raw = request.inputs[index], raw_contents(request, index)
        if tensor.datatype != "BYTES":
            return float_images(tensor, raw, (3, SIZE, SIZE), 4)
        found = encoded_inputs(tensor, raw, 4)
        _, troubles = read_headers(found, max_pixels=MAX_PIXELS, max_work=MAX_PIXELS)
        for error in troubles.values():
            raise error
        return np.stack([preprocessing.pixels(decode(file)) for file in found])

    def check(data: bytes) -> None:
        check_message(data, REQUEST, Limits(elements=1024))
        request = parse_request(data)
        remove_own_names(request)
        seen = read(request)
        if seen.dtype == np.uint8:
            forwarded = with_elements(request, find_input(request, "image"), [encode(pixels) for pixels in seen])
        else:
            forwarded = request.SerializeToString()
        again = ModelInferRequest.FromString(forwarded)
        (tensor,) = again.inputs
        raw = list(again.raw_input_contents)
        contents = [values for _, values in tensor.contents.ListFields()]
        if len(contents) + len(raw) != 1 or any(name.startswith("guard_") for name in again.parameters):
            raise WrongAcceptError("contents of two forms, or a name of guard's own")
        # As a server reads it that takes whatever comes first.
        if tensor.datatype == "BYTES":
            parts = list(contents[0]) if contents else unpack_bytes(raw[0])
            found = np.stack([np.asarray(Image.open(io.BytesIO(part))).transpose(2, 0, 1) for part in parts])
        else:
            found = np.array(contents[0] if contents else np.frombuffer(raw[0], np.float32), np.float32)
        if not np.array_equal(found.ravel(), seen.ravel(), equal_nan=True):
            raise WrongAcceptError("other images are forwarded than were read")

    return Kind(samples, check, _reshape_message(ModelInferRequest))


def _replies(_: Artefacts, __: Path) -> Kind:
    reply = ModelInferResponse(model_name="m", model_version="1", id="7")
    add_output(reply, "logits", np.arange(6, dtype=np.float32), raw=True)
    typed = ModelInferResponse(model_name="m")
    add_output(typed, "logits", np.arange(6, dtype=np.float32), raw=False)
    last = ModelInferResponse(model_name="m")
    last.parameters[FINAL].bool_param = True
    plain = [each.SerializeToString() for each in (reply, typed, last)]
    enveloped = [ModelStreamInferResponse(infer_response=each).SerializeToString() for each in (reply, typed, last)]

    async def nobody() -> str:
        return ""

    def check(data: bytes) -> None:
        check_message(data, STREAM_REPLY, REPLY_LIMITS)
        found = StreamDialect("auto", nobody).read(data)
        if found is None:
            raise RequestError("it cannot be read whole")
        if found.answers:
            return
        others: list[ModelInferResponse] = []
        with suppress(DecodeError):
            others.append(ModelInferResponse.FromString(data))
        with suppress(DecodeError):
            others.append(ModelStreamInferResponse.FromString(data).infer_response)
        if any(other.outputs or other.raw_output_contents for other in others):
            raise WrongAcceptError("outputs that count as no answer")

    return Kind((*plain, *enveloped), check, _reshape_message(ModelStreamInferResponse))


def _reshape_message(kind: Any) -> Callable[[bytes, random.Random], bytes]:  # noqa: ANN401 - a class of protobuf
    """Takes away a field, repeats one, or adds one that nobody knows, at any depth."""

    def reshape(data: bytes, source: random.Random) -> bytes:
        try:
            message = kind.FromString(data)
        except DecodeError:
            return data
        part = source.choice(list(_messages(message)))
        fields = [each for each, _ in part.ListFields()]
        action = source.randrange(3)
        if action == 0 and fields:
            part.ClearField(source.choice(fields).name)
        elif action == 1:
            extra = source.choice((b"\xba\x3e\x01x", b"\x08\x01", b"\x2a\x00", b"\x12\x01x", b"\x32\x00"))
            with suppress(DecodeError):
                part.MergeFromString(extra)
        else:
            part.MergeFromString(part.SerializeToString())
        return bytes(message.SerializeToString())

    return reshape


def _state(kind: StateKind) -> Callable[[Artefacts, Path], Kind]:
    def make(_: Artefacts, folder: Path) -> Kind:
        whole = folder / "whole"
        whole.mkdir()
        kind.make(whole)

        def check(data: bytes) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as name:
                for file in whole.iterdir():
                    shutil.copy(file, name)
                (Path(name) / kind.file).write_bytes(data)
                if not kind.start(Path(name)):
                    raise StateError("begun anew")

        def reshape(data: bytes, source: random.Random) -> bytes:
            return changed(data, source.randrange(2**31))

        return Kind(((whole / kind.file).read_bytes(),), check, reshape)

    return make


def _key(name: str) -> PrivateKey:
    """A key that is the same in every process."""
    if name.startswith("P-256"):
        return PrivateKey(derive_private_key(int(sha256(name.encode()), 16) >> 1, SECP256R1()))
    return PrivateKey(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(sha256(name.encode()))))


def _trusting(*keys: PrivateKey) -> Policy:
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for key in keys:
            paths.append(Path(folder) / key.public.id)
            paths[-1].write_bytes(key.public.to_pem())
        return Policy.trusting(paths)


def _statement(artefacts: Artefacts) -> tuple[bytes, dict[str, str]]:
    """A statement about the files of the model, and the digests of these."""
    files = files_of_model(artefacts.model) | files_of_model(artefacts.exported)
    digest = "ab" * 32
    statement = Statement.model_validate_json(
        json.dumps(
            {
                "_type": "https://in-toto.io/Statement/v1",
                "subject": [{"name": name, "digest": {"sha256": files[name]}} for name in sorted(files)],
                "predicateType": PREDICATE_TYPE,
                "predicate": {
                    "verdict": {
                        "outcome": "no evidence", "target": None, "pValue": 0.5, "significance": 0.01, "reasons": [],
                    },
                    "vetter": {"id": "benchmark", "version": "1"},
                    "model": {"source": "model", "digest": digest, "parts": {"weights": digest}},
                    "scope": {
                        "families": ["patch"], "budget": "quick", "classes": 6, "promptSet": digest,
                        "imagesSearched": 100, "imagesHeldOut": 100,
                        "referenceModel": "base", "referenceDigest": digest, "effort": {},
                    },
                    "methods": [],
                    "evaluation": {"threshold": 0.01, "value": 0.5, "passed": True, "sampleSize": 200},
                    "power": None, "triggers": [], "screening": None, "parity": None, "environment": {},
                    "vettedAt": "2026-01-01T00:00:00Z", "certifiedAt": "2026-01-01T00:00:00Z",
                    "expiresAt": "2036-01-01T00:00:00Z",
                },
            }
        )
    )  # fmt: skip
    return statement.to_json(), files


_TIME = datetime(2026, 6, 1, tzinfo=UTC)


def _certificates(artefacts: Artefacts, _: Path) -> Kind:
    payload, files = _statement(artefacts)
    trusted = [_key("Ed25519"), _key("P-256")]
    policy, keys = _trusting(*trusted), [key.public for key in trusted]
    samples = [Envelope.sign(payload, [key]).to_json() for key in trusted]
    samples.append(Envelope.sign(payload, trusted).to_json())
    stranger = Envelope.sign(payload, [_key("stranger")]).to_json()

    def check(data: bytes) -> None:
        verify(data, files, [policy], "model", now=_TIME).demand()
        envelope = Envelope.from_json(data, "certificate")
        if envelope.payload != payload or not envelope.signers(keys):
            raise WrongAcceptError("a certificate that nobody signed")

    return Kind((*samples, stranger), check, _reshape_json)


def _policies(artefacts: Artefacts, folder: Path) -> Kind:
    payload, files = _statement(artefacts)
    own, stranger = _key("Ed25519"), _key("stranger")
    pem = own.public.to_pem().decode()
    rules = (
        'threshold = 1\nverdicts = ["no evidence"]\nminimum_budget = "quick"\nfamilies = ["patch"]\n',
        'maximum_age_days = 365\nminimum_version = "0.1"\nreference_models = ["base"]\nonly_listed_sources = false\n',
        "",
    )
    more = (
        f'[[revoked]]\ndigest = "{"0" * 64}"\nreason = "x"\n',
        '[[sources]]\nprefix = "/models"\nminimum_budget = "quick"\n',
        "",
    )
    key = f'[[keys]]\nname = "own"\npem = """\n{pem}"""\n'
    samples = [f"{first}{key}{last}".encode() for first in rules for last in more]
    path = folder / "policy.toml"
    good, bad = (Envelope.sign(payload, [each]).to_json() for each in (own, stranger))

    def check(data: bytes) -> None:
        path.write_bytes(data)
        policy = Policy.read(path)
        for certificate, expected in ((good, None), (bad, False), (b"", False)):
            admitted = verify(certificate, files, [policy], "/models/a", now=_TIME).admitted
            if expected is not None and admitted is not expected:
                raise WrongAcceptError("a policy that admits what nobody signed who is trusted")
        changed_files = {**files, "model/classes.json": "0" * 64}
        if verify(good, changed_files, [policy], "/models/a", now=_TIME).admitted:
            raise WrongAcceptError("a policy that admits a changed file")

    def reshape(data: bytes, source: random.Random) -> bytes:
        """Take away, repeat or move a line."""
        lines = data.split(b"\n")
        at = source.randrange(len(lines))
        line = lines.pop(at)
        for _ in range(source.randrange(3)):
            lines.insert(source.randrange(len(lines) + 1), line)
        return b"\n".join(lines)

    return Kind(samples, check, reshape)


def _bundles(artefacts: Artefacts, folder: Path) -> Kind:
    model = Path(shutil.copytree(artefacts.model, folder / "model"))
    key, path = _key("P-256"), folder / "model.sig"
    write_bundle(model, path, key)
    sample = path.read_bytes()
    (folder / "key.pub").write_bytes(key.public.to_pem())
    authority = Authority.read(folder / "key.pub")
    known = json.loads(sample)["dsseEnvelope"]["payload"]
    opened = [name.partition("/")[2] for name in files_of_model(model)]

    def check(data: bytes) -> None:
        path.write_bytes(data)
        check_bundle(model, path, authority, opened)
        if json.loads(data)["dsseEnvelope"]["payload"].replace("-", "+").replace("_", "/") != known:
            raise WrongAcceptError("a bundle that nobody signed")

    return Kind((sample,), check, _reshape_json)


def _certified_files(artefacts: Artefacts, folder: Path) -> Kind:
    payload, files = _statement(artefacts)
    key = _key("Ed25519")
    certificate, policy = Envelope.sign(payload, [key]).to_json(), _trusting(key)
    parts = {part: Path(shutil.copytree(place, folder / part)) for part, place in vars(artefacts).items()}
    names = sorted(files)
    # A sample begins with the number of its file.
    samples = [bytes([k]) + (folder / name).read_bytes() for k, name in enumerate(names)]

    def check(data: bytes) -> None:
        name = names[data[0] % len(names)] if data else names[0]
        path, whole = folder / name, samples[names.index(name)][1:]
        path.write_bytes(data[1:])
        try:
            found = {digest: value for place in parts.values() for digest, value in files_of_model(place).items()}
            verify(certificate, found, [policy], "model", now=_TIME).demand()
        finally:
            path.write_bytes(whole)
        if data[1:] != whole:
            raise WrongAcceptError("a file that is not the one that was certified")

    def reshape(data: bytes, source: random.Random) -> bytes:
        return data[:1] + data[1:][::-1] if source.random() < 0.5 else data[:1]

    return Kind(samples, check, reshape)


KINDS: dict[str, Callable[[Artefacts, Path], Kind]] = {
    "images": _images,
    "onnx": _onnx,
    "safetensors": _safetensors,
    "class lists": _class_lists,
    "configurations": _configurations,
    "requests": _requests,
    "replies of a stream": _replies,
    "certificates": _certificates,
    "trust policies": _policies,
    "signatures of models": _bundles,
    "certified files": _certified_files,
    **{kind.name: _state(kind) for kind in STATE_KINDS},
}
"""What is mutated: a function that makes a kind from whole files, with a folder for its own use."""
SLOW = {"onnx": 5, "configurations": 20, **{kind.name: 20 for kind in STATE_KINDS}}
"""Kinds of which only one part of so many of the mutations is tried, since each takes long."""


if __name__ == "__main__":
    main()
