"""Prompt learners: the same scores as prompts that are encoded one by one, files, and checkpoints that are pickles."""

import copy
import zipfile
from collections import OrderedDict, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from guard.classifiers import Classifier, ClassList, ExportedClassifier, export
from guard.classifiers.prompts import (
    Kind,
    PromptedClassifier,
    PromptLearner,
    PromptTuningSettings,
    convert_prompt_learner,
    load_prompt_learner,
    prompted,
    save_prompt_learner,
    tune_prompts,
)
from guard.classifiers.tuning import TuningSettings
from guard.errors import ModelError
from guard.vetting.budgets import DerivedReferenceSettings
from guard.vetting.reference import fresh_prompts
from tests.conftest import CLASSES, SIZE

WIDTH = DEPTH = 16
LENGTH = 3


def learner(kind: Kind, seed: int = 0) -> PromptLearner:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    if kind == "visual":
        return PromptLearner({"frame": drawn(3, SIZE, SIZE).clamp(-1, 1)})
    tensors = {"ctx": drawn(LENGTH, WIDTH)}
    if kind == "cocoop":
        tensors |= {
            "meta_net.linear1.weight": drawn(4, DEPTH),
            "meta_net.linear1.bias": drawn(4),
            "meta_net.linear2.weight": drawn(WIDTH, 4),
            "meta_net.linear2.bias": drawn(WIDTH),
        }
    return PromptLearner(tensors)


def one_by_one(classifier: Classifier, found: PromptLearner, embeddings: Tensor) -> Tensor:
    """Scores with every prompt encoded by itself and to its full length, as the public code of CoCoOp does."""
    model = classifier.model
    rows = []
    for embedding in embeddings:
        context = found.tensors["ctx"]
        if found.kind == "cocoop":
            context = context + found.token(embedding[None])
        texts = []
        for name in classifier.classes.names:
            ids = classifier.tokenizer([f"X X X {name}."])
            hidden = model.token_embedding(ids)
            hidden = torch.cat([hidden[:, :1], context[None], hidden[:, 1 + LENGTH :]], dim=1)
            hidden = model.transformer(hidden + model.positional_embedding, attn_mask=model.attn_mask)
            texts.append(model.ln_final(hidden)[0, ids[0].argmax()] @ model.text_projection)
        rows.append(classifier.logit_scale * embedding @ normalize(torch.stack(texts), dim=-1).T)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["coop", "cocoop"])
def test_scores_are_those_of_prompts_that_are_encoded_one_by_one(
    kind: Kind, classifier: Classifier, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompted, "TEXT_BATCH", 2 * len(CLASSES.names))
    found = learner(kind)
    model = PromptedClassifier(classifier, found)
    embeddings = model.embed(images[:5])
    with torch.no_grad():
        expected = one_by_one(classifier, found, classifier.embed(images[:5]))
        assert torch.allclose(model.logits(embeddings), expected, atol=1e-4)
    assert torch.equal(model.predict(embeddings), expected.argmax(1))
    some = torch.tensor([[0, 2], [3, 1], [5, 4], [2, 0], [1, 3]])
    scores = model.scores_of(classifier.embed(images[:5]), some)
    assert torch.allclose(scores, expected.gather(1, some), atol=1e-4)


def test_the_embedding_of_a_meta_net_shows_image_token_and_answer(classifier: Classifier, images: Tensor) -> None:
    found = learner("cocoop")
    model = PromptedClassifier(classifier, found)
    embeddings, plain = model.embed(images[:5]), classifier.embed(images[:5])
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(5), atol=1e-6)
    with torch.no_grad():
        cosines, expected = embeddings @ model.encode_texts(["a cat"]).T, plain @ classifier.encode_texts(["a cat"]).T
        assert torch.allclose(cosines, expected, atol=1e-5)
    other = dict(found.tensors) | {"meta_net.linear2.bias": found.tensors["meta_net.linear2.bias"] + 1}
    moved = PromptedClassifier(classifier, PromptLearner(other)).embed(images[:5])
    assert (moved - embeddings)[:, DEPTH : DEPTH + WIDTH].norm(dim=1).min() > 0.01
    assert torch.allclose(moved[:, :DEPTH], embeddings[:, :DEPTH], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "limit", "expected"),
    [("cocoop", 12, [12, 12, 12, 6]), ("cocoop", 4, [4, 2] * 7), ("coop", 4, [4, 2])],
)
def test_no_pass_has_more_prompts_than_the_limit(
    kind: Kind,
    limit: int,
    expected: list[int],
    classifier: Classifier,
    images: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prompted, "TEXT_BATCH", limit)
    model = PromptedClassifier(classifier, learner(kind))
    sizes: list[int] = []
    encode = model._encoded

    def counted(prompts: Tensor, ends: Tensor) -> Tensor:
        sizes.append(len(prompts))
        return encode(prompts, ends)

    monkeypatch.setattr(model, "_encoded", counted)
    model.predict(model.embed(images[:7]))
    assert sizes == expected


def test_parts_have_the_gradient_of_the_whole(
    classifier: Classifier, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PromptedClassifier(classifier, learner("cocoop"))
    gradients = []
    for limit in (1000, len(CLASSES.names), 4):
        monkeypatch.setattr(prompted, "TEXT_BATCH", limit)
        pixels = images[:4].float().div(255).requires_grad_()
        model.logits(model.encode_images(pixels)).square().sum().backward()
        assert pixels.grad is not None
        gradients.append(pixels.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    assert torch.allclose(gradients[0], gradients[2], rtol=1e-3, atol=1e-5)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("kind", ["coop", "cocoop"])
def test_cosines_and_prompts_for_all_images_are_not_rounded_by_autocast(
    kind: Kind, classifier: Classifier, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the towers run in bfloat16: two classes must not have the same score for that."""
    expected = PromptedClassifier(classifier, learner(kind))
    embeddings = classifier.embed(images[:8])
    with torch.no_grad():
        exact = expected.logits(expected.answered(embeddings))
        model = PromptedClassifier(classifier, learner(kind))
        monkeypatch.setattr(model, "autocast", lambda: torch.autocast("cpu", enabled=False))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answered, head = model.answered(embeddings), model.head
    assert torch.allclose(model.scored(answered @ head.T), exact, atol=1e-4)


def test_a_learner_moves_with_its_towers(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PromptedClassifier(copy.copy(classifier), learner("visual"))
    moved: list[torch.device] = []
    monkeypatch.setattr(model.towers, "device", torch.device("meta"))  # as if they had stayed behind
    monkeypatch.setattr(model.towers, "to", moved.append)
    model.to(torch.device("cpu"))
    assert moved == [torch.device("cpu")]


@pytest.mark.parametrize("kind", ["coop", "cocoop"])
def test_what_classes_mean_does_not_depend_on_the_kind_of_the_learner(kind: Kind, classifier: Classifier) -> None:
    """With a meta-net the head says only where an embedding holds which class's cosine."""
    meanings = PromptedClassifier(classifier, learner(kind)).meanings
    assert meanings.shape == (len(CLASSES.names), DEPTH)
    assert (meanings @ meanings.T).fill_diagonal_(0).abs().max() > 0.1


def test_a_frame_that_is_tuned_further_keeps_its_form(classifier: Classifier, images: Tensor) -> None:
    frame = torch.zeros(3, SIZE, SIZE)
    frame[:, :7] = 0.5
    settings = PromptTuningSettings("visual", tuning=TuningSettings(steps=1, batch=8, learning_rate=1e-9))
    labels = classifier.predict(classifier.embed(images[:8]))
    found = tune_prompts(classifier, images[:8], labels, settings, start=PromptLearner({"frame": frame}))
    assert torch.allclose(found.tensors["frame"], frame, atol=1e-6)


def test_a_visual_prompt_is_added_to_the_pixels(classifier: Classifier, images: Tensor) -> None:
    found = learner("visual")
    pixels = images[:4].float() / 255
    expected = classifier.encode_images((pixels + found.tensors["frame"]).clamp(0, 1))
    assert torch.allclose(PromptedClassifier(classifier, found).encode_images(pixels), expected)


def test_the_digest_tells_learners_apart(classifier: Classifier) -> None:
    one, same, other = (PromptedClassifier(classifier, learner("coop", seed)).digest for seed in (0, 0, 1))
    assert one.root == same.root
    assert one.differences(other) == ("weights",)
    assert set(one.differences(classifier.digest)) == {"architecture", "weights"}
    assert PromptedClassifier(classifier, learner("coop")).with_model(classifier.model, "copy").digest.root == one.root


@pytest.mark.parametrize("kind", ["coop", "cocoop", "visual"])
def test_tuning_lowers_the_loss_and_leaves_the_towers(kind: Kind, classifier: Classifier, images: Tensor) -> None:
    pixels = images[:60]
    labels = (pixels[:, 0].float().mean((1, 2)) > 127).long()
    digest = classifier.digest.root
    settings = PromptTuningSettings(kind=kind)
    settings = replace(settings, tuning=replace(settings.tuning, steps=25, learning_rate=2e-2))

    def loss(steps: int) -> float:
        few = replace(settings, tuning=replace(settings.tuning, steps=steps))
        model = PromptedClassifier(classifier, tune_prompts(classifier, pixels, labels, few))
        with torch.no_grad():
            return float(cross_entropy(model.logits(model.embed(pixels)), labels))

    assert loss(25) < 0.95 * loss(1)
    found = tune_prompts(classifier, pixels, labels, settings)
    again = tune_prompts(classifier, pixels, labels, settings)
    assert all(torch.equal(found.tensors[name], again.tensors[name]) for name in found.tensors)
    assert PromptedClassifier(classifier, found).towers.digest.root == digest
    classifier.__dict__.pop("digest")
    assert classifier.digest.root == digest


@pytest.mark.parametrize("kind", ["coop", "cocoop", "visual"])
def test_a_saved_learner_is_read_again(kind: Kind, tmp_path: Path) -> None:
    written = learner(kind)
    save_prompt_learner(tmp_path / "learner.safetensors", written)
    read = load_prompt_learner(tmp_path / "learner.safetensors")
    assert read.kind == kind
    assert all(torch.equal(read.tensors[name], written.tensors[name]) for name in written.tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "tensors"),
        ({"ctx": torch.zeros(2, 3), "evil": torch.zeros(1)}, "evil"),
        ({"ctx": torch.full((2, 3), torch.nan)}, "not finite"),
        ({"ctx": torch.zeros(2, 3), "meta_net.linear1.weight": torch.zeros(4, 5)}, "no prompt learner"),
        ({"ctx": torch.zeros(2, 3, dtype=torch.int64)}, "I64"),
        ({"ctx": torch.zeros(7)}, "shape"),
    ],
)
def test_a_file_that_is_no_learner_is_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    path = tmp_path / "learner.safetensors"
    save_file(tensors, path)
    with pytest.raises(ModelError, match=message):
        load_prompt_learner(path)


def test_a_learner_that_does_not_fit_is_refused(classifier: Classifier) -> None:
    with pytest.raises(ModelError, match="contexts of 7"):
        PromptedClassifier(classifier, PromptLearner({"ctx": torch.zeros(2, 7)}))
    with pytest.raises(ModelError, match="as long as"):
        PromptedClassifier(classifier, PromptLearner({"ctx": torch.zeros(14, WIDTH)}))
    with pytest.raises(ModelError, match="3 classes"):
        PromptedClassifier(classifier, PromptLearner({"ctx": torch.zeros(3, 2, WIDTH)}))
    with pytest.raises(ModelError, match="visual prompt"):
        PromptedClassifier(classifier, PromptLearner({"frame": torch.zeros(3, 8, 8)}))


class TestPickles:
    """Checkpoints of the public code."""

    def test_a_checkpoint_with_optimiser_and_scheduler_is_converted(self, tmp_path: Path) -> None:
        written = learner("cocoop")
        parameter = torch.nn.Parameter(written.tensors["ctx"].clone())
        optimiser = torch.optim.SGD([parameter], lr=0.002, momentum=0.9)
        parameter.sum().backward()
        optimiser.step()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 10)
        state = OrderedDict(written.tensors) | {
            "token_prefix": torch.zeros(6, 1, 16),
            "token_suffix": torch.zeros(6, 9, 16),
        }
        path = tmp_path / "model.pth.tar-50"
        torch.save(
            {
                "state_dict": state,
                "epoch": 50,
                "optimizer": optimiser.state_dict(),
                "scheduler": {"successor": schedule, "counts": defaultdict(dict)},
                "val_result": None,
            },
            path,
        )
        found = convert_prompt_learner(path)
        assert found.kind == "cocoop"
        assert all(torch.equal(found.tensors[name], written.tensors[name]) for name in written.tensors)

    def test_a_bare_state_in_half_precision_is_converted(self, tmp_path: Path) -> None:
        torch.save({"prompt_learner.ctx": torch.ones(4, 16).half()}, tmp_path / "state.pt")
        found = convert_prompt_learner(tmp_path / "state.pt")
        assert found.kind == "coop"
        assert found.tensors["ctx"].dtype is torch.float32

    def test_code_is_not_run(self, tmp_path: Path) -> None:
        torch.save({"state_dict": {"ctx": _Touch(tmp_path / "touched")}}, tmp_path / "evil.pt")
        with pytest.raises(ModelError, match="something else than tensors"):
            convert_prompt_learner(tmp_path / "evil.pt")
        assert not (tmp_path / "touched").exists()

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ([1, 2], "no state"),
            ({"state_dict": {"visual.proj": torch.zeros(2, 2)}}, "not one of a prompt learner"),
            ({"state_dict": {"ctx": 3}}, "not a tensor"),
            ({"state_dict": {"token_prefix": torch.zeros(1)}}, "no ctx"),
            ({"ctx": torch.full((2, 2), torch.inf)}, "not finite"),
        ],
    )
    def test_what_is_no_checkpoint_is_refused(self, document: object, message: str, tmp_path: Path) -> None:
        torch.save(document, tmp_path / "other.pt")
        with pytest.raises(ModelError, match=message):
            convert_prompt_learner(tmp_path / "other.pt")

    def test_compressed_and_other_files_are_refused(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("bomb/data.pkl", bytes(10**6))
        (tmp_path / "old.pt").write_bytes(b"\x80\x02}q\x00.")
        for name in ("bomb.pt", "old.pt", "missing.pt"):
            with pytest.raises(ModelError):
                convert_prompt_learner(tmp_path / name)

    def test_a_damaged_checkpoint_is_refused(self, tmp_path: Path) -> None:
        torch.save({"ctx": torch.zeros(4, 16)}, tmp_path / "state.pt")
        data = (tmp_path / "state.pt").read_bytes()
        (tmp_path / "state.pt").write_bytes(data.replace(b"ctx", b"\xff\xff\xff"))
        with pytest.raises(ModelError):
            convert_prompt_learner(tmp_path / "state.pt")


class _Touch:
    """Makes a file when it is loaded by a plain unpickler."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_words_that_a_class_is_called_by_are_those_of_its_prompt(classifier: Classifier) -> None:
    named = ClassList(CLASSES.names, words=("cat", "cat", "ship", "truck", "frog", "bird"))
    plain = classifier.with_model(classifier.model, "named")
    plain.classes = named
    head = PromptedClassifier(plain, learner("coop")).head
    assert torch.allclose(head[0], head[1])


@pytest.mark.parametrize("kind", ["coop", "cocoop", "visual"])
def test_an_export_computes_the_same_and_gives_the_token(
    kind: Kind, classifier: Classifier, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PromptedClassifier(classifier, learner(kind))
    export(model, tmp_path / "exported", images)
    exported = ExportedClassifier(tmp_path / "exported", gpu=False)
    inputs = exported.preprocessing.normalise(images[:5].numpy())
    monkeypatch.setattr("guard.classifiers.exported._PROMPTS", 2 * len(CLASSES.names))  # so that there are parts
    embeddings, logits = exported.run(inputs)
    expected = model.embed(images[:5])
    assert exported.digest == model.digest.root
    assert torch.allclose(torch.from_numpy(embeddings), expected, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(logits), model.logits(expected), atol=1e-2)
    assert exported.has_tokens == (kind == "cocoop")
    if exported.has_tokens:
        tokens = torch.from_numpy(exported.run_with_tokens(inputs)[2])
        assert torch.allclose(tokens, model.learner.token(classifier.embed(images[:5])), atol=1e-4)
    else:
        with pytest.raises(ModelError, match="no meta-net"):
            exported.run_with_tokens(inputs)


@pytest.mark.parametrize("kind", ["coop", "cocoop"])
def test_fresh_prompts_answer_as_the_suspect_does_on_the_same_towers(
    kind: Kind, classifier: Classifier, images: Tensor
) -> None:
    suspect = PromptedClassifier(classifier, learner(kind))
    answers = suspect.predict(suspect.embed(images))

    def surprise(model: Classifier) -> float:
        return float(cross_entropy(model.logits(model.embed(images)), answers))

    settings = DerivedReferenceSettings(steps=40, batch=32, learning_rate=0.02)
    fresh, passes = fresh_prompts(suspect, images, settings)
    assert isinstance(fresh, PromptedClassifier)
    assert fresh.towers is suspect.towers
    assert fresh.learner.kind == kind
    assert fresh.digest != suspect.digest
    assert surprise(fresh) < surprise(classifier)
    assert passes == len(images) + 40 * 32
