"""What a repair leaves in its folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from torch import Tensor

from guard import report
from guard._documents import read_bytes
from guard._files import check_replaceable, replace_directory, replace_file
from guard.certificates import CERTIFICATE_FILE, Envelope
from guard.certificates.envelope import MAX_BYTES
from guard.certificates.revocation import revocation
from guard.classifiers import Classifier, save
from guard.classifiers.files import LEARNER_FILE
from guard.classifiers.prompts import PromptedClassifier, save_prompt_learner
from guard.errors import CertificateError, UsageError
from guard.profiles import Profile
from guard.repair.repairing import Repair, Repaired

RECORD_FILE, REVOKED_FILE, REPORT_FILE = "repair.json", "revoked.toml", "report.html"
_MODEL, _PROFILE = "model", "profile"
INVALID = (
    "Whatever was computed from embeddings of the old model must be computed again: stored indices and vectors, linear "
    "probes, reference banks and thresholds of profiles, prompt learners, and models that read these embeddings."
)


def check_place(out: Path) -> None:
    """Make sure that `write` may write to a folder, before long work.

    Raises:
        UsageError: It holds something else than an earlier repair.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / RECORD_FILE).is_file())):
        raise UsageError(f"{out} exists and is not a folder of guard repair; choose another place")
    check_replaceable(out / _PROFILE, marker="profile.json")


def write(
    out: Path, repaired: Repaired, suspect: Classifier, profile: Profile, images: Tensor, revoked: Mapping[str, str]
) -> None:
    """Write the model, its profile with a report, the record, and the tables that revoke the old model.

    A prompt learner is written into the folder of the model, beside its towers, which are as they were.

    The folder takes the place of an earlier one as a whole. Where nothing was found to repair, there is no model, no
    profile and nothing to revoke; the report is that of the old profile.

    Args:
        out: Folder to write to.
        repaired: What `guard.repair.repair` returned.
        suspect: The model before.
        profile: Its profile.
        images: uint8, shape [N, 3, H, W], for the pictures of the report.
        revoked: Why each digest is revoked, by digest (`revoked_digests`); nothing is, if there is none.
    """
    with replace_directory(out, marker=RECORD_FILE) as folder:
        _fill(folder, repaired, suspect, profile, images, revoked)


def _fill(
    out: Path, repaired: Repaired, suspect: Classifier, profile: Profile, images: Tensor, revoked: Mapping[str, str]
) -> None:
    sections = [section(repaired.repair)]
    if repaired.vetting is not None:
        found = repaired.classifier
        prompted = found if isinstance(found, PromptedClassifier) else None
        architecture = prompted.towers.config if prompted else suspect.config
        config = {"model_cfg": architecture, "preprocess_cfg": asdict(suspect.preprocessing)}
        save(out / _MODEL, found.model, config, suspect.classes)
        if prompted:
            save_prompt_learner(out / _MODEL / LEARNER_FILE, prompted.learner)
        new = Profile.build(found, repaired.vetting, text=repaired.text)
        text = report.render(new, report.examples(new, images), sections=sections)
        new.save(out / _PROFILE, report=text)
        if revoked:
            replace_file(out / REVOKED_FILE, revocation(revoked).lstrip("\n").encode())
    else:
        text = report.render(profile, report.examples(profile, images), sections=sections)
        replace_file(out / REPORT_FILE, text.encode())
    document = json.dumps(asdict(repaired.repair), indent=1, ensure_ascii=False, allow_nan=False)
    replace_file(out / RECORD_FILE, (document + "\n").encode())


def revoked_digests(profile: Profile, directory: Path, repair: Repair) -> dict[str, str]:
    """What is revoked with a backdoored model: its digest, and its certificate if there is one in its profile.

    Nothing is, unless the repair says so (`Repair.revokes`).
    """
    if not repair.revokes:
        return {}
    ending = f", and it was repaired as {repair.model}" if repair.outcome == "repaired" else ""
    reason = f"vetting says of this model: {repair.verdict_before}{ending}"
    digests = {profile.document.model.digest: reason}
    file = directory / CERTIFICATE_FILE
    if file.is_file():
        envelope = Envelope.from_json(read_bytes(file, MAX_BYTES, CertificateError), str(file))
        digests[sha256(envelope.payload).hexdigest()] = f"the certificate of a model; {reason}"
    return digests


def section(repair: Repair) -> report.Section:
    """The part of a report that compares before and after."""
    if repair.outcome == "nothing to repair":
        return report.Section(
            "Repair: nothing was found to repair",
            [("model", repair.suspect)],
            f"{_sentence(repair.reasons)} It was not changed.",
        )
    rows = [
        ("method", f"{repair.method} ({repair.rounds} {'round' if repair.rounds == 1 else 'rounds'})"),
        ("verdict", f"{repair.verdict_before} → {repair.verdict}"),
        ("digest", f"{repair.suspect} → {repair.model}"),
        *_figures(repair),
        ("images trained on, held out", f"{repair.images[0]}, {repair.images[1]}"),
        ("cost", f"{repair.passes} image passes, and {repair.vetting_passes} of vetting; {repair.seconds:.0f} s"),
        ("seed", str(repair.seed)),
    ]
    return report.Section(f"Repair: {repair.outcome}", rows, f"{_sentence(repair.reasons)} {INVALID}")


def summary(repair: Repair, out: Path) -> str:
    """The outcome as text."""
    if repair.outcome == "nothing to repair":
        return f"nothing to repair: {repair.reasons[0]}\nreport: {out / REPORT_FILE}"
    lines = [f"{repair.outcome}: verdict {repair.verdict_before} → {repair.verdict}"]
    lines += [f"  {reason}" for reason in repair.reasons]
    lines += [f"  {name}: {value}" for name, value in _figures(repair)]
    lines.append(f"  {repair.passes} image passes, and {repair.vetting_passes} of vetting, in {repair.seconds:.0f} s")
    lines += [
        INVALID,
        f"model: {out / _MODEL}",
        f"profile: {out / _PROFILE}",
    ]
    lines.append(f"report: {out / _PROFILE / REPORT_FILE}")
    if repair.revokes:
        lines.append(f"to refuse the old model: append {out / REVOKED_FILE} to your trust policy (--revoke does it)")
    return "\n".join(lines)


def _figures(repair: Repair) -> list[tuple[str, str]]:
    before, after, drift = repair.before, repair.after, repair.drift
    rows = []
    if before.accuracy is not None and after.accuracy is not None:
        rows.append(("accuracy", f"{before.accuracy:.1%} → {after.accuracy:.1%} of {before.images} held-out images"))
    rows.append(("same answer as before", f"{drift.agreement:.1%} of held-out images"))
    rows += [
        (f"images moved by {name}", f"{share:.1%} → {after.success[name]:.1%}")
        for name, share in before.success.items()
    ]
    drifted = (
        f"mean cosine {drift.cosine:.3f}, 5th percentile {drift.low_cosine:.3f}; an index of old embeddings still "
        f"finds {drift.found:.0%} of images as their own nearest; head {drift.head:.3f}"
    )
    return [*rows, ("drift of embeddings", drifted)]


def _sentence(reasons: Sequence[str]) -> str:
    return " ".join(f"{reason[0].upper()}{reason[1:]}." for reason in reasons)
