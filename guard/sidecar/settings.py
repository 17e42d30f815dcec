"""What an operator can set. Command line over environment (`GUARD_…`) over `guard.toml`."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from guard.errors import UsageError
from guard.sidecar.addresses import socket_path, split_address
from guard.sidecar.policy import FailurePolicy, Mode


class Settings(BaseSettings):
    """Configuration of one sidecar.

    Exactly one of three shapes: `model` alone serves the exported classifier itself; `upstream` with `model` forwards
    and embeds each image once more; `upstream` with `embedding_output` forwards and reads the embedding from the reply.
    """

    model_config = SettingsConfigDict(
        env_prefix="GUARD_", extra="forbid", frozen=True, protected_namespaces=(), env_ignore_empty=True
    )

    profile: Path
    """The calibrated profile of the classifier."""
    model: Path | None = None
    """What `guard export` wrote."""
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
    embedding_output: str | None = None
    """Name of the upstream output that carries the image embedding."""
    name: str = Field(default="classifier", min_length=1, max_length=128)
    """Model name in requests."""
    input: str = Field(default="image", min_length=1)
    """Name of the input tensor that carries the images."""
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
    mode: Mode = Mode.TAG
    """What a decision does."""
    failure_policy: FailurePolicy | None = None
    """What happens when guard cannot decide; default: open in shadow mode, closed in the others."""
    neighbours: Literal["exact", "compressed", "approximate"] = "exact"
    """How the banks are searched; the others trade a few decisions for time in large banks."""
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
    second_looks: float = Field(default=0.0, ge=0, le=1e6)
    """Most flagged images per second that are looked at again, with their trigger undone; 0: none."""
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
    version: str | None = Field(default=None, min_length=1, max_length=128)
    """Version of the upstream model that the profile is of; a request for another one is of an unknown model."""
    stream_dialect: Literal["auto", "triton", "mlserver"] = "auto"
    """What the messages of `ModelStreamInfer` look like; auto: seen from the replies of the upstream server."""
    allow_model_control: bool = False
    """Whether clients may load and unload models of the upstream server; never such that they send themselves."""
    queue: int = Field(default=256, ge=0)
    """Most requests that wait for a worker; more are not checked, and the failure policy decides."""

    @field_validator("listen", "upstream")
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
    def _one_shape(self) -> Self:
        if self.upstream is None and self.model is None:
            raise ValueError("give --model to serve an exported classifier, or --upstream to stand before a server")
        if self.upstream is None and self.embedding_output is not None:
            raise ValueError("--embedding-output names an output of the upstream server; give --upstream too")
        if self.upstream is not None and (self.model is None) == (self.embedding_output is None):
            raise ValueError("with --upstream give one source of embeddings: --model or --embedding-output")
        return self

    @model_validator(mode="after")
    def _state_is_needed(self) -> Self:
        if self.state is None and (self.sample or self.thumbnails):
            raise ValueError("--sample and --thumbnails are kept in a folder; give one with --state")
        if self.second_looks and self.model is None:
            raise ValueError("--second-looks needs --model: a second look embeds changed images")
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
    def on_failure(self) -> FailurePolicy:
        """The failure policy, with the default applied."""
        if self.failure_policy is not None:
            return self.failure_policy
        return FailurePolicy.OPEN if self.mode is Mode.SHADOW else FailurePolicy.CLOSED

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
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            if first["type"] == "missing":
                raise UsageError(f"--{where} is required (or GUARD_{where.upper()}, or {where} in the file)") from error
            message = first["msg"].removeprefix("Value error, ")
            raise UsageError(f"{where}: {message}" if where else message) from error
        except ValueError as error:
            raise UsageError(f"{config} is not valid TOML: {error}") from error
        except OSError as error:
            raise UsageError(f"cannot read {config}: {error.strerror}") from error
        return merged
