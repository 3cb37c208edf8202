"""Loss and accuracy on validation images."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from timm_igkd.training.validation import validate


def test_validation_gives_every_module_its_own_mode_back():
    """A batch norm that was frozen in eval mode stays frozen in a model that trains."""
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.9), nn.Flatten(), nn.Linear(4, 2)).train()
    model[0].eval()
    images, labels = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    loader = accelerator.prepare(DataLoader(list(zip(images, labels, strict=True)), batch_size=2))
    logits = model.eval()(images).detach()
    model.train()[0].eval()
    loss, top1 = validate(model, loader, accelerator)
    assert [module.training for module in model] == [False, True, True, True]
    assert abs(loss - float(nn.functional.cross_entropy(logits, labels))) < 1e-6
    assert top1 == 100 * float((logits.argmax(1) == labels).float().mean())
