"""An exported file as a model that can be evaluated like any other."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_igkd.errors import InputError, MissingFileError, first_line
from timm_igkd.evaluation.onnx_file import open_session, read_metadata, require_onnx_packages

SUFFIX = ".onnx"


class OnnxModel(nn.Module):
    """A file in onnxruntime on the CPU, with the preprocessing and the class names that stand in it.

    Args:
        path: of a file that `write_onnx` wrote, quantised or not.

    Attributes:
        sizes: `num_parameters` and `macs` of the PyTorch model, None where the file does not say them, and `size_mb` of
            the file.

    Raises:
        InputError: see `load_onnx_model`.
    """

    def __init__(self, path: Path):
        super().__init__()
        try:
            self.session: Any = open_session(path)
        except Exception as error:  # onnxruntime has one of its own for each thing that can be wrong with a file
            raise InputError(
                f"{str(path)!r} is no ONNX file that onnxruntime reads ({first_line(error, 120)}); export it again "
                "with: timm-igkd export"
            ) from error
        metadata = read_metadata(self.session, repr(str(path)))
        self.num_classes = int(self.session.get_outputs()[0].shape[1])
        self.sizes = {
            "num_parameters": metadata.num_parameters,
            "macs": metadata.macs,
            "size_mb": path.stat().st_size / 1e6,
        }
        self.pretrained_cfg: dict[str, Any] = vars(metadata) | {"num_classes": self.num_classes}
        if metadata.class_names is not None:
            self.pretrained_cfg["label_names"] = list(metadata.class_names)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (N, classes) float32, of (N, C, H, W) images, on their device."""
        feed = {self.session.get_inputs()[0].name: images.detach().cpu().float().numpy()}
        return torch.from_numpy(self.session.run(None, feed)[0]).to(images.device)


def load_onnx_model(path: str | Path) -> OnnxModel:
    """Open an exported file.

    Raises:
        MissingFileError: no such file.
        InputError: a package of the extra `onnx` is missing, no ONNX file, other inputs than images, or no metadata.
    """
    require_onnx_packages(f"reading {str(path)!r}")
    if not Path(path).is_file():
        raise MissingFileError(f"no ONNX file {str(path)!r}; write one with: timm-igkd export")
    return OnnxModel(Path(path))
