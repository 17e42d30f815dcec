"""Records in the form of the Open Cybersecurity Schema Framework, which SIEM systems read.

Each record becomes a Detection Finding (class 2004) of OCSF 1.5. It holds what is known about the request and no
picture. What guard found and what it did about it are told apart: the severity is of the finding, the disposition of
the deed.
"""

from datetime import datetime
from typing import Any

from guard import __version__
from guard.evidence.records import Record

VERSION = "1.5.0"
"""Version of the schema."""
_CATEGORY, _CLASS, _CREATE = 2, 2004, 1
_SEVERITIES = {"flag": (4, "High"), "unchecked": (2, "Low")}
_INFORMATIONAL = (1, "Informational")
_ALLOWED, _BLOCKED, _DETECTED = (1, "Allowed"), (2, "Blocked"), (15, "Detected")


def detection_finding(record: Record) -> dict[str, Any]:
    """A record as a Detection Finding."""
    severity, severity_name = _SEVERITIES.get(record.decision, _INFORMATIONAL)
    flagged = record.decision == "flag"
    disposition, disposition_name = (_BLOCKED if record.mode == "block" else _DETECTED) if flagged else _ALLOWED
    happened = round(datetime.fromisoformat(record.time).timestamp() * 1000)
    title = f"An image was flagged as triggered ({record.model})" if flagged else f"{record.decision} ({record.model})"
    matched = f"; it matches the trigger {record.trigger}, which leads to {record.target!r}" if record.trigger else ""
    return {
        "activity_id": _CREATE,
        "activity_name": "Create",
        "category_uid": _CATEGORY,
        "category_name": "Findings",
        "class_uid": _CLASS,
        "class_name": "Detection Finding",
        "type_uid": 100 * _CLASS + _CREATE,
        "type_name": "Detection Finding: Create",
        "time": happened,
        "severity_id": severity,
        "severity": severity_name,
        "status_id": 1,
        "status": "New",
        "disposition_id": disposition,
        "disposition": disposition_name,
        "message": f"{title}: decided by {record.decided_by or 'no score'}{matched}",
        "metadata": {
            "version": VERSION,
            "product": {"name": "guard", "vendor_name": "clip-guard", "version": __version__},
            "uid": str(record.id),
            "correlation_uid": record.trace_id or record.request_id,
            "profiles": ["security_control"],
        },
        "finding_info": {
            "uid": f"{record.model_digest[-12:]}-{record.id}",
            "title": title,
            "desc": record.explanation or f"p-value {record.p_value}, alpha {record.alpha}",
            "types": ["Backdoor trigger"],
            "created_time": happened,
        },
        "resources": [{"type": "model", "name": record.model, "uid": record.model_digest}],
        "observables": [
            {"type_id": 99, "type": "Other", "name": name, "value": value}
            for name, value in (("request_id", record.request_id), ("input_sha256", record.input_digest))
            if value
        ],
        "unmapped": {
            "mode": record.mode,
            "image": record.image,
            "predicted": record.predicted,
            "reference": record.reference,
            "decided_by": record.decided_by,
            "trigger": record.trigger,
            "target": record.target,
            "second_look": record.second_look,
            "p_value": record.p_value,
            "alpha": record.alpha,
            **{name: record.document()[name] for name in ("scores", "thresholds")},
        },
    }
