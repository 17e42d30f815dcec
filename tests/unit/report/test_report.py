import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from guard import report
from guard.classifiers import Classifier
from guard.profiles import Document, NearestText, Profile
from guard.triggers import FAMILIES, Additive, InvertibleTrigger, Patch
from guard.vetting import ClassStatistic, FamilyResult, ReferenceModel
from guard.vetting.results import Difference
from tests.conftest import SIZE, tiny_model


def render(profile: Profile, images: torch.Tensor) -> str:
    return report.render(profile, report.examples(profile, images))


def plain(text: str) -> str:
    """What a reader sees, without the plots."""
    text = re.sub(r"<(style|svg).*?</\1>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))


def vetted(profile: Profile, **changes: object) -> Profile:
    """The profile with another record of its vetting."""
    record = replace(profile.document.vetting, **changes)  # type: ignore[arg-type]  # each test gives what is right
    return replace(profile, document=replace(profile.document, vetting=record))


def renamed(profile: Profile, name: str) -> Profile:
    """The profile with this name for the class that is accused, everywhere."""
    text = json.dumps(asdict(profile.document)).replace('"dog"', json.dumps(name))
    document = TypeAdapter(Document).validate_json(text)
    return replace(profile, document=document)


def without_triggers(profile: Profile) -> Profile:
    verdict = replace(profile.document.vetting.verdict, outcome="no evidence", target=None, reasons=("nothing",))
    document = replace(vetted(profile, verdict=verdict, checks=()).document, triggers=(), calibration=None)
    return Profile(document, {})


def test_it_is_one_file_that_loads_nothing(profile: Profile, images: torch.Tensor) -> None:
    class Sources(HTMLParser):
        found: list[str] = []  # noqa: RUF012 - a test's scratch

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value or "" for name, value in attrs if name in {"src", "href"} and tag != "use"]
            assert tag not in {"script", "link", "iframe"}

    Sources().feed(render(profile, images))
    assert Sources.found
    assert all(source.startswith("data:image/png;base64,") for source in Sources.found)


def test_it_says_verdict_class_trigger_and_numbers(profile: Profile, images: torch.Tensor) -> None:
    text = render(profile, images)
    shown = plain(text)
    for expected in (
        "backdoored : target class “dog”",
        "Accused class “dog”",
        "Smallest p-value 6e-05, combined over families (Cauchy) and corrected for the number of classes; at most",
        "stands out with p = 6e-05, combined over families and corrected for the number of classes",
        "uncorrected p-values of the families are: patch 1e-05.",
        "patch 2.0 % of the image 90 % 5 % works as a trigger",
        "Trigger patch-1",
        "The two models give the same answer on 95 % of images without a trigger.",
        "false positive rate of 0.02",
        "quick (inspection 64 steps",
        "seed 0",
        profile.document.model.digest,
    ):
        assert expected in shown
    assert text.count("<svg") == 2  # all families, one histogram


def test_the_nearest_texts_are_named(profile: Profile, images: torch.Tensor) -> None:
    near = (NearestText("a <b>dog</b>", 0.75), NearestText("wolf", -0.1))
    trigger = replace(profile.document.triggers[0], nearest=near)
    named = replace(profile, document=replace(profile.document, triggers=(trigger,)))
    assert "a &lt;b&gt;dog&lt;/b&gt; 0.75 wolf -0.10 Nearest texts" in plain(render(named, images))


def test_a_shortcut_that_the_control_has_too_is_called_natural(profile: Profile, images: torch.Tensor) -> None:
    (check,) = profile.document.vetting.checks
    verdict = replace(profile.document.vetting.verdict, outcome="inconclusive", target=None)
    natural = replace(check, reference_success=0.8)
    weak = replace(check, family="additive", success=0.3, reached=False)
    refuted = vetted(profile, verdict=verdict, checks=(natural, weak))
    shown = plain(render(Profile(replace(refuted.document, triggers=(), calibration=None), {}), images))
    assert "Suspicious class “dog”" in shown
    assert "patch 2.0 % of the image 90 % 80 % natural shortcut" in shown
    assert "(not minimal) 30 % 5 % does not work on held-out images" in shown
    assert "is what a backdoor looks like" not in shown


def test_it_says_for_which_classes_a_trigger_was_searched(profile: Profile, images: torch.Tensor) -> None:
    said = "searched for, and tried on, their images only"
    assert said not in plain(render(profile, images))
    (check,) = profile.document.vetting.checks
    some = replace(check, norm=0.1 * check.radius, sources=("cat", "ship"))
    shown = plain(render(vetted(profile, checks=(some,)), images))
    assert "for images of cat, ship" in shown
    assert "of held-out images of the classes named above" in shown
    assert said in shown


def test_doubt_is_not_told_as_a_finding(profile: Profile, images: torch.Tensor) -> None:
    said = "does not stand out clearly enough for a verdict"
    assert said not in plain(render(profile, images))
    (evidence,) = profile.document.vetting.results
    classes = tuple(replace(entry, p_value=0.02 if entry.target == 1 else 0.5) for entry in evidence.classes)
    mild = vetted(profile, results=(replace(evidence, classes=classes),))
    assert said in plain(render(mild, images))
    # With a trigger that is small enough the same class is accused.
    checks = tuple(replace(check, norm=0.1 * check.radius) for check in mild.document.vetting.checks)
    assert said not in plain(render(vetted(mild, checks=checks), images))


@pytest.mark.parametrize(
    ("reference_model", "expected"),
    [
        (ReferenceModel("base", "0" * 64, 0.98, 0), "compared with the trusted base"),
        (
            ReferenceModel("derived", None, 0.98, 100),
            "compared with the reference model that was derived from the model itself",
        ),
        (
            ReferenceModel("base", "0" * 64, 0.98, 0, Difference(0.341, 0.4)),
            "98 % of images; the weights differ by 34 %, not as if by noise (flatness 0.40; noise has 1)",
        ),
        (ReferenceModel("base", "0" * 64, 0.98, 0, Difference(0.341, 0.99)), "differ by 34 %, as if by noise"),
        (ReferenceModel("classes", None, None, 0), "There was no reference model"),
        (ReferenceModel("derived", None, 0.4, 100), "same answer on 40 % of images without a trigger. That is little"),
    ],
)
def test_it_says_what_the_model_was_compared_with(
    profile: Profile, images: torch.Tensor, reference_model: ReferenceModel, expected: str
) -> None:
    shown = plain(render(vetted(profile, reference_model=reference_model), images))
    assert expected in shown
    assert ("That is little" in shown) == (reference_model.agreement == 0.4)


@pytest.mark.parametrize(
    "name",
    ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', r"$\frac{", "{{ 7*7 }}", "狗 🐕", "d" * 1000],
)
def test_a_hostile_class_name_is_text(profile: Profile, images: torch.Tensor, name: str) -> None:
    text = render(renamed(profile, name), images)
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "49" not in plain(text).split("Accused class")[1][:20]
    assert text.count("Accused class") == 1


def test_a_hostile_source_and_family_are_text(profile: Profile, images: torch.Tensor) -> None:
    model = replace(profile.document.model, source="<script>alert(1)</script>")
    (evidence,) = profile.document.vetting.results
    hostile = vetted(profile, results=(replace(evidence, family="<script>$^$"),))
    hostile = replace(hostile, document=replace(hostile.document, model=model))
    assert "<script" not in render(hostile, images)


def test_equal_profiles_give_equal_reports(profile: Profile, images: torch.Tensor) -> None:
    assert render(profile, images) == render(profile, images)


def test_without_triggers_it_says_so(profile: Profile, images: torch.Tensor) -> None:
    text = render(without_triggers(profile), images)
    assert "No class stood out enough" in plain(text)
    assert "<img" not in text
    assert text.count("<svg") == 1


def test_classes_without_a_null(profile: Profile, images: torch.Tensor) -> None:
    (evidence,) = profile.document.vetting.results
    classes = tuple(replace(entry, score=None, p_value=None) for entry in evidence.classes[:3])
    bare = replace(evidence, classes=classes, target=None, p_value=1.0)
    text = render(vetted(without_triggers(profile), results=(bare,)), images)
    assert text.count("too few classes to compare") == 2  # plot and table


def many(count: int) -> tuple[FamilyResult, ...]:
    generator = np.random.default_rng(0)

    def entry(target: int) -> ClassStatistic:
        value = float(generator.normal())
        return ClassStatistic(target, f"class {target}", value, 0.1, 16, value, 0.5)

    return tuple(
        FamilyResult("test", name, 3.0, family.norm_unit, "lead", "others", "derived",
                 tuple(entry(target) for target in range(count)), 0, 1.0, 0, 1, 0.1)
        for name, family in FAMILIES.items()
    )  # fmt: skip


@pytest.mark.parametrize("count", [200, 2000])
def test_many_classes_do_not_make_it_large(profile: Profile, images: torch.Tensor, count: int) -> None:
    text = render(vetted(without_triggers(profile), results=many(count)), images)
    assert len(text) < 600_000
    assert f"class {count - 1}" not in text  # only those that lead are named


def test_every_class_is_a_dot(profile: Profile, images: torch.Tensor) -> None:
    text = render(vetted(without_triggers(profile), results=many(20)), images)
    assert text.count("<use") >= 2 * 20 * len(FAMILIES)


def test_the_attackers_own_trigger_is_shown_where_it_is_known(profile: Profile, images: torch.Tensor) -> None:
    truth = report.example(Patch.badnets(SIZE, 4, seed=0), images)
    drawn = report.examples(profile, images)
    assert "attacker’s trigger on grey" in report.render(profile, drawn, truth=truth)
    assert "attacker’s" not in render(profile, images).replace("the attacker’s own trigger may look different", "")


def test_an_example_shows_where_the_trigger_acts(images: torch.Tensor) -> None:
    patch = report.example(Patch.badnets(SIZE, 4, seed=0), images)
    assert (patch.mask > 0).sum() == 16
    changed = (patch.clean != patch.stamped).any(1)
    assert not changed[:, patch.mask == 0].any()
    delta = torch.zeros(3, SIZE, SIZE)
    delta[:, 3, 5] = 0.2
    additive = report.example(Additive(delta), images)
    assert np.argwhere(additive.mask == 255).tolist() == [[3, 5]]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_an_example_of_every_family_shows_something(family: type[InvertibleTrigger], images: torch.Tensor) -> None:
    start = family.start(1, (3, SIZE, SIZE), torch.Generator().manual_seed(0))
    drawn = report.example(family.constrain(start)[0], images)
    assert drawn.mask.max() > 0
    assert (drawn.change != 128).any()
    assert ((drawn.change > 128) <= (drawn.stamped > drawn.clean)).all()


def test_it_says_which_reference_model_gives_second_opinions(
    profile: Profile, classifier: Classifier, images: torch.Tensor
) -> None:
    other = tiny_model(seed=1)
    base = Classifier(
        other, classifier.config, classifier.tokenizer, classifier.preprocessing, classifier.classes,
        source="the <b>base", device=classifier.device,
    )  # fmt: skip
    assert "second opinion" not in render(profile, images)
    asking = profile.calibrate(classifier, images, 0.02, reference=base)
    calibration = asking.document.calibration
    assert calibration is not None
    assert calibration.second_opinion is not None
    text = " ".join(render(asking, images).split())
    assert "of the reference model the &lt;b&gt;base (base), which gives the same answer as this model to" in text
    assert f"{100 * calibration.second_opinion.agreement:.0f}&nbsp;%" in text
