"""Trust policies: which certificates an operator accepts, as rules that are all asked.

Every rule can only refuse. Without a certificate, or with one signature less, no rule has more to accept, so that
taking something away never turns a refusal into an acceptance. For the same reason several policies are asked one after
the other, and the rules of a source are asked besides the general ones: more settings make a policy stricter only.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict, Field

from guard._documents import read_toml, validated
from guard.certificates.authorities import Authority
from guard.certificates.keys import PublicKey
from guard.certificates.statement import Digest, Statement, parse_time
from guard.errors import CertificateError
from guard.vetting.budgets import BUDGETS, Budget
from guard.vetting.results import Conclusion, ReferenceKind

Item = TypeVar("Item")
Listed = Annotated[tuple[Item, ...], Field(strict=False)]
"""A list of TOML, which is a list of Python and strictly no tuple."""
MAX_POLICY_BYTES = 1024 * 1024
_BUDGETS = tuple(BUDGETS)
"""From the smallest."""


@dataclass(frozen=True)
class Evidence:
    """What rules look at.

    Attributes:
        statement: What the certificate says.
        digest: SHA-256 of the payload that was signed.
        signers: The trusted keys that signed it, by the names of the policy.
        files: SHA-256 of the files as they were loaded, by name of subject.
        source: Where the model comes from: a path, or a name in a registry.
        now: The time.
        model_signatures: For the id of each authority that must have signed the model in the form of OpenSSF model
            signing, why its signature is refused, or None if it is good.
    """

    statement: Statement
    digest: str
    signers: Mapping[str, PublicKey]
    files: Mapping[str, str]
    source: str
    now: datetime
    model_signatures: Mapping[str, CertificateError | None]


class Rule(Protocol):
    """One reason to refuse a model."""

    @property
    def name(self) -> str:
        """What a refusal calls the rule."""

    def objection(self, evidence: Evidence) -> str:
        """Why the model is refused; "" if this rule has nothing against it."""


@dataclass(frozen=True)
class Signed:
    """Enough different keys that the policy trusts have signed."""

    threshold: int
    name: str = "signature"

    def objection(self, evidence: Evidence) -> str:
        """See `Rule`."""
        count = len({key.der for key in evidence.signers.values()})
        if count >= self.threshold:
            return ""
        return f"{count} of the trusted keys signed the certificate, {self.threshold} must"


@dataclass(frozen=True)
class Unchanged:
    """Every file that was loaded is one that the certificate names, with its digest."""

    name: str = "subject"

    def objection(self, evidence: Evidence) -> str:
        """See `Rule`."""
        certified = evidence.statement.files
        if not evidence.files:
            return "no file was loaded that a certificate could be about"
        for name, digest in sorted(evidence.files.items()):
            if name not in certified:
                return f"{name} is not a file of the certificate"
            if certified[name] != digest:
                return f"{name} is not the file that was certified (its SHA-256 differs)"
        for part in {name.partition("/")[0] for name in evidence.files}:
            if missing := sorted({name for name in certified if name.startswith(f"{part}/")} - evidence.files.keys()):
                return f"{missing[0]} is missing, or was not loaded"
        return ""


@dataclass(frozen=True)
class NotRevoked:
    """Neither model, nor certificate, nor a file, nor a key was revoked."""

    revoked: Mapping[str, str]
    name: str = "revocation"

    def objection(self, evidence: Evidence) -> str:
        """See `Rule`."""
        asked = {
            evidence.digest: "the certificate",
            evidence.statement.predicate.model.digest: "the model",
            **{digest: name for name, digest in evidence.statement.files.items()},
            **{key.id: f"the key {name}" for name, key in evidence.signers.items()},
        }
        found = next((digest for digest in asked if digest in self.revoked), None)
        if found is None:
            return ""
        why = self.revoked[found]
        return f"{asked[found]} was revoked{f': {why}' if why else ''}"


@dataclass(frozen=True)
class InForce:
    """The certificate is not of the future, and has not expired."""

    name: str = "validity"

    def objection(self, evidence: Evidence) -> str:
        """See `Rule`."""
        predicate = evidence.statement.predicate
        for what, text in (("vetted", predicate.vetted_at), ("certified", predicate.certified_at)):
            if evidence.now < parse_time(text):
                return f"the model was {what} at {text}, which is in the future: one of the clocks is wrong"
        if evidence.now >= parse_time(predicate.expires_at):
            return f"the certificate expired at {predicate.expires_at}"
        return ""


@dataclass(frozen=True)
class MaximumAge:
    """The vetting is not older than some days."""

    days: float
    name: str = "maximum_age_days"

    def objection(self, evidence: Evidence) -> str:
        """See `Rule`."""
        vetted = evidence.statement.predicate.vetted_at
        if evidence.now - parse_time(vetted) <= timedelta(days=self.days):
            return ""
        return f"the model was vetted at {vetted}, more than {self.days:g} days ago"


@dataclass(frozen=True)
class Accepted:
    """A word of the certificate is one of those that the policy accepts."""

    name: str
    accepted: tuple[str, ...]

    def objection(self, evidence: Evidence) -> str:
        """See `Rule`."""
        predicate = evidence.statement.predicate
        what, found = {
            "verdicts": ("the verdict", predicate.verdict.outcome),
            "vetters": ("the vetter", predicate.vetter.id),
            "reference_models": ("the reference model of the vetting", predicate.scope.reference_model),
        }[self.name]
        return "" if found in self.accepted else f"{what} is {found!r}, not {' or '.join(map(repr, self.accepted))}"


@dataclass(frozen=True)
class MinimumBudget:
    """The vetting had at least some budget."""

    budget: str
    name: str = "minimum_budget"

    def objection(self, evidence: Evidence) -> str:
        """See `Rule`."""
        found = evidence.statement.predicate.scope.budget
        if found in _BUDGETS[_BUDGETS.index(self.budget) :]:
            return ""
        return f"the model was vetted with the budget {found}, at least {self.budget} is needed"


@dataclass(frozen=True)
class Searched:
    """The vetting looked for some trigger families."""

    families: tuple[str, ...]
    name: str = "families"

    def objection(self, evidence: Evidence) -> str:
        """See `Rule`."""
        predicate = evidence.statement.predicate
        searched = {*predicate.scope.families, *(method.family for method in predicate.methods)}
        missing = [family for family in self.families if family not in searched]
        return f"the vetting did not look for {', '.join(missing)}" if missing else ""


@dataclass(frozen=True)
class MinimumVersion:
    """The vetting was made with at least some version of guard."""

    version: str
    name: str = "minimum_version"

    def objection(self, evidence: Evidence) -> str:
        """See `Rule`."""
        found = evidence.statement.predicate.vetter.version
        try:
            enough = Version(found) >= Version(self.version)
        except InvalidVersion:
            enough = False
        return "" if enough else f"the model was vetted by guard {found}, at least {self.version} is needed"


@dataclass(frozen=True)
class ModelSigned:
    """The model also has a good signature in the form of OpenSSF model signing, by one authority."""

    authority: Authority
    name: str = "model_signing"

    def objection(self, evidence: Evidence) -> str:
        """See `Rule`."""
        if self.authority.id not in evidence.model_signatures:
            return "no signature of the model in the form of OpenSSF model signing was given"
        trouble = evidence.model_signatures[self.authority.id]
        return "" if trouble is None else str(trouble)


@dataclass(frozen=True)
class Policy:
    """What an operator accepts.

    Attributes:
        keys: The trusted keys by name.
        rules: Rules for every model.
        sources: Further rules for models whose source begins so.
        only_listed: Whether models of other sources are refused.
        name: What the policy is called in a decision.
    """

    keys: Mapping[str, PublicKey]
    rules: tuple[Rule, ...]
    sources: tuple[tuple[str, tuple[Rule, ...]], ...] = ()
    only_listed: bool = False
    name: str = "--trust"

    @classmethod
    def trusting(cls, paths: Sequence[Path], *, model_signing: Path | None = None) -> "Policy":
        """The policy that accepts what one of these keys signed, with the verdict `no evidence`.

        Args:
            paths: PEM files of public keys.
            model_signing: PEM file of the key, or of the authority, that must have signed the model in the form of
                OpenSSF model signing.

        Raises:
            CertificateError: A key cannot be used.
        """
        signing = None if model_signing is None else Authority.read(model_signing)
        return _policy(_Form(), {str(path): PublicKey.read(path) for path in paths}, "--trust", signing)

    @classmethod
    def read(cls, path: Path) -> "Policy":
        """Read a policy from a TOML file; docs/certificates.md describes it.

        Raises:
            CertificateError: The file cannot be read or does not describe a policy, or a key cannot be used.
        """
        form = validated(path, _Form, read_toml(path, MAX_POLICY_BYTES, CertificateError), CertificateError)
        if not form.keys:
            raise CertificateError(f"{path} trusts no key; add a table [[keys]]")
        keys = {}
        for entry in form.keys:
            if (entry.file is None) == (entry.pem is None):
                raise CertificateError(f"{path}: the key {entry.name!r} needs either file or pem")
            if entry.name in keys:
                raise CertificateError(f"{path} has two keys {entry.name!r}")
            keys[entry.name] = (
                PublicKey.from_pem(entry.pem.encode(), f"{path}: {entry.name}")
                if entry.pem is not None
                else PublicKey.read(path.parent / str(entry.file))
            )
        if len({key.der for key in keys.values()}) < form.threshold:
            raise CertificateError(f"{path} asks for {form.threshold} signatures, and trusts fewer different keys")
        signing = None if form.model_signing is None else Authority.read(path.parent / form.model_signing)
        return _policy(form, keys, str(path), signing)

    @property
    def revoked(self) -> Mapping[str, str]:
        """Digests that are revoked, with the reasons."""
        return {
            digest: why for rule in self.rules if isinstance(rule, NotRevoked) for digest, why in rule.revoked.items()
        }

    @property
    def authorities(self) -> tuple[Authority, ...]:
        """Who must have signed the model in the form of OpenSSF model signing."""
        return tuple(rule.authority for rule in self.rules if isinstance(rule, ModelSigned))

    def rules_for(self, source: str) -> tuple[Rule, ...]:
        """The rules for a model of this source, in the order in which they are asked."""
        matching = [rules for prefix, rules in self.sources if _begins(source, prefix)]
        listed: tuple[Rule, ...] = (_Listed(bool(matching)),) if self.only_listed else ()
        return (*self.rules, *listed, *(rule for rules in matching for rule in rules))


def read_policies(
    files: Sequence[Path], keys: Sequence[Path], *, model_signing: Path | None = None
) -> tuple[Policy, ...]:
    """The policies that are asked for, each of which must accept a model; none if there are no files and no keys.

    Args:
        files: TOML files of policies.
        keys: PEM files of public keys, which make a policy of their own (`Policy.trusting`).
        model_signing: As for `Policy.trusting`.

    Raises:
        CertificateError: A policy or a key cannot be used.
    """
    found = [Policy.read(path) for path in files]
    return (*found, *((Policy.trusting(keys, model_signing=model_signing),) if keys else ()))


@dataclass(frozen=True)
class _Listed:
    is_listed: bool
    name: str = "only_listed_sources"

    def objection(self, evidence: Evidence) -> str:
        return "" if self.is_listed else f"the policy names no source that {evidence.source} belongs to"


class _Rules(BaseModel):
    """Rules that can stand at the top level and in a source."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    verdicts: Listed[Conclusion] | None = None
    minimum_budget: Budget | None = None
    families: Listed[str] = ()
    vetters: Listed[str] | None = None
    reference_models: Listed[ReferenceKind] | None = None
    maximum_age_days: Annotated[float, Field(gt=0)] | None = None
    minimum_version: str | None = None

    def rules(self) -> tuple[Rule, ...]:
        """The rules that are stated."""
        found: list[Rule] = []
        if self.verdicts is not None:
            found.append(Accepted("verdicts", self.verdicts))
        if self.vetters is not None:
            found.append(Accepted("vetters", self.vetters))
        if self.minimum_version is not None:
            found.append(MinimumVersion(self.minimum_version))
        if self.minimum_budget is not None:
            found.append(MinimumBudget(self.minimum_budget))
        if self.families:
            found.append(Searched(self.families))
        if self.reference_models is not None:
            found.append(Accepted("reference_models", self.reference_models))
        if self.maximum_age_days is not None:
            found.append(MaximumAge(self.maximum_age_days))
        return tuple(found)


class _Key(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    name: str
    file: str | None = None
    pem: str | None = None


class _Revoked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    digest: Digest
    reason: str = ""


class _Source(_Rules):
    prefix: Annotated[str, Field(min_length=1)]


class _Form(_Rules):
    """The contents of a policy file."""

    threshold: Annotated[int, Field(ge=1, le=16)] = 1
    verdicts: Listed[Conclusion] | None = ("no evidence",)
    only_listed_sources: bool = False
    model_signing: str | None = None
    keys: Listed[_Key] = ()
    revoked: Listed[_Revoked] = ()
    sources: Listed[_Source] = ()


def _policy(form: _Form, keys: Mapping[str, PublicKey], name: str, signing: Authority | None) -> Policy:
    revoked = {entry.digest: entry.reason for entry in form.revoked}
    rules: tuple[Rule, ...] = (
        Signed(form.threshold),
        Unchanged(),
        NotRevoked(revoked),
        InForce(),
        *form.rules(),
        *(() if signing is None else (ModelSigned(signing),)),
    )
    sources = tuple((entry.prefix, entry.rules()) for entry in form.sources)
    return Policy(keys, rules, sources, form.only_listed_sources, name)


def _begins(source: str, prefix: str) -> bool:
    """Whether a source lies below a prefix: whole parts of a path or a name are compared."""
    if "://" in prefix or prefix.startswith("hf-hub:"):
        return source == prefix.rstrip("/") or source.startswith(prefix.rstrip("/") + "/")
    if source.startswith("hf-hub:"):
        return False
    return Path(os.path.abspath(source)).is_relative_to(os.path.abspath(prefix))  # noqa: PTH100 - links stay as they are
