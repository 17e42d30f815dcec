import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from guard.classifiers import Classifier, load, save, save_hugging_face
from guard.cli import cli
from guard.errors import ModelError, UsageError
from tests.conftest import ARCHITECTURE, CLASSES, CONFIG, SIZE

PROMPTS = ["a photo of a cat.", "Zażółć gęślą jaźń 123 !?", "x " * 40]


@pytest.fixture(scope="session")
def directory(classifier: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny classifier as a CLIPModel directory."""
    path = tmp_path_factory.mktemp("hugging-face") / "tiny"
    save_hugging_face(path, classifier)
    return path


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "model"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def shard(directory: Path) -> Path:
    """Split the weights into two files and an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, directory / file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def check_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)


# The types are quoted because transformers loads a model when its name is first used, and every worker collects this.
def features(model: "transformers.CLIPModel", pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Image and text features of transformers, before normalisation."""
    with torch.no_grad():
        return (
            model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output),
            model.text_projection(model.text_model(input_ids=ids).pooler_output),
        )


def check_parity(model: "transformers.CLIPModel", loaded: Classifier) -> None:
    pixels = torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    ids = loaded.tokenizer(PROMPTS)
    images, texts = features(model, pixels, ids)
    check_close(loaded.model.encode_image(pixels), images)
    check_close(loaded.model.encode_text(ids), texts)
    assert loaded.logit_scale == pytest.approx(model.logit_scale.exp().item())


@pytest.mark.parametrize("sharded", [False, True])
def test_a_classifier_comes_back_with_the_same_digest_and_scores(
    classifier: Classifier, images: torch.Tensor, copy: Path, *, sharded: bool
) -> None:
    if sharded:
        shard(copy)
    loaded = load(str(copy), device="cpu")
    assert loaded.digest == classifier.digest
    expected, found = classifier.embed(images[:8]), loaded.embed(images[:8])
    check_close(found, expected)
    check_close(loaded.logits(found), classifier.logits(expected))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("legacy", [False, True], ids=["", "legacy"])
def test_it_computes_what_transformers_computes(copy: Path, act: str, *, legacy: bool) -> None:
    torch.manual_seed(1)
    config = transformers.CLIPConfig(
        text_config={
            "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 3,
            "max_position_embeddings": 20, "hidden_act": act, "eos_token_id": 2 if legacy else 49407,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": SIZE, "patch_size": 4, "hidden_act": act, "layer_norm_eps": 1e-3,
        },
        projection_dim=40,
    )  # fmt: skip
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # no bias is zero, no norm is one
    model.save_pretrained(copy)
    if legacy:
        # As first released: settings of the towers under another name, and positions stored as a tensor.
        edit(copy / "config.json", lambda d: d.update(text_config_dict=d.pop("text_config"), text_config=None))
        edit_tensors(copy, lambda t: t.update({"text_model.embeddings.position_ids": torch.arange(20)[None]}))
    check_parity(model, load(str(copy), device="cpu"))


def test_transformers_loads_what_is_saved_model_tokenizer_and_processor(
    directory: Path, classifier: Classifier
) -> None:
    read: Any = transformers.CLIPModel.from_pretrained  # what it returns depends on its arguments
    model, report = read(directory, output_loading_info=True)
    assert not any(report.values())
    check_parity(model, classifier)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(directory)
    for prompt, ours in zip(PROMPTS, classifier.tokenizer(PROMPTS), strict=True):
        theirs = tokenizer(prompt, truncation=True).input_ids
        assert theirs == ours[: len(theirs)].tolist()
    processor = transformers.CLIPImageProcessor.from_pretrained(directory)
    picture = Image.radial_gradient("L").convert("RGB")
    theirs = torch.as_tensor(processor(picture, return_tensors="np").pixel_values[0])
    assert (theirs - torch.from_numpy(classifier.preprocessing(picture))).abs().max() < 0.05  # rounding of the resize


def test_a_vit_l_of_openai_is_the_same_architecture_in_both_forms() -> None:
    from guard.classifiers.hugging_face.config import HuggingFaceConfig

    for name in ("ViT-L-14-336-quickgelu", "ViT-L-14-336", "ViT-bigG-14", "ViT-H-14"):
        config = open_clip.get_model_config(name)
        with torch.device("meta"):
            expected = {key: value.shape for key, value in open_clip.CLIP(**config).state_dict().items()}
            again = open_clip.CLIP(**HuggingFaceConfig.from_open_clip(config).to_open_clip()).state_dict()
        assert {key: value.shape for key, value in again.items()} == expected
    # Not only as wide, but word for word, where open_clip leaves out its defaults too.
    config = open_clip.get_model_config("ViT-L-14-336-quickgelu")
    assert HuggingFaceConfig.from_open_clip(config).to_open_clip() == config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_loaded_as_float32(
    copy: Path, classifier: Classifier, images: torch.Tensor, dtype: torch.dtype
) -> None:
    edit_tensors(copy, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    loaded = load(str(copy), device="cpu")
    assert {tensor.dtype for tensor in loaded.model.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(loaded.embed(images[:4]), classifier.embed(images[:4]), rtol=0.0, atol=0.05)


def test_squashing_preprocessing_survives(tmp_path: Path, classifier: Classifier) -> None:
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "interpolation": "bilinear", "resize_mode": "squash"}
    save(tmp_path / "open-clip", classifier.model, {**CONFIG, "preprocess_cfg": preprocess}, CLASSES)
    original = load(str(tmp_path / "open-clip"), device="cpu")
    save_hugging_face(tmp_path / "hugging-face", original)
    assert load(str(tmp_path / "hugging-face"), device="cpu").preprocessing == original.preprocessing


@pytest.mark.parametrize("form", ["preprocessor", "processor"])
def test_preprocessing_of_older_and_newer_releases_is_understood(copy: Path, classifier: Classifier, form: str) -> None:
    path = copy / "preprocessor_config.json"
    edit(path, lambda d: d.update(size=SIZE, crop_size=SIZE))
    if form == "processor":
        (copy / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(path.read_text())}))
        path.unlink()
    assert load(str(copy), device="cpu").preprocessing == classifier.preprocessing


def test_a_pickle_is_refused(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"is a pickle.*save_file.*'model\.safetensors'"):
        load(str(copy))
    shutil.move(copy / "pytorch_model.bin", copy / "model.safetensors")
    with pytest.raises(ModelError, match="is a pickle"):
        load(str(copy))
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        load(str(copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip", "architectures": ["SiglipModel"]}, "'siglip'"),
        ({"architectures": ["CLIPForImageClassification"]}, "CLIPForImageClassification"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"text_config": {"hidden_act": "relu"}}, r"hidden_act.*'relu'"),
        ({"text_config": {"hidden_act": "quick_gelu"}}, "differ in hidden_act"),
        ({"text_config": {"eos_token_id": 7}}, "eos_token_id"),
        ({"text_config": {"vocab_size": 1000}}, "vocab_size"),
        ({"text_config": {"num_attention_heads": 3}}, "heads"),
        ({"text_config": 3}, "text_config"),
        ({"vision_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"vision_config": {"hidden_size": 2**20}}, "in shape"),
        ({"vision_config": {"hidden_size": -32}}, "hidden_size"),
        ({"vision_config": {"num_channels": 4}}, "num_channels"),
        ({"vision_config": {"image_size": 32}}, "preprocessing that is not supported"),
        ({"vision_config": {"patch_size": 4}}, "in shape"),
        ({"projection_dim": 8}, "in shape"),
    ],
)
def test_a_configuration_that_is_not_followed_exactly_is_refused_in_one_line(
    copy: Path, change: dict[str, Any], message: str
) -> None:
    def apply(document: dict[str, Any]) -> None:
        for key, value in change.items():
            document[key] = {**document[key], **value} if isinstance(value, dict) and key in document else value

    edit(copy / "config.json", apply)
    with pytest.raises(ModelError, match=message) as caught:
        load(str(copy), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, " " * 1_000_001, '"\\ud800"', "{}"])
def test_a_damaged_configuration_is_refused(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        load(str(copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("logit_scale"), "lacks 1 tensors, such as 'logit_scale'"),
        (lambda t: t.update(classifier=torch.ones(1)), "no place for: 'classifier'"),
        (lambda t: t.update(logit_scale=torch.ones(2)), r"'logit_scale' in shape \[2\]"),
        (lambda t: t.update(logit_scale=torch.ones((), dtype=torch.int8)), "as I8"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    copy: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    edit_tensors(copy, change)
    with pytest.raises(ModelError, match=message):
        load(str(copy), device="cpu")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "", ".."])
def test_an_index_that_leads_elsewhere_is_refused(copy: Path, name: str) -> None:
    edit(shard(copy), lambda d: d["weight_map"].update(logit_scale=name))
    with pytest.raises(ModelError, match="not a safetensors file beside it; refused"):
        load(str(copy))


def test_a_damaged_index_or_shard_is_refused(copy: Path) -> None:
    index = shard(copy)
    first = copy / "model-00001-of-00002.safetensors"
    shutil.copy(first, copy / "again.safetensors")
    edit(index, lambda d: d["weight_map"].update(logit_scale="again.safetensors"))
    with pytest.raises(ModelError, match="another file has too"):
        load(str(copy), device="cpu")
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(ModelError, match="truncated"):
        load(str(copy))
    first.unlink()
    with pytest.raises(ModelError, match="there is no file"):
        load(str(copy))
    index.write_text('{"weight_map": {"logit_scale": 3}}')
    with pytest.raises(ModelError, match="weight_map"):
        load(str(copy))


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"shortest_edge": 20}},
        {"crop_size": {"height": 12, "width": 12}},
        {"resample": 0},
        {"rescale_factor": 1.0},
        {"do_normalize": False},
        {"image_mean": [0.5]},
        {"image_std": [0.5, 0.5, 0]},
        {"image_std": None},
    ],
)
def test_preprocessing_that_is_not_reproduced_is_refused(copy: Path, change: dict[str, Any]) -> None:
    edit(copy / "preprocessor_config.json", lambda d: d.update(change))
    with pytest.raises(ModelError, match=r"preprocessor_config\.json"):
        load(str(copy))


def test_missing_preprocessing_is_not_guessed(copy: Path) -> None:
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"has no preprocessor_config\.json"):
        load(str(copy))


def test_the_tokenizer_of_transformers_is_recognised_and_any_other_refused(copy: Path, classifier: Classifier) -> None:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(copy)
    for file in ("vocab.json", "merges.txt"):
        (copy / file).unlink()
    tokenizer.save_pretrained(copy)
    assert (copy / "tokenizer.json").exists()
    assert load(str(copy), device="cpu").digest == classifier.digest
    tokenizer.add_tokens(["<backdoor>"])
    tokenizer.save_pretrained(copy)
    with pytest.raises(ModelError, match="differs from CLIP's vocabulary"):
        load(str(copy))


def _swap(vocabulary: dict[str, int]) -> None:
    vocabulary["cat</w>"], vocabulary["dog</w>"] = vocabulary["dog</w>"], vocabulary["cat</w>"]


def test_a_changed_vocabulary_or_merge_is_refused(copy: Path, directory: Path) -> None:
    edit(copy / "vocab.json", _swap)
    with pytest.raises(ModelError, match=r"vocab\.json differs"):
        load(str(copy))
    shutil.copy(directory / "vocab.json", copy)
    (copy / "merges.txt").write_text((directory / "merges.txt").read_text().replace("i n\nt h\n", "t h\ni n\n"))
    with pytest.raises(ModelError, match=r"merges\.txt differs"):
        load(str(copy))
    shutil.copy(directory / "merges.txt", copy)
    (copy / "added_tokens.json").write_text('{"<backdoor>": 49408}')
    with pytest.raises(ModelError, match=r"added_tokens\.json differs"):
        load(str(copy))
    (copy / "added_tokens.json").unlink()
    (copy / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ModelError, match=r"tokenizer\.json is damaged"):
        load(str(copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 32, "image_size": 32}}, "ResNet"),
        ({"vision_cfg": {"pool_type": "avg"}}, "pool_type 'avg'"),
        ({"vision_cfg": {"no_ln_pre": True}}, "no_ln_pre"),
        ({"text_cfg": {"no_causal_mask": True}}, "no_causal_mask"),
        ({"text_cfg": {"tokenizer_kwargs": {"clean": "whitespace"}}}, "tokenizer_kwargs"),
        ({"init_logit_bias": -10.0}, "init_logit_bias"),
        ({"custom_text": True}, "custom_text"),
    ],
)
def test_what_clipmodel_cannot_express_is_not_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config: dict[str, Any] = {
        key: {**value, **change.get(key, {})} if isinstance(value, dict) else value
        for key, value in (ARCHITECTURE | {key: change[key] for key in change if key not in ARCHITECTURE}).items()
    }
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    model = (open_clip.CustomTextCLIP if "custom_text" in config else open_clip.CLIP)(**arguments)
    save(tmp_path / "model", model, {**CONFIG, "model_cfg": config}, CLASSES)
    classifier = load(str(tmp_path / "model"), device="cpu")
    with pytest.raises(ModelError, match=rf"cannot express this model.*{message}"):
        save_hugging_face(tmp_path / "out", classifier)
    assert not (tmp_path / "out").exists()


def test_saving_replaces_such_a_directory_and_nothing_else(copy: Path, classifier: Classifier, tmp_path: Path) -> None:
    save_hugging_face(copy, classifier)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="not replaced"):
        save_hugging_face(tmp_path / "home", classifier)


def test_a_hub_tag_of_this_form_loads_from_the_hubs_cache(
    directory: Path, classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--owner--tiny"
    shutil.copytree(directory, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load("hf-hub:owner/tiny", device="cpu").digest == classifier.digest


def test_the_command_writes_it_without_images_and_asks_for_them_for_onnx(
    model_directory: Path, classifier: Classifier, tmp_path: Path
) -> None:
    arguments = ["export", str(model_directory), "--out", str(tmp_path / "out"), "--device", "cpu"]
    result = CliRunner().invoke(cli, [*arguments, "--format", "hugging-face", "--json"], catch_exceptions=False)
    assert json.loads(result.stdout) == {"classifier": classifier.digest.root}
    assert load(str(tmp_path / "out"), device="cpu").digest == classifier.digest
    with pytest.raises(UsageError, match="needs --images"):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
