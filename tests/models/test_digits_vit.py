"""The small vision transformer: what it is made of, and that its image matters."""

import torch

from netweight.core.compressed import weighted
from netweight.core.origin import origin_of
from netweight.models.digits_vit import VisionTransformer, skeleton


def test_its_parts_and_its_tokens():
    model = skeleton("digits-vit", {})
    assert origin_of(model).target == "digits-vit"
    assert model.places.shape == (1, 17, 48) and len(model.blocks) == 2 and len(weighted(model)) == 14
    other = VisionTransformer(size=4, patch=2, width=8, depth=1, heads=2, ratio=1, classes=3).eval()
    x = torch.rand(2, 1, 4, 4)
    y = other(x)
    assert y.shape == (2, 3) and not torch.equal(y[0], y[1])
    turned = other(x.flip(3))  # places count
    assert not torch.allclose(y, turned)
    with torch.no_grad():
        other.places.zero_()
    assert torch.allclose(other(x), other(x.roll(2, 3)), atol=1e-5)  # patches change places
