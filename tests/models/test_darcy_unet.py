"""The U-Net: shapes, and that training brings it towards the pressure."""

import torch

from netweight.data import darcy
from netweight.models import darcy_unet
from netweight.models.darcy_unet import UNet, fit
from netweight.models.trained import seeded


def test_it_keeps_the_shape_and_sees_the_whole_plate():
    with seeded(0):
        model = UNet().eval()
    x = torch.rand(2, 1, 24, 16, requires_grad=True)
    y = model(x)
    assert y.shape == x.shape
    y[0, 0, 0, 0].backward()
    assert (x.grad[1] == 0).all() and (x.grad[0] != 0).float().mean() > 0.9


def test_training_brings_it_near_and_the_same_twice(monkeypatch):
    monkeypatch.setattr(darcy_unet, "EPOCHS", 4)
    part = darcy.train(300)
    monkeypatch.setattr(darcy_unet.darcy, "train", lambda: part)
    nets = []
    for _ in range(2):
        with seeded(0):
            nets.append(UNet())
            fit(nets[-1], 0)
    test = darcy.test()
    with torch.no_grad():
        found = [net(test.x) for net in nets]
    assert torch.equal(*found)
    assert (found[0] - test.y).square().mean() < 0.3 * test.y.var()
