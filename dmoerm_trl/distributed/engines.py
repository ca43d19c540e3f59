"""Train with DeepSpeed or FSDP: check that a configured engine runs, and gather the weights after training."""

import gc
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
from accelerate import DistributedType
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .sharding import full_copy


def check_installed() -> None:
    """
    Check that DeepSpeed is installed.

    Raises:
        ValueError: If it is not.
    """
    if find_spec("deepspeed") is None:
        raise ValueError(
            "got a DeepSpeed configuration and no DeepSpeed, need the package: pip install 'dmoerm-trl[deepspeed]', or leave "
            "`deepspeed` out."
        )


def start_deepspeed(args: TrainingArguments) -> None:
    """
    Connect the processes if DeepSpeed is configured; otherwise, on a CPU, each would run as the only one.

    Raises:
        ValueError: If no launcher started this process.
    """
    if args.deepspeed_plugin is None:
        return
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(
            "got a DeepSpeed configuration in a process that no launcher started, need one, because DeepSpeed would look for "
            "the other processes in vain: start with `torchrun --nproc_per_node N` (1 too) or `accelerate launch`, or leave "
            "`deepspeed` out."
        )
    import deepspeed

    deepspeed.init_distributed()


def check_engine(trainer: Trainer) -> None:
    """
    Check that DeepSpeed or FSDP runs if it is configured, because on a CPU accelerate silently ignores it.

    Raises:
        ValueError: If the configured engine does not run, or if it is FSDP's first version.
    """
    engine = trainer.accelerator.distributed_type
    if trainer.args.deepspeed_plugin is not None and engine != DistributedType.DEEPSPEED:
        raise ValueError(
            f"got a DeepSpeed configuration and a run without DeepSpeed ({engine.value}), need it to run, because nothing "
            "would be sharded: start with `torchrun`, or with `accelerate launch` without `--cpu`, or leave `deepspeed` out."
        )
    if wants_fsdp(trainer) and engine != DistributedType.FSDP:
        raise ValueError(
            f"got an FSDP configuration and a run without FSDP ({engine.value}), need several GPUs, because accelerate has FSDP "
            "on them alone and nothing would be sharded: start on GPUs, or leave the FSDP configuration out."
        )
    if engine == DistributedType.FSDP and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            "got FSDP's first version, need the second, because the first one flattens the weights, of which each expert has "
            "its own group: set `fsdp_version: 2`, as recipes/accelerate/fsdp.yaml does."
        )


def wants_fsdp(trainer: Trainer) -> bool:
    """Return whether the launcher or the settings configure FSDP."""
    return bool(trainer.is_fsdp_enabled or trainer.args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"))


@contextmanager
def unsharded_afterwards(trainer: Trainer) -> Iterator[None]:
    """
    Context manager for training, after which the model is unsharded: the same object, without the engine, with all
    weights in each process, the heads and the trained weights in fp32. The weights are gathered in CPU memory, because
    a GPU still holds the optimizer's states.

    FSDP changes the modules themselves. Its mixed-precision policy is removed, because it would cast the heads and the
    rewards to bf16 too: it gathers weights in fp32, and autocast computes products in bf16, as without FSDP.

    Raises:
        ValueError: If a process has no room for the complete model. The checkpoints are kept.
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = None
    model = trainer.model
    before = [Before.of(module) for module in model.modules()]
    yield
    if trainer.deepspeed is not None:
        _check_room(trainer)
        _without_deepspeed(trainer, before)
    elif any(isinstance(weight, DTensor) for weight in model.parameters()):
        _check_room(trainer)
        _without_fsdp(before, trainer.accelerator.device)


class Before(NamedTuple):
    """A module with the class and hooks that it had before an engine replaced them by its own."""

    module: nn.Module
    kind: type[nn.Module]
    hooks: list[dict]

    @classmethod
    def of(cls, module: nn.Module) -> "Before":
        return cls(module, type(module), [dict(hooks) for hooks in _hooks(module)])

    def restore(self) -> None:
        """Give the module its class and hooks back."""
        self.module.__class__ = self.kind
        for now, kept in zip(_hooks(self.module), self.hooks, strict=True):
            now.clear()
            now.update(kept)


def _hooks(module: nn.Module) -> tuple[dict, ...]:
    return (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
        module._state_dict_pre_hooks,
        module._load_state_dict_pre_hooks,
    )


def _without_deepspeed(trainer: Trainer, before: Sequence[Before]) -> None:
    model, device = trainer.model, trainer.accelerator.device
    copies = {weight: full_copy(weight) for weight in _weights_to_gather(model)}
    _free_deepspeed(trainer)
    for was in before:
        was.restore()
        was.module._parameters = dict(was.module._parameters)  # replaces DeepSpeed's dict, which gathers on access
    for weight in copies:
        vars(weight).clear()  # DeepSpeed's references to its shards and its optimizer
    gc.collect()  # frees the engine, which is in reference cycles, before the full weights are loaded
    for weight, whole in copies.items():
        weight.data = whole.to(device)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not set(model._keep_in_fp32_modules_strict).isdisjoint(name.split(".")):
            tensor.data = tensor.data.float()  # DeepSpeed casts these to bf16 too


def _free_deepspeed(trainer: Trainer) -> None:
    """Free the engine and its optimizer, to which the trainer, the accelerator and DeepSpeed's globals refer."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    trainer.deepspeed, trainer.is_deepspeed_enabled, trainer.model_wrapped = None, False, trainer.model
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    FWD_MODULE_STACK.clear()  # keeps references to the modules of the last forward pass
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():
            # an `lru_cache` keeps references to all modules that it was called with
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()
    trainer.accelerator.free_memory()
    unset_hf_deepspeed_config()


def _without_fsdp(before: Sequence[Before], device: torch.device) -> None:
    modules = [was.module for was in before]
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()
    for module in modules:
        for name, weight in module._parameters.items():
            if isinstance(weight, DTensor):
                module._parameters[name] = nn.Parameter(full_copy(weight), weight.requires_grad)
    for was in before:
        was.restore()
    modules[0].to(device)


def _weights_to_gather(model: nn.Module) -> list[nn.Parameter]:
    """List the weights that are trained or sharded."""
    return [
        weight
        for weight in model.parameters()
        if weight.requires_grad or hasattr(weight, "ds_id") or isinstance(weight, DTensor)
    ]


def _check_room(trainer: Trainer) -> None:
    """
    Check that there is room for the gathered weights, in all processes together, so that none waits for one
    that fails.

    Raises:
        ValueError: In every process, if one of them has too little memory or disk space.
    """
    folder = trainer.args.output_dir
    size = sum(
        getattr(weight, "ds_numel", weight.numel()) * (4 if weight.requires_grad else weight.element_size())
        for weight in _weights_to_gather(trainer.model)
    )
    room = {
        "of the machine's memory": (
            psutil.virtual_memory().available,
            size * int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        ),
        f"on the disk of {folder}": (shutil.disk_usage(folder).free, size),
    }
    for place, (free, needed) in room.items():
        short = torch.tensor(int(free < needed), device=trainer.accelerator.device)
        dist.all_reduce(short)
        if short:
            raise ValueError(
                f"got {free / 2**30:.3f} GiB {place}, need {needed / 2**30:.3f} GiB, because the trained weights are gathered "
                "from all processes, in each of them, to be saved: make room and start again, which goes on from the last "
                f"checkpoint in {folder}."
            )
