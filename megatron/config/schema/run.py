"""What a run saves, shows and generates, and how it is started."""

from __future__ import annotations

from typing import Literal

from megatron.config.schema.base import Section


class CheckpointConfig(Section):
    save: str | None = None
    load: str | None = None
    checkpoint_factor: float | None = None
    checkpoint_scale: Literal["linear", "log"] = "linear"
    extra_save_iters: list[int] | None = None
    keep_last_n_checkpoints: int | None = None
    finetune: bool = False
    no_load_optim: bool = False
    no_save_optim: bool = False
    iteration: int | None = None


class MonitorConfig(Section):
    run_name: str | None = None
    runs_dir: str = "runs"
    log_interval: int = 100
    peak_theoretical_tflops: float | None = None
    tensorboard_dir: str | None = None
    use_wandb: bool | None = None
    wandb_project: str = "neox"
    wandb_group: str | None = None
    wandb_run_name: str | None = None
    wandb_team: str | None = None
    wandb_host: str | None = None


class GenerationConfig(Section):
    text_gen_type: Literal["unconditional", "input-file", "interactive"] | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    maximum_tokens: int = 64
    prompt_end: str = "\n"
    sample_input_file: str | None = None
    sample_output_file: str = "samples.txt"
    num_samples: int = 1
    recompute: bool = False


class LauncherConfig(Section):
    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    num_nodes: int = -1
    num_gpus: int | None = None
    master_addr: str | None = None
    master_port: int = 29500
    launcher: Literal["pdsh", "openmpi", "mvapich", "slurm"] = "pdsh"
    force_multi: bool = False
    no_ssh_check: bool = False
    comment: str | None = None
    account: str | None = None
