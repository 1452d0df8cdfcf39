"""The sweep over methods in and after the tower; times themselves are not asserted."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from eval_harness import pareto, pareto_rounds, pareto_tables, plots
from eval_harness.pareto import goal, parts_of, sweep
from eval_harness.pareto_plan import PUBLISHED, TOWERS, Plan, published
from eval_harness.pareto_rounds import NOTHING, Timing, tower_round
from scripts import readme
from vlmcompress.core.errors import ConfigError, UnknownMethodError
from vlmcompress.methods import pipeline, registry
from vlmcompress.methods.tower.base import TowerReducer
from vlmcompress.reference.model import build_model
from vlmcompress.reference.tokenizer import build_processor

TINY = Timing("tiny", "float32")
PLAN = Plan({"objects": 12}, ("evit:0.4",), ("vtc_cls", "uniform"), (0.25,), TINY, rounds=2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained weights of the reference model's shape."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build_model().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def results(weights, folder):
    return sweep(PLAN, folder, weights=weights, processes=0)


def test_every_combination_is_there(results):
    assert json.loads(json.dumps(results)) == results
    specs = ["vtc_cls", "uniform", "evit:0.4 | vtc_cls", "evit:0.4 | uniform"]
    assert [point["spec"] for point in results["points"]] == specs
    for point in results["points"]:
        assert point["tokens"] == 9  # a quarter of 36, whatever left the tower
        assert point["patches"] == ([36, 36, 26, 19, 14] if point["tower"] else [])
        low, high = point["floor_range"]
        assert 0 < low <= point["floor_ratio"] <= high
        assert point["speedup"] == pytest.approx(1 / point["ttft_ratio"], rel=1e-2)
        assert set(point["accuracy"]) == {"objects"}
    assert results["floors"]["0.25"] > 0
    assert set(results["towers"]) == set(published())


def test_accuracy_is_compared_with_the_method_after_the_tower_alone(results):
    alone = {p["connector"]: p for p in results["points"] if not p["tower"]}
    for point in results["points"]:
        before = alone[point["connector"]]["accuracy"]["objects"][0]
        gained = point["over_connector"]["objects"][0]
        assert gained == pytest.approx(point["accuracy"]["objects"][0] - before, abs=2e-4)
        if not point["tower"]:
            assert point["over_connector"]["objects"] == [0, 0, 0]


def test_a_stopped_sweep_goes_on_and_times_outlive_the_weights(
    monkeypatch, weights, folder, results, tmp_path
):
    def never(*args):
        raise AssertionError(args)

    monkeypatch.setattr(pareto, "time_round", never)
    monkeypatch.setattr(pareto, "tower_round", never)
    names = []
    monkeypatch.setattr(pareto, "ask_round", never)
    again = sweep(PLAN, folder, weights=weights, processes=0, progress=names.append)
    assert again == results
    assert len(names) == parts_of(PLAN, weights)
    asked = []

    def ask(world, n, split, other, specs, keep):
        asked.append(specs)
        right = dict.fromkeys(specs or ("full", "blind"), "1" * n)
        return {"right": right, "kinds": ["a"] * n, "scenes": list(range(n))}

    monkeypatch.setattr(pareto, "ask_round", ask)
    for file in weights.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b" ")
    other = sweep(PLAN, folder, weights=tmp_path, processes=0)
    assert asked == [(), *((point.spec,) for point in PLAN.points())]
    assert other["full"] == {"objects": [1, 1, 1]}
    times = [[p["floor_ratio"] for p in found["points"]] for found in (results, other)]
    assert times[0] == times[1]


def test_the_front_holds_what_nothing_beats(results):
    def beaten(point, by):
        faster = by["ttft_ratio"] <= point["ttft_ratio"]
        return faster and by["accuracy"]["objects"][0] >= point["accuracy"]["objects"][0]

    points = results["points"]
    front = [p for p in points if p["front"] == ["objects"]]
    assert front
    for point in points:
        better = [p for p in points if p is not point and beaten(point, p)]
        assert (point in front) == (not better)


def _point(tower="evit:0.35", ratio=0.7, gained=0.0, keep=0.1):
    over = {"objects": [gained, gained, gained], "text": [0.0, 0.0, 0.0]}
    spec = f"{tower} {ratio}"
    return {
        "tower": tower,
        "keep": keep,
        "floor_ratio": ratio,
        "over_connector": over,
        "spec": spec,
    }


def test_goal():
    good, better = _point(), _point(ratio=0.6, gained=-0.01)
    assert goal([good, better])["specs"] == [better["spec"], good["spec"]]
    for other in (_point(ratio=0.76), _point(gained=-0.011), _point(tower=""), _point(keep=0.2)):
        assert goal([other])["met"] is False


def test_towers_are_timed_at_settings_that_papers_evaluate():
    settings = published()
    assert list(settings) == [
        name
        for name in registry.BUILTIN
        if issubclass(registry.get(name), TowerReducer)
        and registry.get(name).training_free
        and not registry.create(name).own_budget
    ]
    assert set(PUBLISHED) < set(settings)
    found = tower_round(TINY, ["evit(rate=0.7)", "tome_tower:0.5"], 1)
    assert list(found["seconds"]) == [NOTHING, "evit(rate=0.7)", "tome_tower:0.5"]
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert found["patches"]["evit(rate=0.7)"] == [36, 36, 27, 20, 15]
    # Rows in (attention, MLP) of each layer: reduced between the two, with one [CLS] row.
    rows, d = [(37, 37), (37, 37), (37, 28), (28, 21), (21, 16)], 64
    cost = sum(a * (4 * d * d + 2 * a * d) + m * 2 * d * 128 for a, m in rows)
    whole = 5 * 37 * (4 * d * d + 2 * 37 * d + 2 * d * 128)
    assert found["flops"]["evit(rate=0.7)"] == pytest.approx(cost / whole, rel=1e-6)


def test_rounds_alternate(monkeypatch):
    order = []
    subject = pareto_rounds._subject(TINY)
    under = type(subject).tower_under

    def noted(self, spec):
        order.append(spec)
        return under(self, spec)

    monkeypatch.setattr(type(subject), "tower_under", noted)
    specs = ["evit:0.5", "tome_tower:0.5"]
    for turn in (0, 1):
        del order[:]
        tower_round(TINY, specs, turn)
        assert order == [NOTHING, *[NOTHING, *specs][:: 1 if turn == 0 else -1]]
    assert "forward" not in subject.model.__dict__


def test_default_settings_can_run_on_the_large_shape():
    for tower in TOWERS:
        if tower:
            (method,) = pipeline.build(tower).templates
            plan = pipeline.build(tower).tower
            left = method.schedule(576, plan.keep, 24, 22)
            assert 58 <= left[-1] <= 288


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"questions": {"nowhere": 1}}, "nowhere"),
        ({"questions": {}}, "objects"),
        ({"keeps": (58,)}, "shares"),
        ({"keeps": ()}, "shares"),
        ({"rounds": 0}, "at least 1"),
        ({"towers": ("evit",)}, "no budget"),
        ({"timing": Timing("huge")}, "huge"),
    ],
)
def test_plans_that_make_no_sense(options, match):
    with pytest.raises(ConfigError, match=match):
        Plan(**{"questions": {"objects": 4}, **options})


def test_unknown_methods_are_named_at_once():
    with pytest.raises(UnknownMethodError, match="evitt"):
        Plan({"objects": 4}, ("evitt:0.5",))


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        sweep(PLAN, tmp_path, weights=tmp_path)


def test_tables(results):
    header, rows = pareto_tables.points(results)
    assert [row[0] for row in rows].count("evit:0.4") == 2
    assert all(len(row) == len(header) for row in rows)
    ratios = {p["spec"]: f"{p['floor_ratio']:.3f}" for p in results["points"]}
    assert {" | ".join(r for r in row[:2] if r != "-"): row[3] for row in rows} == ratios
    header, rows = pareto_tables.towers(results)
    assert {row[0]: row[1] for row in rows}["evit(rate=0.7)"] == "published"
    assert len(rows) == len(published())
    assert "no pipeline" in pareto_tables.goal(results)
    met = {**results, "goal": goal([_point(ratio=0.6)])}
    assert "1 pipelines meet it, the fastest is evit:0.35 0.6" in pareto_tables.goal(met)


def test_page(results):
    page = readme.pareto_region({**results, "machine": {**results["machine"], "device": "cpu"}})
    assert "| `evit:0.4` | `vtc_cls` |" in page
    assert "![Accuracy" in page
    assert "commit" in page


def test_plot(results, tmp_path):
    path = plots.plot_pareto(results, tmp_path / "pareto.png")
    with Image.open(path) as picture:
        one = picture.width
    both = {**results, "questions": {"objects": 12, "text": 12}}
    for part in both["points"]:
        part["accuracy"]["text"] = part["accuracy"]["objects"]
        part["front"] = ["objects", "text"]
    with Image.open(plots.plot_pareto(both, tmp_path / "two.png")) as picture:
        assert picture.width > one > 900
