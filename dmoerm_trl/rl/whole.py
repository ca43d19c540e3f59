"""A policy that DeepSpeed divides (ZeRO-3), whole for a while: to sample from it, to save it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..training.distributed import gathered


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """
    Within it each process has all weights of the model, and the model runs as it would without DeepSpeed, as often as each
    process likes. All processes have to enter and to leave. A model that is whole is left as it is.
    """
    divided = any(hasattr(weight, "ds_id") for weight in model.parameters())
    hooks = [
        own
        for module in (model.modules() if divided else ())
        for own in (module._forward_pre_hooks, module._forward_hooks)
    ]
    with gathered(model.parameters()):
        kept = [dict(own) for own in hooks]
        for own in hooks:
            own.clear()  # the engine's would divide each module again after its first run
        try:
            yield
        finally:
            for own, before in zip(hooks, kept, strict=True):
                own.update(before)
