"""The models of a sidecar: finding the model that a request is for, and reloading profiles that have changed."""

import asyncio
import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

from guard._files import file_stamp
from guard.errors import GuardError
from guard.profiles.storage import REFERENCE_MODEL
from guard.sidecar.decisions.checking import Checker
from guard.sidecar.decisions.loading import Loaded, load
from guard.sidecar.decisions.reservoir import Reservoir
from guard.sidecar.decisions.routes import Request, Route
from guard.sidecar.decisions.watch import Shared
from guard.sidecar.model_settings import ModelSettings
from guard.sidecar.policy import Reason
from guard.sidecar.settings import OWN_VERSION
from guard.sidecar.telemetry.metrics import Metrics, ModelMetrics

log = logging.getLogger(__name__)

FolderStamp: TypeAlias = tuple[tuple[str, tuple[int, int, int] | None], ...]


@dataclass(eq=False)
class Served:
    """A model and what it is screened with at present.

    Attributes:
        settings: Settings of the model.
        version: The version of the model; "" if it has none.
        checker: The checker in use; it is replaced as a whole.
        stamps: Stamps of the folders of the profile and of the exported model when they were last examined.
        loaded: What the checker was made from.
        model_stamp: Stamp of the folder of the exported model when the one in use was loaded.
        since: When the profile in use was read.
        stale: Whether the files on disk could not be used, so that older ones stay in use.
    """

    settings: ModelSettings
    version: str
    checker: Checker
    stamps: tuple[FolderStamp, FolderStamp]
    loaded: Loaded
    model_stamp: FolderStamp
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    stale: bool = False

    @property
    def route(self) -> Route:
        """The route of requests for this model."""
        return Route(self.settings, self.checker.metrics, self.checker)


class Models:
    """All models that the configuration names.

    Args:
        shared: What the models share.
        metrics: Metrics of the sidecar.

    Attributes:
        unknown: The route of requests for models that guard has no profile of.

    Raises:
        ProfileError: A profile is missing, damaged, not calibrated, or of another model.
        ModelError: An exported model is missing or damaged.
        UsageError: A calibration does not support an alpha.
    """

    def __init__(self, shared: Shared, metrics: Metrics) -> None:
        self._shared = shared
        self.unknown = Route(shared.settings, metrics.of_unknown(shared.settings), None)
        self._by_name: dict[str, dict[str, Served]] = {}
        default = OWN_VERSION if shared.settings.upstream is None else ""
        for settings in shared.settings.served:
            version = settings.model_version or default
            self._by_name.setdefault(settings.model_name, {})[version] = self._load(
                settings, version, metrics.of(settings)
            )

    @property
    def served(self) -> tuple[Served, ...]:
        """All models."""
        return tuple(served for versions in self._by_name.values() for served in versions.values())

    def find(self, name: str, version: str) -> Served | None:
        """The model that a request is for; None if guard has no profile of it.

        Args:
            name: Name of the model.
            version: Version of the model; "" leaves the choice to the server. Until the reply tells, this is assumed to
                be the model without a version in the configuration, or else the highest version, as with Triton;
                `settle` corrects it.
        """
        versions = self._by_name.get(name, {})
        if version or not versions:
            return versions.get(version)
        return versions[max(versions, key=_rank)]

    def route(self, name: str, version: str) -> Route:
        """The route of a request; the arguments are those of `find`."""
        found = self.find(name, version)
        return self.unknown if found is None else found.route

    def is_current(self, request: Request) -> bool:
        """Whether the route of a request is final: the reply cannot be of another version that guard knows."""
        message = request.message
        return bool(message.model_version) or len(self._by_name.get(message.model_name, {})) < 2

    def settle(self, request: Request, version: str) -> None:
        """Route a request to the version that its reply names, if the request names none and guard knows that one."""
        message = request.message
        if version and not message.model_version and version != request.route.settings.model_version:
            found = self._by_name.get(message.model_name, {}).get(version)
            if found is not None:
                request.route = found.route

    async def refresh(self, *, again: bool = False) -> None:
        """Load profiles and exported models that have changed; running requests keep those that they began with.

        Files that are damaged, not calibrated, or do not belong together are not used: the old ones stay in use until
        the files change again.

        Args:
            again: Whether files are read even if they seem to be the same.
        """
        for served in self.served:
            stamps = await asyncio.to_thread(_stamps, served.settings)
            unchanged = stamps == served.stamps and not again
            if unchanged or () in stamps[: 1 + (served.settings.model is not None)]:
                # A missing folder is the moment between two renames, or an unmounted volume: no reason to stop serving.
                continue
            taken = False
            try:
                await asyncio.to_thread(self._replace, served, stamps)
                taken = True
            except GuardError as error:
                log.warning(
                    "changed files of %s are not used, the old ones stay in use: %s", served.settings.label, error
                )
                served.checker.metrics.reloaded(taken=False)
            except Exception:
                # Whatever a file contains, it must not end a sidecar that serves.
                log.exception("changed files of %s are not used, the old ones stay in use", served.settings.label)
                served.checker.metrics.reloaded(taken=False)
            served.stamps, served.stale = stamps, not taken

    def recertify(self) -> None:
        """Decide again about the certificates: they expire, and policies change."""
        for served in self.served:
            served.checker.recertify()

    @property
    def trouble(self) -> str | None:
        """Why requests are refused whatever they carry; None if all models are served."""
        for served in self.served:
            if (barred := served.route.barred) is not None and barred.reason is Reason.MODEL_NOT_CERTIFIED:
                return f"the model {served.settings.label} has no certificate that is accepted"
        return None

    def save(self) -> None:
        """Save the states of the monitors and the samples of the traffic, if there is a folder for them."""
        for served in self.served:
            served.checker.watch.save()

    def _load(self, settings: ModelSettings, version: str, metrics: ModelMetrics) -> Served:
        # The stamps are taken before reading, so that files that change meanwhile are read again.
        stamps = _stamps(settings)
        loaded, size = load(settings, self._shared.settings), self._shared.settings.keep_embeddings
        sample = Reservoir(size, loaded.detector.screen.dimension) if size else None
        checker = Checker(loaded, settings, metrics, self._shared, sample)
        return Served(settings, version, checker, stamps, loaded, stamps[1])

    def _replace(self, served: Served, stamps: tuple[FolderStamp, FolderStamp]) -> None:
        """Read the files of a model and replace its checker."""
        old, settings = served.checker, served.settings
        kept = old.model if stamps[1] == served.model_stamp else None
        loaded = load(settings, self._shared.settings, kept, served.loaded)
        profile = loaded.profile
        if loaded.model is old.model and profile.document == old.profile.document:
            # Only a certificate or a report beside the profile is new, or the old files are back: the monitor goes on.
            old.certify(loaded.certification)
            served.loaded = loaded
            old.metrics.reloaded(taken=True)
            return
        sample = old.watch.sample
        if sample is not None and profile.document.model.digest != old.profile.document.model.digest:
            # Embeddings of two models must not be mixed in one sample.
            sample = Reservoir(self._shared.settings.keep_embeddings, loaded.detector.screen.dimension)
        # Save the state of the old monitor, before the new one looks for it.
        old.watch.save()
        served.checker = Checker(loaded, settings, old.metrics, self._shared, sample)
        served.loaded, served.model_stamp, served.since = loaded, stamps[1], datetime.now(UTC)
        old.metrics.reloaded(taken=True)
        verdict = profile.document.vetting.verdict.outcome
        log.info("changed files of %s were read and are in use; verdict: %s", settings.label, verdict)


def _stamps(settings: ModelSettings) -> tuple[FolderStamp, FolderStamp]:
    return _folder_stamp(settings.profile), _folder_stamp(settings.model)


def _folder_stamp(folder: Path | None) -> FolderStamp:
    """A value that changes with every file of a folder and of the reference model in it, see `file_stamp`.

    It is () if the folder is missing or empty.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file()) if folder else []
        if folder and (inner := folder / REFERENCE_MODEL).is_dir():
            files += sorted(path for path in inner.iterdir() if path.is_file())
    except OSError:
        return ()
    stamps = [(str(path), file_stamp(path)) for path in files]
    return () if any(stamp is None for _, stamp in stamps) else tuple(stamps)


def _rank(version: str) -> tuple[bool, int, str]:
    """Sort key of versions: a model without a version is the largest, then numbers by value, then names."""
    return not version, int(version) if version.isdecimal() else -1, version
