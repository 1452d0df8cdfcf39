"""Adapters and results on the Hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from vlmcompress.core.errors import ConfigError
from vlmcompress.hub.cards import table
from vlmcompress.hub.folder import CARD, EVAL_RESULTS, RESULTS, read, read_json
from vlmcompress.hub.results import Evaluation, date_of, evaluations
from vlmcompress.hub.saving import about_handle, write

if TYPE_CHECKING:
    from vlmcompress.live.handle import Handle

TEMPLATE = Path(__file__).with_name("results.md.jinja")
ROWS = "evaluations.jsonl"


def push(
    adapter: Handle | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload adapter",
    trained_keep: Sequence[float] | None = None,
    results: str | Path | Mapping[str, Any] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """Put an adapter on the Hub, in a repository that is made where it is missing.

    A README.md that the repository has stays where others wrote it (see `write_card`), and the
    licence is that of the base model, which the Hub is asked for.

    Args:
        adapter: a handle, which is saved first as `save` does with the arguments from
            `trained_keep` on; or the folder of an adapter, which goes as it is. Of a folder only
            the adapter's own files go, no checkpoints and no logs.
        repo_id: `"user/name"`.
        private: whether a repository that is made is private; None leaves it to the account.
        token: as `huggingface_hub` takes it; None is the one that was logged in with.
        endpoint: of the Hub, where it is not the public one.
        revision: branch to commit to.
        create_pr: whether to ask for the commit by a pull request.
        commit_message: its first line.
        trained_keep: as for `save`, like those that follow.
        results: what was measured.
        base_model: Hub id of the model.
        license: of the adapter.
        datasets: Hub ids of what was trained on.

    Returns:
        The commit's address.

    Raises:
        ConfigError, CheckpointError: as `save` and `load` do, and for facts about a folder, whose
            card is written already.
        huggingface_hub.errors.HfHubHTTPError: when the Hub refuses.
    """
    api = HfApi(endpoint=endpoint, token=token)
    commit = {"revision": revision, "create_pr": create_pr, "commit_message": commit_message}
    if isinstance(adapter, str | Path):
        if any(value is not None for value in (trained_keep, results, base_model, license)):
            raise ConfigError(
                "A folder goes to the Hub as it is; give trained_keep, results, base_model and "
                "license to vlmcompress.hub.save when it is written."
            )
        return _commit(api, repo_id, Path(adapter), private, commit)
    about = about_handle(adapter, repo_id, base_model, license, datasets, _lookup(api))
    with tempfile.TemporaryDirectory() as place:
        _fetch_card(api, repo_id, revision, Path(place))
        write(adapter, Path(place), about, trained_keep=trained_keep, results=results)
        return _commit(api, repo_id, Path(place), private, commit)


def push_results(
    results: str | Path | Mapping[str, Any] | Sequence[str | Path],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    license: str | None = None,
    commit_message: str = "Upload results",
) -> str:
    """Put results files on the Hub as a data set, with a card made from them.

    Args:
        results: a results file, several, a folder of them, or what stands in one.
        repo_id: `"user/name"` of the data set, made where it is missing.
        private: as for `push`.
        token: as for `push`.
        endpoint: as for `push`.
        license: of the results, as the Hub names it.
        commit_message: its first line.

    Returns:
        The commit's address.

    Raises:
        ConfigError: for what are no results, or two files of one name.
        huggingface_hub.errors.HfHubHTTPError: when the Hub refuses.
    """
    found = _collected(results)
    api = HfApi(endpoint=endpoint, token=token)
    with tempfile.TemporaryDirectory() as place:
        write_results(found, Path(place), repo_id, license)
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=place,
            commit_message=commit_message,
        )
    return str(done.commit_url)


def write_results(
    found: Mapping[str, Mapping[str, Any]], folder: Path, name: str, license: str | None = None
) -> None:
    """The data set of some results: their files, one line for each value, and a card.

    Args:
        found: results by the name of their file.
        folder: that exists.
        name: of the data set.
        license: of the results.

    Raises:
        ConfigError: for results that are none.
    """
    measured = [e for results in found.values() for e in evaluations(results)]
    (folder / "results").mkdir(exist_ok=True)
    for each, results in found.items():
        text = json.dumps(results, indent=2) + "\n"
        (folder / "results" / each).write_text(text, encoding="utf-8")
    if measured:
        lines = [json.dumps(row) for row in _rows(found)]
        (folder / ROWS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = DatasetCardData(
        license=license,
        pretty_name=name.rpartition("/")[2],
        tags=["vlmcompress", "benchmark", "visual-token-compression"],
        configs=[{"config_name": "default", "data_files": ROWS if measured else "results/*.json"}],
    )
    card = DatasetCard.from_template(
        data, template_path=str(TEMPLATE), **_shown(found, name, measured)
    )
    (folder / CARD).write_text(f"{str(card).strip()}\n", encoding="utf-8")


def _rows(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"file": name, "date": date_of(results), **each.row()}
        for name, results in found.items()
        for each in evaluations(results)
    ]


def _shown(
    found: Mapping[str, Mapping[str, Any]], name: str, measured: Sequence[Evaluation]
) -> dict[str, Any]:
    files, commands = [], []
    for each, results in found.items():
        machine = results.get("machine")
        machine = machine if isinstance(machine, Mapping) else {}
        facts = {key: machine.get(key, "") for key in ("date", "commit", "device")}
        files.append({"name": each, **facts})
        if isinstance(results.get("command"), str):
            commands.append(results["command"])
    title = name.rpartition("/")[2]
    return {"title": title, "files": files, "commands": commands, "rows": table(measured)}


def _collected(results: Any) -> dict[str, Mapping[str, Any]]:
    """Results by the name of their file."""
    if isinstance(results, Mapping):
        evaluations(results)
        return {RESULTS: results}
    paths = [results] if isinstance(results, str | Path) else list(results)
    if len(paths) == 1 and Path(paths[0]).is_dir():
        paths = sorted(Path(paths[0]).glob("*.json"))
    if not paths:
        raise ConfigError(f"{results!r} holds no results files; give files that end in .json.")
    found: dict[str, Mapping[str, Any]] = {}
    for path in map(Path, paths):
        if path.name in found:
            raise ConfigError(f"Two results files are called {path.name!r}; rename one of them.")
        found[path.name] = read_json(path, "results file")
        evaluations(found[path.name])
    return found


def _commit(
    api: HfApi, repo_id: str, folder: Path, private: bool | None, commit: Mapping[str, Any]
) -> str:
    """The adapter in a folder, uploaded; the commit's address."""
    names = read(folder).files
    api.create_repo(repo_id, private=private, exist_ok=True)
    done = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=[*names, f"{EVAL_RESULTS}/*.yaml"],
        **commit,
    )
    return str(done.commit_url)


def _lookup(api: HfApi) -> Any:
    """Asks the Hub for the metadata of a model's card."""

    def lookup(repo_id: str) -> Any:
        try:
            return api.model_info(repo_id).card_data
        except HfHubHTTPError:
            return None  # not on this Hub, or not for everybody: the card says no licence

    return lookup


def _fetch_card(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> None:
    """The repository's README.md into a folder, where there is one."""
    try:
        path = api.hf_hub_download(repo_id, CARD, revision=revision)
    except LocalEntryNotFoundError:
        raise  # the Hub cannot be reached, which says nothing about its card
    except (EntryNotFoundError, RepositoryNotFoundError):
        return
    shutil.copyfile(path, folder / CARD)
