"""
What the phases and scoring take in memory: `memory_estimates.py`'s estimates beside measurements on a CPU, and
alone for the recipes' sizes.

    python tests/benchmarks/memory.py --json FILE [--cases "phase 1" scoring]

Each case runs in a process of its own, with a small Qwen2 in fp32. Measured is the peak of the resident memory above what
is resident after the same case has run with a tiny model, so that libraries do not count. `rows` of the JSON have
`estimate_gib` and `measured_gib`, which is null for the recipes' sizes: those need GPUs.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Read by the libraries when they are first imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs  # noqa: E402
from memory_estimates import (  # noqa: E402
    Memory,
    Run,
    Shape,
    grpo_memory,
    phase1_memory,
    phase2_memory,
    phase3_memory,
    ppo_memory,
    sampling_memory,
    scoring_memory,
    shape_of,
)
from speed_measure import environment  # noqa: E402
from speed_setting import QUICK, TASK, Setting  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402
from transformers import PreTrainedConfig, Qwen2Config, Qwen3Config  # noqa: E402

from dmoerm_trl.modeling.assembly import export_expert, with_experts  # noqa: E402
from dmoerm_trl.modeling.configuration_dmoerm import DMoERMConfig  # noqa: E402
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification  # noqa: E402
from dmoerm_trl.scoring.batch import score_rows  # noqa: E402
from dmoerm_trl.tasks import slug  # noqa: E402
from dmoerm_trl.training.batches import distinct_tokens  # noqa: E402
from dmoerm_trl.training.phases import phase1, phase2, phase3  # noqa: E402
from dmoerm_trl.training.ranked_config import RankedRewardConfig  # noqa: E402

SMALL = Setting(
    hidden_size=512,
    intermediate_size=1408,
    layers=8,
    heads=8,
    kv_heads=4,
    vocab_size=16_000,
    experts=3,
    prompt=128,
    response=128,
    spread=1e-6,  # all texts of one length
)

WARM_UP = replace(QUICK, spread=1e-6, sizes={})

WIDER = replace(
    SMALL,
    hidden_size=640,
    intermediate_size=1280,
    layers=6,
    heads=10,
    kv_heads=5,
    vocab_size=9000,
    experts=2,
    prompt=200,
    response=60,
)

CASES: dict[str, tuple[Setting, str, int, dict[str, Any]]] = {
    "phase 1": (SMALL, "phase1", 4, {}),
    "phase 1, checkpointing": (SMALL, "phase1", 8, {"checkpointing": True}),
    "phase 2": (SMALL, "phase2", 2, {}),
    "phase 2, checkpointing": (SMALL, "phase2", 4, {"checkpointing": True}),
    "phase 3": (SMALL, "phase3", 8, {}),
    "scoring": (SMALL, "scoring", 8, {}),
    "wider: phase 1, checkpointing": (WIDER, "phase1", 8, {"checkpointing": True}),
    "wider: phase 2": (WIDER, "phase2", 2, {}),
    "wider: phase 2, checkpointing": (WIDER, "phase2", 4, {"checkpointing": True}),
    "wider: scoring": (WIDER, "scoring", 8, {}),
}
"""Name -> the model's sizes, what is run, prompts of a step or a batch with two responses each, arguments of `Run`."""

SIZES: dict[str, PreTrainedConfig] = {
    "qwen1.5-1.8b-chat": Qwen2Config(
        vocab_size=151_936, hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=16,
    ),
    "qwen1.5-7b-chat": Qwen2Config(
        vocab_size=151_936, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "qwen1.5-14b-chat": Qwen2Config(
        vocab_size=152_064, hidden_size=5120, intermediate_size=13_696, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=40,
    ),
    "qwen3-1.7b": Qwen3Config(
        vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "qwen3-8b": Qwen3Config(
        vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    ),
    "qwen3-14b": Qwen3Config(
        vocab_size=151_936, hidden_size=5120, intermediate_size=17_408, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=8, head_dim=128,
    ),
}  # fmt: skip
"""Folder of recipes -> what its models' config.json say."""

STEP = 4096
"""Tokens of a step: a prompt of 1,024 with four responses of 768, say."""

EVAL = 16_384
"""Tokens of a batch in scoring and in evaluation."""

BF16 = {"precision": "bf16", "checkpointing": True}

OFFLOADED = {"offload_optimizer": True, "offload_parameters": True}

PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "phase 1, 1 GPU": ("phase1", {"checkpointing": True}),
    "phase 1, 8 GPUs, plain": ("phase1", {"checkpointing": True, "ranks": 8}),
    "phase 1, 8 GPUs, ZeRO-1": ("phase1", {**BF16, "zero": 1, "ranks": 8}),
    "phase 1, 8 GPUs, ZeRO-2": ("phase1", {**BF16, "zero": 2, "ranks": 8}),
    "phase 1, 8 GPUs, ZeRO-3": ("phase1", {**BF16, "zero": 3, "ranks": 8}),
    "phase 1, 1 GPU, ZeRO-2, optimizer offloaded": ("phase1", {**BF16, "zero": 2, "offload_optimizer": True}),
    "phase 1, 1 GPU, ZeRO-3, all offloaded": ("phase1", {**BF16, "zero": 3, **OFFLOADED}),
    "phase 2, no checkpointing": ("phase2", {}),
    "phase 2": ("phase2", {"checkpointing": True}),
    "phase 2, 8 GPUs, ZeRO-3": ("phase2", {**BF16, "zero": 3, "ranks": 8}),
    "phase 2, 8-bit base": ("phase2", {"precision": "8bit", "checkpointing": True}),
    "phase 2, 4-bit base": ("phase2", {"precision": "4bit", "checkpointing": True}),
    "phase 3": ("phase3", {"tokens": EVAL}),
    "scoring, five tasks, fp32": ("scoring", {"precision": "fp32", "tokens": EVAL}),
    "scoring, five tasks, bf16": ("scoring", {"precision": "bf16", "tokens": EVAL}),
    "scoring, one task resident, bf16": ("scoring_one", {"precision": "bf16", "tokens": EVAL}),
    "scoring, one task resident, 4-bit": ("scoring_one", {"precision": "4bit", "tokens": EVAL}),
    "scoring, a single reward model, bf16": ("scoring_single", {"precision": "bf16", "tokens": EVAL}),
    "best of n, the policy writes 64 responses": ("writing_64", {"precision": "bf16"}),
    "best of n, the policy writes 32 responses": ("writing_32", {"precision": "bf16"}),
    "PPO, 8 GPUs, ZeRO-2": ("ppo", {**BF16, "zero": 2, "ranks": 8}),
    "PPO, 8 GPUs, ZeRO-3": ("ppo", {**BF16, "zero": 3, "ranks": 8}),
    "PPO, 16 GPUs in two machines, ZeRO-3": ("ppo", {**BF16, "zero": 3, "ranks": 16, "machines": 2}),
    "PPO, 8 GPUs, ZeRO-3, one task": ("ppo_one", {**BF16, "zero": 3, "ranks": 8}),
    "GRPO, 8 GPUs, ZeRO-2": ("grpo", {**BF16, "zero": 2, "ranks": 8}),
    "GRPO, 8 GPUs, ZeRO-2, optimizer offloaded": ("grpo", {**BF16, "zero": 2, "ranks": 8, "offload_optimizer": True}),
    "GRPO, 8 GPUs, ZeRO-2, optimizer offloaded, one task": (
        "grpo_one",
        {**BF16, "zero": 2, "ranks": 8, "offload_optimizer": True},
    ),
}
"""What of the recipes' sizes is estimated, as in `CASES`; experts are six. Policies' prompts are of five tasks, or of one."""

ROUTER = 600_000_000
"""Parameters of the recipes' routers, at most."""

PPO = {"rollout": 4, "response_length": 1024}

GRPO = {"responses": 8, "length": 2048, "eval_tokens": EVAL}

ESTIMATES: dict[str, Callable[..., Memory]] = {
    "phase1": partial(phase1_memory, eval_tokens=EVAL),
    "phase2": phase2_memory,
    "phase3": phase3_memory,
    "scoring": partial(scoring_memory, tasks=5, router=ROUTER),
    "scoring_one": partial(scoring_memory, router=ROUTER),
    "scoring_single": lambda shape, run: scoring_memory(shape.without_experts, run),
    "writing_64": partial(sampling_memory, responses=64, length=200 + 1024),
    "writing_32": partial(sampling_memory, responses=32, length=200 + 1024),
    "ppo": partial(ppo_memory, **PPO, tasks=5, router=ROUTER),
    "ppo_one": partial(ppo_memory, **PPO),
    "grpo": partial(grpo_memory, **GRPO, tasks=5, router=ROUTER),
    "grpo_one": partial(grpo_memory, **GRPO),
}

LOADED: dict[str, Callable[[Shape], float]] = {
    "train": lambda shape: shape.base,
    "PPO, five tasks": lambda shape: 5 * (shape.base + shape.lora) + ROUTER + 2 * shape.policy + shape.base,
    "PPO, one task": lambda shape: 2 * shape.base + shape.lora + 2 * shape.policy,
}
"""What is started -> parameters that each process loads in fp32 before they are divided, or put on its device."""


# What is measured.


def prepare(what: str, prompts: int, options: dict[str, Any], setting: Setting, folder: str) -> Callable[[], Any]:
    """Loads the models that a case stands on, and returns what is to be measured."""
    rows, arguments = setting.rows(2 * prompts, 2), setting.model_arguments("all")
    args = RankedRewardConfig(
        output_dir=folder,
        max_steps=2,
        eval_steps=2,
        per_device_train_batch_size=prompts,
        eval_tokens_per_batch=1024,
        gradient_checkpointing=options.get("checkpointing", False),
        use_cpu=True,
        disable_tqdm=True,
    )
    if what == "phase1":
        return lambda: phase1(setting.base, TASK, rows, rows[:2], setting.formatter, args, **arguments)
    if what == "scoring":
        model = setting.ours("all")
        return lambda: score_rows(model, rows[:prompts], setting.formatter)
    base = DMoERMForSequenceClassification.from_base(setting.base, task=TASK, **arguments)
    if what == "phase2":
        return lambda: phase2(base, setting.points, rows, rows[:2], setting.formatter, args)
    experts = {point: Path(folder) / slug(point) for point in setting.points}
    trained = DMoERMForSequenceClassification.from_base(setting.base, task=TASK, **arguments)
    trained = with_experts(trained, setting.points)
    for point, path in experts.items():
        export_expert(trained, TASK, point, path)
    return lambda: phase3(base, experts, rows, rows[:2], setting.formatter, args)


def measured(case: str) -> int:
    """Bytes of a case in this process, which runs it with a tiny model first."""
    setting, *what = CASES[case]
    for sizes in (WARM_UP, setting):
        sizes.formatter, sizes.base  # noqa: B018  (made now, not while it is measured)
        before = settle()
        with TemporaryDirectory() as folder:
            run = prepare(*what, sizes, folder)
            settle()
            run()
            peak = resident("VmHWM")
    return peak - before


def settle() -> int:
    """Gives back what is free, sets the high-water mark of resident memory back, and returns what is resident."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measured_apart(case: str) -> int:
    """The same in a process of its own, which gives memory back as soon as it is free."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    command = [sys.executable, __file__, "--measure", case]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{case}: got exit status {result.returncode}, need 0:\n{result.stderr}")
    return int(result.stdout.split()[-1])


# What is estimated.


def estimate_of_case(case: str) -> Memory:
    setting, what, prompts, options = CASES[case]
    rows = setting.formatter.encode_rows(setting.rows(2 * prompts, 2)[:prompts])[0]
    texts = [encoding for row in rows for encoding in row]
    tokens = distinct_tokens([text.input_ids for text in texts], [text.prompt_length for text in texts])
    config = DMoERMConfig(setting.backbone_config, {TASK: setting.points}, **setting.model_arguments("all"))
    estimate = scoring_memory if what == "scoring" else ESTIMATES[what]
    return estimate(shape_of(config), Run(tokens, "fp32", device="cpu", **options))


@cache
def shape_of_size(size: str) -> Shape:
    return shape_of(DMoERMConfig(SIZES[size], {TASK: [f"point {number}" for number in range(6)]}))


def recipe_rows() -> Iterator[dict[str, Any]]:
    """The estimates of `PLANS`, and beside those under ZeRO what DeepSpeed's own estimator has of it."""
    for size in tqdm(SIZES, desc="estimating"):
        shape = shape_of_size(size)
        for plan, (what, options) in PLANS.items():
            run = Run(**{"tokens": STEP, **options})
            named = {"case": plan, "size": size}
            yield named | row_of(ESTIMATES[what](shape, run)) | {"deepspeed_gib": deepspeed_gib(shape, run, what)}


def recipe_table(rows: list[dict[str, Any]]) -> str:
    """GiB a GPU, plans down and sizes across; in brackets GiB of a machine's memory for what is offloaded."""
    cells = {(row["case"], row["size"]): row for row in rows if "size" in row}
    lines = [["", *SIZES], ["---", *["---:"] * len(SIZES)]]
    for plan in PLANS:
        hosts = [cells[plan, size]["parts_gib"]["host"] for size in SIZES]
        totals = [f"{cells[plan, size]['estimate_gib']:.0f}" for size in SIZES]
        lines.append(
            [plan, *(f"{gib} ({host:.0f})" if host else gib for gib, host in zip(totals, hosts, strict=True))]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def loaded_table() -> str:
    """GB of a machine's memory for each process, in fp32, before anything is divided."""
    lines = [["GB a process", *SIZES], ["---", *["---:"] * len(SIZES)]]
    shapes = [shape_of_size(size) for size in SIZES]
    lines += [[what, *(f"{4 * count(shape) / 1e9:.0f}" for shape in shapes)] for what, count in LOADED.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def deepspeed_gib(shape: Shape, run: Run, what: str) -> float | None:
    """What DeepSpeed estimates of the model states on a device; it takes all parameters for trained ones."""
    trained = {"phase1": shape.base, "phase2": shape.base + shape.lora, "ppo": shape.policy + shape.base}.get(what)
    if trained is None or run.zero < 2:
        return None
    options = {"num_gpus_per_node": run.ranks, "cpu_offload": run.offload_optimizer}
    if run.zero == 2:
        return estimate_zero2_model_states_mem_needs(trained, **options)[1] / 2**30
    options["cpu_offload_params"] = run.offload_parameters
    return estimate_zero3_model_states_mem_needs(trained, shape.largest, **options)[1] / 2**30


def row_of(memory: Memory, measured: int | None = None) -> dict[str, Any]:
    parts = {name: round(value / 2**30, 3) for name, value in memory._asdict().items()}
    return {
        "estimate_gib": memory.total / 2**30,
        "measured_gib": None if measured is None else measured / 2**30,
        "parts_gib": parts,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES), help="what is measured")
    parser.add_argument("--measure", choices=list(CASES), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(measured(arguments.measure))
        return
    rows = []
    for case in tqdm(arguments.cases, desc="measuring"):
        rows.append({"case": case, **row_of(estimate_of_case(case), measured_apart(case))})
    for row in rows:
        estimate, value = row["estimate_gib"], row["measured_gib"]
        print(f"{row['case']:30} {estimate:.3f} GiB, measured {value:.3f}, off by {estimate / value - 1:+.1%}")
    rows += recipe_rows()
    print(recipe_table(rows), loaded_table(), sep="\n\n")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=2))


if __name__ == "__main__":
    main()
