"""`vlmcompress generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmcompress.cli.options import Adapter, Clip, Device, Dtype, Json, Keep, Method, Model
from vlmcompress.cli.output import emit
from vlmcompress.cli.values import keep_of
from vlmcompress.loading import REFERENCE, clip_of, load

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmcompress import Handle


def generate(
    image: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="A picture.")],
    prompt: Annotated[str, typer.Option(help="What to ask about it.")],
    model: Model = REFERENCE,
    method: Method = None,
    keep: Keep = None,
    adapter: Adapter = None,
    clip: Clip = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
    overlay: Annotated[
        Path | None, typer.Option(help="Write the picture with the dropped patches dimmed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask a model about a picture. Without --method, --keep and --adapter nothing is compressed."""
    picture = _open(image)
    budget = None if keep is None else keep_of(keep)
    plain = method is None and budget is None and adapter is None
    if method is not None and adapter is not None:
        raise typer.BadParameter("An adapter brings its own method.", param_hint="--adapter")
    if overlay is not None and plain:
        raise typer.BadParameter(
            "An overlay needs --method, --keep or --adapter.", param_hint="--overlay"
        )
    if clip is not None and method is None and adapter is None:
        raise typer.BadParameter("A CLIP model needs --method or --adapter.", param_hint="--clip")
    loaded, processor = load(model, dtype, device)
    results: dict[str, Any] = {"model": model, "adapter": adapter, "method": None, "keep": None}
    if plain:
        answer = _ask(loaded, processor, picture, prompt, max_new_tokens)
        emit({**results, "answer": answer}, answer, as_json)
        return
    from vlmcompress import load_adapter, patch

    options: dict[str, Any] = {"processor": processor}
    options |= {} if budget is None else {"keep": budget}
    options |= {} if clip is None else {"clip": clip_of(clip, loaded.device)}
    with (
        patch(loaded, method, **options)
        if adapter is None
        else load_adapter(loaded, adapter, **options)
    ) as handle:
        answer = _ask(loaded, processor, picture, prompt, max_new_tokens)
        results |= {"keep": budget, "answer": answer, **_facts(handle)}
        if overlay is not None:
            handle.overlay(picture).save(overlay)
    emit(results, f"{answer}\n\n{results['report']}", as_json)


def _open(path: Path) -> Image:
    from PIL import Image

    return Image.open(path).convert("RGB")


def _ask(model: Any, processor: Any, picture: Image, prompt: str, new_tokens: int) -> str:
    text = prompt
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        turns = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    new = ids[:, inputs["input_ids"].shape[1] :]
    answer: str = processor.batch_decode(new, skip_special_tokens=True)[0]
    return answer.strip()


def _facts(handle: Handle) -> dict[str, Any]:
    last = handle.last
    if last is None:  # every call with an image leaves a record
        return {"report": str(handle.report)}
    return {
        "method": last.method,
        "positions": last.positions,
        "tokens_before": list(last.tokens_before),
        "tokens_after": list(last.tokens_after),
        "seconds": dict(last.times),
        "report": str(handle.report),
    }
