import pytest
import torch

from netweight.core.errors import DoesNotFit
from netweight.nn.normalize import Normalize


def test_each_channel_by_hand():
    layer = Normalize([0.5, 0.0], [0.25, 2.0])
    x = torch.tensor([[[[1.0]], [[1.0]]]])
    assert layer(x).flatten().tolist() == [2.0, 0.5]
    assert set(layer.state_dict()) == {"mean", "std"}
    assert "mean=[0.5, 0.0]" in repr(layer)


@pytest.mark.parametrize(("mean", "std"), [([0.0], [0.0]), ([0.0], [1.0, 1.0]), ([0.0], [-1.0])])
def test_refuses_a_std_that_cannot_divide(mean, std):
    with pytest.raises(ValueError, match="one positive std per mean"):
        Normalize(mean, std)


def test_grey_images_are_not_broadcast_to_colours():
    with pytest.raises(DoesNotFit, match="images of 1 channels, but the network takes 3"):
        Normalize([0.0] * 3, [1.0] * 3)(torch.rand(2, 1, 4, 4))
