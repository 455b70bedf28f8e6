"""Spoken digits: what a tone, a shorter clip and silence look like, and files that are something else."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.core.errors import BadInput
from netweight.data import spoken
from netweight.data.shared import shared_data
from netweight.data.spoken import BANDS, MOMENTS, WINDOW, spectrum

needs_data = pytest.mark.skipif(shared_data() is None, reason="the data folder is not here (NETWEIGHT_DATA)")


def tone(band: int, samples: int, loud: float = 0.5) -> torch.Tensor:
    """A tone in the middle of a band."""
    step = 2 * math.pi * (4 * band + 2.5) / WINDOW
    return loud * (step * torch.arange(samples)).sin()


@settings(deadline=None, max_examples=40)
@given(band=st.integers(0, BANDS - 1), samples=st.integers(WINDOW, 9000))
def test_a_tone_is_a_line(band, samples):
    picture = spectrum(tone(band, samples))
    assert picture.shape == (BANDS, MOMENTS) and picture.dtype == torch.float32
    assert (picture.argmax(0) == band).all()


@settings(deadline=None, max_examples=40)
@given(loud=st.floats(0.3, 0.9), samples=st.integers(1, 3000))
def test_loudness_goes_away_and_short_or_silent_clips_do_not_break(loud, samples):
    picture = spectrum(tone(5, samples, loud))
    assert picture.isfinite().all() and abs(picture.mean()) < 1e-3
    if samples >= WINDOW:
        torch.testing.assert_close(picture.std(), torch.tensor(1.0))
    assert spectrum(torch.zeros(samples)).abs().max() < 1e-2
    noise = 0.1 * torch.randn(samples + WINDOW, generator=torch.Generator().manual_seed(samples))
    torch.testing.assert_close(spectrum(loud * noise), spectrum(noise), rtol=0, atol=0.2)


def test_moments_go_from_the_first_sample_to_the_last():
    clip = torch.zeros(WINDOW * 40)
    clip[-WINDOW:] = tone(3, WINDOW)
    picture = spectrum(clip)
    assert picture[3, -1] == picture.max() and picture[3, 0] < 0
    assert spectrum(clip.flip(0))[3, 0] == spectrum(clip.flip(0)).max()


@needs_data
def test_parts_are_those_of_the_set():
    train, test = spoken.train(), spoken.test()
    assert train.x.shape == (2250, 1, 32, 32) and test.x.shape == (150, 1, 32, 32)
    assert train.domain.bincount().tolist() == [450] * 5 and test.domain.bincount().tolist() == [30] * 5
    assert train.y.bincount().tolist() == [225] * 10 and train.classes == tuple("0123456789")
    torch.testing.assert_close(train.x.std((1, 2, 3)), torch.ones(2250))
    with np.load(shared_data() / "fsdd" / "fsdd_train.npz") as file:
        offsets, clip = file["offsets"], file["x"][file["offsets"][7] : file["offsets"][8]]
        assert (file["speakers"][:5] == np.array(spoken.SPEAKERS)).all() and len(offsets) == 2251
        assert train.y[7] == file["y"][7] and train.domain[7] == file["speaker"][7]
    assert torch.equal(train.x[7, 0], spectrum(torch.from_numpy(clip.astype("float32")) / 32768))
    rows = {tuple(row) for row in train.x.flatten(1).tolist()}
    assert not rows & {tuple(row) for row in test.x.flatten(1).tolist()}


def written(folder, **arrays):
    (folder / "fsdd").mkdir(exist_ok=True)
    np.savez(folder / "fsdd" / "fsdd_test_a.npz", **arrays)


def test_files_that_are_something_else(tmp_path, monkeypatch):
    monkeypatch.setenv("NETWEIGHT_DATA", str(tmp_path))
    with pytest.raises(BadInput, match="has no such file"):
        spoken.test()
    x, y = np.ones(900, np.int16), np.zeros(2, np.uint8)
    written(tmp_path, x=x, y=y)
    with pytest.raises(BadInput, match="expected arrays x, offsets, y and speaker"):
        spoken.test()
    for offsets in ([0, 400, 800], [0, 900], [0, 900, 900], [1, 400, 900], [0, 950, 900]):
        written(tmp_path, x=x, y=y, speaker=y, offsets=np.array(offsets))
        with pytest.raises(BadInput, match="its offsets do not cut its samples"):
            spoken.test()
    written(tmp_path, x=x, y=y, speaker=y + 3, offsets=np.array([0, 400, 900]))
    assert spoken.test().domain.tolist() == [3, 3] and len(spoken.test()) == 2
