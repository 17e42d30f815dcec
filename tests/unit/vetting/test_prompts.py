from pathlib import Path

import pytest

from guard.errors import GuardError
from guard.vetting import ordinary_prompts, read_prompts
from guard.vetting.text_probes import TextProbe, listed_text_probes


def test_ordinary_prompts_are_different_ones_and_follow_the_seed() -> None:
    prompts = ordinary_prompts(2000, seed=1)
    assert len(set(prompts)) == 2000
    assert prompts == ordinary_prompts(2000, seed=1) != ordinary_prompts(2000, seed=2)
    assert not any("{" in prompt for prompt in prompts)


def test_prompts_are_read_from_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"prompt {k}" for k in range(96)) + "\n\nprompt 0\n", encoding="utf-8")
    assert read_prompts(file) == tuple(f"prompt {k}" for k in range(96))


@pytest.mark.parametrize(
    "content", [b"one\ntwo\n", b"\xff\xfe", b"\n".join(b"%d" % k for k in range(96)) + b"x" * 3000]
)
def test_what_is_no_list_of_prompts_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(GuardError):
        read_prompts(file)


def test_a_probe_is_inserted_as_a_word_or_replaces_a_letter() -> None:
    assert TextProbe("x", "cf").apply("a red bus", 1) == "a cf red bus"
    assert TextProbe("x", "cf").apply("a red bus", 7) == "a red bus cf"
    assert TextProbe("x", "0", "o").apply("two dogs", 3) == "tw0 d0gs"
    kinds = {probe.kind for probe in listed_text_probes()}
    assert {"homoglyphs", "emoji", "control_and_zero_width", "rare_tokens", "known_triggers"} <= kinds
    assert all(probe.name.isprintable() for probe in listed_text_probes())
