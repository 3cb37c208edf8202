#!/usr/bin/env python3
"""A training script in the style of timm's train.py, as a user of timm has one; it knows nothing of any plugin."""

import argparse
import csv
import os
import time

import torch
from timm import utils
from timm.data import AugMixDataset, FastCollateMixup, Mixup, create_dataset, create_loader, resolve_data_config
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, LogitDistillationTask

parser = argparse.ArgumentParser(description="Training")
parser.add_argument("data_dir", metavar="DIR", nargs="?", default=None)
parser.add_argument("--dataset", default="")
parser.add_argument("--train-split", default="train")
parser.add_argument("--val-split", default="validation")
parser.add_argument("--model", default="resnet18")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=utils.ParseKwargs)
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--initial-checkpoint", default="")
parser.add_argument("--num-classes", type=int, default=None)
parser.add_argument("--img-size", type=int, default=None)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--opt", default="sgd")
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--no-aug", action="store_true")
parser.add_argument("--scale", type=float, nargs="+", default=[0.08, 1.0])
parser.add_argument("--ratio", type=float, nargs="+", default=[3.0 / 4.0, 4.0 / 3.0])
parser.add_argument("--hflip", type=float, default=0.5)
parser.add_argument("--color-jitter", type=float, default=0.4)
parser.add_argument("--aa", default=None)
parser.add_argument("--aug-splits", type=int, default=0)
parser.add_argument("--reprob", type=float, default=0.0)
parser.add_argument("--mixup", type=float, default=0.0)
parser.add_argument("--cutmix", type=float, default=0.0)
parser.add_argument("--smoothing", type=float, default=0.1)
parser.add_argument("--train-interpolation", default="random")
parser.add_argument("--kd-model-name", default=None)
parser.add_argument("--kd-loss-weight", type=float, default=1.0)
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--no-prefetcher", action="store_true")
parser.add_argument("--device", default="cpu")
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--max-steps", type=int, default=None)
parser.add_argument("--output", default="")


def main():
    args = parser.parse_args()
    args.prefetcher = not args.no_prefetcher
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)

    model = create_model(
        args.model,
        pretrained=args.pretrained,
        num_classes=args.num_classes,
        checkpoint_path=args.initial_checkpoint,
        **args.model_kwargs,
    )
    data_config = resolve_data_config(vars(args), model=model, verbose=False)
    model.to(device=device)
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr)

    dataset_train = create_dataset(
        args.dataset,
        root=args.data_dir,
        split=args.train_split,
        is_training=True,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    dataset_eval = create_dataset(
        args.dataset, root=args.data_dir, split=args.val_split, is_training=False, batch_size=args.batch_size
    )

    collate_fn, mixup_fn = None, None
    if args.mixup > 0 or args.cutmix > 0:
        mixup_args = {
            "mixup_alpha": args.mixup,
            "cutmix_alpha": args.cutmix,
            "label_smoothing": args.smoothing,
            "num_classes": model.num_classes,
        }
        if args.prefetcher:
            collate_fn = FastCollateMixup(**mixup_args)
        else:
            mixup_fn = Mixup(**mixup_args)
    if args.aug_splits > 1:
        dataset_train = AugMixDataset(dataset_train, num_splits=args.aug_splits)

    common = {
        "input_size": data_config["input_size"],
        "batch_size": args.batch_size,
        "use_prefetcher": args.prefetcher,
        "mean": data_config["mean"],
        "std": data_config["std"],
        "num_workers": args.workers,
        "distributed": args.distributed,
        "device": device,
    }
    loader_train = create_loader(
        dataset_train,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        num_aug_splits=args.aug_splits,
        interpolation=args.train_interpolation,
        collate_fn=collate_fn,
        **common,
    )
    loader_eval = create_loader(
        dataset_eval,
        is_training=False,
        interpolation=data_config["interpolation"],
        crop_pct=data_config["crop_pct"],
        **common,
    )

    criterion_kwargs = {"smoothing": 0.0 if collate_fn or mixup_fn else args.smoothing}
    if args.kd_model_name:
        task = LogitDistillationTask(
            model,
            args.kd_model_name,
            criterion_kwargs=criterion_kwargs,
            distill_loss_weight=args.kd_loss_weight,
            device=device,
            verbose=False,
        )
    else:
        task = ClassificationTask(model, criterion_kwargs=criterion_kwargs, device=device, verbose=False)
    if args.distributed:
        task.prepare_distributed(device_ids=None)

    scheduler, num_epochs = create_scheduler_v2(optimizer, num_epochs=args.epochs, warmup_epochs=0)
    for epoch in range(num_epochs):
        if hasattr(dataset_train, "set_epoch"):
            dataset_train.set_epoch(epoch)
        elif args.distributed and hasattr(loader_train.sampler, "set_epoch"):
            loader_train.sampler.set_epoch(epoch)
        train_metrics = train_one_epoch(task, loader_train, optimizer, args, mixup_fn)
        eval_metrics = validate(model, loader_eval, args)
        scheduler.step(epoch + 1, eval_metrics["top1"])
        if utils.is_primary(args):
            report(epoch, train_metrics, eval_metrics, model, args)


def train_one_epoch(task, loader, optimizer, args, mixup_fn):
    losses, images = utils.AverageMeter(), 0
    task.train()
    start = time.perf_counter()
    for step, (input, target) in enumerate(loader):
        if step == args.max_steps:
            break
        if mixup_fn is not None:
            input, target = mixup_fn(input, target)
        loss = task(input, target)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), input.size(0))
        images += input.size(0)
    return {"train_loss": losses.avg, "images_per_s": images / (time.perf_counter() - start)}


@torch.inference_mode()
def validate(model, loader, args):
    losses, top1 = utils.AverageMeter(), utils.AverageMeter()
    model.eval()
    for input, target in loader:
        output = model(input)
        losses.update(torch.nn.functional.cross_entropy(output, target).item(), input.size(0))
        top1.update(utils.accuracy(output, target)[0].item(), input.size(0))
    return {"eval_loss": losses.avg, "top1": top1.avg}


def report(epoch, train_metrics, eval_metrics, model, args):
    row = {"epoch": epoch, **train_metrics, **eval_metrics}
    print(*(f"{name} {value:.6g}" for name, value in row.items()))
    if not args.output:
        return
    os.makedirs(args.output, exist_ok=True)
    summary = os.path.join(args.output, "summary.csv")
    is_new = epoch == 0
    with open(summary, "w" if is_new else "a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    state = {"arch": args.model, "epoch": epoch, "state_dict": utils.get_state_dict(model)}
    torch.save(state, os.path.join(args.output, "last.pth.tar"))


if __name__ == "__main__":
    main()
