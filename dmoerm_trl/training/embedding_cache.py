"""Cache of the experts' embeddings on disk, on which phase 3 trains the aggregator."""

import hashlib
import math
import os
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from ..data.formatting import Encoding
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from ..scoring.batch import map_encodings

CHUNK = 4096
"""Number of texts whose embeddings are in memory at once."""


def embeddings_on_disk(
    model: DMoERMForSequenceClassification, encodings: Sequence[Encoding], pad_token_id: int, folder: Path
) -> Tensor:
    """
    Compute the embeddings of all texts by the experts of a one-task model once (equation 3), as a tensor that is memory-mapped
    from a file in `folder`. Memory does not grow with the number of texts.

    Several processes share the work. The name of the file contains a digest of the texts and the experts. The file gets this
    name when it is complete, so that a resumed run finds it.

    Returns:
        `Tensor` of shape (N, k, H), fp32, on the CPU.
    """
    (task,) = model.config.tasks
    shape = (len(encodings), len(model.config.tasks[task]), model.config.backbone_config.hidden_size)
    content = hashlib.sha256()
    for encoding in encodings:
        content.update(array("q", [encoding.prompt_length, len(encoding.input_ids), *encoding.input_ids]).tobytes())
    for name, weight in model.state_dict().items():
        if ".lora_" in name:
            content.update(weight.float().cpu().numpy().tobytes())
    path = folder / f"embeddings-{content.hexdigest()[:16]}.f32"
    size, state = math.prod(shape), PartialState()
    if not path.exists() or path.stat().st_size != 4 * size:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        z = torch.from_file(str(temporary), shared=True, size=size).view(shape)

        def embed(input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
            return model.model.embed(task, model.model.find_spans(input_ids, attention_mask, prompt_lengths)).float()

        step = min(CHUNK, -(-len(encodings) // state.num_processes))
        for start in range(state.process_index * step, len(encodings), state.num_processes * step):
            chunk = encodings[start : start + step]
            description = f"embedding texts {start + 1} to {start + len(chunk)} of {len(encodings)}"
            options = {"pad_token_id": pad_token_id, "device": model.device, "description": description}
            z[start : start + step] = map_encodings(embed, chunk, **options)
        del z
        with temporary.open("rb+") as file:
            os.fsync(file)  # for the other machines
        state.wait_for_everyone()
        if state.is_main_process:
            temporary.rename(path)
        state.wait_for_everyone()
    return torch.from_file(str(path), shared=True, size=size).view(shape)
