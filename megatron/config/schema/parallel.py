"""How the model and the batch are spread over processes."""

from __future__ import annotations

from typing import Any, Literal

from megatron.config.schema.base import Section, setting


class ParallelConfig(Section):
    """Sizes of the mesh axes, and what ZeRO shards over the data axis."""

    pipe_parallel_size: int = setting(0, "Pipeline stages; 0 and 1 both mean no pipeline.", unit="stages", ge=0)
    pipe_partition_method: str = setting(
        "parameters",
        "How layers are shared out over pipeline stages. parameters: equal numbers of weights; uniform: equal numbers "
        "of layers; type:<regular expression>: equal numbers of the layers whose name or class it finds.",
    )
    model_parallel_size: int = setting(
        1, "Processes that share each layer (tensor parallelism).", unit="processes", ge=1
    )
    context_parallel_size: int = setting(
        1,
        "Processes that share each sequence: each computes a part of its tokens, and attention goes round them all.",
        unit="processes",
        ge=1,
    )
    context_parallel_method: Literal["ring", "all_to_all"] = setting(
        "ring",
        "How attention sees the whole sequence. ring: keys and values travel from process to process; any number of "
        "heads. all_to_all: each process computes some of the heads over the whole sequence; attention dropout and "
        "pos_emb rpe work.",
    )
    sequence_parallel: bool = setting(
        False, "Spread norms and dropout over the tensor parallel processes along the sequence."
    )
    fp32_allreduce: bool = setting(
        False, "Tensor parallel processes sum 16 bit activations, and send them, in fp32. Gradients always are."
    )
    world_size: int = setting(1, "Processes of the run, one per GPU; counted by the launcher.", unit="processes", ge=1)
    zero_optimization: dict[str, Any] = setting(
        {"stage": 0},
        "DeepSpeed's ZeRO block. stage: 1 shards optimizer states, 2 gradients too, 3 parameters too; 0 shards "
        "nothing and is the fastest on one process. The arithmetic is the same.",
    )

    @property
    def data_parallel_size(self) -> int:
        """Groups of processes that read different samples; each group computes a model's whole step on its own."""
        stages = max(1, self.pipe_parallel_size)
        return self.world_size // (self.model_parallel_size * stages * self.context_parallel_size)


class BatchConfig(Section):
    """The batch triangle, whole after resolution:
    train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * data parallel size."""

    train_batch_size: int = setting(..., "Sequences of one optimizer step over all processes.", unit="sequences", ge=1)
    train_micro_batch_size_per_gpu: int = setting(
        ..., "Sequences that one process computes at once.", unit="sequences", ge=1
    )
    find_micro_batch_size: bool = setting(
        False,
        "Find the largest micro-batch that fits when the run starts, keeping train_batch_size, which must be set; "
        "train_micro_batch_size_per_gpu: auto is the same.",
    )
    gradient_accumulation_steps: int = setting(
        ..., "Micro-batches of each process in one optimizer step.", unit="micro-batches", ge=1
    )
