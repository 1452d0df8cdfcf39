"""Training in miniature: it learns, survives a kill, and exports what plain transformers loads."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmcompress.core.errors import ConfigError
from vlmcompress.reference import prompt, train
from vlmcompress.reference.batches import Encoder, make_batch
from vlmcompress.reference.checkpoint import read_state
from vlmcompress.reference.labels import patch_labels
from vlmcompress.reference.language import position_ids, run_llm
from vlmcompress.reference.model import Shape, build_model, cls_attention, run_tower
from vlmcompress.reference.questions import KINDS
from vlmcompress.reference.scenes import Split, scene
from vlmcompress.reference.selection import objects_and_ground, score_patches
from vlmcompress.reference.text_head import TextHead
from vlmcompress.reference.tokenizer import build_processor, build_tokenizer
from vlmcompress.reference.trainee import Mix
from vlmcompress.reference.worlds import ALL_KINDS

TINY = Shape(
    width=48,
    heads=2,
    tower_layers=4,
    tower_mlp=64,
    llm_layers=2,
    llm_mlp=64,
    kv_heads=1,
    text_width=32,
    text_layers=1,
)
SMALL = {
    "shape": TINY,
    "batch": {"tower": 2, "language": 2, "joint": 2},
    "test_scenes": 2,
    "device": "cpu",
}
EVEN = np.ones(len(ALL_KINDS))


pytestmark = pytest.mark.usefixtures("one_thread")


def _check_logs(folder):
    for stage in ("tower", "language", "joint"):
        assert read_state(folder / f"{stage}.safetensors")["step"] >= 3
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    validation = next(row["validation"] for row in rows if "validation" in row)
    assert set(KINDS) < set(validation["all@196"])
    assert "cls@20" in validation
    log = json.loads((folder / "training_log.json").read_text())
    assert set(log["stages"]) == {"tower", "language", "joint"}
    assert "| cls@20 |" in (folder / "weights" / "README.md").read_text()


def _check_plain_loading(weights):
    model = AutoModelForImageTextToText.from_pretrained(weights, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(weights)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    inputs = processor(
        images=Image.new("RGB", (224, 224)), text=prompt(processor, "What?"), return_tensors="pt"
    )
    out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert out.shape[1] > inputs["input_ids"].shape[1]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with safe_open(str(weights / "model.safetensors"), "pt") as file:
        assert file.get_tensor(next(iter(file.keys()))).dtype == torch.bfloat16


@pytest.mark.slow
def test_two_processes_train_log_and_export(tmp_path):
    weights = train(tmp_path, steps=12, processes=2, **SMALL)
    _check_logs(tmp_path)
    _check_plain_loading(weights)
    before = (tmp_path / "joint.safetensors").stat().st_mtime_ns
    train(tmp_path, steps=12, processes=2, **SMALL)  # finished: nothing is repeated
    assert (tmp_path / "joint.safetensors").stat().st_mtime_ns == before


def test_budget_is_needed(tmp_path):
    with pytest.raises(ConfigError, match="budget"):
        train(tmp_path, minutes=0)


def test_packed_questions_equal_one_question_at_a_time():
    """The training path answers exactly as transformers' own forward does."""
    model = build_model(TINY).eval()
    processor = build_processor()
    batch = make_batch(Split.TRAIN, range(2), 5, EVEN, Encoder(processor.tokenizer))
    states = run_tower(model.model.vision_tower, batch.pixels(), None)
    tokens = model.model.multi_modal_projector(states.hidden[-2][:, 1:])
    everything = torch.arange(196).expand(2, -1)
    with torch.no_grad():
        logits, _, _ = run_llm(model, tokens, everything, batch.packed, contiguous=False)
    row = 0
    for drawn, questions in zip(batch.scenes, batch.questions, strict=True):
        for question in questions:
            text = prompt(processor, question.text)
            inputs = processor(images=drawn.image, text=text, return_tensors="pt")
            with torch.no_grad():
                plain = model(**inputs).logits[0, -1]
            torch.testing.assert_close(logits[row], plain, atol=1e-3, rtol=1e-3)
            row += 2  # the answer and its end


def test_position_modes():
    kept = torch.tensor([[3, 10, 195]])
    offset = torch.tensor([[0, 1, 0]])
    assert position_ids(offset, kept, True).tolist() == [[0, 1, 2, 3, 4, 5, 4]]
    assert position_ids(offset, kept, False).tolist() == [[0, 4, 11, 196, 197, 198, 197]]


def test_cls_attention_is_the_towers_own():
    model = build_model(TINY).eval()
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = tower(pixels, output_attentions=True, output_hidden_states=True)
        layer = tower.encoder.layers[-2]
        ours = cls_attention(layer, own.hidden_states[-3])
    torch.testing.assert_close(ours, own.attentions[-2][:, :, 0].mean(1))


def test_labels_name_the_object_under_each_patch():
    drawn = scene("train", 4)
    labels = patch_labels(drawn)
    assert labels.attention.sum() == pytest.approx(1, abs=1e-5)
    assert (labels.attention[drawn.coverage < 0.1] == 0).all()
    per_item = [labels.attention[item.coverage >= 0.1].sum() for item in drawn.items]
    assert np.allclose(per_item, 1 / len(drawn.items), atol=0.06)
    assert labels.present[:48].sum() == len({item.pair for item in drawn.items})


def test_cheap_steps_keep_every_object_patch():
    share = torch.from_numpy(np.stack([scene("train", i).coverage for i in range(8)]))
    kept = objects_and_ground(share.float(), 90, torch.Generator().manual_seed(0))
    assert (kept.diff(dim=1) > 0).all()
    assert torch.equal((share.gather(1, kept) > 0).sum(1), (share > 0).sum(1))
    with pytest.raises(ConfigError, match="allowed are"):
        score_patches("best", share, share, torch.Generator())


def test_stuck_kinds_are_asked_more_often():
    mix = Mix()
    asked = np.full(len(ALL_KINDS), 50)
    right = asked.copy()
    right[2] = 12
    for _ in range(100):
        mix.update(right, asked)
    assert mix.needs().argmax() == 2
    assert mix.needs().min() == 0.07


def test_text_head_round_trip(tmp_path):
    head, tokenizer = TextHead(TINY).eval(), build_tokenizer()
    head.save(tmp_path)
    again = TextHead.load(tmp_path)
    texts = ["red circle", "Where is the blue star?"]
    one, two = head.embed_texts(texts, tokenizer), again.embed_texts(texts, tokenizer)
    torch.testing.assert_close(one, two)
    assert one.norm(dim=-1).tolist() == pytest.approx([1, 1])
