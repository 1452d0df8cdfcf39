"""Results equal those of the original implementations, and of float64 oracles on other inputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.parity import index
from tests.parity.cases import run
from vlmcompress.methods import registry, table

FILES = sorted(Path(__file__).parent.glob("*.npz"))


def test_all_cases_are_here():
    assert len(FILES) == 78


def test_the_table_of_methods_knows_them():
    assert index.PATH.read_text() == index.as_text(), "run: python -m tests.parity"
    cases = {case for row in table.rows(registry.BUILTIN) for case in row["parity"]}
    assert {path.stem for path in FILES} == cases


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_original(path: Path):
    with np.load(path) as data:
        meta = json.loads(str(data["meta"]))
        inputs = {k.removeprefix("in_"): data[k] for k in data.files if k.startswith("in_")}
        wanted = {k.removeprefix("out_"): data[k] for k in data.files if k.startswith("out_")}
    got = run(meta["method"], meta["case"], inputs)
    for name, want in wanted.items():
        assert got[name].shape == want.shape
        if name in meta["exact"]:
            np.testing.assert_array_equal(got[name], want)
        else:
            np.testing.assert_allclose(got[name], want, atol=meta["atol"], rtol=meta["rtol"])


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return (powers / powers.sum(-1, keepdims=True)).astype(np.float32)


def best(scores: np.ndarray, k: int) -> np.ndarray:
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :k], axis=-1)


SIZES = [(0, 1, 25, 3, 5), (1, 3, 64, 4, 17), (2, 2, 196, 7, 196), (3, 5, 100, 16, 1)]


@pytest.mark.parametrize(("seed", "b", "n", "heads", "k"), SIZES)
def test_fastervlm_oracle(seed: int, b: int, n: int, heads: int, k: int):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(b, n, 6)).astype(np.float32)
    attention = softmax(2 * rng.normal(size=(b, heads, n + 1)))
    got = run("fastervlm", "", {"features": features, "cls_attn": attention, "k": np.array(k)})
    want = best(attention[:, :, 1:].astype(np.float64).mean(1), k)
    np.testing.assert_array_equal(got["kept_idx"], want)
    np.testing.assert_array_equal(
        got["kept_features"], np.take_along_axis(features, want[..., None], 1)
    )


@pytest.mark.parametrize("start", [-2, -4, -7, 0, 3])
@pytest.mark.parametrize(("seed", "b", "n", "heads", "k"), SIZES)
def test_vtc_cls_oracle(seed: int, b: int, n: int, heads: int, k: int, start: int):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(b, n + 1, 6)).astype(np.float32)
    attention = softmax(2 * rng.normal(size=(7, b, heads, n + 1)))
    inputs = {
        "hidden_states": hidden,
        "cls_attn_layers": attention[:, 0] if b == 1 else attention,
        "start_layer": np.array(start),
        "k": np.array(k),
    }
    got = run("vtc_cls", "", inputs)
    want = best(attention[start:-1, ..., 1:].astype(np.float64).mean(2).sum(0), k)
    np.testing.assert_array_equal(got["kept_idx"], want)
    assert got["kept_features"].shape == (b, k, 6)


@pytest.mark.parametrize("rate", [1e-4, 0.07, 0.33, 0.999, 1.0])
@pytest.mark.parametrize(("seed", "n"), [(0, 49), (1, 256)])
def test_hired_oracle(seed: int, n: int, rate: float):
    attention = softmax(2 * np.random.default_rng(seed).normal(size=(1, 5, n + 1)))
    inputs = {"cls_attn_layer22": attention, "token_budget_rate": np.array(rate)}
    want = best(attention[0, :, 1:].astype(np.float64).sum(0), max(1, int(n * rate)))
    np.testing.assert_array_equal(run("hired", "", inputs)["kept_idx"], want)


def farthest(features: np.ndarray, k: int) -> list[int]:
    """Max-min selection in float64, from the definition."""
    units = features.astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    distance = 1 - units @ units.T
    rest = set(range(len(units)))
    first = max(sorted(rest), key=lambda i: min(distance[i, j] for j in rest if j != i))
    chosen = [first]
    while len(chosen) < k:
        rest.discard(chosen[-1])
        chosen.append(max(sorted(rest), key=lambda i: distance[i, chosen].min()))
    return chosen


@pytest.mark.parametrize(("n", "ratio"), [(20, 0.125), (30, 0.5), (47, 0.21), (12, 1.0), (9, 0.01)])
def test_divprune_oracle(n: int, ratio: float):
    features = np.random.default_rng(n).normal(size=(3, n, 11)).astype(np.float32)
    k = max(1, round(ratio * n))
    want = [farthest(unit, k) for unit in features]
    for inputs, expected in ((features, want), (features[0], want[0])):
        got = run("divprune", "", {"features": inputs, "ratio": np.array(ratio)})
        np.testing.assert_array_equal(got["selected_idx"], expected)
