"""What is made from a few lists for those on call: deploy/prometheus/guard.rules.yml and deploy/grafana/guard.json.

scripts/generate_docs.py writes the files. Every metric that is named here must be one of a sidecar's; tests compare
them with the registry, and have promtool try the rules.
"""

import json
from dataclasses import dataclass
from typing import Any

from guard.sidecar.host.dashboard import advice

MODEL = "job, instance, model, version"
"""Labels by which series of one model in one sidecar are told from others."""
NOT_A_FAULT = "|".join(advice.NOT_A_FAULT)
"""Reasons for `unchecked` that the operator or the client asked for."""


@dataclass(frozen=True)
class Alert:
    """One alert; docs/runbooks has a page of the same name.

    Attributes:
        name: Its name.
        expr: PromQL.
        severity: `critical` for what somebody must look at now, `warning` for this working day.
        summary: One sentence with the labels of the alert.
        description: What was seen, and what it means.
        wait: How long the expression must hold.
        keep: How long the alert goes on after it no longer holds; "" for not at all.
        window: Value of the label `window`, by which alerts of one name are told apart; "" for none.
    """

    name: str
    expr: str
    severity: str
    summary: str
    description: str
    wait: str = "0m"
    keep: str = ""
    window: str = ""


@dataclass(frozen=True)
class Budget:
    """A share of requests that may go wrong, watched over several windows (Google, Site Reliability Workbook, ch. 5).

    Attributes:
        name: Its name in recorded series.
        bad: PromQL of the rate of bad requests, with WINDOW for the window.
        all: The same of all requests.
        share: Share that may be bad.
        text: What is bad, for people.
    """

    name: str
    bad: str
    all: str
    share: float
    text: str


BUDGETS = (
    Budget(
        "unchecked",
        f'sum by ({MODEL}) (rate(guard_unchecked_total{{reason!~"{NOT_A_FAULT}"}}[WINDOW]))',
        f"sum by ({MODEL}) (rate(guard_requests_total[WINDOW]))",
        0.001,
        "requests were not checked",
    ),
    Budget(
        "slow",
        f"sum by ({MODEL}) (rate(guard_overhead_seconds_count[WINDOW])) - "
        f'sum by ({MODEL}) (rate(guard_overhead_seconds_bucket{{le="0.05"}}[WINDOW]))',
        f"sum by ({MODEL}) (rate(guard_overhead_seconds_count[WINDOW]))",
        0.01,
        "requests were delayed by guard by more than 50 ms",
    ),
)
WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
BURNS = (
    (14.4, "1h", "5m", "critical"), (6.0, "6h", "30m", "critical"), (3.0, "1d", "2h", "warning"),
    (1.0, "3d", "6h", "warning"),
)  # fmt: skip
"""How many times too fast the budget is spent, over which two windows, and how bad that is."""

CHECKED = f'sum by ({MODEL}) (increase(guard_images_total{{decision=~"pass|flag"}}[30m]))'
FLAGGED = f'sum by ({MODEL}) (increase(guard_images_total{{decision="flag"}}[30m]))'
_TOP = (
    '{{ with printf "topk(1, increase(guard_flagged_trigger_total{instance=%q,model=%q}[30m]) * on (instance, model, '
    'version, trigger) group_left (target) guard_trigger_info) > 0" .Labels.instance .Labels.model | query }}'
    'Most of them match {{ . | first | label "trigger" }}, which leads to the class '
    '{{ . | first | label "target" }}.{{ else }}They match no reconstructed trigger.{{ end }}'
)
ALERTS = (
    Alert(
        "GuardNotReady", "guard_ready == 0", "critical", "guard at {{ $labels.instance }} refuses requests",
        "It has not been ready for two minutes; /readyz and the log say why.", "2m",
    ),
    Alert(
        "GuardAttack", 'guard_alarm{kind="attack"} == 1', "critical",
        "An attack on the model {{ $labels.model }} shows in the traffic ({{ $labels.stream }})",
        "More requests than clean traffic explains are suspicious by this score. " + _TOP,
    ),
    Alert(
        "GuardDrift", 'guard_alarm{kind="drift"} == 1', "warning",
        "The traffic of the model {{ $labels.model }} no longer resembles the calibration ({{ $labels.stream }})",
        "The false-alarm rate is of traffic like the calibration images; calibrate again.",
    ),
    Alert(
        "GuardFlagsBeyondAlpha",
        "guard:flagged:increase30m > guard:expected:increase30m + 5 * sqrt(guard:expected:increase30m) + 9",
        "critical", "{{ printf \"%.0f\" $value }} images of the model {{ $labels.model }} were flagged in half an hour",
        "That is more than the false-alarm rate explains. " + _TOP, keep="15m",
    ),
    Alert(
        "GuardBlind",
        f'sum by ({MODEL}) (rate(guard_requests_total{{model!="(unknown)"}}[10m])) > 0 unless '
        f'sum by ({MODEL}) (rate(guard_requests_total{{decision=~"pass|flag"}}[10m])) > 0',
        "critical", "No request of the model {{ $labels.model }} is checked",
        "Requests arrive, and guard decides about none of them.", "10m",
    ),
    Alert(
        "GuardUncheckedRequests",
        f'sum by ({MODEL}, reason) (rate(guard_unchecked_total{{reason!~"{NOT_A_FAULT}"}}[10m])) / on ({MODEL}) '
        f"group_left sum by ({MODEL}) (rate(guard_requests_total[10m])) > 0.01",
        "warning", "Requests of the model {{ $labels.model }} are not checked: {{ $labels.reason }}",
        "More than one in a hundred for ten minutes.", "10m",
    ),
    Alert(
        "GuardModelNotCertified", "guard_model_certified == 0", "critical",
        "No trust policy accepts the certificate of the model {{ $labels.model }}",
        "The log names the rule that decided. Where certificates are required, its requests are refused or unchecked.",
        "1m",
    ),
    Alert(
        "GuardCertificateExpires", "guard_certificate_expiry_timestamp_seconds - time() < 14 * 86400", "warning",
        "The certificate of the model {{ $labels.model }} expires in {{ $value | humanizeDuration }}",
        "Certify the model again: guard certify.",
    ),
    Alert(
        "GuardProfileStale", "guard_profile_stale == 1", "warning",
        "The profile of the model {{ $labels.model }} on disk is not the one in use",
        "It is damaged, not certified, or of another model; an older one stays in use.", "15m",
    ),
    Alert(
        "GuardEvidenceLost",
        "guard_evidence_trouble == 1 or on (job, instance) sum by (job, instance) "
        "(increase(guard_evidence_dropped_total[15m])) > 0",
        "warning", "guard at {{ $labels.instance }} loses records of flagged requests",
        "The evidence log cannot be written, or its queue is full.", "5m",
    ),
    Alert(
        "GuardUpstreamDown", "guard_upstream_up == 0", "critical",
        "The server {{ $labels.address }} behind guard at {{ $labels.instance }} is not ready",
        "guard reports itself as not ready, too.", "2m",
    ),
    Alert(
        "GuardStateDamaged", "sum by (job, instance, kind) (increase(guard_state_damaged_total[1h])) > 0", "warning",
        "guard at {{ $labels.instance }} moved damaged state aside: {{ $labels.kind }}",
        "Alarms that were active before may be forgotten.",
    ),
)  # fmt: skip


def budget_alerts() -> tuple[Alert, ...]:
    """An alert for each budget and pair of windows."""
    found = []
    for budget in BUDGETS:
        for factor, long, short, severity in BURNS:
            limit = f"{factor:g} * {budget.share:g}"
            series = f"guard:{budget.name}:ratio_rate"
            found.append(
                Alert(
                    f"GuardBudget{budget.name.capitalize()}",
                    f"{series}{long} > {limit} and {series}{short} > {limit}",
                    severity,
                    f"Too many {budget.text} (model {{{{ $labels.model }}}})",
                    f"{{{{ $value | humanizePercentage }}}} over {long}; {100 * budget.share:g} % are budgeted, and at "
                    f"this rate a month's budget is spent {factor:g} times as fast as it may be.",
                    "2m",
                    window=long,
                )
            )
    return tuple(found)


def rules() -> str:
    """deploy/prometheus/guard.rules.yml."""
    lines = [
        "# Recording rules and alerts for guard, written by scripts/generate_monitoring.py; tested by guard.tests.yml.",
        "# They work with Prometheus 2.42 and later.",
        "groups:",
        "  - name: guard",
        "    rules:",
        *_record("guard:flagged:increase30m", FLAGGED),
        *_record("guard:expected:increase30m", f"{CHECKED} * on ({MODEL}) max by ({MODEL}) (guard_alpha_ratio)"),
    ]
    for budget in BUDGETS:
        for window in WINDOWS:
            bad, every = budget.bad.replace("WINDOW", window), budget.all.replace("WINDOW", window)
            lines += _record(f"guard:{budget.name}:ratio_rate{window}", f"({bad}) / ({every} > 0)")
    for alert in (*ALERTS, *budget_alerts()):
        lines += [
            f"      - alert: {alert.name}",
            f"        expr: {json.dumps(alert.expr)}",
            f"        for: {alert.wait}",
            *([f"        keep_firing_for: {alert.keep}"] if alert.keep else []),
            "        labels:",
            f"          severity: {alert.severity}",
            *([f"          window: {alert.window}"] if alert.window else []),
            "        annotations:",
            f"          summary: {json.dumps(alert.summary)}",
            f"          description: {json.dumps(alert.description)}",
            f"          runbook_url: {advice.RUNBOOKS}/{alert.name}.md",
        ]
    return "\n".join(lines) + "\n"


def _record(name: str, expr: str) -> list[str]:
    return [f"      - record: {name}", f"        expr: {json.dumps(expr)}"]


@dataclass(frozen=True)
class Panel:
    """One panel of the dashboard.

    Attributes:
        title: Its title.
        kind: Type of panel in Grafana.
        queries: PromQL and legend of each series.
        unit: Unit in Grafana's words.
        text: What it shows, for the help of the panel.
    """

    title: str
    kind: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    text: str = ""


_OF = 'instance=~"$instance", model=~"$model"'
_AT = 'instance=~"$instance"'
_PER = "[$__rate_interval]"
_MODEL_LEGEND = "{{model}} {{version}}"
Query = tuple[str, str]


def _state(function: str, metric: str, by: str = "model, version", legend: str = _MODEL_LEGEND) -> Query:
    """A gauge, over the sidecars."""
    return f"{function} by ({by}) ({metric}{{{_AT if 'model' not in by else _OF}}})", legend


def _rate(metric: str, by: str, function: str = "rate") -> Query:
    """How fast a counter grows, by some of its labels."""
    return f"sum by ({by}) ({function}({metric}{{{_OF}}}{_PER}))", " ".join(
        f"{{{{{each}}}}}" for each in by.split(", ")
    )


def _quantiles(metric: str) -> tuple[Query, ...]:
    """p50 and p99 of a histogram."""
    return tuple(
        (f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{{{_OF}}}{_PER})))", name)
        for share, name in ((0.5, "p50"), (0.99, "p99"))
    )


_BOUND = f"guard:expected:increase30m{{{_OF}}} + 5 * sqrt(guard:expected:increase30m{{{_OF}}}) + 9"
_BY_TRIGGER = (
    f"sum by (trigger, target) (increase(guard_flagged_trigger_total{{{_OF}}}{_PER}) * on (instance, model, version, "
    f"trigger) group_left (target) guard_trigger_info{{{_OF}}})"
)
_STAGES = f"histogram_quantile(0.99, sum by (le, stage) (rate(guard_check_duration_seconds_bucket{{{_OF}}}{_PER})))"
ALIVE = (
    Panel("Ready", "stat", (_state("min", "guard_ready", "instance", "{{instance}}"),), text="1: requests are served."),
    Panel("Certified", "stat", (_state("min", "guard_model_certified"),), text="Empty where nothing is asked for."),
    Panel(
        "Certificates end",
        "stat",
        ((f"1000 * min by (model, version) (guard_certificate_expiry_timestamp_seconds{{{_OF}}})", _MODEL_LEGEND),),
        "dateTimeFromNow",
    ),
    Panel("A profile on disk is not in use", "stat", (_state("max", "guard_profile_stale"),)),
    Panel("Upstream server", "stat", (_state("min", "guard_upstream_up", "address", "{{address}}"),)),
    Panel(
        "Requests", "timeseries", (_rate("guard_requests_total", "model, decision"),), "reqps",
        "By decision. Without pass and flag, guard is blind.",
    ),
)  # fmt: skip
FIRING = (
    Panel(
        "Flagged in 30 minutes, and the bound",
        "timeseries",
        ((f"guard:flagged:increase30m{{{_OF}}}", "{{model}} flagged"), (_BOUND, "{{model}} bound")),
        text="Above the bound the false-alarm rate no longer explains the flags.",
    ),
    Panel(
        "Alarms of the monitor",
        "state-timeline",
        (_state("max", "guard_alarm", "model, kind, stream", "{{model}} {{kind}} {{stream}}"),),
    ),
    Panel("Flagged by trigger and class", "timeseries", ((_BY_TRIGGER, "{{trigger}} to {{target}}"),)),
    Panel("Flagged by what decided", "timeseries", (_rate("guard_flagged_score_total", "score", "increase"),)),
)
WHY = (
    Panel("Scores", "heatmap", (_rate("guard_score_bucket", "le", "increase"),), text="Compare with the threshold."),
    Panel("Threshold", "stat", (_state("max", "guard_threshold"),)),
    Panel(
        "p-values", "heatmap", (_rate("guard_p_value_bucket", "le", "increase"),),
        text="Clean traffic fills the buckets in proportion to their width.",
    ),
    Panel("Second opinions", "timeseries", (_rate("guard_second_opinions_total", "result"),), "reqps"),
    Panel("Size of the reference bank", "stat", (_state("max", "guard_reference_size"),)),
)  # fmt: skip
COST = (
    Panel(
        "Delay by guard", "timeseries", _quantiles("guard_overhead_seconds"), "s",
        "From request to reply, less the upstream server.",
    ),
    Panel("Upstream server", "timeseries", _quantiles("guard_upstream_duration_seconds"), "s"),
    Panel("Stages", "timeseries", ((_STAGES, "{{stage}} p99"),), "s"),
    Panel("Unchecked by reason", "timeseries", (_rate("guard_unchecked_total", "reason"),), "reqps"),
    Panel(
        "In progress, and the limit",
        "timeseries",
        (
            _state("sum", "guard_active_requests", "instance", "{{instance}}"),
            _state("sum", "guard_active_requests_limit", "instance", "{{instance}} limit"),
        ),
    ),
    Panel(
        "Refused", "timeseries", ((f"sum by (code) (rate(guard_refused_total{{{_AT}}}{_PER}))", "{{code}}"),), "reqps"
    ),
)  # fmt: skip
ROWS = (("Alive", ALIVE), ("Firing", FIRING), ("Why", WHY), ("Cost", COST))
_SCHEMA, _PER_ROW, _HEIGHT = 36, 3, 7
"""The form of dashboards of Grafana 9; later ones bring it up to date when they load it."""


def dashboard() -> str:
    """deploy/grafana/guard.json."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
             "gridPos": {"h": 1, "w": 24, "x": 0, "y": y}}
        )  # fmt: skip
        y += 1
        for index, panel in enumerate(row):
            place = {"h": _HEIGHT, "w": 24 // _PER_ROW, "x": 24 // _PER_ROW * (index % _PER_ROW), "y": y}
            panels.append(_panel(panel, len(panels) + 1, place))
            y += _HEIGHT if index % _PER_ROW == _PER_ROW - 1 or index == len(row) - 1 else 0
    document = {
        "uid": "clip-guard",
        "title": "guard",
        "description": "Backdoor screening of CLIP classifiers. Written by scripts/generate_monitoring.py.",
        "tags": ["clip-guard"],
        "schemaVersion": _SCHEMA,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
                _variable("instance", "guard_ready"),
                _variable("model", "guard_model_info"),
            ]
        },
        "annotations": {
            "list": [
                _annotation("Profiles loaded", f"changes(guard_profile_reloads_total{{{_OF}}}[1m]) > 0", "blue"),
                _annotation(
                    "Certificates", f"changes(guard_certificate_expiry_timestamp_seconds{{{_OF}}}[1m]) > 0", "purple"
                ),
            ]
        },
        "panels": panels,
    }
    return json.dumps(document, indent=1) + "\n"


def _source() -> dict[str, str]:
    return {"type": "prometheus", "uid": "${datasource}"}


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + k), "expr": expr, "legendFormat": legend, "datasource": _source(),
         **({"format": "heatmap"} if panel.kind == "heatmap" else {})}
        for k, (expr, legend) in enumerate(panel.queries)
    ]  # fmt: skip
    return {
        "id": number, "type": panel.kind, "title": panel.title, "description": panel.text, "gridPos": place,
        "datasource": _source(), "targets": targets, "options": {},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
    }  # fmt: skip


def _variable(name: str, metric: str) -> dict[str, Any]:
    query = f"label_values({metric}, {name})"
    return {
        "name": name, "type": "query", "label": name.capitalize(), "datasource": _source(),
        "query": {"query": query, "refId": name}, "includeAll": True, "multi": True, "refresh": 2, "sort": 1,
        "current": {"text": ["All"], "value": ["$__all"]},
    }  # fmt: skip


def _annotation(name: str, expr: str, colour: str) -> dict[str, Any]:
    return {"name": name, "enable": True, "iconColor": colour, "datasource": _source(), "expr": expr, "step": "1m"}
