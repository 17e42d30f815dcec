"""What an operator can set. Command line over environment (`GUARD_…`) over `guard.toml`."""

from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from guard._documents import first_error
from guard.errors import UsageError
from guard.sidecar.policy import FailurePolicy, Mode
from guard.sidecar.transport.addresses import is_loopback, socket_path, split_address

OWN_VERSION = "1"
"""What guard calls the version of a model that it serves itself, if the configuration does not."""


class ModelSettings(BaseModel):
    """What can be different for each model of a sidecar: an entry of `[[models]]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str = Field(default="classifier", min_length=1, max_length=128)
    """Model name in requests."""
    version: str | None = Field(default=None, min_length=1, max_length=128)
    """Version that the profile is of; a request for another one is of an unknown model."""
    profile: Path | None = None
    """The calibrated profile of the classifier."""
    model: Path | None = None
    """What `guard export` wrote."""
    embedding_output: str | None = None
    """Name of the upstream output that carries the image embedding."""
    input: str = Field(default="image", min_length=1)
    """Name of the input tensor that carries the images."""
    mode: Mode = Mode.TAG
    """What a decision does."""
    failure_policy: FailurePolicy | None = None
    """What happens when guard cannot decide; default: open in shadow mode, closed in the others."""
    alpha: float | None = Field(default=None, gt=0, lt=1)
    """p-value up to which an image is flagged, so the false-alarm rate; default: that of the calibration."""
    neighbours: Literal["exact", "approximate"] = "exact"
    """How the banks are searched; `approximate` trades a few decisions for time in very large banks."""
    second_looks: float = Field(default=0.0, ge=0, le=1e6)
    """Most flagged images per second that are looked at again, with their trigger undone; 0: none."""
    checked_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the requests that guard embeds and checks, drawn at random; the others are `unchecked`."""
    require_vetted: bool = False
    """Whether no request passes unless the model's vetting ended with `no evidence`; flagged ones stay flagged."""

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
    def background(self) -> bool:
        """Whether nothing that a client gets depends on what guard finds."""
        return self.mode is Mode.SHADOW and self.on_failure is FailurePolicy.OPEN

    @property
    def label(self) -> str:
        """Name and version in one word, for people and for the names of files."""
        return quote(self.name, safe="") + (f"@{quote(self.version, safe='')}" if self.version else "")


class Settings(ModelSettings, BaseSettings):
    """Configuration of one sidecar.

    What a model can have of its own stands at the top level for a single model. With `[[models]]` in the file there are
    several, and the top level says what holds where an entry says nothing, and for requests of unknown models.

    A model has one of three shapes: without `upstream`, `model` is the exported classifier that guard serves itself; in
    front of an `upstream`, `model` embeds each image once more, and `embedding_output` reads the embedding from the
    reply.
    """

    model_config = SettingsConfigDict(
        env_prefix="GUARD_", extra="forbid", frozen=True, protected_namespaces=(), env_ignore_empty=True
    )

    models: tuple[ModelSettings, ...] = ()
    """Several models, each with what it has of its own; `served` has them whole."""
    upstream: str | None = None
    """HOST:PORT or unix:PATH of the inference server to forward to."""
    upstream_tls: str | None = None
    """TLS towards it: `system` for the machine's certificate authorities, or a PEM file of some; None: no TLS."""
    upstream_certificate: Path | None = None
    """PEM certificate that guard shows it."""
    upstream_key: Path | None = None
    """PEM private key of that."""
    upstream_server_name: str | None = Field(default=None, min_length=1)
    """Name that its certificate must carry, if not the host of its address."""
    processes: int = Field(default=1, ge=1, le=64)
    """Processes that share the inference port; each connection stays with one of them."""
    admin: str | None = None
    """HOST:PORT or unix:PATH for guard's own service, `guard.v1.Sidecar`; None: it is not served.

    What it tells would help an attacker: HOST must be of the loopback interface, or clients need a certificate
    (`tls_client_ca`). With several processes it must be unix:PATH, and process i, from 0, listens at PATH.i.
    """
    listen: str = "127.0.0.1:8001"
    """HOST:PORT or unix:PATH for inference; port 0 lets the system choose."""
    socket_mode: str = Field(default="600", pattern="^0?[0-7]{3}$")
    """Who may connect to a Unix socket, as the mode of its file, in octal."""
    tls_certificate: Path | None = None
    """PEM certificate chain of the inference port; with it, the port takes TLS only."""
    tls_key: Path | None = None
    """PEM private key of that, without a password."""
    tls_client_ca: Path | None = None
    """PEM certificate authorities of clients; with it, a client without a certificate is turned away."""
    metrics: str = "127.0.0.1:8002"
    """HOST:PORT for `/metrics`, `/healthz` and `/readyz`, over plain HTTP."""
    state: Path | None = None
    """Folder for the evidence log, the monitor's state and the sample of traffic; without it they are not kept."""
    thumbnails: bool = False
    """Whether the evidence log keeps small pictures of flagged images."""
    evidence_rows: int = Field(default=100_000, ge=1)
    """Most records in the evidence log; the oldest go first."""
    evidence_bytes: int = Field(default=2**30, ge=2**18)
    """Largest size of the evidence log."""
    evidence_days: float = Field(default=90.0, gt=0, le=36_500)
    """Longest time that a record is kept."""
    run_length: float = Field(default=1e7, ge=1e3, lt=1e12)
    """Images between two false alarms of the stream monitor, on average and at least."""
    sample: int = Field(default=0, ge=0, le=10**6)
    """Embeddings of requests that are sampled for `guard calibrate --embeddings`; 0: none."""
    screening: bool = True
    """Off: every decision is `unchecked`; for measuring what screening costs."""
    timeout: float = Field(default=1.0, gt=0, le=60)
    """Seconds that screening may take before a request is `unchecked`."""
    max_message_bytes: int = Field(default=64 * 2**20, ge=1024, le=2**31 - 1)
    """Largest request or reply."""
    max_pixels: int = Field(default=50_000_000, ge=1)
    """Largest encoded image, in decoded pixels."""
    max_batch: int = Field(default=256, ge=1, le=65_536)
    """Most images in one request."""
    max_concurrent: int = Field(default=256, ge=1)
    """Most requests at once; more are refused with RESOURCE_EXHAUSTED."""
    workers: int = Field(default=2, ge=1, le=256)
    """Threads that decode, embed and screen."""
    drain: float = Field(default=10.0, ge=0)
    """Seconds that running requests are given after SIGTERM."""
    drain_delay: float = Field(default=0.0, ge=0, le=3600)
    """Seconds between SIGTERM and that: requests are still taken, while whoever sends them learns of the end."""
    loop: Literal["auto", "asyncio", "uvloop"] = "auto"
    """Event loop; auto: uvloop if it is installed."""
    log_format: Literal["json", "text"] | None = None
    """Form of the log on standard error; default: text on a terminal, else JSON."""
    stream_dialect: Literal["auto", "triton", "mlserver"] = "auto"
    """What the messages of `ModelStreamInfer` look like; auto: seen from the replies of the upstream server."""
    allow_model_control: bool = False
    """Whether clients may load and unload models of the upstream server; never such that they send themselves."""
    queue: int = Field(default=256, ge=0)
    """Most requests that wait for a worker; more are not checked, and the failure policy decides."""

    @field_validator("listen", "upstream", "admin")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None and socket_path(value) is None:
            split_address(value)
        return value

    @field_validator("metrics")
    @classmethod
    def _tcp_address(cls, value: str) -> str:
        split_address(value)
        return value

    @model_validator(mode="after")
    def _models_are_whole(self) -> Self:
        if not self.models:
            self._check_model(self.served[0], "")
            return self
        if alone := {"name", "version", "profile"} & self.model_fields_set:
            raise ValueError(f"with [[models]], {min(alone)} is given for each of them, not at the top level")
        if unnamed := [index for index, each in enumerate(self.models) if "name" not in each.model_fields_set]:
            raise ValueError(f"[[models]] number {unnamed[0] + 1} has no name")
        served, default = self.served, OWN_VERSION if self.upstream is None else None
        for each in served:
            self._check_model(each, f"model {each.label}: ")
        known = [(each.name, each.version or default) for each in served]
        if twice := [each.label for index, each in enumerate(served) if known[index] in known[:index]]:
            raise ValueError(f"model {twice[0]} is listed twice")
        return self

    def _check_model(self, each: ModelSettings, where: str) -> None:
        if each.profile is None:
            raise ValueError(f"{where}--profile is required (or GUARD_PROFILE, or profile in the file)")
        if self.upstream is None and each.model is None:
            raise ValueError(
                f"{where}give --model to serve an exported classifier, or --upstream to stand before a server"
            )
        if self.upstream is None and each.embedding_output is not None:
            raise ValueError(f"{where}--embedding-output names an output of the upstream server; give --upstream too")
        if self.upstream is not None and (each.model is None) == (each.embedding_output is None):
            raise ValueError(f"{where}with --upstream give one source of embeddings: --model or --embedding-output")
        if each.second_looks and each.model is None:
            raise ValueError(f"{where}--second-looks needs --model: a second look embeds changed images")
        if each.checked_share < 1 and (self.upstream is None or each.model is None or each.mode is Mode.BLOCK):
            raise ValueError(
                f"{where}--checked-share is for a model that guard embeds beside an upstream server, in shadow or tag "
                "mode: elsewhere a check costs no second embedding, or blocking would be left to chance"
            )

    @model_validator(mode="after")
    def _state_is_needed(self) -> Self:
        if self.state is None and (self.sample or self.thumbnails):
            raise ValueError("--sample and --thumbnails are kept in a folder; give one with --state")
        return self

    @model_validator(mode="after")
    def _port_is_shared(self) -> Self:
        if self.processes > 1 and socket_path(self.listen) is not None:
            raise ValueError("several --processes share a port, which a Unix socket cannot; --listen needs HOST:PORT")
        return self

    @model_validator(mode="after")
    def _admin_is_for_operators(self) -> Self:
        if self.admin is None:
            return self
        if socket_path(self.admin) is not None:
            for address in self.admin_addresses:
                socket_path(address)
        elif self.processes > 1:
            raise ValueError("several --processes have an --admin each; give unix:PATH, for PATH.0, PATH.1 and so on")
        elif not is_loopback(self.admin) and self.tls_client_ca is None:
            raise ValueError(
                "--admin tells what is flagged and by which threshold, so at an address that others can reach it needs "
                "--tls-client-ca; or give a loopback address or unix:PATH"
            )
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate and --tls-key go together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("--tls-client-ca needs --tls-certificate and --tls-key")
        if (self.upstream_certificate is None) != (self.upstream_key is None):
            raise ValueError("--upstream-certificate and --upstream-key go together")
        if self.upstream_tls is None and (self.upstream_certificate or self.upstream_server_name):
            raise ValueError("--upstream-certificate and --upstream-server-name need --upstream-tls")
        if self.upstream_tls is not None and self.upstream is None:
            raise ValueError("--upstream-tls is of the connection to a server; give --upstream too")
        return self

    @property
    def admin_addresses(self) -> tuple[str, ...]:
        """Where each process serves guard's own service; none if it is not served."""
        if self.admin is None or self.processes == 1:
            return () if self.admin is None else (self.admin,)
        return tuple(f"{self.admin}.{process}" for process in range(self.processes))

    @property
    def served(self) -> tuple[ModelSettings, ...]:
        """The models, each with what the top level says where it says nothing itself."""
        own = {name: getattr(self, name) for name in ModelSettings.model_fields}
        return tuple(_merged(own, each) for each in self.models) or (ModelSettings(**own),)

    @classmethod
    def load(cls, config: Path | None, **command_line: Any) -> "Settings":  # noqa: ANN401 - click's values
        """Merge command line, environment and file.

        Args:
            config: A TOML file with the names above; None for no file.
            command_line: Values given there; None for those that were not.

        Raises:
            UsageError: The file cannot be read, a name is unknown, or a value is impossible.
        """
        if config is not None and not config.is_file():
            raise UsageError(f"there is no configuration file {config}")

        class Merged(cls):  # type: ignore[misc, valid-type]
            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                **_: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                if config is None:
                    return init_settings, env_settings
                return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, config)

        try:
            merged: Settings = Merged(**{key: value for key, value in command_line.items() if value is not None})
        except ValidationError as error:
            raise UsageError(first_error(error)) from error
        except SettingsError as error:
            raise UsageError(f"GUARD_MODELS is not valid JSON: {error.__cause__}") from error
        except ValueError as error:
            raise UsageError(f"{config} is not valid TOML: {error}") from error
        except OSError as error:
            raise UsageError(f"cannot read {config}: {error.strerror}") from error
        # Of this class, not of the local one, which another process could not unpickle.
        return cls.model_construct(merged.model_fields_set, **dict(merged))


def _merged(top: dict[str, Any], entry: ModelSettings) -> ModelSettings:
    own = entry.model_dump(exclude_unset=True)
    if own.keys() & {"model", "embedding_output"}:
        # One source of embeddings replaces the other.
        top = {**top, "model": None, "embedding_output": None}
    return ModelSettings(**{**top, **own})
