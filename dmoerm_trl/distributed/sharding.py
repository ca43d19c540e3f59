"""
Shard a model over processes (ZeRO-3): each stores a shard of every weight, and gathers a task's weights while the task
runs.

DeepSpeed's own engine cannot run a reward model: it gathers module by module, but [`~dmoerm_trl.modeling.multi_lora`]
reads weights of modules that it does not call; it requires all processes to run the same modules, but their texts may
be of different tasks; and in bf16 it also casts the heads, which must stay in fp32.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def shard(module: nn.Module, config: dict[str, Any]) -> None:
    """
    Shard every weight of a module, in place. All processes must take part, here and whenever the module runs.

    Args:
        module (`nn.Module`): The unsharded module, the same in each process.
        config (`dict`): The DeepSpeed configuration; its `offload_param` sets where the shards are stored.
    """
    import deepspeed

    deepspeed.zero.Init(module=module, config_dict_or_path=config)


def sum_over_processes(counts: Tensor) -> Tensor:
    """Sum the counts of all processes, in place."""
    dist.all_reduce(counts)
    return counts


@contextmanager
def gathered(*parts: nn.Module | nn.Parameter) -> Iterator[None]:
    """
    Context manager in which weights that ZeRO-3 shards are gathered in each process. All processes must take part. It does
    nothing for weights that are not sharded.
    """
    weights = [weight for part in parts for weight in (part.parameters() if isinstance(part, nn.Module) else [part])]
    if not _are_sharded(weights):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(weights):
        yield


def full_copy(weight: nn.Parameter) -> Tensor:
    """
    Copy a full weight, sharded or not, to the CPU. All processes must take part.

    With DeepSpeed in bf16 the copy is the optimizer's fp32 weight, because rounding to bf16 loses more than many steps
    of phase 1 change.
    """
    if isinstance(weight, DTensor):
        return weight.full_tensor().detach().cpu()
    if weight.requires_grad and (hasattr(weight, "ds_id") or hasattr(weight, "_hp_mapping")):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(weight).detach().to("cpu", copy=True)
    with gathered(weight):
        return weight.detach().to("cpu", copy=True)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """
    Context manager in which a model's weights are gathered in each process, and each can run the model without
    DeepSpeed, independently of the others. All processes must enter and leave it. An unsharded model is left as it is.
    """
    hooks = [
        own
        for module in (model.modules() if _are_sharded(model.parameters()) else ())
        for own in (module._forward_pre_hooks, module._forward_hooks)
    ]
    with gathered(model):
        kept = [dict(own) for own in hooks]
        for own in hooks:
            own.clear()  # the engine's hooks would shard each module again after its first run
        try:
            yield
        finally:
            for own, before in zip(hooks, kept, strict=True):
                own.update(before)


def _are_sharded(weights: Iterable[nn.Parameter]) -> bool:
    return any(hasattr(weight, "ds_id") for weight in weights)
