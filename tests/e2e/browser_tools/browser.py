"""A browser that does what it is told: a JSON array on each line of standard input, an answer on each of output.

It runs in an environment of its own, which has Playwright; the browser is the system's. The commands:

    ["open", URL]                     load a page; answers the status
    ["size", WIDTH, HEIGHT]           size of the window, in CSS pixels
    ["colours", SCHEME]               `dark` or `light`, as the system would ask for
    ["ask", JAVASCRIPT]               the value of an expression, or of what a promise resolves to
    ["until", JAVASCRIPT, SECONDS]    seconds until an expression is true; null if it did not become true
    ["press", KEY]                    press a key
    ["script", FILE]                  run a file in the page, past its content security policy
    ["picture", FILE]                 write a PNG file of the whole page
    ["errors"]                        what the page wrote to its console as errors, and exceptions
    ["heap"]                          bytes of JavaScript's heap after a collection of garbage
"""

import json
import sys
import time
from pathlib import Path

from playwright.sync_api import Error as PageError  # type: ignore[import-not-found]
from playwright.sync_api import Page, sync_playwright


def main(browser_path: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page()
        session = page.context.new_cdp_session(page)
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        for line in sys.stdin:
            command, *given = json.loads(line)
            answer = None
            if command == "open":
                reply = page.goto(given[0], wait_until="load")
                answer = None if reply is None else reply.status
            elif command == "size":
                page.set_viewport_size({"width": given[0], "height": given[1]})
            elif command == "colours":
                page.emulate_media(color_scheme=given[0])
            elif command == "ask":
                answer = page.evaluate(given[0])
            elif command == "until":
                # Playwright's own waiting evaluates text inside the page, which its content security policy forbids.
                started = time.monotonic()
                while not (done := holds(page, given[0])) and time.monotonic() - started < given[1]:
                    page.wait_for_timeout(20)
                answer = time.monotonic() - started if done else None
            elif command == "press":
                page.keyboard.press(given[0])
            elif command == "script":
                source = Path(given[0]).read_text(encoding="utf-8")
                session.send("Runtime.evaluate", {"expression": source})
            elif command == "picture":
                page.screenshot(path=given[0], full_page=True)
            elif command == "errors":
                answer = errors
            elif command == "heap":
                session.send("HeapProfiler.collectGarbage")
                answer = session.send("Runtime.getHeapUsage")["usedSize"]
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
        browser.close()


def holds(page: Page, expression: str) -> bool:
    try:
        return bool(page.evaluate(expression))
    except PageError:  # another page is being loaded
        return False


if __name__ == "__main__":
    main(sys.argv[1])
