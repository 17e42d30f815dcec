"""The soak of `benchmarks/soak`, in seconds instead of minutes."""

from pathlib import Path

from benchmarks.soak.__main__ import main


def test_a_mixture_and_two_restarts_lose_nothing(tmp_path: Path) -> None:
    out = tmp_path / "soak.md"
    main(["--seconds", "2", "--restarts", "2", "--clients", "4", "--out", str(out)])
    mixture, restarts = out.read_text(encoding="utf-8").split("## Restarts")
    for what in ("wrong answers", "calls that hung", "ended otherwise than expected", "`guard_active_requests`"):
        assert f"| {what} | 0 | 0 | yes |" in mixture, mixture
    for what in ("requests lost that were accepted", "attempts that hung", "attempts with a wrong answer"):
        assert f"| {what} | 0 | 0 | yes |" in restarts, restarts
    for part in (mixture, restarts):
        for what in (
            "answered, and delivered upstream other than once",
            "delivered upstream more than once",
            "flagged images that the evidence log lacks",
            "images in it twice",
        ):
            assert f"| {what} | 0 | 0 | yes |" in part, part
