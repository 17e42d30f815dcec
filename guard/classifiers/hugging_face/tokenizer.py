"""The tokenizer files of a Hugging Face `CLIPModel` directory; any vocabulary other than CLIP's is refused."""

import json
from pathlib import Path
from typing import Any

from guard._documents import read_object, read_text
from guard.classifiers.open_clip import import_open_clip
from guard.errors import ModelError

_MAX_BYTES = 16_000_000
_SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
"""open_clip's names of the two special tokens, and Hugging Face's."""

_Merges = list[tuple[str, ...]]


def check_tokenizer(directory: Path) -> None:
    """Make sure that the tokenizer of a directory, if it has one, has the vocabulary that guard will use.

    guard tokenizes with open_clip's `SimpleTokenizer`. Vocabulary, merges and added tokens are compared with it. Text
    is cleaned first as open_clip (and OpenAI) do it: mojibake is repaired, quotes are straightened and HTML is
    unescaped, which transformers' newer tokenizers do not do.

    Raises:
        ModelError: A file is damaged, or contains another vocabulary.
    """
    vocabulary, merges = _clip()
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json", "tokenizer_config.json"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            same = _is_clip(path, vocabulary, merges)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{path} is damaged, or not the tokenizer of a CLIP") from error
        if not same:
            raise ModelError(
                f"{path} differs from CLIP's vocabulary of {len(vocabulary)} tokens; guard has no other tokenizer, and "
                "with the wrong one the prompts of the classes would mean something else"
            )


def tokenizer_files(context_length: int) -> dict[str, str]:
    """The files from which transformers builds the same tokenizer: name → text."""
    vocabulary, merges = _clip()
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length}
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False) + "\n",
        "merges.txt": "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in merges),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def _clip() -> tuple[dict[str, int], _Merges]:
    """CLIP's vocabulary and merges, under Hugging Face's names."""
    tokenizer = import_open_clip().SimpleTokenizer()
    return {_SPECIAL.get(token, token): number for token, number in tokenizer.encoder.items()}, list(
        tokenizer.bpe_ranks
    )


def _is_clip(path: Path, vocabulary: dict[str, int], merges: _Merges) -> bool:
    if path.name == "merges.txt":
        lines = read_text(path, _MAX_BYTES, ModelError).splitlines()
        return [tuple(line.split()) for line in lines if line and not line.startswith("#version")] == merges
    document = read_object(path, _MAX_BYTES, ModelError)
    if path.name == "vocab.json":
        return document == vocabulary
    added = _added(path.name, document)
    if path.name == "tokenizer.json":
        model = document["model"]
        pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        return model["type"] == "BPE" and {**model["vocab"], **added} == vocabulary and pairs == merges
    return added.items() <= vocabulary.items()


def _added(name: str, document: dict[str, Any]) -> dict[str, int]:
    """The tokens that a file adds to the vocabulary."""
    if name == "added_tokens.json":
        return document
    if name == "tokenizer.json":
        return {token["content"]: token["id"] for token in document.get("added_tokens") or []}
    tokens = document.get("added_tokens_decoder") or {}
    return {token["content"]: int(number) for number, token in tokens.items()}
