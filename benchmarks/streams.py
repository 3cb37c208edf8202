"""What the overlay costs in a stream: CPU time per image of timm's training pipeline, from tars and from a folder.

    python benchmarks/streams.py          # 300 images of ../shared/data/imagenette_small, or of --dataset and --split

The images are enlarged to 500 x 375, as most of ImageNet are, and saved as JPEG files of quality 90.
All arms run in this process without workers, one after the other in every round, in an order that turns; a ratio is of
one round. CPU seconds, not the clock's: other work on the machine slows them far less. timm's default augmentation at
224 px, p = 0.1; maps of random weights, whose files are larger than those of a trained teacher.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
from paired import ROOT, alternating, facts, summarize
from PIL import Image
from timm.data import create_dataset, create_transform
from torch.utils.data import IterableDataset

from timm_igkd import IGOptions, IGOverlay, IGOverlayDataset, IGOverlayStream, MapStore, compute_maps
from timm_igkd.data.loading import load_labeled_images

SHARED = ROOT.parent / "shared" / "data" / "imagenette_small"


def write_files(images: Any, folder: Path) -> None:
    """Write the same files as class folders and as two tars."""
    import webdataset

    writers = [webdataset.TarWriter(str(folder / f"train-{shard}.tar")) for shard in range(2)]
    for index in range(len(images)):
        image, label = images[index]
        path = folder / "images" / "train" / f"{label:02d}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        writers[index % 2].write({"__key__": path.stem, "jpg": path.read_bytes(), "cls": str(label).encode()})
    for writer in writers:
        writer.close()


def opened(arm: str, folder: Path, count: int, maps: MapStore | None) -> Any:
    """Return the training dataset of one arm."""
    kind, _, overlaid = arm.partition(" ")
    if kind == "tars":
        root, split = str(folder), f"train-{{0..1}}.tar|{count}"
        dataset = create_dataset("wds/", root=root, split=split, is_training=True)
    else:
        dataset = create_dataset("", root=str(folder / "images"), split="train")
    wrapper: Any = IGOverlayStream if kind == "tars" else IGOverlayDataset
    if overlaid:
        dataset = wrapper(dataset, maps, IGOverlay(0.1))
    return dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=str(SHARED))
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "streams_cpu.json")
    args = parser.parse_args()
    images = load_labeled_images(args.dataset, args.split).subset(range(args.images))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_files(images, folder)
        teacher = timm.create_model("test_resnet", num_classes=images.num_classes).eval()
        maps = compute_maps(
            teacher, opened("folder", folder, 0, None), folder / "maps", options=IGOptions(n_steps=1), progress=False
        )
        assert maps is not None
        arms = ["folder", "folder overlay", "tars", "tars overlay"]
        datasets = {arm: opened(arm, folder, args.images, maps) for arm in arms}
        for dataset in datasets.values():
            dataset.transform = create_transform(224, is_training=True, use_prefetcher=True)

        def ms_per_image(arm: str) -> float:
            dataset, start, seen = datasets[arm], time.process_time(), 0
            for _ in dataset if isinstance(dataset, IterableDataset) else map(dataset.__getitem__, range(args.images)):
                seen += 1
            assert seen == args.images
            return (time.process_time() - start) * 1000 / seen

        for arm in arms:  # what is cached is cached for all
            ms_per_image(arm)
        rounds = alternating(arms, args.rounds, ms_per_image, "CPU ms per image")
    pairs = {"overlay on folder": arms[1::-1], "overlay on tars": arms[:1:-1], "tars over folder": arms[3:0:-2]}
    ratios = {name: summarize([found[a] / found[b] for found in rounds]) for name, (a, b) in pairs.items()}
    report = {"facts": facts(), "images": args.images, "cpu_ms_ratio": ratios, "rounds": rounds}
    args.out.write_text(json.dumps(report, indent=1).replace(str(SHARED), "imagenette_small") + "\n")
    for name, ratio in ratios.items():
        print(f"{name:<20} x{ratio['median']:.3f} {ratio['interval']} (n = {ratio['n']})")


if __name__ == "__main__":
    main()
