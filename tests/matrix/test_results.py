"""Shards, resuming, fingerprints, and that the committed results are those of the lists."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest

from scripts import readme
from tests.matrix import fingerprint, results
from tests.matrix.cells import Cell, cells, every_cell, in_shard, parse_shard
from tests.matrix.results import Outcome
from tests.seam import matrix
from tests.seam.checks import CHECKS, LAYER_CHECKS
from vlmcompress.methods import registry

ONE = Cell("llava", "sdpa", "float32", "uniform", "cache_bytes")


def outcome(cell, result="passed", reason="", known=None):
    known = fingerprint.of_pair(cell.method, cell.family) if known is None else known
    return Outcome(str(cell), known, result, reason)


# --- the committed file -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed():
    return json.loads(results.FILE.read_text(encoding="utf-8"))


def test_every_method_is_in_the_matrix():
    """Whatever is registered: one line in `tests/methods_list.py` brings it in."""
    assert sorted(matrix.names()) == sorted(registry.BUILTIN)


def test_every_method_has_cells_where_it_exists():
    there = {(cell.family, cell.method) for cell in cells()}
    assert there == set(matrix.everything())
    assert {method for _, method in there} == set(matrix.names())


def test_the_committed_results_are_those_of_the_lists(committed):
    """Older than the lists: run `make test-matrix` (only what is new runs) and commit its file."""
    missing = [name for name in matrix.names() if name not in committed["results"]]
    assert not missing, f"methods without results: {', '.join(missing)}; run `make test-matrix`"
    assert committed["axes"] == json.loads(json.dumps(results.axes()))
    assert committed["lists"] == fingerprint.of_lists()
    assert set(committed["results"]) == set(matrix.names())
    for family, method in matrix.everything():
        row = committed["results"][method][family]["outcomes"]
        assert len(row) == len(matrix.KERNELS)
        for words in map(str.split, row):
            assert [len(word) for word in words] == [len(matrix.EQUALITIES)] * len(matrix.DTYPES)


def test_no_committed_cell_failed(committed):
    assert committed["counts"]["failed"] == 0
    assert committed["counts"]["passed"] + committed["counts"]["passed on earlier sources"] > 0
    signs = "".join(
        text
        for families in committed["results"].values()
        for row in families.values()
        for text in row["outcomes"]
    )
    others = {results.EARLIER, results.NOT_RUN, results.NO_CELL, " "}
    known = {results.PASSED, *others, *committed["reasons"]}
    assert set(signs) <= known
    assert signs.count(results.PASSED) == committed["counts"]["passed"]
    assert signs.count(results.NOT_RUN) == committed["counts"]["not run"]


def test_no_committed_cell_is_missing(committed):
    """An expected failure that names the debt, so that it stands in every test run until paid."""
    missing = committed["counts"]["not run"] + committed["counts"]["passed on earlier sources"]
    if missing:
        pytest.xfail(
            f"{missing} cells have not run on these sources; run `make test-matrix`, which goes on"
        )


def test_only_what_needs_another_machine_was_skipped(committed):
    exempt = {e.reason for e in matrix.EXEMPT}
    skipped = set(committed["reasons"].values()) - exempt
    assert skipped <= {"needs a CUDA device and the flash-attn package"}


def test_the_committed_file_is_small():
    assert results.FILE.stat().st_size < 300_000


# --- cells and shards ---------------------------------------------------------------------------


def test_cells_have_names_of_their_own():
    names = [str(cell) for cell in every_cell()]
    assert len(set(names)) == len(names)
    assert set(matrix.EQUALITIES) == set(CHECKS)
    assert set(LAYER_CHECKS) <= set(CHECKS)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_are_disjoint_and_exhaustive(count):
    shards = [{c for c in cells() if in_shard(c, (i + 1, count))} for i in range(count)]
    assert sum(map(len, shards)) == len(cells())
    assert set.union(*shards) == set(cells())
    assert min(map(len, shards)) > 0.7 * len(cells()) / count


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/2"])
def test_shards_that_do_not_exist(text):
    with pytest.raises(ValueError, match="1/4"):
        parse_shard(text)


def test_exemptions_have_reasons_and_name_what_exists():
    axes = results.axes()
    for exemption in matrix.EXEMPT:
        assert len(exemption.reason) > 20
        for axis in matrix.AXES:
            assert set(getattr(exemption, axis)) <= set(axes[axis]), exemption
        assert any(exemption.reason == cell.exempt for cell in every_cell()), exemption


def test_cells_are_crossed_by_the_rule():
    """All with one kernel and dtype; methods inside a model vary one of both, on three families."""
    plain = matrix.PLAIN
    everywhere = {(f, m, e) for f, m in matrix.everything() for e in matrix.EQUALITIES}
    found = {(c.kernel, c.dtype): set() for c in every_cell()}
    for cell in every_cell():
        found[cell.kernel, cell.dtype].add((cell.family, cell.method, cell.equality))
    assert found.pop(plain) == everywhere
    assert len(found) == len(matrix.KERNELS) * len(matrix.DTYPES) - 1
    for (kernel, dtype), there in found.items():
        assert {e for _, _, e in there} == set(matrix.EQUALITIES) - set(matrix.ONCE_PER_FAMILY)
        alone = kernel == plain[0] or dtype == plain[1] or kernel == "flash_attention_2"
        for name in matrix.names():
            families = {f for f, m, _ in there if m == name}
            known = {f for f, m in matrix.everything() if m == name}
            if matrix.stage_of(name) == "connector":
                assert families == known
            else:
                assert len(families) == (min(3, len(known)) if alone else 0)


def test_a_method_that_says_nothing_of_itself_exempts_nobody():
    with pytest.raises(ValueError, match="take its exemption out"):
        matrix._which("decoder", "stage", "tower")


@pytest.mark.parametrize("stage", ["tower", "decoder"])
def test_a_method_is_absent_where_patch_refuses_it(stage):
    for name, family in itertools.product(matrix.names(stage), matrix.FAMILIES):
        reason = matrix.absent(name, family)
        assert (reason is None) == ((family, name) in matrix.everything())
        assert reason is None or name not in reason.split()


# --- fingerprints -------------------------------------------------------------------------------


def test_all_of_live_and_core_is_in_every_fingerprint():
    for method in matrix.names():
        names = {str(path.relative_to(fingerprint.ROOT)) for path in fingerprint.sources(method)}
        for folder in ("live", "core", "families"):
            files = (fingerprint.ROOT / "vlmcompress" / folder).glob("*.py")
            assert {str(path.relative_to(fingerprint.ROOT)) for path in files} <= names


def test_all_that_runs_a_cell_is_in_every_fingerprint():
    """Equalities, references, models: all of them, and none of the lists."""
    names = {str(path.relative_to(fingerprint.ROOT)) for path in fingerprint.judges()}
    parts = ("checks", "equalities", "layer_equalities", "use_equalities", "reductions", "worlds")
    parts += ("oracle", "kernels", "talk")
    assert {f"tests/seam/{part}.py" for part in parts} | {"tests/tiny/__init__.py"} <= names
    assert not names & set(fingerprint.LISTS)


@pytest.mark.parametrize("name", ["tome_tower", "fastv"])
def test_methods_inside_a_model_bring_their_files(name):
    module = registry.BUILTIN[name].partition(":")[0].replace(".", "/")
    names = {str(path.relative_to(fingerprint.ROOT)) for path in fingerprint.sources(name)}
    assert {f"{module}.py", f"{module.rpartition('/')[0]}/base.py"} <= names
    assert not names & {"vlmcompress/methods/connector/pool.py"}


def test_a_method_depends_on_its_own_file_and_no_others():
    names = {path.name for path in fingerprint.sources("divprune")}
    assert {"divprune.py", "diversity.py", "base.py"} <= names
    assert not names & {"vtc_cls.py", "hired.py", "pool.py"}


@pytest.fixture
def forgetful(monkeypatch):
    """Fingerprints are computed anew, before and after a test."""
    cached = (
        fingerprint.of_pair,
        fingerprint.meaning,
        fingerprint.imported,
        fingerprint.judges,
        fingerprint.sources,
    )

    def forget():
        for function in cached:
            function.cache_clear()

    forget()
    yield forget
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("vlmcompress/live/encode.py", {"divprune", "pool"}),
        ("vlmcompress/core/keep.py", {"divprune", "pool"}),
        ("tests/seam/oracle.py", {"divprune", "pool"}),
        ("tests/seam/reductions.py", {"divprune", "pool"}),
        ("vlmcompress/methods/connector/pool.py", {"pool"}),
        ("vlmcompress/methods/ops/diversity.py", {"divprune"}),
        ("vlmcompress/methods/table.py", set()),
    ],
)
def test_a_change_makes_old_what_depends_on_it(forgetful, monkeypatch, file, changed):
    before = {name: fingerprint.of_pair(name, "llava") for name in ("divprune", "pool")}
    parse = fingerprint._tree

    def edited(path):
        tree = parse(path)
        if path == fingerprint.ROOT / file:
            tree.body.pop()
        return tree

    monkeypatch.setattr(fingerprint, "_tree", edited)
    forgetful()
    after = {name: fingerprint.of_pair(name, "llava") for name in before}
    assert {name for name in before if before[name] != after[name]} == changed


def test_a_new_method_makes_no_other_result_old(forgetful, monkeypatch):
    before = fingerprint.of_pair("pool", "llava")
    parse = fingerprint._tree

    def longer(path):
        text = path.read_text(encoding="utf-8").replace("= {", '= {"new": "x.y:Z",')
        return fingerprint.ast.parse(text) if path.name == "registry.py" else parse(path)

    monkeypatch.setattr(fingerprint, "_tree", longer)
    forgetful()
    assert fingerprint.of_pair("pool", "llava") == before


def test_options_and_families_count(forgetful, monkeypatch):
    before = fingerprint.of_pair("random", "llava")
    assert before != fingerprint.of_pair("random", "vipllava")
    monkeypatch.setitem(matrix.OPTIONS, "random", {"seed": 4})
    forgetful()
    assert fingerprint.of_pair("random", "llava") != before


# --- outcomes -----------------------------------------------------------------------------------


def test_outcomes_of_several_writers_are_merged(tmp_path):
    first, second, third = cells()[:3]
    results.append(tmp_path, "gw0", outcome(first))
    results.append(tmp_path, "gw0", outcome(second, "failed", "no"))
    results.append(tmp_path, "gw1", outcome(second))
    results.append(tmp_path, "gw1", outcome(third, known="older"))
    with (tmp_path / "gw1.jsonl").open("a") as file:
        file.write('{"cell": "cut off')  # a killed process
    assert results.passed(results.read(tmp_path)) == {str(first), str(second)}


def test_the_file_remembers_what_passed(tmp_path):
    first, second, third = cells()[:3]
    known = {o.cell: o for o in (outcome(first), outcome(second, "failed", "no"))}
    known[str(third)] = outcome(third, "skipped", "needs a thing")
    file = tmp_path / "matrix.json"
    file.write_text(results.dumps(results.table(known)), encoding="utf-8")
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content == json.loads(json.dumps(results.table(known)))
    counts = content["counts"]
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 1, 1)
    assert counts["exempt"] == sum(cell.exempt is not None for cell in every_cell())
    assert sum(counts.values()) == len(every_cell())
    again = results.merged(tmp_path, file)
    assert again[str(first)].outcome == "passed"
    assert again[str(third)].reason == "needs a thing"
    assert str(second) not in again


def test_the_page_shows_failures_gaps_and_exemptions():
    every = {str(cell): outcome(cell) for cell in cells()}
    good = readme.matrix_region(results.table(every))
    assert "✗" not in good
    assert "| ? " not in good
    assert "| `pool` | ✓ <sup>1</sup> |" in good
    assert "| `vtc_cls` | ✓ | - |" in good
    assert "✗" in readme.matrix_region(results.table({**every, str(ONE): outcome(ONE, "failed")}))
    every.pop(str(ONE))
    assert "| ? |" in readme.matrix_region(results.table(every))
    assert "| (✓) |" in readme.matrix_region(results.table(every, {str(ONE)}))
    exemptions = readme.exemptions_region(results.table(every))
    assert all(exemption.reason in exemptions for exemption in matrix.EXEMPT)


def test_what_passed_on_older_sources_says_so(tmp_path):
    file = tmp_path / "matrix.json"
    content = results.table({str(ONE): outcome(ONE)})
    content["results"]["uniform"]["llava"]["fingerprint"] = "older"
    file.write_text(results.dumps(content), encoding="utf-8")
    assert results.passed_earlier(file) == {str(ONE)}
    for _ in range(2):  # also when it is written twice
        again = results.table(results.merged(tmp_path, file), results.passed_earlier(file))
        assert again["counts"]["passed"] == 0
        assert again["counts"]["passed on earlier sources"] == 1
        file.write_text(results.dumps(again), encoding="utf-8")


def test_results_of_older_sources_are_not_taken_over(tmp_path):
    content = results.table({str(ONE): outcome(ONE)})
    content["results"]["uniform"]["llava"]["fingerprint"] = "older"
    file = tmp_path / "matrix.json"
    file.write_text(results.dumps(content), encoding="utf-8")
    assert results.committed(file) == {}


def _run(folder, *more):
    command = "-m pytest -p tests.matrix.plugin -p no:cacheprovider -q -m matrix tests/matrix"
    chosen = ["-k", str(ONE), "--results", str(folder), *more]
    done = subprocess.run(
        [sys.executable, *command.split(), *chosen],
        cwd=fingerprint.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.slow
def test_a_run_writes_its_outcomes_and_the_next_skips_them(tmp_path):
    code, out = _run(tmp_path, "--fresh", "-n", "1")
    assert code == 0, out
    (line,) = (tmp_path / "gw0.jsonl").read_text().splitlines()
    assert json.loads(line)["cell"] == str(ONE)
    assert results.passed(results.read(tmp_path)) == {str(ONE)}
    code, out = _run(tmp_path)
    assert code == 0, out
    assert "deselected" in out
    assert " passed" not in out
