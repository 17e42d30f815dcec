import json
import pickle
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from guard.classifiers import Classifier, Preprocessing, load, save
from guard.errors import ClassListError, ModelError
from tests.conftest import CLASSES, CONFIG, tiny_model


@pytest.fixture
def copy(model_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_directory, tmp_path / "model"))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "open_clip_config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config["model_cfg"][key].update(value)
    path.write_text(json.dumps(config))


def test_it_computes_what_open_clip_computes(model_directory: Path, classifier: Classifier) -> None:
    model = open_clip.create_model(f"local-dir:{model_directory}").eval()
    pixels = torch.rand(5, 3, 16, 16)
    with torch.no_grad():
        expected = model.encode_image((pixels - 0.5) / 0.25, normalize=True)
        text = model.encode_text(open_clip.SimpleTokenizer(context_length=16)(["a cat"]), normalize=True)
    torch.testing.assert_close(classifier.encode_images(pixels), expected)
    torch.testing.assert_close(classifier.encode_texts(["a cat"]), text)
    torch.testing.assert_close(classifier.head.norm(dim=1), torch.ones(6))


def test_a_weights_file_of_a_named_architecture_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    name = "RN-tiny"
    config = deepcopy(open_clip.get_model_config("RN50"))
    config["embed_dim"] = config["text_cfg"]["width"] = 16
    config["vision_cfg"] |= {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
    config["text_cfg"] |= {"heads": 2, "layers": 1}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    published = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear", "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"tag": published})
    model = open_clip.create_model(name, pretrained=None)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    (tmp_path / "classes.json").write_text(CLASSES.to_json())
    loaded = load(f"{name}::{tmp_path / 'w.safetensors'}", device="cpu")
    assert loaded.image_shape == (3, config["vision_cfg"]["image_size"], config["vision_cfg"]["image_size"])
    assert loaded.preprocessing == Preprocessing(64, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), "bilinear", "squash")


def test_a_hub_tag_loads_from_the_hubs_cache(
    model_directory: Path, classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--owner--tiny"
    shutil.copytree(model_directory, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load("hf-hub:owner/tiny", device="cpu").digest == classifier.digest
    with pytest.raises(ModelError, match="cannot fetch hf-hub:owner/other"):
        load("hf-hub:owner/other", device="cpu")


def test_a_missing_model_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="no architecture 'NoSuch'"):
        load(f"NoSuch::{tmp_path}/x.safetensors")
    with pytest.raises(ModelError, match="there is no file"):
        load(f"RN50::{tmp_path}/x.safetensors")


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_a_pickle_is_refused_by_its_bytes_whatever_its_name(copy: Path, name: str) -> None:
    (copy / "open_clip_model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), copy / name)
    with pytest.raises(ModelError, match=r"is a pickle.*save_file"):
        load(str(copy))
    (copy / name).write_bytes(pickle.dumps({"weights": 1}))
    with pytest.raises(ModelError, match="is a pickle"):
        load(str(copy))


@pytest.mark.parametrize("cut", [0, 5, 100, 5000, -1])
def test_truncated_weights_are_refused(copy: Path, cut: int) -> None:
    weights = copy / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(ModelError, match=r"truncated|not a safetensors|damaged"):
        load(str(copy))


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"x": 1}',
        b'{"x": {"data_offsets": ["a", "b"]}}',
        b'{"x": {"data_offsets": [0, 1e999]}}',
        b'{"x": {"data_offsets": [0, 99999999]}}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_a_hostile_header_is_refused(copy: Path, header: bytes) -> None:
    (copy / "open_clip_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match=r"damaged|truncated"):
        load(str(copy))


@pytest.mark.parametrize("change", [{"layers": 10**9}, {"width": 10**8}, {"layers": [1, 1, 10**6, 1]}, {"width": -1}])
def test_a_configuration_of_absurd_size_is_refused(copy: Path, change: dict[str, Any]) -> None:
    edit_config(copy, vision_cfg=change)
    with pytest.raises(ModelError, match="is accepted"):
        load(str(copy))


def test_weights_of_another_architecture_are_refused_in_one_line(copy: Path) -> None:
    edit_config(copy, vision_cfg={"width": 48})
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load(str(copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"text_cfg": {"hf_model_name": "evil/model"}},
        {"vision_cfg": {"timm_model_name": "hf-hub:evil/model"}},
        {"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}},
    ],
)
def test_a_configuration_that_fetches_or_runs_foreign_code_is_refused(copy: Path, change: dict[str, Any]) -> None:
    edit_config(copy, **change)
    with pytest.raises(ModelError, match=r"refused|not supported"):
        load(str(copy))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model_cfg": 3}', '{"model_cfg": {"vision_cfg": 1, "text_cfg": 2}}']
)
def test_a_damaged_configuration_is_refused(copy: Path, text: str) -> None:
    (copy / "open_clip_config.json").write_text(text)
    with pytest.raises(ModelError, match="open_clip_config"):
        load(str(copy))


def test_a_missing_class_list_is_refused(copy: Path) -> None:
    (copy / "classes.json").unlink()
    with pytest.raises(ClassListError, match=r"classes\.json"):
        load(str(copy))


def test_preprocessing_that_is_not_reproduced_is_refused(copy: Path) -> None:
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["resize_mode"] = "longest"
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="longest"):
        load(str(copy))


def test_the_digest_is_of_the_content_and_each_part_counts(copy: Path, classifier: Classifier) -> None:
    assert load(str(copy), device="cpu").digest.root == classifier.digest.root
    changes: dict[str, Callable[[], object]] = {
        "weights": lambda: _nudge(copy / "open_clip_model.safetensors"),
        "classes": lambda: (copy / "classes.json").write_text(CLASSES.to_json().replace("frog", "toad")),
        "preprocessing": lambda: _replace(copy / "open_clip_config.json", "0.25", "0.26"),
        "architecture": lambda: edit_config(copy, text_cfg={"tokenizer_kwargs": {"clean": "whitespace"}}),
    }
    for part, change in changes.items():
        before = load(str(copy), device="cpu").digest
        change()
        after = load(str(copy), device="cpu").digest
        assert before.root != after.root
        assert part in before.differences(after)


def _nudge(path: Path) -> None:
    tensors = load_file(path)
    tensors["visual.proj"][0, 0] += 1e-3
    save_file(tensors, path)


def _replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def test_saving_replaces_models_and_nothing_else(copy: Path, tmp_path: Path) -> None:
    from guard.errors import UsageError

    save(copy, tiny_model(1), CONFIG, CLASSES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    home = tmp_path / "home"
    home.mkdir()
    (home / "precious").write_text("")
    with pytest.raises(UsageError, match="not replaced"):
        save(home, tiny_model(), CONFIG, CLASSES)
    assert (home / "precious").exists()
