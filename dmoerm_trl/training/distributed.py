"""Training under DeepSpeed: that it runs where it is asked for, its checkpoints, and whole weights where they are needed."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from accelerate import DistributedType
from accelerate.utils import parse_flag_from_env
from torch import nn
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
        ValueError: where DeepSpeed is asked for and would not run, or FSDP is (which accelerate leaves out on a CPU).
    """
    if trainer.is_fsdp_enabled or trainer.args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError(
            "got a training under FSDP, need DeepSpeed or plain data parallelism, because the trained weights would stay in "
            "shards: leave the FSDP configuration out, and take ZeRO-3 where memory is short."
        )
    engine = trainer.accelerator.distributed_type
    if trainer.args.deepspeed_plugin is not None and engine != DistributedType.DEEPSPEED:
        raise ValueError(
            f"got a DeepSpeed configuration and a run without DeepSpeed ({engine.value}), need it to run, because nothing "
            "would be sharded: start with `torchrun`, or with `accelerate launch` without `--cpu`, or leave `deepspeed` out."
        )


def check_checkpoint(checkpoint: str | Path, trainer: Trainer) -> None:
    """
    A plain checkpoint goes on with any number of processes. One of ZeRO does not, not by DeepSpeed's universal checkpoint
    either: read under ZeRO-3 it gives all groups of weights the first one's step and settings, of which each expert has its own.

    Raises:
        ValueError: if a checkpoint is not of this ZeRO stage and number of processes, so that its shards do not fit.
    """
    now = "plain"
    if trainer.is_deepspeed_enabled:
        now = _layout(trainer.accelerator.state.deepspeed_plugin.zero_stage, trainer.accelerator.num_processes)
    before = "plain"
    for folder in Path(checkpoint).glob("global_step*"):
        states = len(list(folder.glob("*zero_pp_rank_*_optim_states.pt")))
        stage = 3 if list(folder.glob("zero_pp_rank_*_model_states.pt")) else 2 if states else 0
        before = _layout(stage, states)
    if before != now:
        raise ValueError(
            f"{checkpoint}: got a checkpoint of {before} training and {now} training now, need the same, because the "
            f"optimizer's states are divided so: start as before, or delete {Path(checkpoint).parent} to begin this stage anew."
        )


def _layout(stage: int, shards: int) -> str:
    name = {0: "DeepSpeed", 1: "ZeRO-1 or 2", 2: "ZeRO-1 or 2", 3: "ZeRO-3"}[stage]
    return f"{name} ({shards} processes)" if stage else name


@contextmanager
def gathered(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within it the weights are whole, also under ZeRO-3. All processes have to take part."""
    weights = list(weights)
    if not any(map(_in_shards, weights)):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(weights):
        yield


def unshard(trainer: Trainer) -> None:
    """
    Makes an ordinary model of one that DeepSpeed trained, in place: each process has all of it, the heads and what was
    trained in fp32. In bf16 those are the optimizer's weights: what bf16 rounds away is more than many steps of phase 1.

    Raises:
        ValueError: if a process has no room for the whole model. The checkpoints stay.
    """
    if trainer.deepspeed is None:
        return
    from deepspeed.utils import safe_get_full_fp32_param

    _check_room(trainer)
    trained = {
        weight: safe_get_full_fp32_param(weight) for weight in trainer.model.parameters() if weight.requires_grad
    }
    trained = {weight: full.detach().clone() for weight, full in trained.items() if full is not None}
    trainer.deepspeed.destroy()
    trainer.deepspeed, trainer.is_deepspeed_enabled = None, False
    unset_hf_deepspeed_config()
    model = trainer.model
    for module in model.modules():
        module._parameters = dict(module._parameters)  # DeepSpeed's gathers what is read
        for weight in module._parameters.values():
            if weight is not None and _in_shards(weight):
                with gathered([weight]):
                    whole = weight.detach().clone()
                vars(weight).clear()
                weight.data = whole
            if weight in trained:
                weight.data = trained[weight].to(weight.device)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not set(model._keep_in_fp32_modules_strict).isdisjoint(name.split(".")):
            tensor.data = tensor.data.float()  # in bf16 DeepSpeed casts all there is


def _check_room(trainer: Trainer) -> None:
    """All processes take part, so that none waits for one that has no room."""
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad or _in_shards(weight)]
    size = sum(getattr(weight, "ds_numel", weight.numel()) * (4 if weight.requires_grad else 2) for weight in weights)
    device, folder = trainer.accelerator.device, trainer.args.output_dir
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        in_memory = torch.cuda.mem_get_info(device)[0] + cached, size
    else:
        in_memory = psutil.virtual_memory().available, size * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    room = {f"of memory ({device})": in_memory, f"on the disk of {folder}": (shutil.disk_usage(folder).free, size)}
    for place, (free, needed) in room.items():
        short = torch.tensor(int(free < needed), device=device)
        dist.all_reduce(short)
        if short:
            raise ValueError(
                f"got {free / 2**30:.3f} GiB {place}, need {needed / 2**30:.3f} GiB, because the trained weights are gathered "
                "from all processes to be saved: make room, or start fewer processes a machine, and start again. The run "
                f"goes on from the last checkpoint in {folder}."
            )


def _in_shards(weight: nn.Parameter) -> bool:
    return hasattr(weight, "ds_id")
