#!/usr/bin/env python3
"""An inference script in the style of timm's inference.py; it knows nothing of any plugin."""

import argparse
import csv

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model

parser = argparse.ArgumentParser(description="Inference")
parser.add_argument("data_dir", metavar="DIR")
parser.add_argument("--split", default="validation")
parser.add_argument("--model", "-m", required=True)
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--checkpoint", default="")
parser.add_argument("--topk", type=int, default=1)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--device", default="cpu")
parser.add_argument("--results-file", required=True)


@torch.inference_mode()
def main():
    args = parser.parse_args()
    device = torch.device(args.device)
    model = create_model(args.model, pretrained=args.pretrained, checkpoint_path=args.checkpoint).to(device).eval()
    data_config = resolve_data_config(vars(args), model=model, verbose=False)
    dataset = create_dataset(root=args.data_dir, name="", split=args.split)
    loader = create_loader(dataset, batch_size=args.batch_size, num_workers=0, device=device, **data_config)
    rows = []
    for images, _ in loader:
        values, indices = model(images).softmax(-1).topk(args.topk)
        rows += zip(values[:, 0].tolist(), indices[:, 0].tolist(), strict=True)
    with open(args.results_file, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "prob", "index"])
        writer.writerows([name, *row] for name, row in zip(dataset.filenames(basename=True), rows, strict=True))


if __name__ == "__main__":
    main()
