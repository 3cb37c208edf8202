#!/usr/bin/env python3
"""An ONNX export script in the style of timm's onnx_export.py; it knows nothing of any plugin."""

import argparse

from timm.models import create_model
from timm.utils.onnx import onnx_export

parser = argparse.ArgumentParser(description="ONNX export")
parser.add_argument("output", metavar="ONNX_FILE")
parser.add_argument("--model", "-m", required=True)
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--checkpoint", default="")
parser.add_argument("--batch-size", type=int, default=1)
parser.add_argument("--dynamo", action="store_true")


def main():
    args = parser.parse_args()
    model = create_model(args.model, pretrained=args.pretrained, checkpoint_path=args.checkpoint, exportable=True)
    onnx_export(model, args.output, batch_size=args.batch_size, check_forward=True, use_dynamo=args.dynamo)


if __name__ == "__main__":
    main()
