"""One method in an engine leaves what it leaves under `patch`, and says beforehand how much."""

from __future__ import annotations

import logging

import pytest
import torch

from tests import tiny
from tests.served import engine
from vlmcompress import CompressionConfig, patch
from vlmcompress.core.config import StageConfig
from vlmcompress.core.errors import ConfigError, EvidenceError, UnsupportedModelError
from vlmcompress.integrations.vllm.evidence import TowerReader, pick_views
from vlmcompress.integrations.vllm.serving import TESTED_METHODS, Serving, layers_of
from vlmcompress.integrations.vllm.settings import Settings

SIZES = [(3, 8), (8, 3), (8, 8)]
OF_FEATURES = ("uniform", "pool", "divprune", "vqtoken", "tome(metric='features')")


def _same(serving, mine, call, model, spec, batch):
    """Whether rows are those of `patch`, and as many as were announced."""
    with patch(model, spec, positions="contiguous") as handle:
        theirs = handle.encode(**batch)["image"].pooler_output
    for i, (rows, other) in enumerate(zip(mine, theirs, strict=True)):
        torch.testing.assert_close(rows, other, rtol=1e-5, atol=1e-5)
        sizes = {name: tuple(value[i].tolist()) for name, value in call.items()}
        n = serving.full[i]
        assert serving.tokens_kept(serving.layout(n, **sizes)) == len(rows)


def _read(serving, model, pixels):
    """States of the tower as an engine gives them, and what was read on the way."""
    depth = len(model.model.vision_tower.encoder.layers)
    tower = engine.Tower(model.model.vision_tower, depth - 1)
    session = serving.session()
    if serving.resolved.all():
        TowerReader(serving, layers_of(tower), lambda heads: heads).start(session)
    return tower(pixels)[:, 1:], session


@pytest.mark.parametrize("keep", [0.3, 5, 1.0])
@pytest.mark.parametrize("method", [*TESTED_METHODS, "received_attention", "random"])
def test_llava(method, keep):
    model, batch = engine.images("llava")
    serving = Serving(model.config, Settings(f"{method}:{keep}"))
    states, session = _read(serving, model, batch["pixel_values"])
    connector = model.model.multi_modal_projector
    with torch.no_grad():
        if serving.before_connector:
            kept = connector(torch.stack(serving.compress(list(states), {}, session)))
        else:
            kept = serving.compress(list(connector(states)), {}, session)
    serving.full = [states.shape[1]] * len(states)
    _same(serving, kept, {}, model, f"{method}:{keep}", batch)


@pytest.mark.parametrize("keep", [0.3, 7])
@pytest.mark.parametrize("method", [*TESTED_METHODS, "hired", "uniform(newlines='kept')"])
def test_llava_next(method, keep):
    model, batch = engine.images("llava_next", image_sizes=SIZES)
    serving = Serving(model.config, Settings(f"{method}:{keep}"))
    call = {"image_sizes": batch["image_sizes"]}
    views, pixels = serving.views(call["image_sizes"]), batch["pixel_values"]
    assert len(set(views)) > 1 or pixels.shape[1] == views[0]
    real = torch.cat([i * pixels.shape[1] + torch.arange(n) for i, n in enumerate(views)])
    _, session = _read(serving, model, pixels.flatten(0, 1))
    pick_views(session, real)
    with torch.no_grad():
        units = model.model.get_image_features(**call, pixel_values=pixels, return_dict=True)
        kept = serving.compress(list(units.pooler_output), call, session)
    serving.full = [len(unit) for unit in units.pooler_output]
    _same(serving, kept, call, model, f"{method}:{keep}", batch)


@pytest.mark.parametrize("method", OF_FEATURES)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_qwen_vl(family, method):
    model, batch = engine.images(family, 2, image_sizes=[(8, 12), (4, 4)])
    serving = Serving(model.config, Settings(f"{method}:0.3"))
    call = {"image_grid_thw": batch["image_grid_thw"]}
    with torch.no_grad():
        units = model.model.get_image_features(batch["pixel_values"], **call, return_dict=True)
        kept = serving.compress(list(units.pooler_output), call, serving.session())
    serving.full = [len(unit) for unit in units.pooler_output]
    _same(serving, kept, call, model, f"{method}:0.3", batch)


def test_images_do_not_see_each_other():
    """An engine puts the images of many requests into one batch."""
    model, batch = engine.images("llava", 4)
    serving = Serving(model.config, Settings("random:0.3"))
    states, session = _read(serving, model, batch["pixel_values"])
    together = serving.compress(list(states), {}, session)
    for i, rows in enumerate(together):
        assert torch.equal(serving.compress([states[i]], {}, session)[0], rows)


def test_heads_of_all_devices_are_joined():
    model, batch = engine.images("llava")
    serving = Serving(model.config, Settings("vtc_cls:0.3"))
    tower = engine.Tower(model.model.vision_tower, 5)
    seen = []
    session = serving.session()
    TowerReader(serving, layers_of(tower), lambda x: (seen.append(x.shape), x)[1]).start(session)
    with pytest.raises(ConfigError, match="looks at tower layer"):
        TowerReader(serving, layers_of(tower)[:2], lambda heads: heads)
    tower(batch["pixel_values"])
    assert len(seen) == 2 * len(serving.resolved.all())


def test_what_holds_nan_is_left_to_its_own_request(caplog):
    model, _ = engine.images("llava")
    serving = Serving(model.config, Settings("divprune:0.3"))
    units = list(torch.randn(3, 16, 8))
    alone = [serving.compress([unit], {}, serving.session())[0] for unit in units]
    units[1] = torch.full_like(units[1], torch.nan)
    with caplog.at_level(logging.ERROR):
        kept = serving.compress(units, {}, serving.session())
    assert "not compressed" in caplog.text
    assert torch.equal(kept[0], alone[0])
    assert torch.equal(kept[2], alone[2])
    assert kept[1].isnan().all()
    assert len(kept[1]) == len(kept[0])


REFUSED = [
    ("vtc_cls:auto", "its count depends on the picture"),
    ("quecc:0.3", "it reads the question"),
    ("cdpruner:0.3", "it reads the question"),
    ("fastv@2:0.5", "one method between vision tower and language model"),
    ("tome_tower:0.5", "one method between"),
    ("vtc_cls:0.5 | divprune:0.5", "one method between"),
    ("tokenpacker:4", "trained parts of its own"),
    ("vqtoken(attention=True):4", "trained parts of its own"),
    ("visionzip(faithful=True):6", "reads states"),
    ("vtc_cls(exclude_outliers='norm'):0.3", "reads states"),
    ("divprune(scope='prompt'):0.3", "a budget of a whole prompt"),
]


@pytest.mark.parametrize(("spec", "why"), REFUSED)
def test_what_no_engine_can_serve(spec, why):
    with pytest.raises(ConfigError, match=why) as raised:
        Serving(tiny.build("llava").config, Settings(spec))
    assert "vlmcompress.patch" in str(raised.value)


def test_what_the_tower_does_not_have():
    siglip, qwen = tiny.build("llava_siglip").config, tiny.build("qwen2_vl").config
    with pytest.raises(EvidenceError, match=r"no \[CLS\]"):
        Serving(siglip, Settings("vtc_cls:0.3"))
    with pytest.raises(ConfigError, match="not read inside an engine"):
        Serving(qwen, Settings("tome:0.3"))
    with pytest.raises(UnsupportedModelError):
        Serving(tiny.build("gemma3").config, Settings("divprune:0.3"))


def test_positions_are_those_of_engines():
    config = tiny.build("llava").config
    with pytest.raises(ConfigError, match="one by one"):
        Serving(config, Settings("vtc_cls:0.3", positions="original"))
    file = CompressionConfig((StageConfig("divprune", 0.3),))
    Serving(config, Settings(file))
    with pytest.raises(ConfigError, match="positions='contiguous'"):
        Serving(tiny.build("qwen2_vl").config, Settings(file))


def test_adapters_stay_in_their_range():
    file = CompressionConfig((StageConfig("vtc_cls", 0.3),), trained_keep=(0.25, 0.5))
    config = tiny.build("llava").config
    assert Serving(config, Settings(file)).stage.keep == 0.3
    with pytest.raises(ConfigError, match="trained for keep from"):
        Serving(config, Settings(file, 0.1))


def test_caches_tell_budgets_apart():
    config = tiny.build("llava").config
    prints = {
        Serving(config, Settings(s)).fingerprint for s in ("uniform:4", "uniform:5", "pool:4")
    }
    assert len(prints) == 3
    same = Settings("uniform", 4)
    assert Serving(config, same).fingerprint in prints


def test_the_tower_decides_where_no_method_is_named():
    assert Serving(tiny.build("llava").config, Settings(None, 0.3)).stage.method.name == "vtc_cls"
