"""Training under DeepSpeed or FSDP: that it runs where it is asked for, its checkpoints, whole weights where they are needed."""

import gc
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
from accelerate import DistributedType
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def is_main() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one: the one that writes."""
    return int(os.environ.get("RANK", 0)) == 0


def processes() -> int:
    """How many processes a launcher started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def wait_for_all() -> None:
    """Returns when all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def check_joined(workers: int) -> None:
    """
    Raises:
        ValueError: if a launcher started several processes which then would train the same, each for itself, or which would
            start workers of their own.
    """
    if processes() > 1 and workers > 1:
        raise ValueError(
            f"got workers={workers} in each of {processes()} processes, need 1, because the processes of a launcher train each "
            "stage together: leave `workers` out, or start without the launcher."
        )
    if processes() > 1 and not dist.is_initialized():
        raise ValueError(
            f"got {processes()} processes that are not joined, need them to be, because each would train alone: without GPUs set "
            "`use_cpu: true` in each stage's settings."
        )


def check_installed() -> None:
    """
    Raises:
        ValueError: without DeepSpeed.
    """
    if find_spec("deepspeed") is None:
        raise ValueError(
            "got a DeepSpeed configuration and no DeepSpeed, need the package: pip install 'dmoerm-trl[deepspeed]', or leave "
            "`deepspeed` out."
        )


def start_deepspeed(args: TrainingArguments) -> None:
    """
    Joins the processes if DeepSpeed is asked for, which on a CPU would else take each for the only one.

    Raises:
        ValueError: in a process that no launcher started.
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
    Raises:
        ValueError: where DeepSpeed or FSDP is asked for and would not run, which accelerate does on a CPU without a word; for
            FSDP's first version.
    """
    engine = trainer.accelerator.distributed_type
    if trainer.args.deepspeed_plugin is not None and engine != DistributedType.DEEPSPEED:
        raise ValueError(
            f"got a DeepSpeed configuration and a run without DeepSpeed ({engine.value}), need it to run, because nothing "
            "would be sharded: start with `torchrun`, or with `accelerate launch` without `--cpu`, or leave `deepspeed` out."
        )
    if asks_for_fsdp(trainer) and engine != DistributedType.FSDP:
        raise ValueError(
            f"got an FSDP configuration and a run without FSDP ({engine.value}), need several GPUs, because accelerate has FSDP "
            "on them alone and nothing would be sharded: start on GPUs, or leave the FSDP configuration out."
        )
    if engine == DistributedType.FSDP and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            "got FSDP's first version, need the second, because the first one flattens the weights, of which each expert has "
            "its own group: set `fsdp_version: 2`, as recipes/accelerate/fsdp.yaml does."
        )


def asks_for_fsdp(trainer: Trainer) -> bool:
    """Whether the launcher or the settings do."""
    return bool(trainer.is_fsdp_enabled or trainer.args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"))


@contextmanager
def gathered(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within it the weights are whole, also under ZeRO-3. All processes have to take part."""
    weights = list(weights)
    if not any(hasattr(weight, "ds_id") for weight in weights):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(weights):
        yield


def whole_copy(weight: nn.Parameter) -> Tensor:
    """
    A copy of a weight on the CPU, also of one in shards. Of DeepSpeed in bf16 it is the optimizer's, in fp32: what bf16 rounds
    away is more than many steps of phase 1. All processes have to take part.
    """
    if isinstance(weight, DTensor):
        return weight.full_tensor().detach().cpu()
    if weight.requires_grad and (hasattr(weight, "ds_id") or hasattr(weight, "_hp_mapping")):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(weight).detach().to("cpu", copy=True)
    with gathered([weight]):
        return weight.detach().to("cpu", copy=True)


@contextmanager
def whole_after(trainer: Trainer) -> Iterator[None]:
    """
    Trains within it. After it the model is an ordinary one again, the same object: each process has all of it, the heads and
    what was trained in fp32. It is gathered in the machine's memory, because a GPU still has the optimizer's states.

    FSDP changes the modules themselves. It gathers their weights in fp32 here, and products are in bf16 by autocast, as
    without it: its own policy would have the heads and the rewards in bf16 too.

    Raises:
        ValueError: if a process has no room for the whole model. The checkpoints stay.
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
    """A module, and its class and hooks before an engine changed them, which hold the engine and its states."""

    module: nn.Module
    kind: type[nn.Module]
    hooks: list[dict]

    @classmethod
    def of(cls, module: nn.Module) -> "Before":
        return cls(module, type(module), [dict(hooks) for hooks in _hooks(module)])

    def restore(self) -> None:
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
    copies = {weight: whole_copy(weight) for weight in _gathered_at_the_end(model)}
    _free_deepspeed(trainer)
    for was in before:
        was.restore()
        was.module._parameters = dict(was.module._parameters)  # DeepSpeed's gathers what is read
    for weight in copies:
        vars(weight).clear()  # DeepSpeed's references to its shards and its optimizer
    gc.collect()  # the engine is in cycles, and its states are to go before the weights come back
    for weight, whole in copies.items():
        weight.data = whole.to(device)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not set(model._keep_in_fp32_modules_strict).isdisjoint(name.split(".")):
            tensor.data = tensor.data.float()  # in bf16 DeepSpeed casts all there is


def _free_deepspeed(trainer: Trainer) -> None:
    """The engine and its optimizer's states go, to which trainer, accelerator and DeepSpeed's own globals refer."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    trainer.deepspeed, trainer.is_deepspeed_enabled, trainer.model_wrapped = None, False, trainer.model
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    FWD_MODULE_STACK.clear()  # the last forward pass leaves its modules there
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):  # an `lru_cache` keeps all modules that it was called with
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
                module._parameters[name] = nn.Parameter(whole_copy(weight), weight.requires_grad)
    for was in before:
        was.restore()
    modules[0].to(device)


def _gathered_at_the_end(model: nn.Module) -> list[nn.Parameter]:
    return [
        weight
        for weight in model.parameters()
        if weight.requires_grad or hasattr(weight, "ds_id") or isinstance(weight, DTensor)
    ]


def _check_room(trainer: Trainer) -> None:
    """All processes take part, so that none waits for one that has no room."""
    folder = trainer.args.output_dir
    size = sum(
        getattr(weight, "ds_numel", weight.numel()) * (4 if weight.requires_grad else weight.element_size())
        for weight in _gathered_at_the_end(trainer.model)
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
