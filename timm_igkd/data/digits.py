"""scikit-learn's handwritten digits as a dataset of labelled images, for demos and tests without a network."""

import io

import numpy as np
from PIL import Image

from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.errors import InputError

DIGITS_SPLITS = ("train", "validation", "test")


def load_digits_split(split: str) -> LabeledImages:
    """Return scikit-learn's 1,797 digits, 8x8 enlarged to 32x32 RGB; stratified with seed 0 into 1,257 / 180 / 360."""
    import datasets

    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise InputError(
            "dataset 'digits' needs scikit-learn; install it with: pip install 'timm-igkd[demo]'"
        ) from error
    if split not in DIGITS_SPLITS:
        raise InputError(f"dataset 'digits' has no split {split!r}; expected one of {list(DIGITS_SPLITS)}")
    digits = load_digits()
    rest, test = train_test_split(np.arange(1797), test_size=360, stratify=digits.target, random_state=0)
    train, validation = train_test_split(rest, test_size=180, stratify=digits.target[rest], random_state=0)
    chosen = np.sort({"train": train, "validation": validation, "test": test}[split])
    cells = []
    for pixels in digits.images[chosen]:
        image = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).convert("RGB")
        buffer = io.BytesIO()
        image.resize((32, 32), Image.Resampling.BICUBIC).save(buffer, format="PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    names = [str(digit) for digit in range(10)]
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)})
    rows = datasets.Dataset.from_dict({"image": cells, "label": digits.target[chosen].tolist()}, features=features)
    return LabeledImages(rows, "digits", split, class_names=tuple(names))
