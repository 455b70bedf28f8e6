"""Frozen dataclasses as tensors and JSON: exact both ways; hostile descriptions are one sentence."""

import dataclasses
import json
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from netweight.compression.prune.nm_magnitude import encode as keep_n_of_m
from netweight.compression.quantize.rtn import RTN
from netweight.compression.quantize.rtn import encode as round_to_nearest
from netweight.core import stored
from netweight.core.affine import Facing, Mixing, Shift, Turn
from netweight.core.errors import BadInput, NetweightError
from netweight.core.grid import Grid
from netweight.core.permute import Permute
from netweight.core.rewrite import FoldBatchNorm, Scale, Unclip
from netweight.core.stored import put_together, take_apart
from netweight.models.converting import Convert
from netweight.nn.buckets import InBuckets
from netweight.nn.codebook import Codebook
from netweight.nn.double_rounding import DoubleRounded, WidthRounding
from netweight.nn.dyadic import Dyadic
from netweight.nn.elastic import ElasticRounding
from netweight.nn.exits import AddExits
from netweight.nn.fake import DynamicRounding, StaticRounding
from netweight.nn.integer_steps import Clip, Concat, Entrance, Join, Move, Negate, Pool, Product, Rescale
from netweight.nn.packed import Dense, Sparse
from netweight.nn.passport import InsertPassports
from netweight.nn.power import Power, PowerRounding
from netweight.nn.power_rewrites import FoldPowerNorm, InsertPowerNorm
from netweight.nn.qk_attention import JoinQueryKey
from netweight.nn.shifted import PlacedRounding
from netweight.nn.skipping import AddGates
from netweight.nn.split import Split
from netweight.nn.switch_norm import SwitchNorms
from netweight.nn.ternary_attention import RoundProducts

WEIGHT = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
ELASTIC = ElasticRounding(torch.tensor(0.1), torch.tensor(-0.2), -1, 1, False)
THINGS = [
    round_to_nearest(WEIGHT, RTN(3)),
    round_to_nearest(WEIGHT.double(), RTN(8, symmetric=True, group=4)),
    keep_n_of_m(WEIGHT.half(), 2, 4),
    Sparse.of(WEIGHT, WEIGHT > 0),
    Dense(WEIGHT.half()),
    StaticRounding.of(-1.0, 2.0, 6),
    DynamicRounding(4),
    FoldBatchNorm("conv", "norm"),
    Unclip("layer1.relu"),
    Scale("norm", ("query", "key"), torch.rand(4) + 0.1),
    Codebook.nearest(torch.cat([WEIGHT] * 4, 1), 2, torch.tensor([1, 0, 1, 0])),
    Permute(("gate", "up"), ("norm",), ("down",), torch.tensor([2, 0, 1], dtype=torch.int32)),
    Shift("norm", ("query", "key"), torch.rand(4)),
    Turn("norm", ("query", "key"), torch.eye(4)),
    Mixing("value", "output", torch.eye(4)[None].double()),
    Facing("query", "key", torch.eye(4)[None].double()),
    Split.nearest(WEIGHT, (WEIGHT > 0).int() + (WEIGHT > 1), 3, Grid(2, group=-1)),
    Power.nearest(WEIGHT, 3),
    PowerRounding.of(0.0, 2.0, 0.5, 4),
    Entrance(torch.ones(1, 2).double(), torch.zeros(1, 2).double(), -128, 127),
    Product(torch.ones(2, 1, 3, dtype=torch.int8), torch.ones(2, dtype=torch.int32), (1,), (0,), (2,), 2),
    Dyadic.of(torch.tensor([0.3, 0.7]).double()),
    Rescale(Dyadic.of(torch.tensor([0.3, 0.7]).double()), 0, 255),
    Join(),
    Concat(1),
    Clip(torch.zeros(1, dtype=torch.int32)),
    Negate(),
    Pool("max", kernel=(2,), stride=(2,), padding=(0,), dilation=(1,)),
    Move("reshape", {"shape": [2, 3]}),
    DoubleRounded.of(WEIGHT, torch.tensor(0.01), (8, 4, 2), 4),
    WidthRounding(torch.tensor([0.01, 0.2]), (8, 4), 4),
    SwitchNorms.of({"norm": ("conv", "")}, (8, 4), 4),
    Convert("2", (8, 4, 4), 10, 8, (1, 8, 8), (16, 4), 0.0, 1.0),
    AddExits(("2", "5"), ((8, 4, 4), (16,)), 10),
    AddGates(("2", "3"), (8, 8)),
    InsertPassports(("conv",), ("norm",), 3),
    InsertPowerNorm(("norm1", "norm2"), "pn", 4, 100, 0.9, 0.9),
    FoldPowerNorm("norm", ("query", "key")),
    PlacedRounding(torch.rand(5, 1) + 1, torch.zeros(8), torch.ones(8), -2, 1),
    JoinQueryKey("blocks.0.attention"),
    ELASTIC,
    RoundProducts("layers.0.self_attn", ELASTIC, ELASTIC, DynamicRounding(8), ELASTIC),
    InBuckets(2, 5).stored(WEIGHT),
]


@pytest.mark.parametrize("thing", THINGS, ids=lambda t: type(t).__name__)
def test_every_known_class_survives_json_and_tensors(thing):
    tensors, settings = take_apart(thing)
    again = put_together(tensors, json.loads(json.dumps(settings)))
    assert type(again) is type(thing)
    other, plain = take_apart(again)
    assert plain == settings and settings["is"] == type(thing).__name__ and other.keys() == tensors.keys()
    assert all(torch.equal(other[name], tensors[name]) for name in tensors)
    for field in dataclasses.fields(thing):
        value = getattr(thing, field.name)
        assert isinstance(value, torch.Tensor) or getattr(again, field.name) == value
    assert {type(t).__name__ for t in THINGS} == set(stored.KNOWN)


@dataclass(frozen=True)
class Pair:
    left: Dense
    right: Dense
    name: str


def test_nested_forms(monkeypatch):
    monkeypatch.setitem(stored.KNOWN, "Pair", __name__)
    real = stored.importlib.import_module
    here = type("here", (), {"Pair": Pair})
    monkeypatch.setattr(
        stored.importlib, "import_module", lambda name: here if name == __name__ else real(name)
    )
    tensors, settings = take_apart(Pair(Dense(WEIGHT), Dense(WEIGHT.half()), "twins"))
    assert sorted(tensors) == ["left.values", "right.values"]
    again = put_together(tensors, json.loads(json.dumps(settings)))
    assert torch.equal(again.right.values, WEIGHT.half()) and again.name == "twins"


def refused(tensors, settings):
    with pytest.raises(BadInput) as error:
        put_together(tensors, settings)
    assert "\n" not in str(error.value)


def test_a_file_cannot_name_other_code_or_other_fields():
    tensors, settings = take_apart(THINGS[0])
    refused(tensors, {**settings, "is": "os.system"})
    refused(tensors, {k: v for k, v in settings.items() if k != "is"})
    with pytest.raises(BadInput, match="^stored form Affine: it has no extra$"):
        put_together(tensors, {**settings, "extra": 1})
    refused({**tensors, "extra": WEIGHT}, settings)
    refused({k: v for k, v in tensors.items() if k != "scale"}, settings)
    refused(tensors, {k: v for k, v in settings.items() if k != "shape"})
    for nonsense in (None, 3, "Affine", ["Affine"]):
        refused(tensors, nonsense)


VALUES = st.none() | st.integers(-3, 2**70) | st.text(max_size=3) | st.lists(st.integers(-2, 9), max_size=3)
VALUES |= st.floats() | st.booleans()


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    thing=st.sampled_from([t for t in THINGS if hasattr(t, "bits") and hasattr(t, "decode")]), data=st.data()
)
def test_whatever_a_file_says_it_is_a_sound_form_or_one_sentence(thing, data):
    tensors, said = take_apart(thing)
    tensors, said = dict(tensors), dict(said)
    key = data.draw(st.sampled_from([*tensors, *said]))
    if key in tensors:
        t = tensors[key]
        tensors[key] = data.draw(
            st.sampled_from(
                [
                    t.reshape(-1)[:-1],
                    t.reshape(-1),
                    t[..., None],
                    t.double(),
                    t.to(torch.int32),
                    t[None][:0],
                    t.bool(),
                ]
            )
        )
    else:
        said[key] = data.draw(VALUES)
    try:
        form = put_together(tensors, said)
    except NetweightError:
        return
    assert form.decode().numel() <= 256 and form.bits() >= 0
