"""Methods that read the question: found in the prompt or given, one per sample, beside any CLIP."""

from __future__ import annotations

from types import SimpleNamespace

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPConfig, CLIPModel

from tests import tiny
from tests.seam.equalities import RandomSource, asking, world
from tests.seam.test_conversation import Talk
from vlmcompress import (
    ConfigTypeError,
    EvidenceError,
    MissingTextError,
    UnsupportedInputError,
    patch,
)
from vlmcompress.live.clip import source_of
from vlmcompress.live.question import found, rows_of, turn_marks
from vlmcompress.reference import load, load_text_head, prompt


class Listening(RandomSource):
    """Notes what it is asked, and embeds each text by itself."""

    heard: list[str] = []  # noqa: RUF012  (shared on purpose, emptied by the fixture)

    def texts(self, texts):
        self.heard.extend(texts)
        return [
            torch.randn(1, 6, generator=torch.Generator().manual_seed(sum(t.encode())))
            for t in texts
        ]


@pytest.fixture
def source():
    Listening.heard.clear()
    width = tiny.build("llava").model.vision_tower.config.hidden_size
    return Listening(width)


@pytest.fixture(scope="module")
def reference():
    return load()


# --- whose question ------------------------------------------------------------------------------


@torch.no_grad()
def test_every_image_is_compared_with_the_question_of_its_row(source):
    w = world("llava")
    questions = ["the first", "the second", "no picture"]
    with patch(w.model, "cdpruner", keep=5, clip=source) as handle:
        w.model(**w.call, question=questions)
        kept = handle.kept
        assert source.heard == ["the first", "the second"]
        for question, images in (("the first", (0, 1)), ("the second", (2,))):
            w.model(**w.call, question=question)
            assert all(torch.equal(handle.kept[i], kept[i]) for i in images)
        w.model(**w.call, question="the second")
        assert not all(torch.equal(handle.kept[i], kept[i]) for i in (0, 1))


@torch.no_grad()
def test_the_question_of_a_call_stands_before_that_of_the_patch(source):
    w = world("llava")
    with patch(w.model, "cdpruner", keep=5, clip=source, question="always") as handle:
        w.model(**w.call)
        w.model(**w.call, question="now")
        w.generate(w.call, question="later")
        handle.encode(**w.call, question="encoded")
    assert source.heard == ["always", "now", "later", "encoded"]


@torch.no_grad()
def test_the_model_never_sees_the_question(source):
    """Also where nothing is compressed: other methods, no image, disabled."""
    w = world("llava")
    text = {k: v[2:] for k, v in w.call.items() if k != "pixel_values"}
    with patch(w.model, "uniform", keep=5) as handle:
        w.model(**w.call, question="?")
        w.generate(w.call, question="?")
        w.model(**text, question="?")
        w.generate(text, question="?")
        with handle.disabled():
            assert torch.equal(w.model(**w.call, question="?").logits, w.logits)
            w.generate(w.call, question="?")


@torch.no_grad()
def test_an_earlier_stage_thins_out_the_patches_too(source):
    w = world("llava")
    spec = "fastervlm:0.75 | cdpruner:0.25"
    with patch(w.model, spec, clip=source, question="?") as handle:
        w.model(**w.call)
        thinned = handle.kept
    with patch(w.model, "fastervlm", keep=0.75) as handle:
        w.model(**w.call)
        assert all(
            set(a.tolist()) <= set(b.tolist()) for a, b in zip(thinned, handle.kept, strict=True)
        )


@torch.no_grad()
def test_images_of_a_later_turn_belong_to_the_rows_that_bring_them(source):
    model = tiny.build("llava")
    with patch(model, "cdpruner", keep=5, clip=source, question=["first", "second"]):
        talk = Talk(model, rows=2)
        for seed in range(2):
            source.heard.clear()
            talk.say(1, 6, seed=seed)
            talk.answer()
            assert source.heard == ["first", "second"]


def test_rows_of_images():
    assert rows_of((18, 0, 14), [9, 9, 14]) == [0, 0, 2]
    assert rows_of((18, 0, 14), [9, 9, 14, 99]) == [0, 0, 2, 2]


# --- what is missing or wrong --------------------------------------------------------------------


@torch.no_grad()
def test_without_a_question(source):
    w = world("llava")
    with (
        patch(w.model, "cdpruner", keep=5, clip=source),
        pytest.raises(MissingTextError, match="processor=processor"),
    ):
        w.model(**w.call)


@pytest.mark.parametrize(
    ("question", "error", "message"),
    [
        (["a", "b"], UnsupportedInputError, "2 questions for a batch of 3 rows"),
        (7, UnsupportedInputError, "question is 7"),
        ([1, 2, 3], UnsupportedInputError, "one text per row"),
        (["a", " ", "c"], MissingTextError, "Row 1 has an image"),
    ],
)
@torch.no_grad()
def test_questions_that_do_not_fit(source, question, error, message):
    w = world("llava")
    with patch(w.model, "cdpruner", keep=5, clip=source), pytest.raises(error, match=message):
        w.model(**w.call, question=question)


def test_a_clip_of_another_width_is_refused():
    with pytest.raises(EvidenceError, match="width 7"):
        patch(tiny.build("llava"), "cdpruner", keep=0.5, clip=RandomSource(7))


@pytest.mark.parametrize("family", ["vipllava", "qwen2_vl", "ovis2"])
def test_towers_that_cannot_be_compared(family):
    model = tiny.build(family)
    with pytest.raises(EvidenceError, match="compare"):
        patch(model, "cdpruner", keep=0.5, **asking(model))


def test_what_is_no_clip():
    with pytest.raises(ConfigTypeError, match="clip is Linear"):
        patch(tiny.build("llava"), "cdpruner", keep=0.5, clip=torch.nn.Linear(1, 1))


def test_set_uses_the_clip_of_the_patch(source):
    model = tiny.build("llava")
    with patch(model, "uniform", keep=5, clip=source) as handle:
        assert handle.set(method="cdpruner").config.to_spec() == "cdpruner:5"
    with (
        patch(model, "uniform", keep=5) as handle,
        pytest.raises(MissingTextError, match="clip="),
    ):
        handle.set(method="cdpruner")


# --- the question in the prompt ------------------------------------------------------------------


def test_the_question_is_found_in_the_prompt(reference):
    model, processor = reference
    asked = ["What colour is the star?", "Is there a red circle?\nSay yes or no."]
    texts = [prompt(processor, q) for q in asked]
    ids = processor.tokenizer(texts, padding=True, return_tensors="pt")
    got = found(model, ids["input_ids"], ids["attention_mask"], processor)
    assert got == [asked[0], "Is there a red circle? Say yes or no."]


def test_only_the_last_turn_is_the_question(reference):
    model, processor = reference
    text = prompt(processor, "What is it?") + " a star<eos><user>And its colour?<assistant>"
    ids = processor.tokenizer(text, return_tensors="pt").input_ids
    assert found(model, ids, None, processor) == ["And its colour?"]


_LLAVA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def test_marks_of_another_template(reference):
    _, processor = reference
    from jinja2 import Template

    template = Template(_LLAVA)
    other = SimpleNamespace(
        apply_chat_template=lambda messages, **more: template.render(
            messages=messages, add_generation_prompt=True
        )
    )
    assert turn_marks(other) == ("USER:", "ASSISTANT:")
    assert turn_marks(processor) == ("<user>", "<assistant>")
    assert turn_marks(SimpleNamespace()) == ("", "")


def test_without_a_template_the_whole_prompt_is_the_question(reference):
    model, processor = reference
    ids = processor.tokenizer("<image>what is it", return_tensors="pt").input_ids
    plain = SimpleNamespace(
        decode=processor.tokenizer.decode, all_special_tokens=["<image>", "<eos>"]
    )
    assert found(model, ids, None, plain) == ["what is it"]


@torch.no_grad()
def test_the_reference_model_with_its_own_text_head(reference):
    model, processor = reference
    image = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    question = "What colour is the star?"
    call = processor.tokenizer(
        prompt(processor, question).replace("<image>", "<image>" * 196), return_tensors="pt"
    )
    call = {"input_ids": call.input_ids, "pixel_values": image}
    head = load_text_head()
    with patch(model, "cdpruner", keep=20, clip=head, processor=processor) as handle:
        model(**call)
        found_by_itself = handle.kept[0]
        model(**call, question=question)
        assert torch.equal(handle.kept[0], found_by_itself)
    with pytest.raises(MissingTextError, match="shares the model's tokenizer"):
        patch(model, "cdpruner", keep=20, clip=head)


# --- CLIP models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    config = CLIPConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 49408,
            "max_position_embeddings": 12,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 49407,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        projection_dim=10,
    )
    torch.manual_seed(0)
    return CLIPModel(config).eval()


class Words:
    """A tokenizer of CLIP's shape, one id per letter."""

    bos_token_id, eos_token_id = 49406, 49407

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[ord(c) for c in text])


def test_a_transformers_clip_model(clip):
    source = source_of((clip, Words()), None, torch.nn.Identity())
    short, long = source.texts(["ab", "x" * 23])
    assert (short.shape, long.shape) == ((1, 10), (3, 10))
    ids = torch.tensor([[49406, 97, 98, 49407]])
    want = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
    torch.testing.assert_close(short, want)
    (alone,) = source.texts(["x" * 10])
    torch.testing.assert_close(long[:1], alone)
    states = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    want = clip.visual_projection(clip.vision_model.post_layernorm(states.float()))
    assert torch.equal(source.patches(states), want)
    assert source.width == 32


def test_a_clip_model_without_its_tokenizer(clip):
    with pytest.raises(MissingTextError, match=r"clip=\(model, tokenizer\)"):
        source_of(clip, None, torch.nn.Identity())


def test_an_open_clip_model():
    torch.manual_seed(0)
    model = open_clip.model.CLIP(
        embed_dim=10,
        vision_cfg={"layers": 1, "width": 32, "head_width": 16, "patch_size": 14, "image_size": 28},
        text_cfg={"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    ).eval()
    tokenizer = SimpleTokenizer(context_length=12)
    source = source_of((model, tokenizer), None, torch.nn.Identity())
    short, long = source.texts(["a red star", "a red star and a blue circle and a green square"])
    torch.testing.assert_close(short, model.encode_text(tokenizer(["a red star"])))
    assert long.shape == (2, 10)
    states = torch.randn(1, 4, 32)
    want = model.visual.ln_post(states) @ model.visual.proj
    assert torch.equal(source.patches(states), want)
    with pytest.raises(MissingTextError, match="open_clip"):
        source_of(model, None, torch.nn.Identity())
