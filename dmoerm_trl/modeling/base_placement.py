"""
Place the tasks' bases: each on its own device, or in the checkpoint until a text is routed to its task.

accelerate's dispatch cannot be used here: it loads and frees a base layer by layer in every pass, has no limit, and
misses weights that [`~dmoerm_trl.modeling.multi_lora`] reads without a forward. Therefore `from_pretrained` loads each
base separately. A base that is not loaded is not offloaded to the CPU either: if there is room, the operating system
caches its file.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from ..tasks import slug
from .configuration_dmoerm import DMoERMConfig
from .experts import adapter_name, add_experts
from .multi_lora import backbone_lock
from .pretrained import DMoERMPreTrainedModel

Device = str | int | torch.device

OTHERS = ""
"""Key in a map of devices for everything that the map does not name: the router, the heads, the other tasks' bases."""


class PlacedBases(nn.ModuleDict):
    """
    The bases of a model's tasks, loaded lazily. The `ModuleDict` contains only the bases that are in memory;
    `bases[key]` loads a base that is not, and frees the least recently used ones if there are too many.

    Args:
        keys (`Sequence[str]`): Keys of all bases.
        load (`Callable`): `load(key, device)` returns a base with its experts.
        bases (`Mapping`, *optional*): The bases that are already in memory.
        limit (`int`, *optional*): Maximum number of bases in memory at a time; all by default.
        home (`torch.device`): Device for the bases that have none of their own. It changes when the model is moved.
        devices (`Mapping`, *optional*): Key -> a base's own device, where it stays when the model is moved.
    """

    def __init__(
        self,
        keys: Sequence[str],
        load: Callable[[str, torch.device], PreTrainedModel],
        *,
        bases: Mapping[str, PreTrainedModel] | None = None,
        limit: int | None = None,
        home: Device = "cpu",
        devices: Mapping[str, torch.device] | None = None,
    ):
        super().__init__()
        self._modules.update(bases or {})  # not `self[key] = ...`, because a key may be the name of an attribute
        self._keys, self._load = list(keys), load
        self._limit = len(self._keys) if limit is None else limit
        self.devices = dict(devices or {})
        self.register_buffer("_home", torch.empty(0, device=home), persistent=False)

    @property
    def waiting(self) -> list[str]:
        """Keys of the bases that are not in memory."""
        return [key for key in self._keys if key not in self]

    def __getitem__(self, key: str) -> PreTrainedModel:
        if key not in self._keys:
            raise KeyError(key)
        with backbone_lock:
            if key not in self:
                while len(self) >= self._limit:
                    del self[next(iter(self))]
                self._modules[key] = self._load(key, self.devices.get(key, self._home.device))
            self._modules[key] = self._modules.pop(key)  # most recently used last
            return self._modules[key]

    def train(self, mode: bool = True) -> "PlacedBases":
        """
        Set the mode of all bases.

        Raises:
            ValueError: If training mode is set while a base is not in memory, because it would not be trained.
        """
        if mode:
            self._check_complete("train")
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        Return the weights of all bases.

        Raises:
            ValueError: If a base is not in memory, because it would be missing from a checkpoint.
        """
        self._check_complete("save")
        return super().state_dict(*args, **kwargs)

    def _check_complete(self, purpose: str) -> None:
        if self.waiting:
            raise ValueError(
                f"got a model to {purpose} that has the bases of {list(self)} in memory and not those of {self.waiting}, need "
                "all of them: load it again without `resident_tasks`, and do not call `keep_tasks`."
            )

    def _apply(self, fn: Callable, recurse: bool = True) -> "PlacedBases":
        """Implement `.to(...)`: a base with a device of its own stays there, and only its dtype changes."""
        for key, base in self._modules.items() if recurse else ():
            if key in self.devices:
                base.to(fn(torch.empty(0, dtype=base.dtype)).dtype)
            else:
                base._apply(fn)
        return super()._apply(fn, recurse=False)


class UnloadedBases(nn.ModuleDict):
    """A placeholder for a model's bases, with which `from_pretrained` does not load them."""

    _keys_to_ignore_on_load_unexpected = [r"^model\.backbones\."]  # transformers reads this from each module


class _BaseOfCheckpoint(DMoERMPreTrainedModel):
    """One task's base with its experts, named as in the complete model, so that `from_pretrained` loads only them."""

    _keys_to_ignore_on_load_unexpected = [r"^model\."]  # all other weights

    def __init__(self, config: DMoERMConfig, task: str, **_: Any):
        super().__init__(config)
        base = AutoModel.from_config(config.backbone_config)
        add_experts(base, config, [adapter_name(task, point) for point in config.tasks[task]])
        self.model = nn.ModuleDict({"backbones": nn.ModuleDict({slug(task): base})})
        self.post_init()


def task_devices(device_map: Device | Mapping[str, Device] | None) -> tuple[torch.device, dict[str, torch.device]]:
    """
    Split a `device_map` into the default device and the devices of the tasks that have their own.

    Args:
        device_map: One device for everything, or task -> device, where `""` stands for everything that is not named.
            The CPU by default.

    Raises:
        ValueError: If a device does not exist.
    """
    by_name = device_map if isinstance(device_map, Mapping) else {OTHERS: device_map}
    devices = {name: _device(place) for name, place in by_name.items()}
    return devices.pop(OTHERS, _device(None)), devices


def _device(place: Device | None) -> torch.device:
    """Return a device after checking that it exists."""
    try:
        return torch.empty(0, device=place).device
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
        there = ["cpu", *(f"{kind}:{index}" for index in range(count))]
        raise ValueError(f"got the device {place!r} in the device_map, need one that is there: {there}.") from error


def bases_of_checkpoint(
    name: str,
    config: DMoERMConfig,
    options: Mapping[str, Any],
    *,
    home: torch.device,
    devices: Mapping[str, torch.device],
    resident_tasks: int | None,
) -> PlacedBases:
    """
    Build the bases of a checkpoint: all loaded, or with `resident_tasks` none of them yet.

    Args:
        name (`str`): Folder or hub name.
        config (`DMoERMConfig`): Configuration of the complete model.
        options (`Mapping`): Further arguments of `from_pretrained`.
        home, devices: The results of [`task_devices`].
        resident_tasks (`int`, *optional*): Maximum number of tasks' bases in memory at a time.

    Raises:
        ValueError: If `resident_tasks` is below 1, a task is unknown, or the tasks share one base.
    """
    if resident_tasks is not None and (type(resident_tasks) is not int or resident_tasks < 1):
        raise ValueError(
            f"got resident_tasks={resident_tasks!r}, need a whole number, at least 1, because the base that runs is in "
            "memory: leave it out to have all of them there."
        )
    if unknown := [task for task in devices if task not in config.tasks]:
        raise ValueError(
            f"got the device_map's keys {unknown}, need tasks among {list(config.tasks)}, or {OTHERS!r} for all others."
        )
    if config.share_base:
        raise ValueError(
            f"{name}: got `resident_tasks` or devices by task for a model whose tasks share one base, need a base for each "
            "task: leave `resident_tasks` out and give one device, the base is in memory only once."
        )
    load = partial(load_base, name, config, options)
    by_key = {slug(task): device for task, device in devices.items()}
    bases = PlacedBases(list(map(slug, config.tasks)), load, limit=resident_tasks, home=home, devices=by_key)
    for key in bases.waiting if resident_tasks is None else ():
        bases[key]
    return bases


def load_base(
    name: str, config: DMoERMConfig, options: Mapping[str, Any], key: str, device: torch.device
) -> PreTrainedModel:
    """Load the base `key` of a checkpoint with its experts; see [`bases_of_checkpoint`]."""
    task = next(task for task in config.tasks if slug(task) == key)
    model = _BaseOfCheckpoint.from_pretrained(
        name, **{**options, "config": config, "task": task, "device_map": device}
    )
    return model.model["backbones"][key]
