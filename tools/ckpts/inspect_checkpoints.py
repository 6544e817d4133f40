#!/usr/bin/env python
"""Look into checkpoints: what there is, whether it is whole, and how two of them differ.

python tools/ckpts/inspect_checkpoints.py list checkpoints/pile
python tools/ckpts/inspect_checkpoints.py show checkpoints/pile --tensors
python tools/ckpts/inspect_checkpoints.py verify checkpoints/pile --iteration 1000
python tools/ckpts/inspect_checkpoints.py diff checkpoints/pile/global_step1000 checkpoints/pile/global_step2000
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron.checkpoint.layout import loadable_steps, read_latest
from megatron.checkpoint.load import CheckpointReader, find_checkpoint
from megatron.errors import CheckpointError, DeepyError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, 1 where two checkpoints differ, 2 with problems on stderr."""
    options = _parser().parse_args(arguments)
    lines = {"list": _list, "show": _show, "verify": _verify, "diff": _diff}[options.command](options)
    try:
        count = 0
        for line in lines:
            print(line)
            count += 1
    except DeepyError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 1 if options.command == "diff" and count else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="tools/ckpts/inspect_checkpoints.py",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "list": "all checkpoints of a save folder",
        "show": "what one checkpoint holds",
        "verify": "read one checkpoint and compare every hash",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", help="the save folder of a run, or one global_step<N>")
        command.add_argument("--iteration", type=int, help="step of the checkpoint; default: the newest")
        command.add_argument("--tensors", action="store_true", help="list every tensor (show)")
    diff = commands.add_parser("diff", help="config keys and tensors in which two checkpoints differ")
    diff.add_argument("first")
    diff.add_argument("second")
    return parser


def _list(options: argparse.Namespace) -> Iterator[str]:
    root = Path(options.folder)
    latest = read_latest(root)
    steps = loadable_steps(root)
    if not steps:
        find_checkpoint(root)
    for iteration, folder in steps.items():
        mark = "  <- latest" if iteration == latest else ""
        try:
            manifest = CheckpointReader(folder).manifest
        except CheckpointError as error:
            yield f"{folder.name:24} damaged: {error.problems[0].why}{mark}"
            continue
        tokens = manifest.progress.get("consumed_tokens", 0)
        yield f"{folder.name:24} {manifest.size / 1e6:10.1f} MB {tokens:>16,} tokens{mark}"


def _show(options: argparse.Namespace) -> Iterator[str]:
    reader = CheckpointReader(find_checkpoint(options.folder, options.iteration))
    manifest = reader.manifest
    yield f"folder     {reader.folder}"
    yield f"iteration  {manifest.iteration}"
    for title, values in (("progress", manifest.progress), ("topology", manifest.topology)):
        yield f"{title:10} " + ", ".join(f"{key} {value}" for key, value in values.items())
    yield "written by " + ", ".join(f"{key} {value}" for key, value in manifest.versions.items())
    yield f"tokenizer  {manifest.tokenizer.get('name', 'not recorded')}"
    yield f"size       {manifest.size / 1e6:.1f} MB in {len(manifest.files)} files"
    yield f"parameters {sum(torch.Size(shape).numel() for shape in reader.shapes.values()):,}"
    for kind, entries in manifest.tensors.items():
        yield f"{kind:10} {len(entries)} tensors, {', '.join(sorted({entry.dtype for entry in entries.values()}))}"
        if options.tensors:
            yield from (f"    {name} {list(entry.shape)} {entry.dtype}" for name, entry in entries.items())


def _verify(options: argparse.Namespace) -> Iterator[str]:
    reader = CheckpointReader(find_checkpoint(options.folder, options.iteration))
    reader.verify()
    yield f"{reader.folder} is whole: {reader.manifest.size / 1e6:.1f} MB agree with their hashes"


def _diff(options: argparse.Namespace) -> Iterator[str]:
    first, second = (CheckpointReader(find_checkpoint(folder)) for folder in (options.first, options.second))
    configs = (first.manifest.config, second.manifest.config)
    left, right = ({k: v for section in config.values() for k, v in section.items()} for config in configs)
    for key in sorted({*left, *right}):
        if left.get(key) != right.get(key):
            yield f"{key}: {left.get(key)} | {right.get(key)}"
    for kind in sorted({*first.kinds, *second.kinds}):
        for name in sorted({*first.names(kind), *second.names(kind)}):
            yield from _compare(name, kind, first, second)


def _compare(name: str, kind: str, first: CheckpointReader, second: CheckpointReader) -> Iterator[str]:
    left, right = first.read(name, kind), second.read(name, kind)
    if left is None or right is None:
        yield f"{kind} {name}: only in the {'second' if left is None else 'first'}"
    elif left.shape != right.shape or left.dtype != right.dtype:
        yield f"{kind} {name}: {list(left.shape)} {left.dtype} | {list(right.shape)} {right.dtype}"
    elif not torch.equal(left, right):
        difference = (left.double() - right.double()).abs().max().item()
        yield f"{kind} {name}: largest difference {difference:.3e}"


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end without a word when `| head` has seen enough
    sys.exit(main())
