"""A hostile export: what it names is not followed, and what it is made of is known before ONNX Runtime sees it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from guard.classifiers import ExportedClassifier
from guard.classifiers.digest import sha256
from guard.classifiers.graph import check_graph
from guard.errors import ModelError


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "export"))


def put(directory: Path, data: bytes) -> None:
    """Replace the model; whoever can do that can write the manifest too."""
    (directory / "model.onnx").write_bytes(data)
    manifest = json.loads((directory / "classifier.json").read_text())
    manifest["model_sha256"] = sha256(data)
    (directory / "classifier.json").write_text(json.dumps(manifest))


def external(name: str = "elsewhere") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret.bin")
    return tensor


def in_an_initialiser(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(external())


def without_saying_where(model: onnx.ModelProto) -> None:
    tensor = external()
    tensor.ClearField("data_location")
    model.graph.initializer.append(tensor)


def without_a_name(model: onnx.ModelProto) -> None:
    tensor = external()
    tensor.ClearField("external_data")
    model.graph.initializer.append(tensor)


def in_a_sparse_initialiser(model: onnx.ModelProto) -> None:
    sparse = model.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(external())


def in_the_indices_of_a_sparse_one(model: onnx.ModelProto) -> None:
    sparse = model.graph.sparse_initializer.add(dims=[4])
    sparse.indices.CopyFrom(external())


def in_an_attribute(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=external()))


def in_a_list_of_an_attribute(model: onnx.ModelProto) -> None:
    model.graph.node.add(op_type="X").attribute.add(name="a").tensors.append(external())


def in_a_sparse_attribute(model: onnx.ModelProto) -> None:
    model.graph.node.add(op_type="X").attribute.add(name="a").sparse_tensor.values.CopyFrom(external())


def in_a_subgraph(model: onnx.ModelProto) -> None:
    inner = model.graph.node.add(op_type="If").attribute.add(name="then_branch").g
    deeper = inner.node.add(op_type="If").attribute.add(name="else_branch").g
    deeper.initializer.append(external())


def in_a_list_of_subgraphs(model: onnx.ModelProto) -> None:
    model.graph.node.add(op_type="X").attribute.add(name="a").graphs.add().initializer.append(external())


def in_a_function(model: onnx.ModelProto) -> None:
    node = model.functions.add(name="f", domain="mine").node.add(op_type="Constant")
    node.attribute.add(name="value").t.CopyFrom(external())


def in_training_information(model: onnx.ModelProto) -> None:
    model.training_info.add().algorithm.initializer.append(external())


def at_an_address_of_the_process(model: onnx.ModelProto) -> None:
    tensor = external()
    tensor.external_data[0].value = "*/_ORT_MEM_ADDR_/*"
    model.graph.initializer.append(tensor)


def an_operator_of_microsoft(model: onnx.ModelProto) -> None:
    model.graph.node.add(op_type="FusedGemm", domain="com.microsoft")


def a_set_of_operators_of_its_own(model: onnx.ModelProto) -> None:
    model.opset_import.add(domain="ai.onnx.ml", version=3)


def a_local_function(model: onnx.ModelProto) -> None:
    model.functions.add(name="f")


CHANGES = [
    in_an_initialiser, without_saying_where, without_a_name, in_a_sparse_initialiser, in_the_indices_of_a_sparse_one,
    in_an_attribute, in_a_list_of_an_attribute, in_a_sparse_attribute, in_a_subgraph, in_a_list_of_subgraphs,
    in_a_function, in_training_information, at_an_address_of_the_process, an_operator_of_microsoft,
    a_set_of_operators_of_its_own, a_local_function,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_not_whole_in_itself_is_refused(copy: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load_model(copy / "model.onnx")
    change(model)
    put(copy, model.SerializeToString())
    with pytest.raises(ModelError, match=r"model\.onnx cannot be used as an exported model: .* refused$") as caught:
        ExportedClassifier(copy, gpu=False)
    assert "\n" not in str(caught.value)


def test_a_file_of_the_host_is_not_served_as_scores(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.arange(6, dtype=np.float32).tofile("secret.bin")
    model = onnx.load_model(copy / "model.onnx")
    for node in model.graph.node:
        node.output[:] = ["true" if name == "logits" else name for name in node.output]
    secret = external("secret")
    secret.dims[:] = [6]
    model.graph.initializer.append(secret)
    model.graph.node.append(helper.make_node("Sub", ["true", "true"], ["zero"]))
    model.graph.node.append(helper.make_node("Max", ["zero", "secret"], ["logits"]))
    # The way exists: this is what ONNX Runtime makes of it.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (served,) = session.run(["logits"], {"image": np.zeros((1, 3, 16, 16), np.float32)})
    assert served.tolist() == [[0, 1, 2, 3, 4, 5]]
    put(copy, model.SerializeToString())
    with pytest.raises(ModelError, match="kept in another file"):
        ExportedClassifier(copy, gpu=False)


def test_a_field_that_is_not_known_is_refused(copy: Path) -> None:
    data = (copy / "model.onnx").read_bytes()
    for more in (b"\xfa\x7f\x01x", b"\xf8\x7f\x01", b"\x38\x01\x3a\x00\x39" + bytes(8)):
        put(copy, data + more)
        with pytest.raises(ModelError, match="a field that onnx does not know"):
            ExportedClassifier(copy, gpu=False)


def test_a_file_that_onnx_runtime_would_take_for_its_own_form_is_read_as_onnx(copy: Path) -> None:
    data = (copy / "model.onnx").read_bytes()
    # Valid protobuf: the name of a producer, of which the fifth to eighth byte are the mark of that form.
    mark = b"\x12\x06xxORTM"
    check_graph(mark + data)
    put(copy, mark + data)
    assert ExportedClassifier(copy, gpu=False).run(np.zeros((1, 3, 16, 16), np.float32))[0].shape == (1, 16)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"\x80\x04\x95", "truncated|not encoded|does not know"),
        (b"PK\x03\x04", "not encoded|truncated|does not know"),
        (b"\x3a" + b"\xff" * 11, "truncated"),
        (b"\x3a\x7f", "truncated"),
        (b"\x0b", "does not know|not encoded"),
    ],
)
def test_what_is_no_onnx_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_graph(data)


def test_nesting_and_number_of_fields_are_bounded_before_anything_is_parsed() -> None:
    nested = onnx.TypeProto()
    for _ in range(20):
        outer = onnx.TypeProto()
        outer.sequence_type.elem_type.CopyFrom(nested)
        nested = outer
    deep = onnx.ModelProto()
    deep.graph.input.add(name="x").type.CopyFrom(nested)
    with pytest.raises(ValueError, match="nested deeper"):
        check_graph(deep.SerializeToString())
    many = b"\x0a\x00" * 1_000_001  # nodes of two bytes, each of which would take some hundred in memory
    length = len(many)
    encoded = bytes([length & 127 | 128, length >> 7 & 127 | 128, length >> 14 & 127 | 128, length >> 21])
    with pytest.raises(ValueError, match="more than 1000000 fields"):
        check_graph(b"\x3a" + encoded + many)


@pytest.mark.parametrize("several", [False, True])
def test_what_could_loop_for_ever_is_refused(several: bool) -> None:  # noqa: FBT001
    model = onnx.ModelProto()
    attribute = model.graph.node.add(op_type="Loop").attribute.add(name="body")
    (attribute.graphs.add() if several else attribute.g).name = "again"
    with pytest.raises(ValueError, match="inside of a node"):
        check_graph(model.SerializeToString())


def test_a_pipe_and_a_sparse_file_are_refused_at_once(copy: Path) -> None:
    path = copy / "model.onnx"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ModelError, match="not a regular file"):
        ExportedClassifier(copy, gpu=False)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ModelError, match="is larger than"):
        ExportedClassifier(copy, gpu=False)


TEXT = {"context": 8, "trimmed": True, "cleaning": "lower", "merges": ["a b"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TEXT, "does not have the inputs and outputs that its manifest names"),
        ({**TEXT, "merges": "a b"}, "merges"),
        ({**TEXT, "cleaning": "__import__('os')"}, "cleaning"),
        ({**TEXT, "context": "many"}, "context"),
    ],
)
def test_an_image_tower_does_not_pass_for_one_of_texts(copy: Path, text: dict[str, object], says: str) -> None:
    manifest = json.loads((copy / "classifier.json").read_text())
    (copy / "classifier.json").write_text(json.dumps({**manifest, "text": text}))
    with pytest.raises(ModelError, match=says):
        ExportedClassifier(copy, gpu=False)
