"""Blocks gathered whole under ZeRO 3: DeepSpeed gathers the weights of each around its code, compiled code above all.

DeepSpeed gathers weights by hooks on the module that owns them. A compiled block runs as one piece, in which no hook of
its parts is called. So the block itself asks for the weights of all its parts, and the parts ask for nothing:

    forward      gathered before the block, let go behind it
    backward     gathered before the compiled backward pass, let go behind it

What compiled code keeps for its backward pass is the parameter itself, with whatever memory that has then, so nothing
is held in between; a test counts it. Gradients are reduced as without, each as soon as autograd has it. A block is
gathered as a whole where an eager one is layer by layer: with `stage3_max_live_parameters` or
`stage3_max_reuse_distance` below its size, more weights are gathered at once.

In a world of one eager blocks are gathered whole as well. There gathered weights are views that take no memory, and the
hooks of nine parts of a block took 30 ms of a step of 12 blocks on a CPU.
"""

from __future__ import annotations

from typing import Any

import deepspeed
from torch import nn

from megatron.model.compiled import blocks

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_THEIRS = "deepspeed."


def gather_whole(live: Any) -> None:
    """Let a live engine of ZeRO 3 gather each block at once. Call it after deepspeed.initialize, before any step."""
    for block in blocks(live.module):
        for part in block.modules():
            if part is not block:
                _remove_hooks(part)
        for parameter in block.parameters():
            deepspeed.zero.register_external_parameter(block, parameter)


def _remove_hooks(module: nn.Module) -> None:
    for name in _HOOKS:
        hooks: dict[int, Any] = getattr(module, name)
        for key, hook in list(hooks.items()):
            if hook.__module__.startswith(_THEIRS):
                del hooks[key]
