"""
A model divided over processes (ZeRO-3): each has a part of every weight, and all of a task's weights while the task runs.

DeepSpeed's engine does not serve a reward model. It gathers module by module, and [`~dmoerm_trl.modeling.one_pass`] reads
weights of modules that it does not call; it needs all processes to run the same modules, and each has texts of other tasks; and
in bf16 it casts the heads too, which are fp32.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def divide(module: nn.Module, config: dict[str, Any]) -> None:
    """
    Leaves this process its part of every weight. All processes have to take part, here and whenever the module runs.

    Args:
        module (`nn.Module`): the same in each process, whole.
        config (`dict`): of DeepSpeed; its `offload_param` says where the parts are.
    """
    import deepspeed

    deepspeed.zero.Init(module=module, config_dict_or_path=config)


def whole(*modules: nn.Module) -> AbstractContextManager:
    """Within it each process has all weights of these modules."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight for module in modules for weight in module.parameters()])


def over_processes(counts: Tensor) -> Tensor:
    """The sum of all processes' counts, in place."""
    dist.all_reduce(counts)
    return counts
