"""What `vlmcompress bench` measured, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmcompress.cli.output import table


def of_model(results: dict[str, Any]) -> str:
    """Tables of a model: times, stages, throughput and memory where they were measured."""
    first = results["configs"][0]["baseline"]
    rows = [["unpatched", "-", str(first["tokens"]), *_cells(first), "-", "-", "-"]]
    for row in results["configs"]:
        ratios = [f"{row['speedup']:.2f}", *_ratios(row)]
        rows.append([row["method"], str(row["keep"]), str(row["tokens"]), *_cells(row), *ratios])
    header = ["method", "keep", "tokens", "from image ms", "TTFT ms", "p99", "stdev", "TPOT ms"]
    header += ["ITL p99", "tok/s", "KV MiB", "GFLOPs", "speed-up", "floor ratio", "ideal ratio"]
    tables = [table(header, rows), _stages(results), *_throughput(results), *_memory(results)]
    return "\n\n".join([*filter(None, tables), _where(results["machine"])])


def _ratios(row: dict[str, Any]) -> list[str]:
    ideal = row["ideal_ratio"]
    return [f"{row['floor_ratio']:.3f}", "-" if ideal is None else f"{ideal:.3f}"]


def _cells(row: dict[str, Any]) -> list[str]:
    decode, flops = row["decode"] or {}, row["flops"]
    itl, rate = decode.get("itl"), decode.get("output_tokens_per_second")
    return [
        _ms(row["ttft_from_image"]),
        *(_ms(row["ttft"], key) for key in ("median", "p99", "stdev")),
        _ms(decode.get("tpot")),
        _ms(itl, "p99"),
        "-" if rate is None else f"{rate:.1f}",
        f"{row['kv_bytes'] / 2**20:.2f}",
        "-" if flops is None else f"{flops['total'] / 1e9:.2f}",
    ]


def _stages(results: dict[str, Any]) -> str:
    """Where the time to the first token goes, and how far it is from what it could be."""
    stages = list(results["configs"][0]["stages"])
    rows = [["unpatched", "-", *_split(results["configs"][0]["baseline"], stages), "-", "-"]]
    rows += [
        [row["method"], str(row["keep"]), *_split(row, stages), *_ratios(row)]
        for row in results["configs"]
    ]
    header = ["method", "keep", *(f"{stage} ms" for stage in stages), "floor ratio", "ideal ratio"]
    return table(header, rows)


def _split(row: dict[str, Any], stages: Sequence[str]) -> list[str]:
    return [f"{1000 * row['stages'][stage]:.2f}" for stage in stages]


def _throughput(results: dict[str, Any]) -> list[str]:
    found = results.get("throughput", {})
    header = ["method", "keep", "images/s", "tok/s", "latency ms", "p99", "speed-up"]
    header += ["floor ratio", "ideal ratio"]
    alone = {(row["method"], row["keep"]): _ratios(row) for row in results["configs"]}
    tables = []
    for kind, word in (("batches", "batch"), ("concurrency", "at once")):
        rows = [
            [
                str(row["size"]),
                row["method"],
                str(row["keep"]),
                *_rates(row),
                *alone.get((row["method"], row["keep"]), ["-", "-"]),
            ]
            for row in found.get(kind, ())
        ]
        tables += [table([word, *header], rows)] if rows else []
    return tables


def _rates(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["error"], "-", "-", "-", "-"]
    return [
        f"{row['images_per_second']:.2f}",
        f"{row['output_tokens_per_second']:.1f}",
        _ms(row["latency"]),
        _ms(row["latency"], "p99"),
        "-" if row["speedup"] is None else f"{row['speedup']:.2f}",
    ]


def _memory(results: dict[str, Any]) -> list[str]:
    rows = []
    names = ("weights", "before", "allocated", "reserved", "resident")
    for row in results.get("memory", ()):
        sizes = [row.get("error", _mib(row.get(names[0])))]
        rows.append(
            [row["method"], str(row["keep"]), *sizes, *(_mib(row.get(n)) for n in names[1:])]
        )
    header = ["method", "keep", "weights MiB", "before", "peak allocated", "peak reserved"]
    return [table([*header, "peak resident"], rows)] if rows else []


def of_towers(results: dict[str, Any]) -> str:
    """One table of a tower alone, by batch size."""
    rows = []
    for found in results["towers"]:
        size, first = str(found["batch"]), found["configs"][0]["baseline"]
        rate = f"{found['batch'] / first['mean']:.1f}"
        rows.append([size, "unpatched", "-", "-", _ms(first), _ms(first, "p99"), rate, "-", "-"])
        rows += [
            [
                size,
                row["method"],
                str(row["keep"]),
                str(row["patches"][-1]),
                _ms(row["seconds"]),
                _ms(row["seconds"], "p99"),
                f"{row['images_per_second']:.1f}",
                f"{row['speedup']:.2f}",
                f"{row['ideal_ratio']:.3f}",
            ]
            for row in found["configs"]
        ]
    header = ["batch", "method", "keep", "patches", "tower ms", "p99", "images/s", "speed-up"]
    return f"{table([*header, 'ideal ratio'], rows)}\n\n{_where(results['machine'])}"


def _where(machine: dict[str, Any]) -> str:
    kernels = ", ".join(f"{part} {kernel}" for part, kernel in machine["attention"].items())
    return (
        f"{machine['shape']} in {machine['dtype']} on {machine['device']} ({machine['cpu']}), "
        f"attention: {kernels}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"commit {machine['commit'] or 'unknown'}"
    )


def _ms(found: dict[str, float] | None, key: str = "median") -> str:
    return "-" if found is None else f"{1000 * found[key]:.1f}"


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f}"
