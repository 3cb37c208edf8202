"""A student that has learnt the digits, its exported files, and files that nobody can use."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import nn

from timm_igkd import load_labeled_images
from timm_igkd.evaluation.onnx_file import describe_model, write_metadata

SIZE = 16
SMALLEST = {"drop_blocks": 17}  # of mobilenetv2_cifar: two blocks of 1,994 parameters


def smallest(**config: Any) -> nn.Module:
    """Return a student of random weights whose export takes a second."""
    torch.manual_seed(0)
    overlay = {"input_size": (3, SIZE, SIZE), **config}
    return timm.create_model("mobilenetv2_cifar", num_classes=10, pretrained_cfg_overlay=overlay, **SMALLEST).eval()


@functools.cache
def digits_student() -> nn.Module:
    """Return a student of 100,000 parameters that reads most digits; trained once in a second or two."""
    torch.manual_seed(0)
    overlay = {"input_size": (3, SIZE, SIZE), "crop_pct": 1.0}
    model = timm.create_model("test_efficientnet", num_classes=10, pretrained_cfg_overlay=overlay)
    data, transform = load_labeled_images("digits", "train"), create_transform(**resolve_data_config({}, model=model))
    images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    inputs, targets = torch.stack([transform(image) for image in images]), torch.tensor(labels)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(4):
        for batch in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    return model.eval()


def write_graph(path: Path, inputs: int = 1, size: int = SIZE, batch: int | str = "batch") -> Path:
    """Write an ONNX file by hand: the mean colour of its first input, with the metadata of a student of SIZE."""
    from onnx import TensorProto, checker, helper, save

    shape = [batch, 3, size, size]
    entries = [helper.make_tensor_value_info(f"image{i}", TensorProto.FLOAT, shape) for i in range(inputs)]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3])
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    node = helper.make_node("ReduceMean", ["image0", "axes"], ["logits"], keepdims=0)
    graph = helper.make_graph([node], "mean", entries, [output], [axes])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    checker.check_model(proto)
    save(proto, path)
    return path


def with_metadata(path: Path, **changes: Any) -> Path:
    """Give a file the metadata of a student of three classes, and `changes` as they are."""
    import onnx

    model = smallest()
    model.reset_classifier(3)
    write_metadata(path, describe_model(model))
    proto = onnx.load(path)
    for entry in proto.metadata_props:
        if entry.key in changes:
            entry.value = json.dumps(changes[entry.key])
    onnx.save(proto, path)
    return path


def truncated(path: Path, target: Path) -> Path:
    """Write the first half of a file."""
    target.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return target


def text_file(target: Path) -> Path:
    """Write a text."""
    target.write_text("this is no model")
    return target


Maker = Callable[[Path], Path]
