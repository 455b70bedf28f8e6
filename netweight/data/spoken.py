"""The Free Spoken Digit Dataset: ten digits, 50 times each by five speakers, at 8 kHz (Jackson, 2018).

    data = train()                                  # x `b 1 32 32`, y the digit, domain the speaker
    george = data.rows(data.domain == 0)            # SPEAKERS[0]

A clip of 0.14 to 2.3 s becomes a picture of 32 bands by 32 moments (`spectrum`). A louder recording gives the
same; another voice or microphone raises some bands and lowers others.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from netweight.core.errors import BadInput
from netweight.core.task import Data
from netweight.data.arrays import read_arrays
from netweight.data.shared import shared_file

SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo")
CLASSES = tuple("0123456789")
BANDS, MOMENTS, WINDOW = 32, 32, 256  # 32 ms, of which each band is four frequencies of 31 Hz
SILENCE = 1e-3  # added to amplitudes, some three orders below a vowel: noise under it is even
FLAT = 1e-3  # the smallest deviation that a picture is divided by
LONGEST = 8000 * 60  # samples of a clip


def train() -> Data:
    """2,250 clips, 450 of each speaker; raises `BadInput` without the data folder."""
    return _part("train")


def test() -> Data:
    """150 clips that `train` does not hold, 30 of each speaker."""
    return _part("test_a")


def spectrum(clip: Float[Tensor, " samples"]) -> Float[Tensor, "32 32"]:
    """Bands by moments: log of the mean amplitude in a band, with mean 0 and deviation 1 over the whole clip.

    Moments are windows of 256 samples (Hann), evenly spread from the first sample to the last; a clip that is
    shorter is filled up with silence. A band is the mean of four neighbouring frequencies, but the lowest.
    """
    clip = torch.nn.functional.pad(clip, (0, max(0, WINDOW - len(clip))))
    starts = torch.linspace(0, len(clip) - WINDOW, MOMENTS).round().long()
    windows = clip[starts[:, None] + torch.arange(WINDOW)] * torch.hann_window(WINDOW)
    amplitude = torch.fft.rfft(windows).abs()
    bands = amplitude[:, 1:].reshape(MOMENTS, BANDS, -1).mean(2)
    picture = (bands.double() + SILENCE).log().T
    return ((picture - picture.mean()) / picture.std().clamp(min=FLAT)).float()


def _part(part: str) -> Data:
    x, y, speaker = _pictures(str(shared_file(f"fsdd/fsdd_{part}.npz")))
    return Data(x, y, 100, f"spoken digits ({part})", CLASSES, domain=speaker)


@functools.cache
def _pictures(path: str) -> tuple[Tensor, Tensor, Tensor]:
    """(pictures, digits, speakers) of a file; raises `BadInput` where it is none of this set."""
    arrays = read_arrays(path, ["x", "offsets", "y", "speaker"])
    if len(arrays) < 4:
        raise BadInput(f"{path}: not the spoken digits; expected arrays x, offsets, y and speaker")
    samples = torch.from_numpy(arrays["x"].astype("float32")) / 32768
    offsets, y, speaker = (
        torch.from_numpy(arrays[name].astype("int64")) for name in ("offsets", "y", "speaker")
    )
    sizes = offsets.diff()
    fits = len(sizes) == len(y) == len(speaker) > 0 and offsets[0] == 0 and offsets[-1] == len(samples)
    if not fits or sizes.min() < 1 or sizes.max() > LONGEST:
        raise BadInput(
            f"{path}: its offsets do not cut its samples into a clip for each label; fetch it again"
        )
    x = torch.stack([spectrum(clip) for clip in samples.split(sizes.tolist())])
    return x[:, None], y, speaker
