"""Where prompts come from: a file, nothing at all, or a person at the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megatron.config.schema.run import GenerationConfig
from megatron.errors import DataError, Problem

_STOP = "stop"


def read_prompts(config: GenerationConfig) -> list[str]:
    """Return the prompts of a run that is not interactive: those of the file, or `num_samples` empty ones.

    Raises DataError where the file is not there or holds no prompt.
    """
    kind = config.text_gen_type or ("input-file" if config.sample_input_file else "unconditional")
    if kind == "unconditional":
        return [""] * config.num_samples
    return _from_file(config.sample_input_file, config.prompt_end)


def _from_file(name: str | None, prompt_end: str) -> list[str]:
    what = f"sample_input_file = {name}"
    if name is None:
        fix = "Give a file of prompts with -i prompts.txt, or set text_gen_type: unconditional."
        raise DataError(Problem("text_gen_type = input-file", "sample_input_file is not set.", fix))
    try:
        text = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        fix = "Give a file of prompts with -i prompts.txt."
        raise DataError(Problem(what, f"It cannot be read ({error.strerror}).", fix)) from error
    except UnicodeDecodeError as error:
        raise DataError(Problem(what, f"It is not UTF-8 text ({error.reason}).", "Save it as UTF-8.")) from error
    prompts = split_prompts(text, prompt_end)
    if not prompts:
        raise DataError(Problem(what, "It holds no prompt.", f"Write prompts, each ended by {prompt_end!r}."))
    return prompts


def split_prompts(text: str, prompt_end: str) -> list[str]:
    """Return the prompts of a text, without white space around them; empty ones are left out."""
    parts = text.split(prompt_end) if prompt_end else [text]
    return [part.strip() for part in parts if part.strip()]


def _hint(prompt_end: str) -> str:
    """Return how a person ends a prompt."""
    if prompt_end == "\n":
        return "one line"
    if prompt_end.strip() and prompt_end == f"\n{prompt_end.strip()}\n":
        return f"any number of lines, then a line `{prompt_end.strip()}`"
    return f"ended by {prompt_end!r}"


def ask(prompt_end: str, source: TextIO, screen: TextIO) -> Iterator[str]:
    """Yield what a person writes, prompt by prompt, until the end of the input or a line `stop`."""
    screen.write(f"Write a prompt ({_hint(prompt_end)}); `{_STOP}` or Ctrl-D ends.\n")
    pending = ""
    while True:
        screen.write("... " if pending else ">>> ")
        screen.flush()
        line = source.readline()
        ended = not line or line.strip() == _STOP
        pending += "" if ended else line
        text = pending.rstrip("\n")
        if ended or pending.endswith(prompt_end) or text.endswith(prompt_end):
            pending = ""
            if prompt := text.removesuffix(prompt_end).strip():
                yield prompt
        if ended:
            screen.write("\n")
            return
