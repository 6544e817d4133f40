"""What a run saves, shows and generates, and how it is started."""

from __future__ import annotations

from typing import Any, Literal

from megatron.config.schema.base import Section, setting


class CheckpointConfig(Section):
    """When the state is saved, how much is kept, and what a run starts from."""

    save: str | None = setting(
        None,
        "Folder of the run's checkpoints, or the URL of an object store (s3://bucket/run). Unset: nothing is saved.",
    )
    load: str | None = setting(
        None, "Folder or URL of checkpoints to start from; a run stops if it holds none, unless resume is auto."
    )
    resume: Literal["auto", "never"] = setting(
        "never", "auto: continue from the newest checkpoint of `save` (or `load`) if there is one, else start fresh."
    )
    checkpoint_factor: float | None = setting(
        None,
        "k of checkpoint_scale. linear: save every k steps; log: save at steps 1, k, k^2, ...",
        unit="optimizer steps",
        gt=0,
    )
    checkpoint_scale: Literal["linear", "log"] = setting("linear", "Whether saves are equally or log-spaced.")
    checkpoint_interval_minutes: float | None = setting(
        None,
        "Save when so much time has passed since the last save (by the clock of rank 0), whatever the step. Unset: "
        "only at the steps that other keys name.",
        unit="minutes",
        gt=0,
    )
    extra_save_iters: list[int] | None = setting(
        None, "More steps to save at; 0 saves the initial model.", unit="optimizer steps"
    )
    async_save: bool = setting(
        False,
        "Training waits only until the state is copied to host memory, which must have room for it (12 to 16 bytes for "
        "each parameter, spread over the ranks); threads write it while training goes on.",
    )
    s3_path: str | None = setting(
        None, "URL under which each checkpoint is stored again once it is in `save`; nothing is ever deleted there."
    )
    s3_chunk_size: int = setting(
        104857600, "Size of one part of an upload to an object store.", unit="bytes", ge=5 << 20, le=5 << 30
    )
    keep_last_n_checkpoints: int | None = setting(
        None, "Older checkpoints are removed after each save. Unset: all are kept.", unit="checkpoints", ge=1
    )
    finetune: bool = setting(False, "Load weights only: the step, the optimizer and the data start anew.")
    no_load_optim: bool = setting(False, "Do not load the optimizer's state.")
    no_save_optim: bool = setting(False, "Do not save the optimizer's state; such a checkpoint cannot resume exactly.")
    override_lr_scheduler: bool = setting(
        False, "A run that goes on with another learning rate schedule than its checkpoint's follows this config's."
    )
    use_checkpoint_lr_scheduler: bool = setting(
        False,
        "A run that goes on with another learning rate schedule keeps the checkpoint's. With neither key it stops, and "
        "shows both rates.",
    )
    iteration: int | None = setting(
        None, "Step of the checkpoint to load. Unset: the newest.", unit="optimizer steps", ge=0
    )


class StoppingConfig(Section):
    """When a run stops before its end, with a checkpoint and an exit code that says: start me again."""

    max_wall_time: float | str | None = setting(
        None,
        'Stop when so much time has passed since the launch: a number of minutes, "HH:MM:SS" or "D-HH:MM:SS". The step '
        "under way is finished, and then a checkpoint written. Unset: no limit.",
    )
    slurm_stop_minutes: float | None = setting(
        None,
        "Stop so long before the end of the Slurm job (SLURM_JOB_END_TIME). Unset: as long as the slowest steps and "
        "two saves took so far, and at least 2 minutes. 0: pay no attention to it.",
        unit="minutes",
        ge=0,
    )
    slurm_requeue: bool = setting(
        False, "Ask Slurm for another turn (`scontrol requeue`) when a run stopped with nothing lost."
    )
    requeue_exit_code: int = setting(
        75, "Exit code of a run that stopped with nothing lost, to be started again.", unit="none", ge=1, le=125
    )


class MonitorConfig(Section):
    """What a person sees of the run, and where it is written."""

    run_name: str | None = setting(None, "Folder under runs_dir for metrics and the loss plot. Unset: a date and time.")
    runs_dir: str = setting("runs", "Folder of all runs' metrics.")
    log_interval: int = setting(100, "Steps between log lines.", unit="optimizer steps", ge=1)
    peak_theoretical_tflops: float | None = setting(
        None, "Peak of one GPU, to report model FLOPs utilisation. Unset: from the GPU's name.", unit="TFLOP/s", gt=0
    )
    tensorboard_dir: str | None = setting(None, "Folder for TensorBoard. Unset: no TensorBoard.")
    use_wandb: bool | None = setting(
        None, "Log to Weights & Biases. Unset: yes if an API key is in the environment or in .netrc."
    )
    wandb_project: str = setting("neox", "Weights & Biases project.")
    wandb_group: str | None = setting(None, "Weights & Biases group.")
    wandb_run_name: str | None = setting(None, "Weights & Biases name of the run. Unset: run_name.")
    wandb_team: str | None = setting(None, "Weights & Biases team (entity).")
    wandb_host: str | None = setting(None, "Weights & Biases server. Unset: https://api.wandb.ai.")
    use_comet: bool | None = setting(None, "Log to Comet; the API key is taken from the environment.")
    comet_workspace: str | None = setting(None, "Comet workspace.")
    comet_project: str | None = setting(None, "Comet project.")
    comet_experiment_name: str | None = setting(None, "Comet name of the run. Unset: run_name.")
    comet_tags: list[str] | None = setting(None, "Comet tags.")
    comet_others: dict[str, Any] | None = setting(None, "More values that are recorded with the Comet experiment.")


class GenerationConfig(Section):
    """Text generation by generate.py."""

    text_gen_type: Literal["unconditional", "input-file", "interactive"] | None = setting(
        None, "Where prompts come from. Unset: input-file if sample_input_file is set, else unconditional."
    )
    temperature: float = setting(
        0.0,
        "Logits are divided by this; 0 leaves them as they are, and with top_k and top_p also 0 takes the likeliest "
        "token.",
        unit="ratio",
        ge=0,
    )
    top_k: int = setting(0, "Sample among the k likeliest tokens; 0: among all.", unit="tokens", ge=0)
    top_p: float = setting(
        0.0,
        "Sample among the likeliest tokens whose probabilities reach this sum; 0: among all.",
        unit="probability",
        ge=0,
        le=1,
    )
    maximum_tokens: int = setting(64, "Most new tokens of each sample.", unit="tokens", ge=1)
    prompt_end: str = setting("\n", "What separates prompts in a file and ends one in interactive use.")
    sample_input_file: str | None = setting(None, "File of prompts.")
    sample_output_file: str = setting("samples.txt", "File of samples, one JSON object per line.")
    num_samples: int = setting(1, "Unconditional samples to make.", unit="samples", ge=1)
    recompute: bool = setting(False, "Compute the whole context for each token instead of keeping keys and values.")


class LauncherConfig(Section):
    """Which machines run the job, and who starts the workers there."""

    hostfile: str | None = setting(
        None,
        "File with lines `host slots=N`. Unset: the Slurm job's nodes with launcher: slurm, else this machine.",
    )
    include: str | None = setting(None, "Hosts and slots to use: host1@host2:0,2.")
    exclude: str | None = setting(None, "Hosts and slots not to use, written as in include.")
    num_nodes: int = setting(-1, "Use the first hosts of the hostfile; -1: all.", unit="machines", ge=-1)
    num_gpus: int | None = setting(None, "Processes on each machine. Unset: one per GPU.", unit="processes", ge=1)
    master_addr: str | None = setting(None, "Address of rank 0's machine. Unset: found by the launcher.")
    master_port: int = setting(29500, "Port of rank 0's machine.", unit="none", ge=1, le=65535)
    launcher: Literal["pdsh", "openmpi", "mpich", "mvapich", "slurm"] = setting(
        "pdsh", "What starts workers on several machines."
    )
    hang_timeout_minutes: float | None = setting(
        10.0,
        "A run in which no rank moves for so long is ended, with a report of who waits for whom. Twice as long before "
        "and in the first step of a process, and in saves and loads; collectives fail after three times as long. Set "
        "it higher where one rank works longer while the others wait, as for an index of many files. null: never.",
        unit="minutes",
        gt=0,
    )
    force_multi: bool = setting(False, "Use that launcher for one machine too.")
    no_ssh_check: bool = setting(False, "Do not try ssh before starting.")
    check_in_seconds: float = setting(
        60.0, "How long ranks wait for each other before the model is built.", unit="seconds", gt=0
    )
    comment: str | None = setting(None, "Slurm comment of the job.")
    account: str | None = setting(None, "Slurm account of the job.")
