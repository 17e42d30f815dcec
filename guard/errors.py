"""Every error that guard raises on purpose.

    GuardError                    4
    ├── UsageError                2   the command or configuration asks for something impossible
    │   └── MissingDependencyError    … because a part of guard was not installed
    ├── ModelError                4   a model is missing, damaged, or of a kind that is refused
    │   └── ExportError               … or its ONNX form does not compute what it computes
    ├── ImageError                4   an image or a folder of images cannot be used
    ├── ClassListError            4   a list of classes or templates cannot be used
    ├── ProfileError              4   a profile is missing, damaged, or of another model
    ├── CertificateError          4   a certificate, a key or a trust policy cannot be used
    │   └── RefusedError              1   … because the trust policy refuses the model
    ├── EmbeddingsError           4   a file of embeddings cannot be used
    ├── EvidenceError             4   an evidence log is missing or cannot be used
    │   └── DamagedLogError           … because it is damaged, of another schema, or no evidence log
    ├── StateError                4   the stored state of a stream monitor is damaged, or of another configuration
    ├── DataError                 4   a training set, or a stored scan of one, cannot be used
    ├── ZooError                  4   a zoo of models, or what is said about its models, cannot be used
    └── RequestError              –   an inference request is malformed (the sidecar answers INVALID_ARGUMENT)

The number is the exit code of the command line. Verdicts are not errors: their exit codes (0, 1, 3) are given by
the commands that reach them. A message is one sentence that says what was wrong and, where there is something to do,
what to do about it.
"""

__all__ = [
    "CertificateError",
    "ClassListError",
    "DamagedLogError",
    "DataError",
    "EmbeddingsError",
    "EvidenceError",
    "ExportError",
    "GuardError",
    "ImageError",
    "MissingDependencyError",
    "ModelError",
    "ProfileError",
    "RefusedError",
    "RequestError",
    "StateError",
    "UsageError",
    "ZooError",
]


class GuardError(Exception):
    """Base of every error that guard raises on purpose."""

    exit_code = 4


class UsageError(GuardError):
    """The command or the configuration asks for something that cannot be done."""

    exit_code = 2


class MissingDependencyError(UsageError):
    """A part of guard that this needs is not installed, or is installed in a form that cannot work."""


class ModelError(GuardError):
    """A model is missing, damaged, or of a kind that guard refuses to load."""


class ExportError(ModelError):
    """The exported form of a model does not compute what the model computes."""


class ImageError(GuardError):
    """An image, or a folder of images, cannot be used."""


class ClassListError(GuardError):
    """A list of class names or prompt templates cannot be used."""


class ProfileError(GuardError):
    """A profile is missing, damaged, of a newer schema, or belongs to another model."""


class CertificateError(GuardError):
    """A certificate, a key or a trust policy is missing, damaged, or of a kind that guard does not accept."""


class RefusedError(CertificateError):
    """The trust policy refuses a model; the message names the rule that decided."""

    exit_code = 1


class EmbeddingsError(GuardError):
    """A file of embeddings is missing, damaged, or of another model."""


class EvidenceError(GuardError):
    """An evidence log is missing, or cannot be read or written."""


class DamagedLogError(EvidenceError):
    """A file in the place of an evidence log is damaged, of another schema, or of another kind."""


class StateError(GuardError):
    """The stored state of a stream monitor is missing, damaged, or belongs to another configuration."""


class DataError(GuardError):
    """A training set, a part of it, or a stored scan of one is missing, damaged, or of another kind."""


class ZooError(GuardError):
    """A zoo of models, or the truth about one of them, is missing or damaged."""


class RequestError(GuardError):
    """An inference request is malformed; the message is safe to send back to the client."""


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for one line of a message of ours."""
    lines = str(error).strip().splitlines()
    return " ".join(line.strip() for line in lines[:2])[:300] if lines else type(error).__name__
