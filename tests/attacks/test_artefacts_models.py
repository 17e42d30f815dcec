"""Model files of others: nothing is fetched, nothing is run, and what was checked is what is loaded."""

import json
import os
import pickle
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from guard._safetensors import open_tensors
from guard.classifiers import Classifier, ClassList, load, open_clip_config, save, save_hugging_face
from guard.classifiers import open_clip as reader
from guard.classifiers.weights import Weights
from guard.errors import GuardError, ModelError
from guard.profiles import Profile, read_embeddings, read_vocabulary
from guard.sidecar.settings import Settings
from tests.conftest import ARCHITECTURE, CLASSES, tiny_model

VISION: Any = ARCHITECTURE["vision_cfg"]
TEXT: Any = ARCHITECTURE["text_cfg"]


@pytest.fixture
def copy(model_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_directory, tmp_path / "model"))


@pytest.fixture(autouse=True)
def _no_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a name or a connection fails the test."""

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was to be fetched")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr("builtins.input", refused)


def refused(directory: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        load(str(directory), device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def put(directory: Path, *path: Any) -> None:
    """Set a value in the configuration: the names that lead to it, and the value."""
    *names, last, value = path
    file = directory / "open_clip_config.json"
    document = json.loads(file.read_text())
    part = document
    for name in names:
        part = part[name]
    part[last] = value
    file.write_text(json.dumps(document))


class TestNothingIsFetchedOrRun:
    @pytest.mark.parametrize(
        "name",
        [
            "hf-hub:evil/model", "HF-HUB:evil/model", "Hf_Hub:evil/model", "hf_hub:evil/model", "local-dir:/tmp",
            "LOCAL-DIR:.", "timm/resnet18.a1_in1k", "resnet18.a1_in1k", "../resnet18", "RESNET18", " resnet18",
            "resnet18\n", "https://evil/model", "no_such_architecture", "\u0072esnet18\u200b",
        ],
    )  # fmt: skip
    def test_an_image_tower_is_one_of_timms_own_architectures(self, copy: Path, name: str) -> None:
        put(copy, "model_cfg", "vision_cfg", "timm_model_name", name)
        assert "none of the architectures that timm has by itself; refused" in refused(copy)

    @pytest.mark.parametrize(
        ("tower", "name", "value"),
        [
            ("text_cfg", "hf_model_name", "evil/model"),
            ("text_cfg", "hf_tokenizer_name", "evil/tokenizer"),
            ("text_cfg", "hf_tokenizer_name", "."),
            ("text_cfg", "tokenizer_mode", "clips"),
            ("text_cfg", "tokenizer_kwargs", {"trust_remote_code": True}),
            ("text_cfg", "tokenizer_kwargs", {"bpe_path": "/etc/passwd"}),
            ("text_cfg", "tokenizer_kwargs", {"reduction_mask": "syntax"}),
            ("text_cfg", "tokenizer_kwargs", {"additional_special_tokens": ["("]}),
            ("text_cfg", "auto_map", {"AutoTokenizer": "evil.Tokenizer"}),
            ("vision_cfg", "hf_model_name", "evil/model"),
            ("vision_cfg", "timm_model_name", ["resnet18"]),
            ("vision_cfg", "norm_kwargs", {"device": "cuda"}),
            ("vision_cfg", "act_kwargs", {"approximate": "tanh", "more": 1}),
        ],
    )
    def test_no_other_place_is_looked_at(self, copy: Path, tower: str, name: str, value: object) -> None:
        put(copy, "model_cfg", tower, name, value)
        assert "is refused: model_cfg" in refused(copy)

    def test_a_tokenizer_with_code_of_its_own_beside_the_weights_is_not_looked_at(self, copy: Path) -> None:
        put(copy, "model_cfg", "text_cfg", "hf_tokenizer_name", "local")
        (copy / "evil.py").write_text("open('/tmp/ran', 'w')")
        (copy / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}')
        assert "hf_tokenizer_name" in refused(copy)

    @pytest.mark.parametrize(
        "architecture", ["local-dir:MODEL", "HF-HUB:evil/model", "Hf-Hub:evil/model", "", "vit-b-32", "ViT-B-32 "]
    )
    def test_an_architecture_is_a_name_that_open_clip_has(self, copy: Path, architecture: str) -> None:
        weights = copy / "open_clip_model.safetensors"
        message = refused(f"{architecture.replace('MODEL', str(copy))}::{weights}")
        assert message.startswith("open_clip knows no architecture")

    @pytest.mark.parametrize("name", ["HF-HUB:evil/model", "Hf-Hub:evil/model", "hf_hub:evil/model", "hf-hub/evil"])
    def test_only_the_exact_prefix_is_a_model_of_a_hub(self, name: str) -> None:
        assert refused(name).startswith("there is no model")

    @pytest.mark.parametrize("pretrained", [True, False])
    def test_a_tower_of_timm_is_built_without_its_published_weights(self, tmp_path: Path, *, pretrained: bool) -> None:
        vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
        config = {**ARCHITECTURE, "vision_cfg": {**vision, "timm_model_pretrained": pretrained}, "custom_text": True}
        torch.manual_seed(0)
        model = open_clip.CustomTextCLIP(16, {**vision, "timm_model_pretrained": False}, ARCHITECTURE["text_cfg"])
        save(tmp_path / "model", model, {"model_cfg": config, "preprocess_cfg": {}}, CLASSES)
        loaded = load(str(tmp_path / "model"), device="cpu")
        pixels = torch.rand(1, 3, 160, 160)
        torch.testing.assert_close(loaded.model.encode_image(pixels), model.eval().encode_image(pixels))


class TestWhatWasCheckedIsWhatIsLoaded:
    def test_a_configuration_that_changes_after_the_check_changes_nothing(
        self, copy: Path, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = open_clip_config.read_config

        def changing(path: Path) -> Any:
            found = read(path)
            put(copy, "model_cfg", "text_cfg", "hf_tokenizer_name", "evil/tokenizer")
            put(copy, "preprocess_cfg", "mean", [0.1, 0.1, 0.1])
            return found

        monkeypatch.setattr(reader, "read_config", changing)
        assert load(str(copy), device="cpu").digest == classifier.digest

    def test_a_file_that_takes_the_place_of_the_weights_after_the_check_is_not_read(
        self, copy: Path, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        check = Weights.check

        def replacing(weights: Weights, expected: Any) -> None:
            check(weights, expected)
            save_file(tiny_model(5).state_dict(), copy / "other.safetensors")
            (copy / "other.safetensors").replace(copy / "open_clip_model.safetensors")

        monkeypatch.setattr(Weights, "check", replacing)
        assert load(str(copy), device="cpu").digest == classifier.digest

    def test_weights_that_are_cut_after_the_check_are_refused(
        self, copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        check = Weights.check

        def cutting(weights: Weights, expected: Any) -> None:
            check(weights, expected)
            os.truncate(copy / "open_clip_model.safetensors", 5000)

        monkeypatch.setattr(Weights, "check", cutting)
        assert "it changed while it was read" in refused(copy)

    @pytest.mark.parametrize(
        "change",
        [
            {"vision_cfg": {"width": 2**20, "layers": 256}},
            {"text_cfg": {"width": 2**18, "layers": 256, "heads": 1}},
            {"text_cfg": {"vocab_size": 2**20}},
            {"vision_cfg": {"mlp_ratio": 64.0, "layers": 256}},
            {"embed_dim": 2**20},
        ],
    )
    def test_no_memory_is_spent_on_a_size_that_the_weights_do_not_have(
        self, copy: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in change.items():
            for key, number in value.items() if isinstance(value, dict) else ():
                put(copy, "model_cfg", name, key, number)
            if not isinstance(value, dict):
                put(copy, "model_cfg", name, value)
        built = []
        model = reader._model

        def counting(config: Any) -> Any:
            built.append(torch.empty(0).device.type)
            return model(config)

        monkeypatch.setattr(reader, "_model", counting)
        assert "in shape" in refused(copy) or "has no place for" in refused(copy) or "lacks" in refused(copy)
        assert set(built) == {"meta"}

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (("model_cfg", "text_cfg", "context_length"), 2**16),
            (("model_cfg", "vision_cfg", "image_size"), 2**15),
            (("model_cfg", "vision_cfg", "layers"), [256] * 5),
            (("model_cfg", "vision_cfg", "layers"), 10**30),
            (("model_cfg", "vision_cfg", "mlp_ratio"), 1e300),
            (("model_cfg", "vision_cfg", "width"), True),
            (("model_cfg", "vision_cfg", "width"), 32.5),
            (("model_cfg", "vision_cfg", "width"), "32"),
        ],
    )
    def test_sizes_are_bounded_by_themselves(self, copy: Path, path: tuple[str, ...], value: object) -> None:
        put(copy, *path, value)
        assert "is refused: " in refused(copy)

    def test_attention_over_too_many_patches_is_refused(self, copy: Path) -> None:
        put(copy, "model_cfg", "vision_cfg", "patch_size", 1)
        put(copy, "model_cfg", "vision_cfg", "image_size", 4096)
        assert "more than 128 along a side" in refused(copy)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**41)


@pytest.mark.parametrize("make", [os.mkfifo, device, sparse])
@pytest.mark.parametrize("name", ["open_clip_config.json", "open_clip_model.safetensors", "classes.json"])
def test_a_pipe_a_device_and_a_sparse_file_end_in_one_line(
    copy: Path, name: str, make: Callable[[Path], object]
) -> None:
    (copy / name).unlink()
    make(copy / name)
    with pytest.raises(GuardError, match=r"not a regular file|is larger than|is not a model|has no open_clip"):
        load(str(copy), device="cpu")


@pytest.mark.parametrize("make", [os.mkfifo, device, sparse])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("guard.toml", Settings.load),
        ("embeddings.npy", lambda path: read_embeddings(path, 16)),
        ("vocabulary.txt", read_vocabulary),
        ("classes.txt", ClassList.read),
        ("reference.safetensors", lambda path: Profile.open(path.parent)),
        ("triggers.safetensors", lambda path: Profile.open(path.parent)),
        ("profile.json", lambda path: Profile.open(path.parent)),
    ],
)
def test_so_do_the_other_files_that_are_read(
    profile_directory: Path, name: str, read: Callable[[Path], object], make: Callable[[Path], object]
) -> None:
    path = profile_directory / name
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(GuardError, match=r"not a regular file|is larger than"):
        read(path)


def rewritten(directory: Path, low: bytes) -> None:
    """The same tensors with a header whose length begins with these bytes; only public functions are used."""
    path = directory / "open_clip_model.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, metadata={"note": ""})
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    wanted = next(each for each in range(length, length + 2**24, 8) if struct.pack("<Q", each).startswith(low))
    save_file(tensors, path, metadata={"note": "x" * (wanted - length)})
    assert path.read_bytes().startswith(low)


@pytest.mark.parametrize("low", [b"\x80", b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"])
def test_a_safetensors_file_is_told_from_a_pickle_by_all_of_its_header(
    copy: Path, classifier: Classifier, low: bytes
) -> None:
    rewritten(copy, low)
    assert load(str(copy), device="cpu").digest == classifier.digest


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_pickle_is_still_called_a_pickle(copy: Path, protocol: int) -> None:
    (copy / "open_clip_model.safetensors").write_bytes(pickle.dumps({"a": [1] * 10_000}, protocol))
    assert "is a pickle, which can run code" in refused(copy)
    torch.save({"a": torch.ones(3)}, copy / "open_clip_model.safetensors")
    assert "is a pickle, which can run code" in refused(copy)


@pytest.mark.parametrize(
    "header",
    [
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "more": 1}},
        {"a": None},
    ],
)  # fmt: skip
def test_a_header_that_does_not_describe_every_byte_once_is_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "w").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with (
        pytest.raises(ModelError, match="is not a safetensors file, or it is damaged"),
        open_tensors(tmp_path / "w", ModelError),
    ):
        pass


class TestWeightsAreNotBentToTheConfiguration:
    def change(self, copy: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
        path = copy / "open_clip_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        return refused(copy)

    @pytest.mark.parametrize("shape", ["larger image", "longer text", "scale"])
    def test_another_shape_is_refused(self, copy: Path, shape: str) -> None:
        if shape == "scale":
            assert "'logit_scale' in shape [1]" in self.change(copy, lambda t: t.update(logit_scale=torch.ones(1)))
            return
        vision = {**VISION, "image_size": 32} if shape == "larger image" else ARCHITECTURE["vision_cfg"]
        text = {**TEXT, "context_length": 248} if shape == "longer text" else ARCHITECTURE["text_cfg"]
        save_file(open_clip.CLIP(16, vision, text).state_dict(), copy / "open_clip_model.safetensors")
        assert "positional_embedding' in shape" in refused(copy)

    @pytest.mark.parametrize(
        "dtype", [torch.int8, torch.uint8, torch.int64, torch.float64, torch.float8_e4m3fn, torch.complex64, torch.bool]
    )
    def test_another_type_of_number_is_refused(self, copy: Path, dtype: torch.dtype) -> None:
        message = self.change(copy, lambda t: t.update({name: value.to(dtype) for name, value in t.items()}))
        assert "BF16, F16, F32 are accepted" in message

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_loaded_as_float32(self, copy: Path, dtype: torch.dtype) -> None:
        path = copy / "open_clip_model.safetensors"
        save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
        assert {value.dtype for value in load(str(copy), device="cpu").model.state_dict().values()} == {torch.float32}

    def test_tensors_that_are_missing_or_belong_nowhere_are_refused(self, copy: Path) -> None:
        assert "lacks 1 tensors, such as 'logit_scale'" in self.change(copy, lambda t: t.pop("logit_scale"))
        assert "no place for: 'logit_bias'" in self.change(copy, lambda t: t.update(logit_bias=torch.ones(())))

    def test_names_of_a_parallel_training_are_the_same_names(self, copy: Path, classifier: Classifier) -> None:
        path = copy / "open_clip_model.safetensors"
        save_file({f"module.{name}": value for name, value in load_file(path).items()}, path)
        assert load(str(copy), device="cpu").digest == classifier.digest

    def test_names_of_a_plain_text_tower_are_those_of_one_of_its_own(self, copy: Path, classifier: Classifier) -> None:
        put(
            copy,
            "model_cfg",
            {**json.loads((copy / "open_clip_config.json").read_text())["model_cfg"], "custom_text": True},
        )
        loaded = load(str(copy), device="cpu")
        assert isinstance(loaded.model, open_clip.CustomTextCLIP)
        torch.testing.assert_close(loaded.head, classifier.head)


class TestThePreprocessingIsTheModels:
    @pytest.mark.parametrize(
        ("architecture", "message"),
        [
            ("ViT-B-32", "differ in quick_gelu; name ViT-B-32-quickgelu if"),
            ("ViT-L-14", "differ in mean and std and quick_gelu"),
            ("ViT-H-14", "differ in resize_mode and quick_gelu"),
            ("ViT-H-14-quickgelu", "differ in resize_mode"),
            ("RN50", "all weights of it that open_clip publishes need QuickGELU"),
            ("ViT-L-14-336", "all weights of it that open_clip publishes need QuickGELU"),
            ("ViT-S-16", "open_clip publishes no weights of it"),
        ],
    )
    def test_a_name_that_does_not_say_it_is_refused(self, copy: Path, architecture: str, message: str) -> None:
        found = refused(f"{architecture}::{copy / 'open_clip_model.safetensors'}")
        assert message in found
        assert "put them into a folder" in found

    @pytest.mark.parametrize("architecture", open_clip.list_models())
    def test_where_it_is_known_it_is_that_of_all_published_weights(self, architecture: str) -> None:
        config = open_clip.get_model_config(architecture)
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        try:
            found = reader._published_preprocessing(architecture, config, 224)
        except ModelError:
            return
        for tag in tags:
            each = open_clip.get_pretrained_cfg(architecture, tag)
            assert (found.mean, found.std) == (tuple(each["mean"]), tuple(each["std"]))
            assert (found.interpolation, found.resize_mode) == (each["interpolation"], each["resize_mode"])
            assert bool(each.get("quick_gelu")) == bool(config.get("quick_gelu"))
        assert tags

    def test_a_mobile_clip_is_loaded_with_its_own(self) -> None:
        config = open_clip.get_model_config("MobileCLIP2-S0")
        found = reader._published_preprocessing("MobileCLIP2-S0", config, 256)
        assert (found.mean, found.std, found.interpolation) == ((0.0,) * 3, (1.0,) * 3, "bilinear")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("mean", None), ("mean", [0.5]), ("mean", [0.5] * 4), ("mean", 0.5), ("mean", [1e39] * 3),
            ("mean", ["0.5"] * 3), ("std", None), ("std", [0.0] * 3), ("std", [-1.0] * 3), ("std", [1e-50] * 3),
            ("size", 32), ("size", [16, 32]), ("interpolation", "nearest"), ("interpolation", None),
            ("resize_mode", "longest"), ("mode", "L"), ("image_mean", [0.5] * 3), ("crop", 16),
        ],
    )  # fmt: skip
    def test_a_value_that_is_not_understood_is_refused(self, copy: Path, name: str, value: object) -> None:
        put(copy, "preprocess_cfg", name, value)
        message = refused(copy)
        assert "preprocess_cfg" in message
        assert "(model_cfg with" not in message

    @pytest.mark.parametrize("value", [None, [], "x", 3])
    def test_preprocessing_that_is_no_object_is_refused_by_its_name(self, copy: Path, value: object) -> None:
        put(copy, "preprocess_cfg", value)
        assert "preprocess_cfg" in refused(copy)

    def test_a_number_that_is_no_number_is_refused(self, copy: Path) -> None:
        put(copy, "preprocess_cfg", "mean", [float("inf")] * 3)
        assert "holds the number Infinity" in refused(copy)

    def test_two_image_processors_must_say_the_same(self, classifier: Classifier, tmp_path: Path) -> None:
        save_hugging_face(tmp_path / "model", classifier)
        old = tmp_path / "model" / "preprocessor_config.json"
        document = json.loads(old.read_text())
        new = tmp_path / "model" / "processor_config.json"
        same = {key: value for key, value in document.items() if key not in {"do_resize", "do_normalize"}}
        new.write_text(json.dumps({"image_processor": {**same, "image_processor_type": "Other"}}))
        assert load(str(tmp_path / "model"), device="cpu").preprocessing == classifier.preprocessing
        for change in ({"image_mean": [0.1] * 3}, {"resample": 2}, {"do_normalize": False}, {"image_std": None}):
            new.write_text(json.dumps({"image_processor": {**document, **change}}))
            assert "two image processors that differ" in refused(tmp_path / "model")
        new.write_text("{}")  # a processor without images, such as that of a tokenizer alone
        assert load(str(tmp_path / "model"), device="cpu").preprocessing == classifier.preprocessing


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model_cfg", "text_cfg", "tokenizer_kwargs"), None),
        (("model_cfg", "quick_gelu"), None),
        (("model_cfg", "vision_cfg", "output_tokens"), True),
        (("model_cfg", "text_cfg", "output_tokens"), True),
        (("model_cfg", "vision_cfg", "head_width"), 64),
        (("model_cfg", "text_cfg", "heads"), 3),
        (("model_cfg", "vision_cfg", "pool_type"), "other"),
        (("model_cfg", "multimodal_cfg"), {}),
        (("model_cfg", "text_cfg"), None),
        (("model_cfg", "vision_cfg"), []),
        (("model_cfg",), None),
        (("model_cfg", "device"), "cuda"),
        (("model_cfg", "embed_dim"), "16"),
        (("model_cfg", "init_logit_scale"), 1e300),
    ],
)
def test_no_value_of_a_configuration_ends_in_a_traceback(copy: Path, path: tuple[str, ...], value: object) -> None:
    put(copy, *path, value)
    if value is None and "tokenizer_kwargs" in path:  # which says nothing
        assert load(str(copy), device="cpu").head.shape == (6, 16)
    else:
        refused(copy)


@pytest.mark.parametrize("architecture", [name for name in open_clip.list_models() if "-" in name][::4])
def test_every_field_of_open_clips_own_configurations_is_known(architecture: str) -> None:
    config = open_clip.get_model_config(architecture)
    text = config["text_cfg"]
    for name in ("hf_tokenizer_name", "hf_model_name"):
        text.pop(name, None)
    if text.get("tokenizer_kwargs") == {"strip_sep_token": True}:
        del text["tokenizer_kwargs"]
    assert open_clip_config.check_config(architecture, config) > 0
