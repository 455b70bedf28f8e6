"""A year of a district: CityLearn's columns and units, the synthetic year, and files that are not right."""

import json

import pytest
import torch

from netweight.core.errors import BadInput
from netweight.data.district import CALENDAR, FOLDER, PRICE, WEATHER, citylearn, synthetic
from netweight.data.shared import shared_data

HOURS = 60


@pytest.fixture
def folder(tmp_path):
    """Two houses whose cells say where they stand: column number + hour / 1000."""

    def write(name: str, columns) -> None:
        rows = [",".join(["unused", *columns])]
        rows += [",".join(["", *(f"{i + t / 1000}" for i in range(len(columns)))]) for t in range(HOURS)]
        (tmp_path / name).write_text("\n".join(rows))

    files = {"weather": "weather.csv", "pricing": "pricing.csv", "carbon_intensity": "carbon.csv"}
    energy = (*CALENDAR, "solar_generation", "non_shiftable_load")
    for name in ("a.csv", "b.csv", "c.csv"):
        write(name, energy)
    write("weather.csv", WEATHER)
    write("pricing.csv", PRICE)
    write("carbon.csv", ("carbon_intensity",))
    houses = {
        name: {"include": name != "c", "energy_simulation": f"{name}.csv", **files,
               "pv": {"attributes": {"nominal_power": power}}}
        for name, power in (("a", 4.0), ("b", 5.0), ("c", 1.0))
    }  # fmt: skip
    (tmp_path / "schema.json").write_text(json.dumps({"buildings": houses}))
    return tmp_path


def test_columns_are_found_by_name_and_the_sun_is_scaled(folder):
    year = citylearn(folder)
    t = torch.arange(HOURS) / 1000
    assert len(year) == HOURS and year.load.shape == (HOURS, 2)  # a house that is left out is left out
    assert torch.allclose(year.load, (4 + t)[:, None].expand(-1, 2))
    assert torch.allclose(year.solar, (3 + t)[:, None] * torch.tensor([4.0, 5.0]) / 1000)
    assert torch.allclose(year.weather, torch.arange(16) + t[:, None])
    assert torch.allclose(year.price, torch.arange(4) + t[:, None])
    assert torch.allclose(year.carbon[:, 0], t) and torch.allclose(year.calendar[:, 2], 2 + t)


def test_files_that_are_not_right_are_told_by_name(folder):
    table = folder / "weather.csv"
    good = table.read_text()
    table.write_text(good.replace("outdoor_relative_humidity,", "humidity,", 1))
    with pytest.raises(BadInput, match=r"weather.csv: there is no column 'outdoor_relative_humidity'"):
        citylearn(folder)
    table.write_text(good.replace(",1.03,", ",wet,", 1))
    with pytest.raises(BadInput, match="is no number"):
        citylearn(folder)
    table.write_text(good.replace(",1.03,", ",nan,", 1))
    with pytest.raises(BadInput, match="gaps"):
        citylearn(folder)
    table.write_text(good.rsplit("\n", 1)[0])
    with pytest.raises(BadInput, match="differ in length"):
        citylearn(folder)
    table.unlink()
    with pytest.raises(BadInput, match=r"weather.csv"):
        citylearn(folder)
    (folder / "schema.json").write_text('{"buildings": []}')
    with pytest.raises(BadInput, match="no list of buildings"):
        citylearn(folder)
    (folder / "schema.json").unlink()
    with pytest.raises(BadInput, match=r"schema.json"):
        citylearn(folder)


def test_a_file_name_does_not_leave_the_folder(folder):
    text = (folder / "schema.json").read_text()
    inner = folder / "inner"
    inner.mkdir()
    (inner / "schema.json").write_text(text.replace("a.csv", "../a.csv"))
    with pytest.raises(BadInput, match=r"inner/a.csv"):
        citylearn(inner)


def test_the_synthetic_year_is_like_the_real_one():
    year = synthetic()
    assert len(year) == 8760 and year.load.shape == (8760, 5) and synthetic() is year
    assert (year.load > 0).all() and (year.solar >= 0).all() and year.carbon.min() > 0
    hour = year.calendar[:, 2]
    assert (
        hour.min() == 1 and hour.max() == 24 and year.calendar[:, 0].unique().tolist() == [*range(1, 13)][:12]
    )
    assert year.solar[(hour < 5) | (hour > 22)].max() == 0  # no sun at night
    assert torch.equal(year.price[:-6, 1], year.price[6:, 0])  # the price is known in advance
    apart = year.weather[:-24, 4:7] - torch.stack(
        [year.weather[k : len(year) - 24 + k, 0] for k in (6, 12, 24)], 1
    )
    assert apart.abs().mean() < 2  # forecasts of the temperature are near what comes
    assert not torch.equal(synthetic(seed=1).load, year.load)
    with pytest.raises(BadInput, match="two days and one house"):
        synthetic(10)


def test_citylearns_files():
    root = shared_data()
    if root is None or not (root / FOLDER / "schema.json").is_file():
        pytest.skip("CityLearn's files are not in the data folder")
    year, like = citylearn(root / FOLDER), synthetic()
    assert year.load.shape == (8760, 5) and float(year.load[0, 0]) == pytest.approx(2.2758)
    assert year.price[:, 0].min() == pytest.approx(0.21) and year.calendar[0].tolist() == [7, 7, 24]
    for name in ("load", "solar", "price", "carbon"):
        ratio = float(getattr(like, name).mean() / getattr(year, name).mean())
        assert 0.5 < ratio < 2, name
