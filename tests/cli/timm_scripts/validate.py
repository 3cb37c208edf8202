#!/usr/bin/env python3
"""A validation script in the style of timm's validate.py; it knows nothing of any plugin."""

import argparse
import json

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model
from timm.utils import AverageMeter, ParseKwargs, accuracy

parser = argparse.ArgumentParser(description="Validation")
parser.add_argument("data_dir", metavar="DIR", nargs="?", default=None)
parser.add_argument("--dataset", default="")
parser.add_argument("--split", default="validation")
parser.add_argument("--model", "-m", required=True)
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
parser.add_argument("--num-classes", type=int, default=None)
parser.add_argument("--checkpoint", default="")
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--device", default="cpu")
parser.add_argument("--results-file", default="")


@torch.inference_mode()
def main():
    args = parser.parse_args()
    device = torch.device(args.device)
    model = create_model(
        args.model,
        pretrained=args.pretrained,
        num_classes=args.num_classes,
        checkpoint_path=args.checkpoint,
        **args.model_kwargs,
    )
    data_config = resolve_data_config(vars(args), model=model, use_test_size=True, verbose=False)
    model = model.to(device).eval()
    loader = create_loader(
        create_dataset(args.dataset, root=args.data_dir, split=args.split),
        input_size=data_config["input_size"],
        batch_size=args.batch_size,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"],
        num_workers=args.workers,
        device=device,
    )
    losses, top1 = AverageMeter(), AverageMeter()
    for input, target in loader:
        output = model(input)
        losses.update(torch.nn.functional.cross_entropy(output, target).item(), input.size(0))
        top1.update(accuracy(output, target)[0].item(), input.size(0))
    results = {"model": args.model, "top1": top1.avg, "loss": losses.avg, "count": top1.count}
    if args.results_file:
        with open(args.results_file, "w") as file:
            json.dump(results, file)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
