"""One year of a district of houses with solar panels, hour by hour: loads, sun, weather, prices, carbon.

Source: the CityLearn challenge 2022, phase 1 (Vazquez-Canteli et al., "CityLearn: Standardizing Research in
Multi-Agent Reinforcement Learning for Demand Response and Urban Energy Management", 2020, arXiv:2012.10504):
five houses, its CSV files where they are present; else `synthetic()`, a year of the same columns and scale.

    solar generation [kWh] = nominal power [kW] * generation of the file [W/kW] / 1000
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from netweight.core.errors import BadInput
from netweight.core.io import existing_file, read_json
from netweight.data.shared import shared_data

FOLDER = "citylearn/citylearn_challenge_2022_phase_1"
LARGEST = 1 << 26  # bytes of one file
SKY = (
    "outdoor_dry_bulb_temperature",
    "outdoor_relative_humidity",
    "diffuse_solar_irradiance",
    "direct_solar_irradiance",
)
AHEAD = (6, 12, 24)  # hours that the three forecasts look ahead
WEATHER = SKY + tuple(f"{name}_predicted_{i}" for name in SKY for i in (1, 2, 3))
PRICE = ("electricity_pricing", *(f"electricity_pricing_predicted_{i}" for i in (1, 2, 3)))
CALENDAR = ("month", "day_type", "hour")


@dataclass(frozen=True, eq=False)
class Year:
    """Float32, one row per hour t; n houses.

    calendar: month 1 to 12, kind of day 1 to 8 (8 is a holiday), hour 1 to 24. weather: the columns
    `WEATHER`, in degrees Celsius, per cent and W/m^2. price: dollars per kWh now and in 6, 12, 24 h. carbon:
    kg per kWh. load, solar: kWh of each house in this hour, both as positive numbers.
    """

    calendar: Float[Tensor, "t 3"]
    weather: Float[Tensor, "t 16"]
    price: Float[Tensor, "t 4"]
    carbon: Float[Tensor, "t 1"]
    load: Float[Tensor, "t n"]
    solar: Float[Tensor, "t n"]
    name: str = "district"

    def __post_init__(self) -> None:
        columns = (self.calendar, self.weather, self.price, self.carbon, self.load, self.solar)
        if len({len(each) for each in columns}) != 1 or self.load.shape != self.solar.shape:
            raise BadInput(f"{self.name}: the columns differ in length; every file needs the same hours")
        if not all(each.isfinite().all() for each in columns):
            raise BadInput(f"{self.name}: a column holds gaps or no number; fill them first")

    def __len__(self) -> int:
        return len(self.load)


@functools.cache
def year() -> Year:
    """CityLearn's year where its files are present, else the synthetic one."""
    root = shared_data()
    return citylearn(root / FOLDER) if root and (root / FOLDER / "schema.json").is_file() else synthetic()


def citylearn(folder: str | Path) -> Year:
    """The year of a folder that holds schema.json and the CSV files it names.

    Raises `BadInput` for a folder without them, or with a file that lacks a column.
    """
    folder = Path(folder)
    houses = read_json(existing_file(folder / "schema.json", "CityLearn's schema"), "CityLearn's schema")
    try:
        houses = [house for house in houses["buildings"].values() if house.get("include", True)]
        files = [house["energy_simulation"] for house in houses]
        common = [houses[0][name] for name in ("weather", "pricing", "carbon_intensity")]
        powers = [float(house["pv"]["attributes"]["nominal_power"]) for house in houses]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise BadInput(
            f"{folder}/schema.json: no list of buildings with files and solar panels ({error!r}); "
            "give the folder of a CityLearn data set with electrical storage"
        ) from error
    energy = [columns(folder, file, (*CALENDAR, "non_shiftable_load", "solar_generation")) for file in files]
    solar = torch.stack([one[:, 4] for one in energy], 1) * torch.tensor(powers) / 1000
    return Year(
        calendar=energy[0][:, :3],
        weather=columns(folder, common[0], WEATHER),
        price=columns(folder, common[1], PRICE),
        carbon=columns(folder, common[2], ("carbon_intensity",)),
        load=torch.stack([one[:, 3] for one in energy], 1),
        solar=solar,
        name=folder.name,
    )


def columns(folder: Path, file: str, names: tuple[str, ...]) -> Float[Tensor, "t k"]:
    """Some columns of a CSV file; raises `BadInput` where one is missing or holds no numbers."""
    path = folder / Path(file).name  # a name that leaves the folder is not followed
    with existing_file(path, "a table of the district", at_most=LARGEST).open(
        newline="", encoding="utf-8"
    ) as text:
        rows = csv.reader(text)
        head = next(rows, [])
        if missing := [name for name in names if name not in head]:
            raise BadInput(f"{path}: there is no column {missing[0]!r}; give CityLearn's file")
        places = [head.index(name) for name in names]
        try:
            cells = np.array([[float(row[i]) for i in places] for row in rows], dtype=np.float32)
        except (ValueError, IndexError) as error:
            raise BadInput(f"{path}: a cell of {', '.join(names)} is no number ({error})") from error
    return torch.from_numpy(cells.reshape(-1, len(names)))


@functools.cache
def synthetic(hours: int = 8760, houses: int = 5, seed: int = 0) -> Year:
    """A year of the same columns: seasons, clouds, evening peaks, a price that is high from 16 to 20 h."""
    if hours < 48 or houses < 1:
        raise BadInput(f"hours={hours}, houses={houses}: a district needs two days and one house")
    random = np.random.default_rng(seed)
    t = np.arange(hours + max(AHEAD))
    hour, day = t % 24, t // 24
    season = np.cos(2 * np.pi * (day % 365) / 365)  # the year starts at the end of July
    sun = np.clip(np.sin(np.pi * (hour - 6 - 1.0 * (1 - season)) / (12 + 2 * season)), 0, None)
    cloud = 1 / (1 + np.exp(-_wandering(random, len(t), 24)))  # share of the sky
    temperature = (
        18 + 5 * season + 5 * np.sin(2 * np.pi * (hour - 9) / 24) + 2 * _wandering(random, len(t), 72)
    )
    humidity = np.clip(75 - 1.8 * (temperature - 18) + 12 * _wandering(random, len(t), 48), 5, 100)
    sky = np.stack([temperature, humidity, 350 * sun * cloud, 950 * sun * (1 - cloud)], 1)
    price = np.where((hour >= 15) & (hour < 20), 0.54, 0.22)
    carbon = 0.16 + 0.03 * np.cos(2 * np.pi * (hour - 20) / 24) + 0.01 * _wandering(random, len(t), 24)
    solar, load = [], []
    for _ in range(houses):
        kw, usual = random.uniform(4, 5), random.uniform(0.5, 1.0)
        solar.append(kw * np.clip(0.75 * sun * (1 - 0.7 * cloud), 0, 1))
        evening = 1 + 1.5 * np.exp(-(((hour - 19) / 3) ** 2)) + 0.5 * np.exp(-(((hour - 7.5) / 2) ** 2))
        load.append(usual * evening * np.exp(0.5 * _wandering(random, len(t), 4) - 0.1))
    now = slice(0, hours)
    ahead = [sky[k : k + hours] * (1 + 0.05 * random.standard_normal((hours, 4))) for k in AHEAD]
    weather = np.concatenate([sky[now], np.stack(ahead, 2).reshape(hours, 12)], 1)
    months = 1 + (7 + (day % 365) // 30.42) % 12
    return Year(
        calendar=_tensor(np.stack([months, 1 + day % 7, 1 + hour], 1)[now]),
        weather=_tensor(weather),
        price=_tensor(np.stack([price[k : k + hours] for k in (0, *AHEAD)], 1)),
        carbon=_tensor(np.clip(carbon, 0.05, None)[now, None]),
        load=_tensor(np.stack(load, 1)[now]),
        solar=_tensor(np.stack(solar, 1)[now]),
        name="synthetic district",
    )


def _wandering(random: np.random.Generator, count: int, memory: float) -> np.ndarray:
    """A stationary process of variance 1 that forgets at the rate exp(-1/memory) an hour."""
    from scipy.signal import lfilter

    keep = np.exp(-1 / memory)
    first = random.standard_normal(count) * np.sqrt(1 - keep**2)
    return np.asarray(lfilter([1.0], [1.0, -keep], first))


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
