"""Every setting of a sidecar: the one source of the options of `guard serve` and of deploy/guard.toml.

The settings that a model can have of its own are in `model_settings`. A description is written for the command line,
and names other settings as options, such as --state-dir. A field without a default has an example, for the documented
file. After a change here, run scripts/generate_docs.py.
"""

import json
import re
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from guard._cpus import usable_cpus
from guard._documents import first_error, read_toml
from guard.errors import UsageError
from guard.sidecar.addresses import is_loopback, socket_path, split_address
from guard.sidecar.model_settings import OPINION_CHOICES, RENAMED, ModelSettings, Names, Paths, metavar
from guard.sidecar.policy import Mode
from guard.sidecar.setting_sources import (
    ENVIRONMENT_PREFIX,
    EffectiveSetting,
    Source,
    environment,
    only_stricter,
    sources_of,
)

OWN_VERSION: Final = "1"
"""Version of a model that guard serves itself, where the configuration names none."""

_config: ContextVar[dict[str, Any]] = ContextVar("_config")
"""The configuration file's contents, while `Settings.load` runs."""
_MAX_CONFIG_BYTES = 16 * 2**20


class Settings(ModelSettings, BaseSettings):
    """Configuration of one sidecar.

    The settings that models can have of their own stand at the top level for a single model. With `[[models]]` in the
    file there are several models, and the top level applies where an entry leaves a setting out, and to requests for
    unknown models.

    A model has one of three shapes. Without `upstream`, `model` is the exported classifier that guard serves itself.
    With `upstream`, either `model` embeds each image a second time, or `embedding_output` names the output of the
    upstream server that carries the embedding.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True, protected_namespaces=(), env_ignore_empty=True
    )

    upstream: str | None = Field(
        default=None,
        description="Address of the Open Inference Protocol server that requests are forwarded to. By default, guard "
        "serves --model itself.",
        examples=["127.0.0.1:9000"],
        json_schema_extra=metavar("ADDRESS"),
    )
    upstream_tls: str | None = Field(
        default=None,
        description="Encrypt the connection to the --upstream server with TLS. The value says which certificate "
        "authorities are trusted: system for those of this machine, or a PEM file.",
        examples=["system"],
        json_schema_extra=metavar("system|FILE"),
    )
    upstream_certificate: Path | None = Field(
        default=None,
        description="PEM file of the certificate that guard presents to the --upstream server.",
        examples=["/tls/client.crt"],
    )
    upstream_key: Path | None = Field(
        default=None,
        description="PEM file of the private key for --upstream-certificate.",
        examples=["/tls/client.key"],
    )
    upstream_server_name: str | None = Field(
        default=None,
        min_length=1,
        description="Host name that the certificate of the --upstream server must carry. By default, it is the host "
        "of the server's address.",
        examples=["models"],
        json_schema_extra=metavar("NAME"),
    )
    stream_dialect: Literal["auto", "triton", "mlserver"] = Field(
        default="auto",
        description="Dialect of the response streams of the --upstream server. With auto, guard recognises it from "
        "the replies.",
    )
    pass_methods: Names = Field(
        default=(),
        description="Paths of further methods of the --upstream server that are forwarded unread, as "
        "/package.Service/Method or /package.Service/*. Any other method that guard does not know is an unchecked "
        "request, and --failure-policy decides whether it is forwarded.",
        examples=[["/package.Service/Method"]],
        json_schema_extra=metavar("PATH,…"),
    )
    pass_headers: Names = Field(
        default=(),
        description="Keys of further request metadata that are passed on to the --upstream server; a * at the end "
        "stands for any ending. By default, only keys of authorization, tracing and Triton's streams are passed on, "
        "because others may choose another model.",
        examples=[["x-tenant", "x-team-*"]],
        json_schema_extra=metavar("KEY,…"),
    )
    allow_model_control: bool = Field(
        default=False,
        description="Whether clients may load and unload models of the --upstream server. A request that carries the "
        "files of a model itself is refused in any case.",
    )
    listen: str = Field(
        default="127.0.0.1:8001",
        description="Address at which guard accepts inference requests over gRPC. Port 0 lets the system choose a "
        "port.",
        json_schema_extra=metavar("ADDRESS"),
    )
    socket_mode: str = Field(
        default="600",
        pattern="^0?[0-7]{3}$",
        description="Permissions, in octal, of each Unix socket at which guard listens: they decide who may connect.",
        json_schema_extra=metavar("OCTAL"),
    )
    tls_certificate: Path | None = Field(
        default=None,
        description="PEM file of the certificate chain for --listen, for --dashboard, and for --admin at HOST:PORT, "
        "which then accept connections with TLS only. A renewed certificate is read without a restart.",
        examples=["/tls/tls.crt"],
    )
    tls_key: Path | None = Field(
        default=None,
        description="PEM file of the private key for --tls-certificate: RSA or ECDSA, without a password.",
        examples=["/tls/tls.key"],
    )
    tls_client_ca: Path | None = Field(
        default=None,
        description="PEM file of the certificate authorities of clients. If it is given, a client without a "
        "certificate from one of these authorities is rejected.",
        examples=["/tls/ca.crt"],
    )
    policy: Paths = Field(
        default=(),
        description="TOML files of trust policies, each of which must accept the certificate of every model. Policies "
        "that the options, the environment and the file name are all asked.",
        examples=[["/etc/guard/policy.toml"]],
        json_schema_extra=metavar("FILE,…"),
    )
    trust: Paths = Field(
        default=(),
        description="PEM files of public keys. A certificate is accepted if one of these keys signed it and "
        'its verdict is "no evidence".',
        examples=[["/etc/guard/vetting.pub"]],
        json_schema_extra=metavar("FILE,…"),
    )
    require_certified: bool = Field(
        default=False,
        description="Whether requests can pass only to models whose certificates --trust and --policy accept. With the "
        "failure policy closed, guard does not start with another model; with open, requests to it are served as "
        "unchecked. If the configuration file requires it, neither options nor the environment can weaken that.",
    )
    certificate_interval: float = Field(
        default=300.0,
        gt=0,
        description="Seconds after which the certificates are checked again: they expire, and policies change.",
        json_schema_extra=metavar("SECONDS"),
    )
    certificate_warning_days: float = Field(
        default=14.0,
        ge=0,
        description="Number of days before a certificate expires at which a warning is logged.",
        json_schema_extra=metavar("DAYS"),
    )
    metrics: str = Field(
        default="127.0.0.1:8002",
        description="Address at which guard answers GET requests for /metrics, /healthz and /readyz over plain HTTP.",
        json_schema_extra=metavar("HOST:PORT"),
    )
    admin: str | None = Field(
        default=None,
        description="Address of guard's own gRPC service, guard.v1.Sidecar, which reports status, models and flagged "
        "requests. This would help an attacker, so HOST must be a loopback address unless --tls-client-ca is given. "
        "With several --processes the address must be unix:PATH, and process number i, from 0, listens at PATH.i. By "
        "default, the service is not offered.",
        examples=["unix:/run/guard/admin.sock"],
        json_schema_extra=metavar("ADDRESS"),
    )
    dashboard: str | None = Field(
        default=None,
        description="Address at which guard serves a page for people over HTTP: its state, its models, flagged "
        "requests as they come, and what to do. HOST must be a loopback address unless --tls-client-ca is given, or "
        "--dashboard-token with --tls-certificate. With several --processes, use guard top instead. By default, the "
        "page is not served.",
        examples=["127.0.0.1:8003"],
        json_schema_extra=metavar("HOST:PORT"),
    )
    dashboard_token: Path | None = Field(
        default=None,
        description="File with the password of --dashboard, of at least 16 characters. Browsers ask for it; the user "
        "name does not matter.",
        examples=["/etc/guard/dashboard-token"],
    )
    dashboard_hosts: Names = Field(
        default=(),
        description="Host names under which browsers may open --dashboard. Requests with another name are refused, "
        "because a hostile page could make its own name lead here; localhost and IP addresses are always accepted.",
        examples=[["guard.example.com"]],
        json_schema_extra=metavar("NAME,…"),
    )
    processes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Number of processes that share the port of --listen. Each connection stays with one process.",
    )
    event_loop: Literal["auto", "asyncio", "uvloop"] = Field(
        default="auto",
        description="Event loop that the server runs on. With auto, it is uvloop if that is installed, and asyncio "
        "otherwise.",
    )
    workers: int = Field(
        default=2, ge=1, le=256, description="Number of threads in each process that decode, embed and screen images."
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Number of threads that one forward pass of --model, or of the reference model, uses. By default, "
        "as many as there are processors for this process, by its affinity and the quota of its container, divided by "
        "--processes.",
        examples=[4],
    )
    max_queued: int = Field(
        default=256,
        ge=0,
        description="Maximum number of requests in each process that wait for a worker thread. Further requests are "
        "not checked, and --failure-policy decides whether they are served.",
    )
    max_concurrent: int = Field(
        default=256,
        ge=1,
        description="Maximum number of requests in each process that are handled at the same time. Further requests "
        "are refused with RESOURCE_EXHAUSTED.",
    )
    max_streams: int = Field(
        default=64,
        ge=1,
        description="Maximum number of streams in each process that are open at the same time. Further streams are "
        "refused with RESOURCE_EXHAUSTED.",
    )
    max_inflight_bytes: int | None = Field(
        default=None,
        ge=1024,
        description="Maximum size in bytes of all messages and replies together that each process handles at the same "
        "time. Further messages are refused with RESOURCE_EXHAUSTED; large ones are refused when half of it is taken. "
        "By default, it is 256 MiB, or four times --max-message-bytes if that is more.",
        examples=[2**28],
    )
    first_message_timeout: float = Field(
        default=60.0,
        gt=0,
        le=3600,
        description="Number of seconds in which a call must have sent its first message. Where many calls wait for "
        "theirs, the one that has waited longest makes room earlier.",
    )
    stream_idle_timeout: float = Field(
        default=600.0,
        gt=0,
        description="Number of seconds for which a stream may be silent in both directions before it is ended.",
    )
    ping_interval: float = Field(
        default=0.5,
        ge=0.001,
        le=86_400,
        description="Minimum number of seconds between two keepalive pings of a client. The connection of a client "
        "that sends them more often is closed. A ping costs next to nothing, so only floods of them are refused by "
        "default.",
    )
    ping_without_calls: bool = Field(
        default=True, description="Whether a client may send keepalive pings while it has no call open."
    )
    max_connection_idle: float = Field(
        default=3600.0,
        gt=0,
        le=86_400,
        description="Number of seconds without a call after which a connection is closed, so that forgotten "
        "connections do not add up. Clients connect again by themselves.",
    )
    max_connection_age: float | None = Field(
        default=None,
        gt=0,
        le=86_400 * 7,
        description="Number of seconds after which a connection is closed when its calls have ended, so that clients "
        "spread over new sidecars. By default, connections have any age.",
        examples=[1800.0],
    )
    max_connection_age_grace: float = Field(
        default=60.0,
        gt=0,
        le=86_400,
        description="Number of seconds in which the calls of a connection may finish after --max-connection-age; then "
        "they are ended.",
    )
    max_batch: int = Field(
        default=256, ge=1, le=65_536, description="Maximum number of images, or of texts, in one request."
    )
    max_pixels: int = Field(
        default=50_000_000, ge=1, description="Maximum number of pixels of an encoded image after decoding."
    )
    max_request_pixels: int = Field(
        default=500_000_000,
        ge=1,
        description="Maximum number of pixels that are decoded for one request: those of all its encoded images, "
        "counted once for each scan of a progressive JPEG.",
    )
    max_message_bytes: int = Field(
        default=16 * 2**20,
        ge=1024,
        le=2**31 - 1,
        description="Maximum size of a request or a reply in bytes. Reading a message of 16 MiB, which has room for 27 "
        "images of 224 × 224 pixels as FP32, keeps all other calls waiting for some hundredths of a second.",
    )
    timeout: float = Field(
        default=1.0,
        gt=0,
        le=60,
        description="Time limit in seconds for the screening of one request to an --upstream server, and for the "
        "second opinion on one request that guard answers itself. A request whose screening takes longer is unchecked, "
        "and --failure-policy decides whether it is served.",
    )
    screening: bool = Field(
        default=True,
        description="Whether requests are screened. Without screening, every request is served as unchecked, which is "
        "meant for measuring what screening costs.",
    )
    state_dir: Path | None = Field(
        default=None,
        description="Folder in which guard keeps the evidence log, the state of the stream monitor and the sample of "
        "embeddings. By default, none of them is kept.",
        examples=["/var/lib/guard"],
    )
    thumbnails: bool = Field(
        default=False,
        description="Whether the evidence log keeps small pictures of flagged images, and the first thousand "
        "characters of flagged texts. This needs --state-dir.",
    )
    evidence_rows: int = Field(
        default=100_000,
        ge=1,
        description="Maximum number of records in the evidence log. The oldest records are deleted first.",
    )
    evidence_bytes: int = Field(
        default=2**30,
        ge=2**18,
        description="Maximum size of the evidence log in bytes. The oldest records are deleted first.",
    )
    evidence_days: float = Field(
        default=90.0, gt=0, le=36_500, description="Number of days after which a record of the evidence log is deleted."
    )
    keep_embeddings: int = Field(
        default=0,
        ge=0,
        le=10**6,
        description="Number of embeddings in the random sample of the traffic that guard keeps for guard calibrate "
        "--embeddings. This needs --state-dir; 0 keeps no sample.",
    )
    run_length: float = Field(
        default=1e7,
        ge=1e3,
        lt=1e12,
        description="Minimum average number of clean images between two false alarms of the stream monitor.",
    )
    drain_delay: float = Field(
        default=0.0,
        ge=0,
        le=3600,
        description="Number of seconds after SIGTERM in which guard still accepts requests but already reports that it "
        "is not ready, so that load balancers send no more.",
    )
    drain_timeout: float = Field(
        default=10.0,
        ge=0,
        description="Number of seconds in which running requests may finish at shutdown, after --drain-delay.",
    )
    log_format: Literal["json", "text"] | None = Field(
        default=None,
        description="Format of the log on standard error. By default, it is text on a terminal and JSON elsewhere.",
        examples=["json"],
    )
    models: tuple[ModelSettings, ...] = Field(
        default=(), description="The models, where there are several; `served` has them with all their settings."
    )

    @field_validator("listen", "upstream", "admin")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None and socket_path(value) is None:
            split_address(value)
        return value

    @field_validator("pass_methods")
    @classmethod
    def _paths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for path in value:
            if not re.fullmatch(r"/[\w.]+/(\w+|\*)", path):
                raise ValueError(f"{path!r} is not of the form /package.Service/Method")
        return value

    @field_validator("pass_headers")
    @classmethod
    def _keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for key in value:
            if not re.fullmatch(r"[0-9a-z_.-]+\*?", key):
                raise ValueError(f"{key!r} is not a key of metadata, which is written in small letters")
        return value

    @field_validator("upstream")
    @classmethod
    def _can_be_called(cls, value: str | None) -> str | None:
        if value is not None and socket_path(value) is None and not split_address(value)[1]:
            raise ValueError(f"{value!r} has port 0, at which no server can be called")
        return value

    @field_validator("metrics", "dashboard")
    @classmethod
    def _tcp_address(cls, value: str | None) -> str | None:
        if value is not None:
            split_address(value)
        return value

    @model_validator(mode="after")
    def _models_are_whole(self) -> Self:
        if not self.models:
            self._check_model(self.served[0], "")
            return self
        if alone := {"model_name", "model_version", "profile"} & self.model_fields_set:
            raise ValueError(f"with [[models]], {min(alone)} must stand in each entry, not at the top level")
        if unnamed := [index for index, each in enumerate(self.models) if "model_name" not in each.model_fields_set]:
            raise ValueError(f"[[models]] number {unnamed[0] + 1} has no model_name")
        served, default = self.served, OWN_VERSION if self.upstream is None else None
        for each in served:
            self._check_model(each, f"model {each.label}: ")
        known = [(each.model_name, each.model_version or default) for each in served]
        if twice := [each.label for index, each in enumerate(served) if known[index] in known[:index]]:
            raise ValueError(f"model {twice[0]} is listed twice")
        return self

    def _check_model(self, each: ModelSettings, where: str) -> None:
        if each.profile is None:
            raise ValueError(f"{where}--profile is required (or GUARD_PROFILE, or profile in the file)")
        if self.upstream is None and each.model is None:
            raise ValueError(
                f"{where}give --model to serve an exported classifier, or --upstream to proxy an inference server"
            )
        if self.upstream is None and each.embedding_output is not None:
            raise ValueError(
                f"{where}--embedding-output names an output of the upstream server, so it needs --upstream"
            )
        if self.upstream is not None and (each.model is None) == (each.embedding_output is None):
            raise ValueError(f"{where}with --upstream, give one source of embeddings: --model or --embedding-output")
        if each.second_looks and each.model is None:
            raise ValueError(f"{where}--second-looks needs --model, because a second look embeds changed images")
        if each.checked_share < 1 and (self.upstream is None or each.model is None or each.mode is Mode.BLOCK):
            raise ValueError(
                f"{where}--checked-share below 1 needs --upstream, --model, and shadow or tag mode: otherwise a check "
                "costs no second embedding, or chance would decide what is blocked"
            )
        if each.mode is Mode.BLOCK and each.second_opinion not in {None, *OPINION_CHOICES}:
            raise ValueError(
                f"{where}a share as --second-opinion needs shadow or tag mode: otherwise chance would decide what is "
                "blocked; give all, near or off"
            )

    @model_validator(mode="after")
    def _somebody_is_trusted(self) -> Self:
        if self.require_certified and not (self.policy or self.trust):
            raise ValueError("--require-certified needs --trust or --policy, which say whose certificates are accepted")
        return self

    @model_validator(mode="after")
    def _a_message_fits(self) -> Self:
        if self.inflight_bytes < self.max_message_bytes:
            raise ValueError(
                "--max-inflight-bytes must not be less than --max-message-bytes: no such message would be taken"
            )
        return self

    @model_validator(mode="after")
    def _state_is_needed(self) -> Self:
        if self.state_dir is None and (self.keep_embeddings or self.thumbnails):
            raise ValueError("--keep-embeddings and --thumbnails need a folder to write to; give one with --state-dir")
        return self

    @model_validator(mode="after")
    def _port_is_shared(self) -> Self:
        if self.processes > 1 and socket_path(self.listen) is not None:
            raise ValueError("several --processes cannot share a Unix socket; --listen needs HOST:PORT")
        return self

    @model_validator(mode="after")
    def _admin_is_for_operators(self) -> Self:
        if self.admin is None:
            return self
        if socket_path(self.admin) is not None:
            for address in self.admin_addresses:
                socket_path(address)
        elif self.processes > 1:
            raise ValueError(
                "with several --processes, each has its own --admin address; give unix:PATH, for PATH.0, PATH.1, …"
            )
        elif not is_loopback(self.admin) and self.tls_client_ca is None:
            raise ValueError(
                "--admin reports what is flagged and by which threshold, so at an address that others can reach it "
                "needs --tls-client-ca; or give a loopback address or unix:PATH"
            )
        return self

    @model_validator(mode="after")
    def _dashboard_is_for_operators(self) -> Self:
        if self.dashboard is None:
            if self.dashboard_token is not None or self.dashboard_hosts:
                raise ValueError("--dashboard-token and --dashboard-hosts need --dashboard")
            return self
        if self.processes > 1:
            raise ValueError(
                "--dashboard shows one process; with several --processes, give --admin unix:PATH and run guard top "
                "unix:PATH"
            )
        token = self.dashboard_token is not None and self.tls_certificate is not None
        if not is_loopback(self.dashboard) and self.tls_client_ca is None and not token:
            raise ValueError(
                "--dashboard shows what is flagged and by which threshold, so at an address that others can reach it "
                "needs --tls-client-ca, or --dashboard-token with --tls-certificate; or give a loopback address"
            )
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate and --tls-key must be given together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("--tls-client-ca needs --tls-certificate and --tls-key")
        if (self.upstream_certificate is None) != (self.upstream_key is None):
            raise ValueError("--upstream-certificate and --upstream-key must be given together")
        if self.upstream_tls is None and (self.upstream_certificate or self.upstream_server_name):
            raise ValueError("--upstream-certificate and --upstream-server-name need --upstream-tls")
        if self.upstream_tls is not None and self.upstream is None:
            raise ValueError("--upstream-tls encrypts the connection to an upstream server, so it needs --upstream")
        return self

    _sources: Mapping[str, Source] = PrivateAttr(default_factory=dict)

    @property
    def sources(self) -> Mapping[str, Source]:
        """Where the values of the settings come from, by name; those that are missing have their default."""
        return self._sources

    @property
    def effective(self) -> tuple[EffectiveSetting, ...]:
        """All settings in effect, those of the sidecar first, then what models have of their own."""
        found = [
            EffectiveSetting("", name, json.dumps(value), self._sources.get(name, Source.DEFAULT))
            for name, value in self.model_dump(mode="json", exclude={"models"}).items()
        ]
        source = self._sources.get("models", Source.FILE)
        for each in self.models:
            own = each.model_dump(mode="json", exclude_unset=True)
            found += [EffectiveSetting(each.label, name, json.dumps(value), source) for name, value in own.items()]
        return tuple(found)

    @property
    def inflight_bytes(self) -> int:
        """The most bytes of all messages and replies that are handled at a time, with the default applied."""
        if self.max_inflight_bytes is not None:
            return self.max_inflight_bytes
        return max(2**28, 4 * self.max_message_bytes)

    @property
    def forward_threads(self) -> int:
        """Threads that one forward pass uses in each process."""
        return self.threads or max(1, usable_cpus() // self.processes)

    @property
    def admin_addresses(self) -> tuple[str, ...]:
        """The address of guard's own service in each process; empty if it is not offered."""
        if self.admin is None or self.processes == 1:
            return () if self.admin is None else (self.admin,)
        return tuple(f"{self.admin}.{process}" for process in range(self.processes))

    @property
    def served(self) -> tuple[ModelSettings, ...]:
        """The models, each completed by the settings of the top level."""
        own = {name: getattr(self, name) for name in ModelSettings.model_fields}
        return tuple(_merged(own, each) for each in self.models) or (ModelSettings(**own),)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic passes every source by name
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - as above
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The sources, the one that wins first: arguments, environment, configuration file."""
        return init_settings, env_settings, InitSettingsSource(settings_cls, _config.get({}))

    @classmethod
    def load(cls, config: Path | None, **command_line: Any) -> "Settings":  # noqa: ANN401 - click's values
        """Merge command line, environment and configuration file, in this order of precedence.

        Args:
            config: A TOML file whose keys are the names of the fields; None for no file.
            command_line: Values of the options by the names of the fields; None for options that were not given.

        Raises:
            UsageError: The file cannot be read, a name is unknown or outdated, or a value is impossible.
        """
        missing = f"there is no configuration file {config}"
        table = {} if config is None else read_toml(config, _MAX_CONFIG_BYTES, UsageError, missing=missing)
        variables = environment()
        for old, new in RENAMED.items():
            if (variable := f"{ENVIRONMENT_PREFIX}{old}".upper()) in variables:
                raise UsageError(f"{variable} is now called {ENVIRONMENT_PREFIX}{new.upper()}")
        given = {key: value for key, value in command_line.items() if value is not None}
        token = _config.set(table)
        try:
            only_stricter(table, given)
            settings = cls(**given)
            settings._sources = sources_of(table, given, cls.model_fields)
        except ValidationError as error:
            raise UsageError(first_error(error)) from error
        except SettingsError as error:
            raise UsageError(f"GUARD_MODELS is not valid JSON: {error.__cause__}") from error
        finally:
            _config.reset(token)
        return settings


def _merged(top: dict[str, Any], entry: ModelSettings) -> ModelSettings:
    own = entry.model_dump(exclude_unset=True)
    if own.keys() & {"model", "embedding_output"}:
        # One source of embeddings replaces the other.
        top = {**top, "model": None, "embedding_output": None}
    return ModelSettings(**{**top, **own})
