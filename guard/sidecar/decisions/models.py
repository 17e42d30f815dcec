"""The models of a sidecar: which of them a request is for, and profiles that are read again when they change."""

import asyncio
import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

from guard._files import file_stamp
from guard.errors import GuardError
from guard.sidecar.decisions.checking import Checker
from guard.sidecar.decisions.loading import load
from guard.sidecar.decisions.reservoir import Reservoir
from guard.sidecar.decisions.routes import Request, Route
from guard.sidecar.decisions.watch import Shared
from guard.sidecar.model_settings import ModelSettings
from guard.sidecar.settings import OWN_VERSION
from guard.sidecar.telemetry.metrics import Metrics, ModelMetrics

log = logging.getLogger(__name__)

FolderStamp: TypeAlias = tuple[tuple[str, tuple[int, int, int] | None], ...]


@dataclass(eq=False)
class Served:
    """A model, and what screens it at present.

    Attributes:
        settings: Of the model.
        version: Under which it is known; "" if it has none.
        checker: In use; replaced as a whole.
        stamps: Of the files of profile and exported model when they were last looked at.
        loaded: Of those of the exported model that is in use.
        since: When the profile in use was read.
        stale: Whether what lies on disk now was not taken.
    """

    settings: ModelSettings
    version: str
    checker: Checker
    stamps: tuple[FolderStamp, FolderStamp]
    loaded: FolderStamp
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    stale: bool = False

    @property
    def route(self) -> Route:
        """For its requests."""
        return Route(self.settings, self.checker.metrics, self.checker)


class Models:
    """Every model that the configuration names.

    Args:
        shared: What they have in common.
        metrics: Of the sidecar.

    Raises:
        ProfileError: A profile is missing, damaged, not calibrated, or of another model.
        ModelError: An exported model is missing or damaged.
        UsageError: A calibration does not support an alpha.
        StateError: A monitor's state is damaged, or of other settings.
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
        """All of them."""
        return tuple(served for versions in self._by_name.values() for served in versions.values())

    def find(self, name: str, version: str) -> Served | None:
        """The model that a request is for; None if guard has no profile of it.

        Args:
            name: Of the model.
            version: Of it; "" for whichever the server prefers. That is taken to be the one without a version in the
                configuration, or else the highest, as Triton does; `settle` has the last word.
        """
        versions = self._by_name.get(name, {})
        if version or not versions:
            return versions.get(version)
        return versions[max(versions, key=_rank)]

    def route(self, name: str, version: str) -> Route:
        """What holds for a request."""
        found = self.find(name, version)
        return self.unknown if found is None else found.route

    def is_current(self, request: Request) -> bool:
        """Whether the reply to a request cannot be of another version that guard knows."""
        message = request.message
        return bool(message.model_version) or len(self._by_name.get(message.model_name, {})) < 2

    def settle(self, request: Request, version: str) -> None:
        """Take the version that a reply says it is of, if the request left that open and guard knows it."""
        message = request.message
        if version and not message.model_version and version != request.route.settings.model_version:
            found = self._by_name.get(message.model_name, {}).get(version)
            if found is not None:
                request.route = found.route

    async def refresh(self) -> None:
        """Take profiles and exported models that have changed; a request keeps what it began with.

        What is broken, not calibrated, or does not belong together is not taken: the old ones stay in use, and it is
        tried again when the files change again.
        """
        for served in self.served:
            stamps = await asyncio.to_thread(_stamps, served.settings)
            if stamps == served.stamps or () in stamps[: 1 + (served.settings.model is not None)]:
                # Nothing there is the moment between two renames, or a volume that is gone: no reason to stop.
                continue
            taken = False
            try:
                await asyncio.to_thread(self._replace, served, stamps)
                taken = True
            except GuardError as error:
                log.warning("changed files of %s are not used, the old ones stay: %s", served.settings.label, error)
                served.checker.metrics.reloaded(taken=False)
            except Exception:
                # Whatever lies in a file, it does not end a sidecar that serves.
                log.exception("changed files of %s are not used, the old ones stay", served.settings.label)
                served.checker.metrics.reloaded(taken=False)
            served.stamps, served.stale = stamps, not taken

    def save(self) -> None:
        """Keep the state of monitors and samples, if there is a place for it."""
        for served in self.served:
            served.checker.watch.save()

    def _load(self, settings: ModelSettings, version: str, metrics: ModelMetrics) -> Served:
        # Stamped before reading: what changes meanwhile is read again.
        stamps = _stamps(settings)
        profile, model = load(settings)
        detector = profile.detector(settings.neighbours, settings.alpha)
        size = self._shared.settings.keep_embeddings
        sample = Reservoir(size, detector.screen.dimension) if size else None
        checker = Checker(profile, detector, model, settings, metrics, self._shared, sample)
        return Served(settings, version, checker, stamps, stamps[1])

    def _replace(self, served: Served, stamps: tuple[FolderStamp, FolderStamp]) -> None:
        """Put what was read anew in the place of the old."""
        old, settings = served.checker, served.settings
        profile, model = load(settings, old.model if stamps[1] == served.loaded else None)
        if model is old.model and profile.document == old.profile.document:
            # A certificate or a report beside it is new, or the old files are back: what the monitor knows stays.
            old.metrics.reloaded(taken=True)
            return
        detector = profile.detector(settings.neighbours, settings.alpha)
        sample = old.watch.sample
        if sample is not None and profile.document.model.digest != old.profile.document.model.digest:
            # Embeddings of two models do not make one sample.
            sample = Reservoir(self._shared.settings.keep_embeddings, detector.screen.dimension)
        # What the monitor knows goes to disk before the new one looks there.
        old.watch.save()
        served.checker = Checker(profile, detector, model, settings, old.metrics, self._shared, sample)
        served.loaded, served.since = stamps[1], datetime.now(UTC)
        old.metrics.reloaded(taken=True)
        verdict = profile.document.vetting.verdict.outcome
        log.info("changed files of %s were read and are in use; verdict: %s", settings.label, verdict)


def _stamps(settings: ModelSettings) -> tuple[FolderStamp, FolderStamp]:
    return _folder_stamp(settings.profile), _folder_stamp(settings.model)


def _folder_stamp(folder: Path | None) -> FolderStamp:
    """A value that changes with every file of a folder, see `file_stamp`; () if the folder is missing or empty."""
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file()) if folder else []
    except OSError:
        return ()
    stamps = [(path.name, file_stamp(path)) for path in files]
    return () if any(stamp is None for _, stamp in stamps) else tuple(stamps)


def _rank(version: str) -> tuple[bool, int, str]:
    """The one without a version first, then by number, then by name."""
    return not version, int(version) if version.isdecimal() else -1, version
