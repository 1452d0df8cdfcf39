"""Ways to decode. What the patched model generates is held against the unpatched model that gets
the prompt cut by hand, and with everything kept against the unpatched model."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CompileConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TextIteratorStreamer,
    TextStreamer,
)

from tests import tiny
from tests.seam import oracle
from tests.support import same
from vlmcompress import UnsupportedInputError, patch
from vlmcompress.core.keep import AutoKeep
from vlmcompress.reference import load

#: qwen2_vl is absent where hand-cut prompts are generated from: M-RoPE positions would have to be
#: given by hand through `generate`, too. Greedy equivalents cover it.
CUT = same.families("llava", "paligemma")


def hold(family, **options):
    """Generates what the unpatched model does from the hand-cut prompt; keep all = unpatched."""
    model = tiny.build(family)
    call = same.one(model)
    options = {**oracle.greedy(model, 8), **options}
    torch.manual_seed(0)
    want = same.generated_from_hand_cut(model, call, **options)
    torch.manual_seed(0)
    assert torch.equal(same.generated_when_patched(model, call, **options), want)
    with torch.no_grad():
        torch.manual_seed(0)
        full = model.generate(**call, **options)
        torch.manual_seed(0)
        with patch(model, keep=1.0):
            assert torch.equal(model.generate(**call, **options), full)


def hold_greedy(family, **options):
    """Generates what patched greedy decoding does; keep all = unpatched with the same options."""
    model = tiny.build(family)
    call = same.one(model)
    full = same.seen(model, call, **options)
    same.assert_same(same.patched(model, call, keep=1.0, **options), full)
    same.assert_same(same.patched(model, call, **options), same.patched(model, call))


@pytest.mark.support("decoding: beams")
@CUT
def test_beams(family):
    """Beams and several returned sequences equal those from the prompt cut by hand."""
    hold(family, num_beams=3, num_return_sequences=2)


@pytest.mark.support("decoding: beams over images that keep different counts", refuses=True)
@same.families("paligemma")
def test_ragged_beams(family):
    """One tensor of features cannot be expanded for beams where its images differ in length."""
    model = tiny.build(family)
    call = same.mixed(model)
    with patch(model, keep=AutoKeep(0.6)) as handle, torch.no_grad():
        model(**call)
        assert len(set(handle.last.tokens_after)) > 1
        with pytest.raises(UnsupportedInputError, match="use one beam"):
            model.generate(**call, num_beams=2)


@pytest.mark.support("decoding: sampling with num_return_sequences over batches of a DataLoader")
@same.THREE
@torch.no_grad()
def test_samples_of_a_loader(family):
    """Every batch gives its prompts repeated in order; keep all draws what the unpatched draws."""
    model = tiny.build(family)
    prompts = [[tiny.Prompt(images=1, text=n), tiny.Prompt(images=2, text=6)] for n in (4, 9)]
    loader = torch.utils.data.DataLoader(
        prompts, batch_size=1, collate_fn=lambda rows: tiny.inputs(model, rows[0])
    )
    options = {**oracle.greedy(model), "do_sample": True, "num_return_sequences": 3}

    def drawn():
        torch.manual_seed(0)
        return [(call, model.generate(**call, **options)) for call in loader]

    unpatched = drawn()
    with patch(model, keep=1.0) as handle:
        for (_, got), (_, want) in zip(drawn(), unpatched, strict=True):
            assert torch.equal(got, want)
        handle.set(keep=same.KEEP)
        for call, got in drawn():
            ids = call["input_ids"]
            assert torch.equal(got[:, : ids.shape[1]], ids.repeat_interleave(3, 0))


@pytest.mark.support("decoding: static cache")
@same.THREE
def test_static_cache(family):
    """Generates what patched greedy decoding does; keep all = unpatched with a static cache."""
    hold_greedy(family, cache_implementation="static")


@pytest.mark.slow
@pytest.mark.support("decoding: static cache, decoding compiled")
@same.families("llava")
def test_compiled_decoding(family):
    """Generates what patched greedy decoding does; keep all = unpatched with compiled decoding."""
    compiled = CompileConfig(backend="eager", mode=None)
    compiled._compile_all_devices = True
    hold_greedy(family, cache_implementation="static", compile_config=compiled)


@pytest.mark.support("decoding: assistant model that sees the image")
@same.THREE
def test_assistant(family):
    """Another, unpatched model drafts; ids as without it or from the prompt cut by hand."""
    assistant = tiny.build(family, seed=1)
    if family == "paligemma":  # its drafts change its ids, also unpatched
        hold(family, assistant_model=assistant)
    else:
        hold_greedy(family, assistant_model=assistant)


@pytest.mark.support("decoding: assistant that reads text alone")
@same.families(
    "llava",
    pytest.param(
        "qwen2_vl",
        marks=pytest.mark.xfail(
            raises=ValueError,
            strict=True,
            reason="also unpatched: transformers hands the assistant token types it does not take",
        ),
    ),
)
def test_text_assistant(family):
    """A language model drafts; ids of patched greedy decoding; keep all = unpatched."""
    hold_greedy(family, assistant_model=tiny.text_only())


@pytest.mark.support("decoding: assistant_early_exit")
@same.families("llava")
@pytest.mark.xfail(
    raises=AttributeError,
    strict=True,
    reason="also unpatched: transformers looks for the layers in the outer configuration",
)
def test_early_exit(family):
    """The first layers draft; ids of patched greedy decoding; keep all = unpatched."""
    hold_greedy(family, assistant_early_exit=1)


@pytest.mark.support("decoding: prompt lookup")
@same.THREE
def test_prompt_lookup(family):
    """Generates what patched greedy decoding does; keep all = unpatched with prompt lookup."""
    hold_greedy(family, prompt_lookup_num_tokens=2)


@pytest.mark.support("decoding: logits processors of the library")
@CUT
def test_built_in_processors(family):
    """Penalties, n-gram bans and watermarks equal those from the prompt cut by hand."""
    hold(family, repetition_penalty=1.3, no_repeat_ngram_size=2)
    hold(family, watermarking_config={"bias": 2.0, "seeding_scheme": "lefthash"})


@pytest.mark.support("decoding: classifier-free guidance")
@CUT
def test_guidance(family):
    """The unconditional branch too equals that from the prompt cut by hand."""
    hold(family, guidance_scale=1.5)


@pytest.mark.support("decoding: logits processors of the caller")
@same.THREE
@torch.no_grad()
def test_own_processors(family):
    """A caller's processor, who sees the full ids, does what the same option does."""
    model = tiny.build(family)
    call = same.one(model)
    own = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
    with patch(model, keep=same.KEEP):
        want = model.generate(**call, **oracle.greedy(model, 8), repetition_penalty=1.3)
        got = model.generate(**call, **oracle.greedy(model, 8), logits_processor=own)
    assert torch.equal(got, want)


@pytest.fixture(scope="module")
def reference():
    """The reference model, whose tokens are words, its tokenizer and a prompt."""
    model, processor = load()
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    turns = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What colour is it?"}],
        }
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=text, images=image, return_tensors="pt", do_rescale=False)
    return model, processor.tokenizer, dict(inputs)


@pytest.mark.support("streamers: TextStreamer")
@torch.no_grad()
def test_text_streamer(reference, capsys):
    """The reference model prints the text that it returns; keep all prints the unpatched text."""
    model, tokenizer, call = reference
    options = {"max_new_tokens": 6, "do_sample": False}

    def printed():
        out = model.generate(**call, **options, streamer=TextStreamer(tokenizer, skip_prompt=True))
        text = tokenizer.decode(out[0, call["input_ids"].shape[1] :])
        assert capsys.readouterr().out.strip() == text.strip()
        return text

    full = printed()
    with patch(model, keep=1.0) as handle:
        assert printed() == full
        handle.set(keep=0.1)
        assert printed()


@pytest.mark.support("streamers: TextIteratorStreamer, generate in a thread")
@torch.no_grad()
def test_text_iterator_streamer(reference):
    """A thread's `generate` streams the caller's prompt and what generate returns elsewhere."""
    from threading import Thread

    model, tokenizer, call = reference
    options = {"max_new_tokens": 6, "do_sample": False}
    with patch(model, keep=0.1):
        want = tokenizer.decode(model.generate(**call, **options)[0])
        streamer = TextIteratorStreamer(tokenizer, timeout=60)
        thread = Thread(target=model.generate, kwargs={**call, **options, "streamer": streamer})
        thread.start()
        assert "".join(streamer).strip() == want.strip()
        thread.join()
