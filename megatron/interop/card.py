"""README.md of an exported model: what it is, where it came from, and the proof that it computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.checkpoint.load import CheckpointReader
from megatron.config.schema.config import Config
from megatron.interop.family import Family
from megatron.interop.verify import Agreement
from megatron.model.accounting import num_parameters


def model_card(
    reader: CheckpointReader,
    config: Config,
    family: Family,
    rows: int,
    agreements: Sequence[Agreement],
    name: str,
    with_tokenizer: bool,
) -> str:
    """Return the text of the card.

    rows: of the vocabulary, padding included. name: of the exported folder.
    """
    model = config.model
    progress = reader.manifest.progress
    facts = {
        "architecture": f"{family.architecture} ({family.model_type})",
        "parameters": f"{num_parameters(model, rows):,}",
        "layers, hidden size, heads": f"{model.num_layers}, {model.hidden_size}, {model.num_attention_heads}",
        "context": f"{model.max_position_embeddings} positions, trained on sequences of {model.seq_length}",
        "vocabulary": f"{rows} rows, with padding",
        "steps": reader.manifest.iteration,
        "samples": f"{progress.get('consumed_samples', 0):,}",
        "tokens": f"{progress.get('consumed_tokens', 0):,}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    proof = "\n".join(_proof_row(agreement) for agreement in agreements)
    tokenizer = "" if with_tokenizer else _NO_TOKENIZER
    return _CARD.format(name=name, table=table, proof=proof, tokenizer=tokenizer)


def _proof_row(agreement: Agreement) -> str:
    ours, theirs = agreement.losses
    return (
        f"| {agreement.precision} | {agreement.largest_difference:.2e} | {agreement.largest_logit:.2f} | "
        f"{agreement.top1:.2%} | {abs(ours - theirs):.1e} | {agreement.num_positions} |"
    )


def write_card(folder: Path, text: str) -> None:
    """Write README.md."""
    (folder / "README.md").write_text(text, encoding="utf-8")


_NO_TOKENIZER = "\nIts tokenizer has no form that transformers reads, so it is not part of this folder.\n"

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A language model trained with deepy.

| | |
|---|---|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
print(tokenizer.decode(model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=50)[0]))
```
{tokenizer}
## Conversion

The logits of this folder, loaded with transformers, against those of the trained model, on fixed prompts and fixed
pseudo-random tokens:

| precision | largest difference | largest logit | same likeliest token | difference of loss | positions |
|---|---|---|---|---|---|
{proof}
"""
