"""Cards: front matter, the numbers of a results file and no others, and what others wrote."""

from __future__ import annotations

import copy
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from tests.hub import adapters
from vlmcompress import hub, patch
from vlmcompress.core.errors import ConfigError
from vlmcompress.hub.results import evaluations

pytestmark = pytest.mark.filterwarnings(adapters.PEFT_WARNING)

BASE = "llava-hf/llava-1.5-7b-hf"


@pytest.fixture
def handle():
    """Of a model with LoRA and parts."""
    return patch(adapters.with_lora(adapters.model()), f"vtc_cls:0.5 | {adapters.ATP}")


def card_of(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter(handle, tmp_path):
    folder = hub.save(
        handle,
        tmp_path / "lora-half",
        results=adapters.RESULTS,
        base_model=BASE,
        license="llama2",
        datasets=["liuhaotian/LLaVA-Instruct-150K"],
    )
    data, _ = card_of(folder)
    index = data.pop("model-index")
    assert data == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vlmcompress", "visual-token-compression", "vtc-cls", "atp", "lora"],
        "license": "llama2",
        "datasets": ["liuhaotian/LLaVA-Instruct-150K"],
    }
    name, results = model_index_to_eval_results(index)
    assert name == "lora-half"
    assert [(r.dataset_type, r.metric_type, r.metric_value) for r in results] == [
        ("lmms-lab/POPE", "accuracy", 0.8625),
        ("drawn-scenes", "accuracy", 0.93),
    ]
    assert results[0].metric_name == "accuracy, keep 0.5 + LoRA"
    assert {r.task_type for r in results} == {"image-text-to-text"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE


def test_front_matter_without_lora_or_results(tmp_path):
    data, body = card_of(hub.save(patch(adapters.model(), "divprune", keep=0.5), tmp_path / "x"))
    assert data == {
        "library_name": "vlmcompress",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vlmcompress", "visual-token-compression", "divprune"],
    }
    assert "Measured" not in body
    assert "`divprune:0.5`" in body
    assert "the terms of its base model." in body


def test_the_text_says_what_it_is(handle, tmp_path):
    said = {"results": adapters.RESULTS, "base_model": BASE, "trained_keep": (0.25, 0.5)}
    _, body = card_of(hub.save(handle, tmp_path / "x", **said))
    assert f'from_pretrained("{BASE}", dtype="auto")' in body
    assert "| trained for | keep 0.25 to 0.5 |" in body
    assert "| learnt | `atp.safetensors` |" in body
    assert r"| LoRA | rank 2 on `.*language_model.*\.(q\|v)_proj` |" in body
    assert "| POPE | keep 0.5 + LoRA | accuracy | 0.8625 (0.85 to 0.87) | 9000 |" in body
    assert "| drawn scenes | all tokens | accuracy | 0.987 | 2000 |" in body
    assert adapters.RESULTS["command"] in body
    assert not re.search(r"\n{3,}", body)


def test_no_number_but_those_of_the_results(handle, tmp_path):
    """Every number in the measured part stands in the file, and none elsewhere changes with it."""
    folder = hub.save(handle, tmp_path / "x", results=adapters.RESULTS)
    _, body = card_of(folder)
    measured = body.split("## Measured")[1].split("## Made by")[0]
    said = {float(n) for n in re.findall(r"(?<![\w.+:-])\d+(?:\.\d+)?(?![\w:-]|\.\d)", measured)}
    assert {0.8625, 0.85, 0.87, 9000.0, 0.93, 2000.0, 0.987} <= said
    listed = re.findall(r"\d+(?:\.\d+)?", json.dumps(adapters.RESULTS))
    assert said - {95.0} <= {float(n) for n in listed}

    without = hub.save(handle, tmp_path / "without" / "x")
    assert body.replace(f"## Measured{measured}", "").split("## Made by")[0].strip() == (
        card_of(without)[1].split("## Terms")[0].strip()
    )


def test_official_results_are_of_full_splits_only(handle, tmp_path):
    folder = hub.save(handle, tmp_path / "x", results=adapters.RESULTS)
    (path,) = (folder / ".eval_results").iterdir()
    assert yaml.safe_load(path.read_text()) == [
        {
            "dataset": {"id": "lmms-lab/POPE", "task_id": "default"},
            "value": 0.8625,
            "date": adapters.RESULTS["machine"]["date"],
            "notes": "keep 0.5 + LoRA, accuracy",
        }
    ]
    theirs = folder / ".eval_results" / "theirs.yaml"
    theirs.write_text("[]\n")
    partly = copy.deepcopy(adapters.RESULTS)
    partly["evaluations"][0]["full_split"] = False
    hub.save(handle, folder, results=partly)
    assert list((folder / ".eval_results").iterdir()) == [theirs]
    assert "value: 0.8625" in (folder / "README.md").read_text()  # the index has all


def test_results_of_others_stay_out(handle, tmp_path):
    """What is shown beside is not in the index, full split or not."""
    compared = copy.deepcopy(adapters.RESULTS)
    for each in compared["evaluations"]:
        each["compared"] = True
    folder = hub.save(handle, tmp_path / "x", results=compared)
    assert "model-index" not in card_of(folder)[0]
    assert not (folder / ".eval_results").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"value": "0.9"}, "finite number"),
        ({"value": float("nan")}, "finite number"),
        ({"value": None}, "finite number"),
        ({"low": True}, "finite number"),
        ({"questions": -1}, "count"),
        ({"metric": 3}, "text"),
        ({"compared": "yes"}, "bool"),
        ({"unknown": 1}, "unknown keys"),
        ({"dataset": "POPE"}, "with a dataset"),
        ({"dataset": {"name": 3}}, "must be a text"),
        ({"dataset": {"name": "POPE"}}, "claims the full split"),
    ],
)
def test_entries_that_are_no_evaluations(change, match):
    entry = {**adapters.EVALUATIONS[0], **change}
    with pytest.raises(ConfigError, match=match):
        evaluations({"evaluations": [entry]})


def test_a_card_that_peft_edited_keeps_its_part(tmp_path):
    """PEFT edits a README.md that it finds: before us, and after."""
    peft = adapters.with_lora(adapters.model())
    handle = patch(peft, "vtc_cls", keep=0.5)
    peft.save_pretrained(tmp_path)
    assert "[More Information Needed]" in (tmp_path / "README.md").read_text()
    hub.save(handle, tmp_path, base_model=BASE)
    data, body = card_of(tmp_path)
    assert data["pipeline_tag"] == "image-text-to-text"
    assert "[More Information Needed]" not in body

    peft.save_pretrained(tmp_path)
    edited, text = card_of(tmp_path)
    assert edited["tags"] != data["tags"]
    assert "### Framework versions" in text
    hub.save(handle, tmp_path, base_model=BASE)
    data, again = card_of(tmp_path)
    assert data["tags"][:2] == ["vlmcompress", "visual-token-compression"]
    assert set(edited["tags"]) <= set(data["tags"])
    assert data["base_model"] == BASE
    assert again.count("## Use") == 1
    assert "### Framework versions" in again
    hub.save(handle, tmp_path, base_model=BASE)
    assert card_of(tmp_path) == (data, again)


def test_a_base_model_by_its_place_is_not_published(tmp_path):
    peft = adapters.with_lora(adapters.model())
    peft.config._name_or_path = str(tmp_path / "llava")
    peft.save_pretrained(tmp_path / "x")
    assert str(tmp_path) in (tmp_path / "x" / "README.md").read_text()
    hub.save(patch(peft, "vtc_cls", keep=0.5), tmp_path / "x")
    assert str(tmp_path) not in (tmp_path / "x" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "x" / "adapter_config.json").read_text()


def test_what_others_wrote_stays(handle, tmp_path):
    folder = hub.save(handle, tmp_path / "x", results=adapters.RESULTS)
    path = folder / "README.md"
    mine = path.read_text()
    changed = mine.replace("library_name:", "language:\n- en\nlibrary_name:")
    changed = changed.replace("- lora\n", "- lora\n- charts\n")
    path.write_text(
        changed.replace("<!-- vlmcompress:begin", "Before.\n\n<!-- vlmcompress:begin")
        + "\nAfter.\n"
    )
    hub.save(handle, folder, results={"evaluations": adapters.EVALUATIONS[1:]})
    data, body = card_of(folder)
    assert data["language"] == ["en"]
    assert "charts" in data["tags"]
    assert body.strip().startswith("Before.")
    assert body.strip().endswith("After.")
    assert "0.8625" not in path.read_text()  # no results file says it any more


def test_front_matter_that_cannot_be_read(handle, tmp_path):
    (tmp_path / "README.md").write_text("---\na: [\n---\ntext")
    with pytest.raises(ConfigError, match="front matter"):
        hub.save(handle, tmp_path)


def test_the_licence_is_that_of_the_base_model(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: their-terms\nlicense_link: https://example.org/terms\n---\n"
    )
    model = adapters.model()
    model.name_or_path = str(tmp_path / "base")
    handle = patch(model, "vtc_cls", keep=0.5)
    data, body = card_of(hub.save(handle, tmp_path / "a"))
    assert data["license"] == "other"
    assert data["license_name"] == "their-terms"
    assert "https://example.org/terms" in body
    assert "base_model" not in data
    assert card_of(hub.save(handle, tmp_path / "b", license="mit"))[0]["license"] == "mit"


def test_a_model_of_the_hub_names_itself(tmp_path):
    model = adapters.model()
    model.name_or_path = BASE
    data, _ = card_of(hub.save(patch(model, "vtc_cls", keep=0.5), tmp_path))
    assert data["base_model"] == BASE


@pytest.mark.parametrize("base_model", ["/home/me/llava", "llava", "a/b/c"])
def test_a_base_model_must_be_on_the_hub(handle, tmp_path, base_model):
    with pytest.raises(ConfigError, match="on the Hub"):
        hub.save(handle, tmp_path, base_model=base_model)


def test_the_snippet_runs(handle, tmp_path, monkeypatch):
    import transformers

    asked = []

    def from_pretrained(name, **options):
        asked.append(name)
        return adapters.model()

    _, body = card_of(hub.save(handle, tmp_path / "x", base_model=BASE))
    (snippet,) = re.findall(r"^```python\n(.*?)^```", body, re.S | re.M)
    auto = transformers.AutoModelForImageTextToText
    monkeypatch.setattr(auto, "from_pretrained", staticmethod(from_pretrained))
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    exec(compile(snippet, "card", "exec", dont_inherit=True), space)
    assert asked == [BASE]
    assert space["handle"].config.to_spec().startswith("vtc_cls:0.5 | atp(")


def test_a_card_can_be_written_again(handle, tmp_path):
    folder = hub.save(handle, tmp_path / "x")
    (folder / "results.json").write_text(json.dumps(adapters.RESULTS))
    hub.write_card(folder, hub.About("me/x", base_model=BASE, license="llama2"))
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results[0].metric_value == 0.8625
    assert 'hub.load(model, "me/x")' in card.text
