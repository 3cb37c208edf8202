"""Images whose class is their shade, and a model that reads it."""

import torch
from PIL import Image

QUIET = {"measure_latency": False, "progress": False}


class Shades(torch.utils.data.Dataset):
    """Grey images whose level is 10 times the class."""

    name, split = "shades", "test"

    def __init__(self, labels, classes=None):
        self.labels = list(labels)
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Image.new("RGB", (8, 8), (10 * abs(self.labels[index]),) * 3), self.labels[index]


class ShadeReader(torch.nn.Module):
    """Answers with the class whose shade is nearest; `answers` permutes the outputs."""

    def __init__(self, num_classes=4, sharpness=10.0, answers=None, mean=0.0, std=1.0):
        super().__init__()
        self.num_classes = num_classes
        shades = torch.full((num_classes,), 99.0)
        for shade, output in enumerate(answers if answers is not None else range(num_classes)):
            shades[output] = shade
        self.shades = torch.nn.Parameter(shades)
        self.sharpness, self.mean, self.std = sharpness, mean, std
        self.pretrained_cfg = {
            "input_size": (3, 8, 8),
            "mean": (mean,) * 3,
            "std": (std,) * 3,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
        }

    def forward(self, x):
        shade = (x.mean(dim=(1, 2, 3)) * self.std + self.mean) * 25.5
        return -self.sharpness * (shade[:, None] - self.shades).square()
