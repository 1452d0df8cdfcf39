"""`generate` as before: lengths, criteria, processors, streamers, beams, caches, several turns."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from tests import tiny
from tests.seam import oracle
from tests.tiny import Prompt
from vlmcompress import UnsupportedInputError, patch

BOTH = pytest.mark.parametrize("positions", ["original", "contiguous"])
SOME = ("llava", "paligemma", "qwen2_vl", "kimi_k25")


@pytest.fixture(scope="module", params=SOME)
def model(request):
    return tiny.build(request.param)


@pytest.fixture
def call(model):
    return tiny.inputs(model, oracle.MIXED)


@torch.no_grad()
def test_lengths_count_the_callers_prompt(model, call):
    length = call["input_ids"].shape[1]
    banned = {"suppress_tokens": tiny.special_ids(model), "do_sample": False}
    with patch(model, keep=0.25):
        assert model.generate(**call, **banned, max_length=length + 5).shape[1] == length + 5
        config = GenerationConfig(max_length=length + 4, min_length=length + 4, do_sample=False)
        assert model.generate(**call, generation_config=config).shape[1] == length + 4
        assert config.max_length == length + 4, "the caller's configuration was changed"
        assert (
            model.generate(**call, **banned, max_new_tokens=3, min_new_tokens=3).shape[1]
            == length + 3
        )


@torch.no_grad()
def test_default_length_is_the_models(model, call):
    want = model.generate(**call, do_sample=False, suppress_tokens=tiny.special_ids(model)).shape
    with patch(model, keep=0.25):
        assert (
            model.generate(**call, do_sample=False, suppress_tokens=tiny.special_ids(model)).shape
            == want
        )


class Recorder(StoppingCriteria, LogitsProcessor):
    """Keeps the ids it was shown; as a criterion it stops after `stop` new tokens."""

    def __init__(self, length, stop=None):
        self.length, self.stop, self.seen = length, stop, []


class Criterion(Recorder):
    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        done = self.stop is not None and input_ids.shape[1] >= self.length + self.stop
        return torch.full((input_ids.shape[0],), done)


class Processor(Recorder):
    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        return scores


@torch.no_grad()
def test_users_criteria_and_processors_see_their_own_ids(model, call):
    ids = call["input_ids"]
    criterion, processor = Criterion(ids.shape[1], stop=3), Processor(ids.shape[1])
    prefixes = []

    def allowed(row, seen):
        prefixes.append((row, seen.clone()))
        return list(range(3, 90))

    with patch(model, keep=0.25):
        out = model.generate(
            **call,
            **oracle.greedy(model, 8),
            stopping_criteria=StoppingCriteriaList([criterion]),
            logits_processor=LogitsProcessorList([processor]),
            prefix_allowed_tokens_fn=allowed,
        )
    assert out.shape[1] == ids.shape[1] + 3
    for seen in (*criterion.seen, *processor.seen):
        assert torch.equal(seen[:, : ids.shape[1]], ids)
    assert torch.equal(criterion.seen[-1], out)
    assert all(torch.equal(seen[: ids.shape[1]], ids[row]) for row, seen in prefixes)


class Streamer(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value.clone())

    def end(self):
        self.ended = True


@torch.no_grad()
def test_streamers_get_the_callers_prompt_first(model):
    call = tiny.inputs(model, oracle.ONE)
    streamer = Streamer()
    with patch(model, keep=0.25):
        out = model.generate(**call, **oracle.greedy(model), streamer=streamer)
    assert torch.equal(streamer.values[0], call["input_ids"])
    assert torch.equal(
        torch.cat([v.view(-1) for v in streamer.values[1:]]), out[0, call["input_ids"].shape[1] :]
    )
    assert streamer.ended


@BOTH
@torch.no_grad()
def test_beams_and_samples_return_full_prompts(model, positions):
    call = tiny.inputs(model, [Prompt(images=1, text=7), Prompt(images=1, text=4)])
    ids = call["input_ids"]
    with patch(model, keep=0.25, positions=positions):
        beams = model.generate(**call, **oracle.greedy(model), num_beams=3, num_return_sequences=2)
        assert torch.equal(beams[:, : ids.shape[1]], ids.repeat_interleave(2, 0))
        one_beam = model.generate(**call, **oracle.greedy(model), num_beams=1)
        best = model.generate(**call, **oracle.greedy(model, 1), num_beams=2)
        assert torch.equal(best[:, ids.shape[1]], one_beam[:, ids.shape[1]])
        torch.manual_seed(1)
        arguments = {
            "max_new_tokens": 4,
            "do_sample": True,
            "suppress_tokens": tiny.special_ids(model),
        }
        samples = model.generate(**call, **arguments, num_return_sequences=2)
        assert torch.equal(samples[:, : ids.shape[1]], ids.repeat_interleave(2, 0))


WAYS = {
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "chunked prefill": {"prefill_chunk_size": 8},
}


def is_plain_greedy(model, call, way):
    """Whether a way to decode gives what plain greedy decoding gives; some fail unpatched."""
    want = model.generate(**call, **oracle.greedy(model, 8))
    try:
        return torch.equal(model.generate(**call, **oracle.greedy(model, 8), **WAYS[way]), want)
    except (RuntimeError, ValueError, TypeError):
        return False


@pytest.mark.parametrize("way", WAYS)
@BOTH
@torch.no_grad()
def test_other_ways_to_decode_change_nothing(model, positions, way):
    call = tiny.inputs(model, oracle.ONE)
    if not is_plain_greedy(model, call, way):
        pytest.skip(f"{way} differs on the unpatched {model.config.model_type}")
    with patch(model, keep=0.25, positions=positions):
        assert is_plain_greedy(model, call, way)


@torch.no_grad()
def test_inputs_by_position_and_dict_outputs(model, call):
    rest = {k: v for k, v in call.items() if k != "input_ids"}
    with patch(model, keep=0.25):
        want = model.generate(**call, **oracle.greedy(model))
        assert torch.equal(model.generate(call["input_ids"], **rest, **oracle.greedy(model)), want)
        assert torch.equal(
            model.generate(inputs=call["input_ids"], **rest, **oracle.greedy(model)), want
        )
        out = model.generate(
            **call, **oracle.greedy(model), return_dict_in_generate=True, output_scores=True
        )
    assert torch.equal(out.sequences, want)
    assert len(out.scores) == 5


@torch.no_grad()
def test_a_missing_mask_is_inferred_from_padding_as_generate_does(model, call):
    model.generation_config.pad_token_id = 0
    rest = {k: v for k, v in call.items() if k != "attention_mask"}
    with patch(model, keep=0.25):
        want = model.generate(**call, **oracle.greedy(model))
        assert torch.equal(model.generate(**rest, **oracle.greedy(model)), want)


@torch.no_grad()
def test_the_cache_is_shorter_by_exactly_the_dropped_tokens(model):
    call = tiny.inputs(model, oracle.ONE)
    arguments = {**oracle.greedy(model, 1), "return_dict_in_generate": True}

    def size(cache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    full = model.generate(**call, **arguments).past_key_values
    with patch(model, keep=0.25) as handle:
        short = model.generate(**call, **arguments).past_key_values
        record = handle.last
    dropped = record.tokens_before[0] - record.tokens_after[0]
    assert (
        full.get_seq_length() - short.get_seq_length()
        == dropped
        == record.prompt_length - record.short_length
    )
    assert size(short) * full.get_seq_length() == size(full) * short.get_seq_length()
    assert record.kv_bytes == size(short)


@BOTH
@torch.no_grad()
def test_a_hand_written_decode_loop_continues_rightly(model, positions):
    call = tiny.inputs(model, oracle.ONE)
    with patch(model, keep=0.25, positions=positions):
        want = model.generate(**call, **oracle.greedy(model, 4))[0, call["input_ids"].shape[1] :]
        out = model(**call, use_cache=True)
        tokens, mask = [], call["attention_mask"]
        for _ in range(4):
            logits = out.logits[0, -1].clone()
            logits[tiny.special_ids(model)] = -torch.inf
            tokens.append(int(logits.argmax()))
            mask = torch.cat([mask, torch.ones(1, 1).long()], 1)
            new = {"input_ids": torch.tensor([tokens[-1:]]), "attention_mask": mask}
            if "token_type_ids" in call:
                new["token_type_ids"] = torch.ones(1, 1).long()
            out = model(**new, past_key_values=out.past_key_values, use_cache=True)
    assert tokens == want.tolist()


@torch.no_grad()
def test_encode_once_ask_often(model):
    call = tiny.inputs(model, oracle.ONE)
    pixels = {k: v for k, v in call.items() if k.startswith(("pixel", "image"))}
    rest = {k: v for k, v in call.items() if k not in pixels}
    grids = {k: v for k, v in pixels.items() if k.startswith("image")}
    with patch(model, keep=0.25) as handle:
        want = model.generate(**call, **oracle.greedy(model))
        logits = model(**call).logits
        encoding = handle.encode(**pixels)
        for _ in range(2):
            out = model.generate(
                **rest, **grids, mm_encoder_outputs=encoding, **oracle.greedy(model)
            )
            assert torch.equal(out, want)
            assert torch.equal(model(**rest, **grids, mm_encoder_outputs=encoding).logits, logits)
        beams = model.generate(
            **rest, **grids, mm_encoder_outputs=encoding, **oracle.greedy(model), num_beams=2
        )
        assert beams.shape == want.shape
        assert handle.last.tokens_after < handle.last.tokens_before
        with pytest.raises(UnsupportedInputError, match="no image"):
            handle.encode(**rest)


@torch.no_grad()
def test_rope_deltas_lead_to_the_right_position():
    """A hand-written loop without a mask lets M-RoPE models count on from the cache length."""
    model = tiny.build("qwen2_vl")
    call = tiny.inputs(model, oracle.ONE)
    full = model(**call, use_cache=True)
    uncompressed = model.model.rope_deltas + full.past_key_values.get_seq_length()
    with patch(model, keep=0.25):
        short = model(**call, use_cache=True)
        following = model.model.rope_deltas + short.past_key_values.get_seq_length()
    assert torch.equal(following, uncompressed)
