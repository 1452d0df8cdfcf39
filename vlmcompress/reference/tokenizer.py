"""A byte-level BPE of at most 512 ids: any text encodes, the questions' words are single tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from .questions import ANSWERS, PHRASES
from .scenes import COLOUR_NAMES, PATCH, SIDE
from .sprites import SHAPES

PAD, EOS, USER, ASSISTANT, IMAGE = SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>", "<image>")
VOCABULARY = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{% if message['content'] is string %}"
    "{{ ' ' if message['role'] == 'assistant' else '' }}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'text' %}"
    "{{ ' ' if message['role'] == 'assistant' else '' }}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}"
    "{{ '<eos>' if message['role'] == 'assistant' else '' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Everyday words take the ids that the questions leave over; they are never trained on.
_EVERYDAY = (
    "a an the and or of to in on at is are was it this that there here with for from by not you"
    " we he she they what who why when can do does have has one picture image scene describe tell"
    " about me between near under over behind big small white black brown grey man woman dog cat"
    " car tree house road sky water hand people street table light dark old new good many some"
)


def _corpus() -> Iterator[str]:
    """Every phrasing with every word that fills it, weighted to the questions."""
    words = {"a": "a", "v": "red", "pair": "red circle", "one": "red star", "two": "blue cross"}
    for forms in PHRASES.values():
        for form in forms:
            yield from [form.format(**words)] * 200
    for answers in ANSWERS.values():
        for answer in answers:
            yield from [f" {answer}"] * 400
    for colour in COLOUR_NAMES:
        for shape in SHAPES:
            yield from [f"{colour} {shape}, an object"] * 40
    yield from [" " + _EVERYDAY + " top bottom corner ground"] * 4


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same result every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens={
            "image_token": IMAGE,
            "user_token": USER,
            "assistant_token": ASSISTANT,
        },
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast | None = None) -> LlavaProcessor:
    """The processor: images are padded to a square with the mean colour, never squeezed."""
    images = LlavaImageProcessor(
        do_pad=True,
        do_center_crop=False,
        size={"height": SIDE, "width": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer or build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def prompt(processor: LlavaProcessor, question: str) -> str:
    """The chat prompt that asks a question about one image, ready for ``processor(text=...)``."""
    content: Any = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
