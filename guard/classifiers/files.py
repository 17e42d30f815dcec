"""The files of a model that may be anybody's, and their limits. No torch here."""

from pathlib import Path

from guard._safetensors import open_tensors
from guard.errors import ModelError

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
CLASSES_FILE = "classes.json"
LEARNER_FILE = "prompt_learner.safetensors"
"""The prompt learner of a model whose prompts were learned; it lies beside the weights of its towers."""
OPEN_CLIP_FILES = (
    CONFIG_FILE, WEIGHTS_FILE, CLASSES_FILE, LEARNER_FILE, "tokenizer*.json", "special_tokens_map.json",
)  # fmt: skip
HUGGING_FACE_FILES = (
    "config.json", "model*.safetensors", "model.safetensors.index.json", "*processor_config.json", CLASSES_FILE,
    LEARNER_FILE, "tokenizer*.json", "vocab.json", "merges.txt", "added_tokens.json",
)  # fmt: skip
"""Patterns of the names of files that are read from a folder of open_clip, and from one of a `CLIPModel`."""
MAX_LAYERS, MAX_SIZE = 256, 2**20
"""Largest number of layers, and largest value of any other number, in the configuration of a tower."""
MAX_CONTEXT, MAX_PATCHES = 4096, 128
"""Longest text in tokens, and most patches along the side of an image: attention takes the square of their number."""
MAX_CONFIG_BYTES = 1_000_000
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}


def missing_weights(directory: Path, name: str) -> ModelError:
    """The error for a directory without its weights.

    Raises:
        ModelError: The directory holds them as a pickle; the message says how to convert it.
    """
    pickles = sorted(path for path in directory.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        with open_tensors(pickles[0], ModelError, wanted=name):
            pass
    return ModelError(f"{directory} has no {name}")
