"""Weights that a network computes from others are int8 in the file, as all others are; what else it computes stays."""

import numpy as np
import pytest
import timm
import torch
from export_parts import SIZE

from timm_igkd.evaluation.onnx_file import write_onnx
from timm_igkd.export.int8 import edge_layers, quantise, weighted_layers

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's exporter
WEIGHTED = ("Conv", "Gemm", "MatMul")


def int8_layers(path):
    """Return of each layer with weights whether they are int8 in the file."""
    graph = onnx.load(path).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    layers = [node for node in graph.node if node.op_type in WEIGHTED]
    sources = [made[node.input[1]].input[0] if node.input[1] in made else node.input[1] for node in layers]
    return [kinds.get(source) == onnx.TensorProto.INT8 for source in sources]


def test_standardised_weights_are_int8(tmp_path):
    """The exporter folds small tensors alone: of 34 layers it leaves four whose weights the file computes."""
    torch.manual_seed(0)
    model = timm.create_model("test_nfnet", num_classes=10).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    source, target = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    write_onnx(model, source)
    assert len(weighted_layers(onnx.load(source))) < 34
    quantise(source, target, [torch.rand(2, 3, 64, 64)])
    assert int8_layers(target) == [True] * 34
    assert target.stat().st_size < 0.45 * source.stat().st_size


@pytest.mark.parametrize(("name", "heads"), [("deit_tiny_distilled_patch16_224", 2), ("deit_tiny_patch16_224", 1)])
def test_edges_are_the_first_layer_and_all_heads(name, heads, tmp_path):
    model = timm.create_model(name, img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=5).eval()
    write_onnx(model, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    layers = weighted_layers(proto)
    assert edge_layers(proto) == [layers[0], *layers[-heads:]]
    assert [node.op_type for node in proto.graph.node if node.name in layers[-heads:]] == ["Gemm"] * heads


class Skipped(torch.nn.Module):
    """Blocks that a skip connection goes around; the logits are their mean."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x).relu()
        return x.mean((2, 3))


def test_a_skipped_block_is_no_last_layer(tmp_path):
    exported = torch.onnx.export(Skipped().eval(), (torch.zeros(2, 3, 8, 8),), dynamo=True, verbose=False)
    exported.save(tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    layers = weighted_layers(proto)
    assert len(layers) == 4
    assert edge_layers(proto) == [layers[0], layers[-1]]


def write_computed(path, layers):
    """Write a network of square layers whose weights are the product of two tensors, and a table grown from one."""
    helper, side = onnx.helper, 3 * SIZE * SIZE
    rng, nodes, tensors = np.random.default_rng(0), [], {"flat": np.array([-1, side], np.int64)}
    nodes.append(helper.make_node("Reshape", ["image", "flat"], ["x0"]))
    for i in range(layers):
        tensors |= {f"v{i}": rng.normal(size=(side, side)).astype(np.float32), f"g{i}": np.full((side, 1), 0.1, "f4")}
        nodes.append(helper.make_node("Mul", [f"v{i}", f"g{i}"], [f"w{i}"]))
        nodes.append(helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]))
    tensors |= {"row": rng.normal(size=(1, 1)).astype(np.float32), "shape": np.array([1, side], np.int64)}
    nodes.append(helper.make_node("Expand", ["row", "shape"], ["table"]))
    nodes.append(helper.make_node("Add", [f"x{layers}", "table"], ["logits"]))
    entries = [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])]
    output = [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", side])]
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "computed", entries, output, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


@pytest.mark.parametrize(
    ("layers", "float_edges", "kinds"),
    [(3, False, [True, True, True]), (3, True, [False, True, False]), (2, True, [True, True]), (1, True, [True])],
)
def test_edges_are_in_float_where_there_are_other_layers(layers, float_edges, kinds, tmp_path):
    """And a table, which is no weight, is not grown."""
    source, target = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    write_computed(source, layers)
    quantise(source, target, [torch.rand(2, 3, SIZE, SIZE)], float_edges=float_edges)
    assert int8_layers(target) == kinds
    operators = [node.op_type for node in onnx.load(target).graph.node]
    assert ("Mul" in operators, "Expand" in operators) == (False, True)
