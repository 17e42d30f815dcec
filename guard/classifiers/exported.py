"""The exported form of a classifier: an ONNX file, and a manifest that describes it. Imports without torch."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from guard._cpus import usable_cpus
from guard._documents import read_bytes
from guard._types import Floats
from guard.classifiers.classes import ClassList
from guard.classifiers.digest import sha256
from guard.classifiers.graph import check_graph
from guard.classifiers.manifest import MANIFEST_FILE, MODEL_FILE, read_manifest
from guard.classifiers.preprocessing import Preprocessing
from guard.classifiers.tokenizer import TextInput
from guard.errors import ModelError, first_line

TOKEN = "token"  # noqa: S105 - of a text, not of a login
"""Name of the output of a meta-net."""
LENGTH = "length"
"""Name of the dimension of a text tower's input that is as long as the longest text."""
_PROMPTS = 1024
"""Most prompts that one forward pass makes where each image has its own, which bounds its memory."""
_FATAL = 4
"""Errors come as exceptions; lines of ONNX Runtime's own on standard error would break the form of a log."""
onnxruntime.set_default_logger_severity(_FATAL)

MAX_MODEL_BYTES = 2**31 - 1
"""ONNX files hold at most 2 GiB in one protobuf; external data, which can point anywhere, is not accepted."""


class ExportedClassifier:
    """An exported classifier, run by ONNX Runtime: one forward pass gives embeddings and class scores.

    It has one tower of the model, of images or of texts; the class scores of a text say which class it speaks of.

    Args:
        directory: A directory that `guard export` wrote.
        threads: Threads that one forward pass uses; 0 for as many as there are processors for this process.
        gpu: Whether to use a GPU if ONNX Runtime can use one.

    Attributes:
        manifest: The contents of `classifier.json`.
        has_tokens: Whether it has a meta-net (CoCoOp), whose token `run_with_tokens` gives.

    Raises:
        ModelError: A file is missing or damaged, or is not the file that the manifest names.
    """

    def __init__(self, directory: Path, *, threads: int = 0, gpu: bool = True) -> None:
        self.manifest = read_manifest(directory / MANIFEST_FILE)
        self._session = _session(directory / MODEL_FILE, self.manifest.model_sha256, threads=threads, gpu=gpu)
        inputs = [(item.name, item.type, item.shape[1:]) for item in self._session.get_inputs()]
        size, text = self.manifest.preprocessing.size, self.manifest.text
        expected: tuple[str, str, list[Any]] = ("image", "tensor(float)", [3, size, size])
        if text is not None:
            expected = ("text", "tensor(int64)", [LENGTH if text.trimmed else text.context])
        outputs = {item.name: item.shape[-1] for item in self._session.get_outputs()}
        token = outputs.pop(TOKEN, None)
        if inputs != [expected] or outputs != {
            "embedding": self.manifest.embedding,
            "logits": len(self.manifest.classes.names),
        }:
            raise ModelError(f"{directory / MODEL_FILE} does not have the inputs and outputs that its manifest names")

        self.has_tokens = token is not None

    @property
    def digest(self) -> str:
        """Root digest of the classifier that was exported."""
        return self.manifest.classifier

    @property
    def preprocessing(self) -> Preprocessing:
        """The transform from an image to the input of `run`."""
        return self.manifest.preprocessing

    @property
    def text(self) -> TextInput | None:
        """What it reads if it is a text tower; None if it is an image tower."""
        return self.manifest.text

    @property
    def classes(self) -> ClassList:
        """Class names, in the order of the scores."""
        return self.manifest.classes

    @property
    def provider(self) -> str:
        """The execution provider that ONNX Runtime uses, such as `CUDAExecutionProvider`."""
        return str(self._session.get_providers()[0])

    def run(self, inputs: Floats | NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Compute embeddings and class scores in one forward pass.

        Args:
            inputs: Preprocessed (normalised) images, shape [N, 3, H, W]; or token ids of texts, shape [N, L], L at most
                the context and equal to it if the tower is not trimmed.

        Returns:
            L2-normalised embeddings, shape [N, D], and class scores, shape [N, C].
        """
        name = "image" if self.text is None else "text"
        if self.text is not None and self.text.trimmed:
            inputs = inputs[:, : int(inputs.argmax(1).max()) + 1]
        embeddings, logits = self._run(["embedding", "logits"], name, inputs)
        return embeddings, logits

    def run_with_tokens(self, inputs: Floats) -> tuple[Floats, Floats, Floats]:
        """The same, and what the meta-net adds to each context vector: shape [N, W].

        Raises:
            ModelError: The model has no meta-net.
        """
        if not self.has_tokens:
            raise ModelError("the exported model has no meta-net; only a CoCoOp prompt learner has one")
        embeddings, logits, tokens = self._run(["embedding", "logits", TOKEN], "image", inputs)
        return embeddings, logits, tokens

    def _run(self, outputs: list[str], name: str, inputs: Floats | NDArray[np.int64]) -> list[Floats]:
        """Run the session; with a meta-net on few images at a time, since each of them has prompts of its own."""
        rows = max(1, _PROMPTS // len(self.classes.names)) if self.has_tokens else max(1, len(inputs))
        if len(inputs) <= rows:
            return list(self._session.run(outputs, {name: inputs}))
        parts = [
            self._session.run(outputs, {name: inputs[start : start + rows]}) for start in range(0, len(inputs), rows)
        ]
        return [np.concatenate(each) for each in zip(*parts, strict=True)]


def _session(path: Path, expected: str, *, threads: int, gpu: bool) -> Any:  # noqa: ANN401 - onnxruntime has no types
    data = read_bytes(path, MAX_MODEL_BYTES, ModelError)
    if sha256(data) != expected:
        raise ModelError(f"{path} is not the file that was exported (its SHA-256 differs); export the model again")
    try:
        check_graph(data)
    except ValueError as error:
        raise ModelError(f"{path} cannot be used as an exported model: {error}") from error
    options = onnxruntime.SessionOptions()
    # Never left to ONNX Runtime, which counts the processors of the machine and not those of the container.
    options.intra_op_num_threads = threads or usable_cpus()
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    # What was checked is what runs: by some bytes at its start, ONNX Runtime would take a file for one of its own form.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # By default idle threads spin, and each occupies a core that the rest of the sidecar and its neighbours could use.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"] if gpu and _has_gpu() else ["CPUExecutionProvider"]
    try:
        # From bytes, so that the file that was hashed and checked is the file that runs.
        # Without a second provider there is nothing to fall back to, which ONNX Runtime would print and try.
        return onnxruntime.InferenceSession(
            data, sess_options=options, providers=providers, enable_fallback=len(providers) > 1
        )
    except Exception as error:  # ONNX Runtime's errors share no public base
        raise ModelError(f"ONNX Runtime cannot load {path}: {first_line(error)}") from error


def _has_gpu() -> bool:
    """Whether an NVIDIA driver is loaded; ONNX Runtime lists the CUDA provider whether or not it can work."""
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers() and Path("/proc/driver/nvidia").exists()
