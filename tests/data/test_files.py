"""Files of anybody: what is read from good ones, and the one sentence for each bad one."""

import io
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from netweight.core.errors import BadInput, DoesNotFit
from netweight.core.task import Data
from netweight.data import files
from netweight.data.split import at_random


def saved(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


@given(count=st.integers(2, 200), seed=st.integers(0, 5))
@settings(max_examples=25)
def test_a_split_is_a_partition_with_a_quarter_to_calibrate_on(count, seed):
    data = Data(torch.arange(count).float()[:, None], torch.arange(count))
    split = at_random(data, seed)
    both = torch.cat([split.calibration.y, split.test.y])
    assert both.sort().values.tolist() == list(range(count))
    assert len(split.calibration) == max(1, count // 4)
    assert torch.equal(at_random(data, seed).calibration.y, split.calibration.y)
    assert torch.equal(split.calibration.x[:, 0].long(), split.calibration.y)


def test_no_more_than_1024_are_calibrated_on():
    assert len(at_random(Data(torch.zeros(5000, 1))).calibration) == 1024
    with pytest.raises(BadInput, match="cannot be split"):
        at_random(Data(torch.zeros(1, 1)))


def test_npz_pixels_become_images(tmp_path):
    x = np.zeros((8, 6, 5, 3), np.uint8)
    x[:, 1, 2, 0] = 255
    split = files.load(saved(tmp_path / "a.npz", x=x, y=np.arange(8, dtype=np.uint8)))
    assert split.test.x.shape == (6, 3, 6, 5)
    assert (split.test.x[:, 0, 1, 2] == 1).all()
    assert split.test.x.sum() == 6
    assert (split.test.low, split.test.high) == (0, 1)
    assert split.test.y.dtype == torch.int64
    assert split.train is None
    grey = files.load(saved(tmp_path / "g.npz", x=x[..., 0]))
    assert grey.test.x.shape == (6, 1, 6, 5)
    assert grey.test.y is None


def test_npz_other_numbers_are_taken_as_they_are(tmp_path):
    x = np.asfortranarray(np.arange(20, dtype=np.float64).reshape(10, 2) - 3)
    split = files.load(saved(tmp_path / "a.npz", x=x, y=np.array(list("abcabcabca"))))
    both = torch.cat([split.calibration.x, split.test.x])
    assert sorted(both.tolist()) == x.tolist()
    assert split.test.low is None
    assert split.test.classes == ("a", "b", "c")
    tokens = np.arange(40).reshape(10, 4)
    split = files.load(saved(tmp_path / "t.npz", x=tokens, y=tokens + 1))
    assert split.test.x.dtype == torch.int64


def test_npz_parts_are_kept_apart(tmp_path):
    x, y = np.arange(12.0)[:, None], np.arange(12)
    split = files.load(saved(tmp_path / "a.npz", x=x, y=y, x_test=x + 100, y_test=y))
    assert split.test.x.min() == 100
    assert split.calibration.x.max() < 100
    assert len(split.train) == 12
    split = files.load(saved(tmp_path / "b.npz", x=x, x_calibration=x + 50))
    assert split.calibration.x.min() == 50
    assert split.test.x.max() < 50
    for name, only in {"x_test": "x_calibration", "x_calibration": "x_test"}.items():
        with pytest.raises(BadInput, match=f"add the array.* {only}"):
            files.load(saved(tmp_path / "c.npz", **{name: x}))


def header_only(shape):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_npz_hostile(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header_only((1 << 40, 8)))
    with pytest.raises(BadInput, match="another number of bytes"):
        files.load(str(path))
    saved(path, x=np.array([{}, 1], dtype=object))
    with pytest.raises(BadInput, match="Python objects"):
        files.load(str(path))
    saved(path, x=np.zeros((4, 100)))
    whole = path.read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput):
            files.load(str(path))
    place = whole.rindex(b"PK\x01\x02") + 24  # the stated size in the directory of the archive
    path.write_bytes(whole[:place] + struct.pack("<I", 0xFFFFFFF0) + whole[place + 4 :])
    with pytest.raises(BadInput):
        files.load(str(path))
    for x in (np.array(["a", "b"]), np.zeros(3, complex), np.float64(1)):
        with pytest.raises(BadInput, match="one row per example"):
            files.load(saved(path, x=x))
    with pytest.raises(BadInput, match="no array x"):
        files.load(saved(path, pictures=np.zeros(3)))
    with pytest.raises(BadInput, match="NaN"):
        files.load(saved(path, x=np.array([[np.nan], [1.0]])))


def test_csv_by_hand(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("height,kind,weight\n" + "".join(f"{i}.5,{'ab'[i % 2]},{-i}\n" for i in range(8)))
    split = files.load(f"{path}:kind")
    both = torch.cat([split.calibration.x, split.test.x])
    assert sorted(both.tolist()) == [[i + 0.5, -i] for i in range(8)]
    assert split.test.classes == ("a", "b")
    assert torch.equal(split.test.y, split.test.x[:, 0].floor().long() % 2)
    path.write_text("1;2;7\n3;4;9\n5;6;7\n7;8;9\n")  # no header, the last column, classes 7 and 9
    split = files.load(str(path))
    assert split.test.x.shape == (3, 2)
    assert split.test.classes == ("7", "9")
    path.write_text("a,b\n1,0.25\n2,0.5\n")
    assert files.load(f"{path}:b").test.y.shape == (1, 1)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a,b\n1,2\n3\n", "line 3 has 1 cells"),
        ("a,b\n,2\n3,4\n", "column 'a', example 1 is empty"),
        ("a,b\n1,2\nx,4\n", "example 2 holds 'x'"),
        ("a,b\nnan,2\n3,4\n", "finite number"),
        ("a,b\n1,2\n3,\n", "column 'b', example 2 is empty"),
        ("1\n2\n", "one column"),
        ("\n\n", "empty"),
        ('a,b\n"1,2\n', "not a table"),
    ],
)
def test_csv_that_is_none(tmp_path, content, sentence):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(BadInput, match=sentence):
        files.load(str(tmp_path / "a.csv"))


def test_csv_target_that_is_not_there(tmp_path):
    (tmp_path / "a.csv").write_text("height,kind\n1,2\n3,4\n")
    with pytest.raises(BadInput, match="did you mean 'height'"):
        files.load(f"{tmp_path / 'a.csv'}:hight")
    with pytest.raises(BadInput, match="no such file"):
        files.load(f"{tmp_path / 'b.csv'}:kind")


def image_folder(folder, mode="RGB", size=(6, 4)):
    for number, name in enumerate(["cat", "dog"]):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            Image.new(mode, size, color=255 * number).save(folder / name / f"{i}.png")
    return folder


def test_folder_of_images(tmp_path):
    split = files.load(str(image_folder(tmp_path / "rgb")))
    both = torch.cat([split.calibration.y, split.test.y])
    assert split.test.x.shape == (5, 3, 4, 6)
    assert split.test.classes == ("cat", "dog")
    assert both.sort().values.tolist() == [0, 0, 0, 1, 1, 1]
    assert (split.test.x[:, 0, 0, 0] == split.test.y).all()
    image_folder(tmp_path / "parts" / "train", "L")
    image_folder(tmp_path / "parts" / "test", "L")
    split = files.load(str(tmp_path / "parts"))
    assert split.test.x.shape == (6, 1, 4, 6)
    assert (len(split.train), len(split.calibration)) == (6, 1)


def test_folder_hostile(tmp_path):
    with pytest.raises(BadInput, match="no images"):
        files.load(str(tmp_path))
    folder = image_folder(tmp_path / "a")
    for width, height in [(5, 4), (6, 5)]:
        Image.new("RGB", (width, height)).save(folder / "dog" / "1.png")
        with pytest.raises(BadInput, match=f"{width} x {height} pixels, but .* has 6 x 4"):
            files.load(str(folder))
    whole = (folder / "dog" / "2.png").read_bytes()
    (folder / "dog" / "1.png").write_bytes(whole[:45])
    with pytest.raises(BadInput, match=r"1\.png: not a whole image"):
        files.load(str(folder))
    huge = whole[:16] + struct.pack(">II", 60_000, 60_000) + whole[24:]
    (folder / "cat" / "0.png").write_bytes(huge)
    with pytest.raises(BadInput, match=r"0\.png"):
        files.load(str(folder))


def test_text_uses_the_tokens_of_the_model(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 100)
    split = files.load(str(tmp_path / "a.txt"), length=10)
    assert split.calibration.x.shape == (19, 10)
    assert len(split.test) == 60
    model = nn.Linear(1, 1)
    model.netweight_tokenizer = lambda text: torch.full((len(text),), 3)
    assert files.load(str(tmp_path / "a.txt"), model=model).test.x.unique().tolist() == [3]
    model.netweight_tokenizer = None
    with pytest.raises(BadInput, match=r"without a tokenizer\.json"):
        files.load(str(tmp_path / "a.txt"), model=model)
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(BadInput, match="longer text"):
        files.load(str(tmp_path / "a.txt"))


def test_names(tmp_path):
    with pytest.raises(BadInput, match="did you mean 'digits'"):
        files.load("digit")
    with pytest.raises(BadInput, match="no such file or folder"):
        files.load("images/none.npy")
    (tmp_path / "a.npy").write_bytes(b"x")
    with pytest.raises(BadInput, match="cannot be read; expected a built-in name"):
        files.load(str(tmp_path / "a.npy"))
    assert len(files.load("digits").train) == 1257


def test_check_of_data_against_a_model():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).train()
    x, y = torch.rand(5, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    files.check(Data(x, y), model)
    files.check(Data(x), model)
    files.check(Data(x, torch.rand(5, 3)), model)
    assert model.training
    with pytest.raises(DoesNotFit, match="examples 2x3 do not fit the model"):
        files.check(Data(torch.rand(5, 2, 3), y), model)
    with pytest.raises(BadInput, match="labels go from 0 to 3, but the model has 3 outputs"):
        files.check(Data(x, y + (y == 2)), model)
    with pytest.raises(BadInput, match="labels go from -1"):
        files.check(Data(x, y - 1), model)
    with pytest.raises(BadInput, match="2 targets per example, the model gives 3"):
        files.check(Data(x, torch.rand(5, 2)), model)
    with pytest.raises(BadInput, match="one class number per row"):
        files.check(Data(x, torch.zeros(5, 7, dtype=torch.long)), model)
    with pytest.raises(DoesNotFit, match="one row per example"):
        files.check(Data(x, y), nn.Flatten(0))


def test_check_looks_at_the_largest_token():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    x = torch.zeros(8, 3, dtype=torch.long)
    files.check(Data(x, x), model)
    x[6, 1] = 10
    with pytest.raises(DoesNotFit, match="do not fit the model"):
        files.check(Data(x), model)
