"""Settings that can differ between the models of one sidecar."""

import math
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic.config import JsonDict
from pydantic_settings import NoDecode

from guard.sidecar.policy import FailurePolicy, Mode

RENAMED: Final = {
    "drain": "drain_timeout",
    "input": "input_tensor",
    "loop": "event_loop",
    "name": "model_name",
    "queue": "max_queued",
    "sample": "keep_embeddings",
    "state": "state_dir",
    "version": "model_version",
}
"""Settings that had another name before version 0.2. The old name is refused with the new one."""

OPINION_CHOICES: Final = ("all", "near", "off")
"""What `second_opinion` can be, besides a share."""


def metavar(text: str) -> JsonDict:
    """The placeholder for a value in the help of an option, where the type does not say enough."""
    return {"metavar": text}


def split(value: Any) -> Any:  # noqa: ANN401 - whatever a source contains; pydantic judges the result
    """The parts of a text with commas, which is the form of a list in an option or an environment variable."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Names = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], NoDecode, BeforeValidator(split)]
"""A list of names: an array in the file, and one text with commas elsewhere."""

Paths = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(split)]
"""A list of files, in the same forms."""


class ModelSettings(BaseModel):
    """Settings that can differ between the models of one sidecar: an entry of `[[models]]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    profile: Path | None = Field(
        default=None,
        description="Folder of the model's calibrated profile, which guard vet and guard calibrate wrote.",
        examples=["/models/profile"],
    )
    model: Path | None = Field(
        default=None,
        description="Folder of the ONNX model that guard export wrote. Without --upstream, guard serves this model "
        "itself; with --upstream, guard only computes the embeddings of images or texts with it.",
        examples=["/models/exported"],
    )
    embedding_output: str | None = Field(
        default=None,
        description="Name of the output tensor of the --upstream server that carries the image embedding. Give it "
        "instead of --model if the upstream server computes embeddings anyway.",
        examples=["embedding"],
        json_schema_extra=metavar("NAME"),
    )
    model_name: str = Field(
        default="classifier",
        min_length=1,
        max_length=128,
        description="Name of the model in requests.",
        json_schema_extra=metavar("NAME"),
    )
    model_version: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        description="Version of the model that the profile was made for. A request that names another version is "
        "treated as a request for an unknown model. By default, the version is 1 if guard serves the model itself, "
        "and a model of an upstream server has no version.",
        examples=["1"],
        json_schema_extra=metavar("VERSION"),
    )
    input_tensor: str = Field(
        default="image",
        min_length=1,
        description="Name of the input tensor that carries the images or the texts.",
        json_schema_extra=metavar("NAME"),
    )
    other_inputs: Names = Field(
        default=(),
        description="Names of input tensors that a request may have besides --input-tensor. guard does not screen what "
        "they carry. By default, a request with a further input cannot be checked, because a server may read its "
        "images from there.",
        examples=[["mask"]],
        json_schema_extra=metavar("NAME,…"),
    )
    pass_parameters: Names = Field(
        default=(),
        description="Names of parameters that a request and its inputs may have besides those of scheduling. By "
        "default, a request with another parameter cannot be checked, because a server may read its images "
        "differently for it.",
        examples=[["tenant"]],
        json_schema_extra=metavar("NAME,…"),
    )
    forward: Literal["canonical", "as-sent"] = Field(
        default="canonical",
        description="Which images an --upstream server receives where guard embeds them with --model. With canonical, "
        "each encoded image is replaced by the pixels that guard checked: a PNG file in 8-bit RGB, of the size of the "
        "model's input; each text is replaced by that of its tokens. With as-sent, it is forwarded unchanged, and one "
        "that programs decode, resize or clean in different ways cannot be checked. In shadow mode with the failure "
        "policy open, inputs are forwarded as sent.",
    )
    mode: Mode = Field(
        default=Mode.TAG,
        description="What guard does with its decisions: shadow only counts them in the metrics; tag also reports them "
        "in the replies; block also refuses flagged requests.",
    )
    failure_policy: FailurePolicy | None = Field(
        default=None,
        description="What guard does with a request that it could not check: open serves it and marks it as "
        "unchecked; closed refuses it. By default, the policy is open in shadow mode and closed in the other modes.",
        examples=["closed"],
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="False-alarm rate, the share of clean images that may be flagged: an image is flagged if its "
        "conformal p-value is at most this. By default, the rate that the profile was calibrated for applies.",
        examples=[0.001],
    )
    require_vetted: bool = Field(
        default=False,
        description='Whether a request can pass only if the vetting of the model ended with the verdict "no '
        'evidence". With another verdict, all requests that are not flagged count as unchecked, and --failure-policy '
        "decides.",
    )
    checked_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the requests that guard embeds and checks; they are drawn at random, and the others are "
        "unchecked. A share below 1 needs --upstream and --model, and cannot be combined with block mode.",
    )
    neighbours: Literal["exact", "approximate"] = Field(
        default="exact",
        description="How the banks of reference embeddings are searched. The approximate search saves time in banks "
        "of 50,000 embeddings and more, and changes a few decisions.",
    )
    second_opinion: str | None = Field(
        default=None,
        description="Which requests a reference model answers too, so that they are compared with its answers: all; "
        "near, for the images that other scores put near the threshold; a share in (0, 1] of all requests, drawn at "
        "random; or off. The profile must have a reference model, which guard calibrate gives it. By default, it is "
        "all, and off if the profile has no reference model.",
        examples=["near"],
        json_schema_extra=metavar("all|near|SHARE|off"),
    )
    second_looks: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="Maximum number of flagged images per second that guard examines again, with the suspected trigger "
        "removed from the image. If the decision does not depend on anything that a trigger could be, the flag is "
        "withdrawn. A flagged text is read again without each of its words, to name the one that makes it suspicious. "
        "This needs --model; 0 turns second looks off.",
    )

    @model_validator(mode="before")
    @classmethod
    def _names_are_current(cls, values: Any) -> Any:  # noqa: ANN401 - whatever the sources contain
        if isinstance(values, dict) and (old := sorted(values.keys() & RENAMED.keys())):
            raise ValueError(f"{old[0]} is now called {RENAMED[old[0]]}")
        return values

    @field_validator("second_opinion", mode="before")
    @classmethod
    def _is_a_choice(cls, value: object) -> object:
        if value is None or value in OPINION_CHOICES:
            return value
        try:
            share = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type] # what cannot be one raises
        except (TypeError, ValueError):
            share = math.nan
        if not 0 < share <= 1:
            raise ValueError(f"{value!r} is none of {', '.join(OPINION_CHOICES)}, and no share in (0, 1]")
        return f"{share:g}" if share < 1 else "all"

    def clears(self, verdict: str) -> bool:
        """Whether requests may pass to a model with this verdict."""
        return not self.require_vetted or verdict == "no evidence"

    @property
    def on_failure(self) -> FailurePolicy:
        """The failure policy, with the default applied."""
        if self.failure_policy is not None:
            return self.failure_policy
        return FailurePolicy.OPEN if self.mode is Mode.SHADOW else FailurePolicy.CLOSED

    @property
    def opinions(self) -> str:
        """Which requests get a second opinion: one of `OPINION_CHOICES`, or a share below 1, with the default applied.

        The default is all: few triggered requests of photographs lie near the threshold of the other scores
        (docs/serving.md), so that `near` saves passes and misses attacks.
        """
        return self.second_opinion or "all"

    @property
    def background(self) -> bool:
        """Whether nothing that a client receives depends on what guard finds."""
        return self.mode is Mode.SHADOW and self.on_failure is FailurePolicy.OPEN

    @property
    def canonical(self) -> bool:
        """Whether an upstream server receives the pixels that were checked, where guard embeds the images itself."""
        return self.forward == "canonical" and not self.background

    @property
    def label(self) -> str:
        """Name and version in one word, for people and for the names of files."""
        version = f"@{quote(self.model_version, safe='')}" if self.model_version else ""
        return quote(self.model_name, safe="") + version
