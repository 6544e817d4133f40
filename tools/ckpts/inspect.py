#!/usr/bin/env python
"""Look into checkpoints, in folders or behind URLs: what one holds, whether it is whole, and how two differ.

python tools/ckpts/inspect.py checkpoints/pile                        # the newest: config, progress, topology, sizes
python tools/ckpts/inspect.py checkpoints/pile --iteration 1000 --tensors --norms
python tools/ckpts/inspect.py s3://bucket/pile --verify               # read everything, compare every hash
python tools/ckpts/inspect.py list checkpoints/pile
python tools/ckpts/inspect.py compare checkpoints/pile/global_step1000 s3://bucket/pile/global_step1000
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # this folder must not be searched for modules: it holds one called inspect
    sys.path[0] = __file__.rsplit("tools", 1)[0] or "."

import argparse
import json
import math
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from megatron.checkpoint.compare import compare_settings, compare_tensors, total_bytes
from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.checkpoint.steps import latest_step, readable_steps
from megatron.checkpoint.storage import storage_of
from megatron.checkpoint.topology import describe
from megatron.data.bar import Bar
from megatron.errors import CheckpointError, DeepyError

_COMMANDS = ("list", "compare")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, 1 where two checkpoints differ, 2 with problems on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given.pop(0) if given and given[0] in _COMMANDS else "show"
    options = _parser(command).parse_args(given)
    try:
        return {"show": _show, "list": _list, "compare": _compare}[command](options)
    except DeepyError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"cannot be read: {error.strerror or error} ({error.filename or 'no name'})", file=sys.stderr)
        return 2


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="tools/ckpts/inspect.py" + (f" {command}" if command != "show" else ""),
    )
    if command == "compare":
        parser.add_argument("first", help="a checkpoint, or the save folder of a run (its newest)")
        parser.add_argument("second")
    else:
        parser.add_argument("folder", help="the save folder of a run or its URL, or one global_step<N>")
    if command == "show":
        parser.add_argument("--iteration", type=int, help="step of the checkpoint; default: the newest")
        parser.add_argument("--tensors", action="store_true", help="list every tensor with its shape and dtype")
        parser.add_argument("--norms", action="store_true", help="with the L2 norm of each, for which all is read")
        parser.add_argument("--config", action="store_true", help="show the whole config")
        parser.add_argument("--verify", action="store_true", help="read all of it and compare every hash")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _show(options: argparse.Namespace) -> int:
    reader = CheckpointReader(find_checkpoint(options.folder, options.iteration))
    if options.verify:
        bar = Bar("reading", total_bytes(reader))
        reader.verify(bar.advance)
        bar.close()
    found = _description(reader, options)
    if options.verify:
        found["verified"] = True
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    for line in _summary(reader, found):
        print(line)
    if options.verify:
        print(f"verified    whole: {_megabytes(reader.manifest.size)} agree with their hashes")
    return 0


def _description(reader: CheckpointReader, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a checkpoint holds, as JSON values."""
    manifest = reader.manifest
    found: dict[str, Any] = {
        "folder": str(reader.folder),
        "iteration": manifest.iteration,
        "progress": dict(manifest.progress),
        "topology": dict(manifest.topology),
        "versions": dict(manifest.versions),
        "tokenizer": manifest.tokenizer.get("name"),
        "bytes": manifest.size,
        "files": len(manifest.files),
        "parameters": sum(math.prod(shape) for shape in reader.shapes.values()),
        "kinds": {kind: _kind(reader, kind) for kind in reader.kinds},
    }
    if options.config or options.json:
        found["config"] = manifest.config
    if options.tensors or options.norms:
        found["tensors"] = list(_tensors(reader, options.norms))
    return found


def _kind(reader: CheckpointReader, kind: str) -> dict[str, Any]:
    entries = reader.manifest.tensors[kind].values()
    return {"tensors": len(entries), "dtypes": sorted({entry.dtype for entry in entries})}


def _tensors(reader: CheckpointReader, norms: bool) -> Iterator[dict[str, Any]]:
    for kind, entries in reader.manifest.tensors.items():
        for name, entry in entries.items():
            row: dict[str, Any] = {"kind": kind, "name": name, "shape": list(entry.shape), "dtype": entry.dtype}
            if norms:
                tensor = reader.read(name, kind)
                assert tensor is not None
                row["norm"] = torch.linalg.vector_norm(tensor.double()).item()
            yield row


def _summary(reader: CheckpointReader, found: dict[str, Any]) -> Iterator[str]:
    manifest = reader.manifest
    yield f"checkpoint  {reader.folder}"
    yield f"iteration   {manifest.iteration}"
    yield "progress    " + (
        ", ".join(f"{key} {value:,}" for key, value in manifest.progress.items() if _is_count(value)) or "-"
    )
    yield f"topology    {describe(manifest.topology) or 'not recorded'}"
    yield "written by  " + ", ".join(f"{key} {value}" for key, value in manifest.versions.items())
    yield f"tokenizer   {found['tokenizer'] or 'not recorded'}"
    yield f"size        {_megabytes(manifest.size)} in {len(manifest.files)} files"
    yield f"parameters  {found['parameters']:,}"
    yield ""
    rows = [(kind, facts["tensors"], ", ".join(facts["dtypes"])) for kind, facts in found["kinds"].items()]
    yield from _table(("kind", "tensors", "dtype"), rows)
    if "config" in found:
        yield ""
        yield from _table(("config key", "value"), sorted(_flat(manifest.config)))
    if "tensors" in found:
        columns = (
            ("kind", "name", "shape", "dtype", "norm")
            if "norm" in found["tensors"][0]
            else ("kind", "name", "shape", "dtype")
        )
        yield ""
        yield from _table(columns, [[_cell(row[column]) for column in columns] for row in found["tensors"]])


def _flat(config: Any) -> Iterator[tuple[str, str]]:
    for section in config.values():
        yield from ((key, json.dumps(value)) for key, value in section.items() if value is not None)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " x ".join(map(str, value)) or "scalar"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """Yield lines with aligned columns."""
    cells = [list(map(str, titles)), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    for number, row in enumerate(cells):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        if number == 0:
            yield "  ".join("-" * width for width in widths)


def _list(options: argparse.Namespace) -> int:
    root = storage_of(options.folder)
    steps = readable_steps(root)
    if not steps:
        find_checkpoint(root)
    latest, rows = latest_step(root), []
    for iteration, folder in steps.items():
        row: dict[str, Any] = {"checkpoint": folder.name, "latest": iteration == latest}
        try:
            manifest = CheckpointReader(folder).manifest
        except CheckpointError as error:
            rows.append({**row, "damage": error.problems[0].why})
            continue
        tokens = int(manifest.progress.get("consumed_tokens", 0))
        rows.append({**row, "bytes": manifest.size, "tokens": tokens, "topology": describe(manifest.topology)})
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    shown = (
        (row["checkpoint"], "DAMAGED", "", row["damage"], "latest" * row["latest"])
        if "damage" in row
        else (
            row["checkpoint"],
            _megabytes(row["bytes"]),
            f"{row['tokens']:,}",
            row["topology"],
            "latest" * row["latest"],
        )
        for row in rows
    )
    for line in _table(("checkpoint", "size", "tokens", "topology", ""), shown):
        print(line)
    return 0


def _compare(options: argparse.Namespace) -> int:
    first, second = (CheckpointReader(find_checkpoint(folder)) for folder in (options.first, options.second))
    bar = Bar("comparing", total_bytes(first))
    tensors = list(compare_tensors(first, second, bar.advance))
    bar.close()
    config = compare_settings(first.manifest.config, second.manifest.config)
    progress = compare_settings(first.manifest.progress, second.manifest.progress)
    verdict = _verdict(tensors, config, progress, sum(len(first.names(kind)) for kind in first.kinds))
    if options.json:
        result = {"tensors": [asdict(found) for found in tensors], "config": config, "progress": progress}
        print(json.dumps({**result, "different": bool(tensors or config or progress), "verdict": verdict}, indent=1))
    else:
        print(f"first   {first.folder}\nsecond  {second.folder}\n")
        for title, changes in (("progress", progress), ("config key", config)):
            for line in (
                _table((title, "first", "second"), ((k, *map(str, v)) for k, v in changes.items())) if changes else ()
            ):
                print(line)
            print(end="\n" * bool(changes))
        rows = [(t.kind, t.name, t.what, _number(t.largest), _number(t.relative)) for t in tensors]
        for line in _table(("kind", "tensor", "differs in", "largest", "relative"), rows) if rows else ():
            print(line)
        print("\n" * bool(rows) + verdict)
    return 1 if tensors or config or progress else 0


def _verdict(tensors: Sequence[Any], config: Any, progress: Any, count: int) -> str:
    parts = [f"{len(tensors)} tensors"] if tensors else []
    parts += [
        f"{len(found)} {what}" for found, what in ((config, "config keys"), (progress, "counts of progress")) if found
    ]
    if not parts:
        return f"THE SAME: {count} tensors, config and progress"
    alike = "" if tensors else f"; all {count} tensors are the same"
    return f"DIFFERENT: {', '.join(parts)}{alike}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3e}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end without a word when `| head` has seen enough
    sys.exit(main())
