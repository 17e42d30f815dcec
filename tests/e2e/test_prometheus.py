"""Rules, alerts and dashboard with Debian's Prometheus and Alertmanager, a sidecar, clean traffic and an attack."""

import json
import re
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from scripts.generate_monitoring import ROWS
from tests.e2e.debian import program
from tests.integration.sidecar.conftest import (
    Floats,
    Launcher,
    classify,
    clean,
    connected,
    eventually,
    free_port,
    infer_request,
    launch,
    served_profile,
    triggered,
)

__all__ = ["classify", "clean", "launch", "served_profile", "triggered"]

DEPLOY = Path(__file__).parents[2] / "deploy" / "prometheus"


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([program("promtool", "prometheus"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_and_configuration_are_valid_and_every_alert_fires_on_what_it_is_for() -> None:
    promtool("check", "rules", DEPLOY / "guard.rules.yml")
    promtool("check", "config", DEPLOY / "prometheus.yml")
    promtool("test", "rules", DEPLOY / "guard.tests.yml")
    done = subprocess.run(
        [program("amtool", "prometheus-alertmanager"), "check-config", DEPLOY / "alertmanager.yml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass
class Receiver:
    """What Alertmanager told its webhook: (status, alert), in order."""

    address: str
    told: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def receiver() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.told += [(each["status"], each["labels"]["alertname"]) for each in document["alerts"]]
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    found = Receiver(f"http://127.0.0.1:{server.server_port}/")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def running(*command: str | Path) -> Iterator[None]:
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


@dataclass
class Monitoring:
    """A Prometheus that looks every second, with windows of seconds instead of minutes."""

    address: str
    receiver: Receiver

    def query(self, expr: str) -> list[dict[str, Any]]:
        query = urllib.parse.urlencode({"query": expr})
        with urllib.request.urlopen(f"{self.address}/api/v1/query?{query}", timeout=30) as reply:  # noqa: S310
            found: list[dict[str, Any]] = json.load(reply)["data"]["result"]
        return found

    def alerts(self, state: str) -> set[str]:
        return {each["metric"]["alertname"] for each in self.query(f'ALERTS{{alertstate="{state}"}}')}


@contextmanager
def monitoring(folder: Path, target: str) -> Iterator[Monitoring]:
    prometheus, alertmanager = (
        program("prometheus", "prometheus"),
        program("prometheus-alertmanager", "prometheus-alertmanager"),
    )
    rules = (DEPLOY / "guard.rules.yml").read_text(encoding="utf-8")
    rules = rules.replace("[30m]", "[20s]").replace("keep_firing_for: 15m", "keep_firing_for: 3s")
    rules = re.sub(r"for: \d+m", "for: 3s", rules)
    (folder / "guard.rules.yml").write_text(rules, encoding="utf-8")
    ports = free_port(), free_port()
    config = (DEPLOY / "prometheus.yml").read_text(encoding="utf-8").replace("15s", "1s")
    config = config.replace("127.0.0.1:9093", f"127.0.0.1:{ports[1]}").replace("127.0.0.1:8002", target)
    (folder / "prometheus.yml").write_text(config, encoding="utf-8")
    with receiver() as told:
        routes = (DEPLOY / "alertmanager.yml").read_text(encoding="utf-8")
        routes = routes.replace("http://127.0.0.1:9099/", told.address)
        routes = re.sub(r"group_wait: \d+s", "group_wait: 1s", routes).replace(
            "group_interval: 5m", "group_interval: 1s"
        )
        (folder / "alertmanager.yml").write_text(routes, encoding="utf-8")
        with (
            running(
                alertmanager, f"--config.file={folder / 'alertmanager.yml'}", f"--storage.path={folder / 'am'}",
                f"--web.listen-address=127.0.0.1:{ports[1]}", "--cluster.listen-address=",
            ),
            running(
                prometheus, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{ports[0]}",
            ),
        ):  # fmt: skip
            found = Monitoring(f"http://127.0.0.1:{ports[0]}", told)

            def scrapes() -> bool:
                try:
                    return bool(found.query("guard_ready == 1"))
                except OSError:
                    return False

            eventually(scrapes, "Prometheus scraping the sidecar")
            yield found


def test_clean_traffic_fires_nothing_and_an_attack_pages_and_resolves(
    launch: Launcher, exported: Path, served_profile: Path, clean: Floats, triggered: Floats, tmp_path: Path
) -> None:
    arguments = ("--model", exported, "--profile", served_profile, "--alpha", "0.02")
    with (
        launch(*arguments) as sidecar,
        connected(sidecar.address) as client,
        monitoring(tmp_path, str(sidecar.announced["metrics"])) as watched,
    ):
        for _ in range(3):
            for image in clean:
                client.infer(infer_request(image[None]))
        eventually(
            lambda: any(float(each["value"][1]) > 100 for each in watched.query("sum(guard_images_total)")),
            "Prometheus seeing the clean traffic",
        )
        eventually(lambda: bool(watched.query("guard:expected:increase30m > 0")), "the rules being evaluated")
        assert watched.alerts("firing") == set()
        assert watched.receiver.told == []
        for image in triggered:
            client.infer(infer_request(image[None]))
        eventually(lambda: "GuardFlagsBeyondAlpha" in watched.alerts("firing"), "the alert firing")
        eventually(lambda: ("firing", "GuardFlagsBeyondAlpha") in watched.receiver.told, "the receiver being told")
        (alert,) = watched.query('ALERTS{alertname="GuardFlagsBeyondAlpha"}')
        assert alert["metric"]["model"] == "classifier"
        substitutes = {"$__rate_interval": "20s", "$instance": ".*", "$model": ".*"}
        empty = []
        for _, row in ROWS:
            for panel in row:
                for expr, _ in panel.queries:
                    if not watched.query(re.sub(r"\$\w+", lambda found: substitutes[found[0]], expr)):
                        empty.append(panel.title)
        # Nothing is there to show without certificates, an upstream server, a second opinion or a refusal.
        assert set(empty) <= {"Certified", "Certificates end", "Upstream server", "Second opinions", "Refused"}
        eventually(lambda: ("resolved", "GuardFlagsBeyondAlpha") in watched.receiver.told, "the alert resolving")


@pytest.fixture(autouse=True, scope="module")
def _programs() -> None:
    """Skip all of it where the programs are missing and cannot be installed."""
    program("prometheus", "prometheus")
    program("prometheus-alertmanager", "prometheus-alertmanager")
