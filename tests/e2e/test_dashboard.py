"""The page in a real browser: Debian's Chromium, driven by Playwright in an environment of its own.

With DASHBOARD_SCREENSHOTS set to a folder, the pictures of the documentation are written there.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import grpc
import numpy as np
import pytest

from guard.classifiers import ExportedClassifier
from guard.profiles import Profile
from guard.protocol import SERVICE
from guard.protocol import sidecar_pb2 as messages
from guard.sidecar.host.dashboard import Access, feed, serve_dashboard
from guard.triggers import Patch
from tests.conftest import random_images
from tests.e2e.debian import program
from tests.e2e.environments import environment, node_package
from tests.fake_sidecar import FakeSidecar, a_flag, a_model
from tests.integration.sidecar.conftest import Launcher, infer_request
from tests.integration.sidecar.conftest import launch as launch  # noqa: PLC0414 - a fixture
from tests.integration.sidecar.conftest import served_profile as served_profile  # noqa: PLC0414 - a fixture

TOOLS = Path(__file__).parent / "browser_tools"
SECONDS = 30
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
FOCUSED = "(one => `${one.tagName} ${one.getAttribute('href') || one.className}`)(document.activeElement)"
HOUR = 3600
"""Events of an hour in which one request in a second is flagged."""


class Browser:
    def __init__(self, to: IO[str], back: IO[str]) -> None:
        self._to, self._back = to, back

    def __call__(self, *command: Any) -> Any:
        self._to.write(json.dumps(command) + "\n")
        self._to.flush()
        return json.loads(self._back.readline())

    def ask(self, expression: str) -> Any:
        return self("ask", expression)

    def until(self, expression: str, seconds: float = SECONDS) -> float:
        took = self("until", expression, seconds)
        assert took is not None, (
            f"{expression} did not become true; the page says: {self.ask('document.body.innerText')}"
        )
        return float(took)

    def serious(self, axe: Path) -> Any:
        """Faults of accessibility that keep people from using the page."""
        self("script", str(axe))
        found = self.ask("axe.run(document).then(result => result.violations.map(each => [each.impact, each.id]))")
        return [each for each in found if each[0] in {"serious", "critical"}]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium, python = program("chromium", "chromium"), environment(TOOLS / "requirements.txt")
    command = [str(python), str(TOOLS / "browser.py"), str(chromium)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield Browser(process.stdin, process.stdout)
        process.stdin.close()


@pytest.fixture(scope="module")
def axe() -> Path:
    return node_package("axe-core", "4.14.1") / "axe.min.js"


def picture(browser: Browser, name: str, width: int) -> None:
    if folder := os.environ.get("DASHBOARD_SCREENSHOTS"):
        browser("size", width, 800)
        browser("picture", str(Path(folder) / f"{name}.png"))


def rows(expression: str) -> str:
    return f"document.querySelectorAll('#flagged li').length {expression}"


def test_a_flagged_request_appears_within_two_seconds_with_picture_and_trigger(
    browser: Browser,
    axe: Path,
    launch: Launcher,
    exported: Path,
    served_profile: Path,
    profile: Profile,
    trigger: Patch,
    tmp_path: Path,
) -> None:
    classify = ExportedClassifier(exported, threads=1, gpu=False)
    images = classify.preprocessing.normalise(trigger.stamp(random_images(60, seed=6)).numpy())
    flagged = images[profile.detector().score(classify.run(images)[0]).flags]
    clean = classify.preprocessing.normalise(random_images(12, seed=5).numpy())
    arguments = ("--model", exported, "--profile", served_profile, "--dashboard", "127.0.0.1:0")
    with launch(*arguments, "--state-dir", tmp_path / "state", "--thumbnails") as sidecar:
        browser("size", 1100, 800)
        assert browser("open", f"http://{sidecar.announced['dashboard']}/") == 200
        browser.until("document.getElementById('sidecars').innerText.startsWith('ready')")
        assert browser.ask(rows("")) == 0
        with grpc.insecure_channel(sidecar.address) as channel:
            infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            for number, image in enumerate(clean):
                infer(infer_request(image[None], id=f"visit-{number}").SerializeToString(), timeout=SECONDS)
            infer(infer_request(flagged[:1], id="order-4711").SerializeToString(), timeout=SECONDS)
        assert browser.until("document.getElementById('flagged').innerText.includes('order-4711')") < 2
        browser.until(
            "[...document.querySelectorAll('#flagged li:first-child img')].filter(it => it.naturalWidth).length == 2"
        )
        browser.until("document.querySelectorAll('#decisions dd')[1].innerText == '1'")
        assert browser.serious(axe) == []
        picture(browser, "dashboard", 1100)
        # By keyboard: a link is reached and followed, and the page of the record says what decided.
        browser.ask("document.querySelector('#flagged a').focus()")
        browser("press", "Enter")
        browser.until("!document.getElementById('record').hidden && document.querySelector('#record table') !== null")
        text = browser.ask("document.getElementById('record').innerText")
        assert all(part in text for part in ("order-4711", "patch-1", "SHA-256 of the input"))
        assert not browser.ask("document.getElementById('overview').checkVisibility()")
        assert browser.serious(axe) == []
        picture(browser, "dashboard-record", 900)
        # The log brings it back after the page of the record is gone from memory.
        browser("open", f"http://{sidecar.announced['dashboard']}/")
        browser.until(rows(">= 1"))
        assert browser("errors") == []


def test_it_can_be_used_on_a_narrow_screen_and_by_keyboard_alone(browser: Browser, axe: Path) -> None:
    certificate = messages.Certificate(accepted=True, expires_at=datetime.now(UTC) + timedelta(days=2))
    models = (
        a_model(
            certificate=certificate, alarms=[messages.Alarm(kind=messages.Alarm.KIND_ATTACK, stream="match patch-0")]
        ),
        a_model(label="cars", stale=True),
    )
    sidecar = FakeSidecar("unix:/run/guard/admin.sock", *models)
    with serve_dashboard("127.0.0.1:0", [sidecar], Access()) as address:
        sidecar.flag(*(a_flag(number) for number in range(3)))
        browser("size", 400, 800)
        browser("open", f"http://{address}/")
        browser.until(rows("== 3") + " && document.querySelectorAll('#conditions a').length >= 3")
        assert browser.ask("document.documentElement.scrollWidth") == 400
        assert browser.serious(axe) == []
        reached = set()
        for _ in range(30):
            browser("press", "Tab")
            reached.add(browser.ask(FOCUSED))
        assert any(each.startswith("A /record/") for each in reached)
        assert any("GuardAttack.md" in each for each in reached)
        assert "DIV scroll" in reached
        browser.ask("document.querySelector('summary').focus()")
        browser("press", "Enter")
        browser.until("document.querySelectorAll('#values tr').length == 1")
        browser("colours", "dark")
        assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
        assert browser.serious(axe) == []
        browser("open", browser.ask("document.querySelector('#flagged a').href"))
        browser.until("document.querySelector('#record table') !== null")
        assert browser.serious(axe) == []
        browser("colours", "light")
        assert browser("errors") == []


def test_who_reads_advice_keeps_the_place_while_requests_come(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "_POLL_SECONDS", 0.01)

    def unchecked(count: int) -> messages.Model:
        many = messages.Traffic(requests={"pass": 4 * count, "unchecked": count}, unchecked={"timeout": count})
        return a_model(traffic=many)

    sidecar = FakeSidecar("", unchecked(100))
    with serve_dashboard("127.0.0.1:0", [sidecar], Access()) as address:
        browser("open", f"http://{address}/")
        browser.until("document.querySelector('#conditions a') !== null")
        browser.ask("document.querySelector('#conditions a').focus()")
        sidecar.served = (unchecked(200),)
        browser.until("document.getElementById('unchecked').innerText.includes('200')")
        assert browser.ask(FOCUSED).endswith("GuardUncheckedRequests.md")


def test_numbers_that_no_sidecar_has_leave_the_page_usable(browser: Browser) -> None:
    most, wrong = 2**64 - 1, float("nan")
    traffic = messages.Traffic(
        requests={"pass": most, "__proto__": most}, images={"flag": most}, unchecked={"constructor": most},
        scores=messages.Histogram(bounds=[wrong, -float("inf")], counts=[most] * 3),
    )  # fmt: skip
    many = messages.Traffic(scores=messages.Histogram(counts=range(200_000)))
    models = a_model(alpha=wrong, threshold=wrong, traffic=traffic), a_model(label="many", traffic=many)
    bad, good = FakeSidecar("bad", *models), FakeSidecar("good", a_model(label="cars"))
    scores = {"score": float("inf"), "__proto__": wrong}
    with serve_dashboard("127.0.0.1:0", [bad, good], Access()) as address:
        before = len(browser("errors"))
        bad.flag(a_flag(1, scores=scores, thresholds={"score": wrong}, p_value=wrong, image=2**32 - 1, lost=most))
        browser("open", f"http://{address}/")
        browser.until(rows("== 1") + " && document.querySelectorAll('#models tr').length == 3")
        browser.until("document.getElementById('scores').innerText.includes('cars')")
        browser("open", browser.ask("document.querySelector('#flagged a').href"))
        browser.until("document.querySelector('#record table') !== null")
        for nothing in ("%zz", "..%2f..", "%00"):
            browser("open", f"http://{address}/record/{nothing}")
            browser.until("document.getElementById('record').innerText.includes('no longer here')")
        # Numbers that are none have no place in a drawing, which is said, and answers of 404; nothing stops the page.
        said = [text for text in browser("errors")[before:] if "Failed to load resource" not in text]
        assert [text for text in said if not text.startswith("Error: <")] == []


def test_a_script_in_a_name_stays_text(browser: Browser) -> None:
    trigger = messages.Trigger(id=HOSTILE, target_class=HOSTILE, picture=b"not a picture")
    verdict = messages.Verdict(outcome=messages.Verdict.OUTCOME_BACKDOORED, target_class=HOSTILE)
    alarm = messages.Alarm(kind=messages.Alarm.KIND_ATTACK, stream=HOSTILE)
    sidecar = FakeSidecar(HOSTILE, a_model(label=HOSTILE, triggers=[trigger], verdict=verdict, alarms=[alarm]))
    sidecar.state = messages.Status(ready=False, reason=HOSTILE, version=HOSTILE, upstream=HOSTILE)
    sidecar.settings = [messages.Setting(name=HOSTILE, value=HOSTILE, model=HOSTILE)]
    texts = (
        "request_id",
        "model",
        "predicted_class",
        "reference_class",
        "decided_by",
        "trigger",
        "target_class",
        "explanation",
    )
    with serve_dashboard("127.0.0.1:0", [sidecar], Access()) as address:
        flag = a_flag(1, **dict.fromkeys(texts, HOSTILE), thumbnail=b"<svg onload='window.hacked=1'>")
        sidecar.flag(flag)
        before = len(browser("errors"))
        browser("open", f"http://{address}/")
        browser.until(rows("== 1") + " && document.querySelectorAll('#models tr').length == 1")
        browser.ask("document.getElementById('settings').open = true")
        browser.until("document.querySelectorAll('#values tr').length == 1")
        assert browser.ask("document.body.innerText.includes('<script>')")
        assert browser.ask("document.querySelectorAll('main script, main [onerror]').length") == 0
        browser("open", browser.ask("document.querySelector('#flagged a').href"))
        browser.until("document.querySelector('#record table') !== null")
        assert browser.ask("window.hacked === undefined")
        # A policy that had to stop a script would have said so; pictures that are none are no error of the page.
        assert [text for text in browser("errors")[before:] if "Content Security Policy" in text] == []


def test_memory_stays_flat_over_the_events_of_an_hour(browser: Browser) -> None:
    sidecar = FakeSidecar()
    small = np.random.default_rng(0).bytes(2000)
    with serve_dashboard("127.0.0.1:0", [sidecar], Access()) as address:
        browser("size", 1000, 800)
        browser("open", f"http://{address}/")
        browser.until("document.getElementById('connection').innerText == 'live'")

        def show(first: int, last: int) -> tuple[int, int]:
            sidecar.flag(*(a_flag(number, thumbnail=b"\xff\xd8\xff" + small) for number in range(first, last)))
            browser.until(f"document.getElementById('flagged').innerText.includes('request-{last - 1},')")
            return browser("heap"), browser.ask("document.getElementsByTagName('*').length")

        # In steps that fit into what is kept, so that none is left out.
        numbers = range(400, HOUR + 1, 400)
        found = [show(last - 400, last) for last in numbers]
        heaps, nodes = zip(*found, strict=True)
        assert max(nodes) < nodes[1] + 50, nodes
        assert heaps[-1] < 1.2 * heaps[1] + 2**20, heaps
        sys.stderr.write(f"heap of the page: {heaps}\n")
