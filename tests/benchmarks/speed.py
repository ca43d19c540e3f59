"""
What k experts cost beside one reward model: scoring and training in all ways, side by side in one process.

    python tests/benchmarks/speed.py --json FILE [--quick]

The unit of every case is an ordinary single reward model on the same texts or pairs: scored in padded batches of 16, or
trained for as many epochs with TRL's `RewardTrainer`. A ratio is the median over interleaved repetitions of a variant's
time to the unit's. `reference`, `peft_loop` and `peft_mixed` have LoRA in all layers, as `ours_all`. What was measured in
one repetition, or on a part of the work and scaled up, stands in the JSON under `once` and `scaled`.

The JSON has, beside the ratios of each case, `exactness` (each of ours -> its largest relative difference from one text and
one expert at a time with PEFT: rewards, embeddings, and in phase 2 LoRA's gradients), `flops`, `peak`, `seconds`,
`peak_memory_mib`, `steps`, and on a GPU `real_sizes`.
"""

import argparse
import contextlib
import json
import os
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

# Read by the libraries when they are first imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from speed_measure import counter, environment, matmul_peak, measure, timed  # noqa: E402
from speed_scoring import ours, scoring_case, single, tokens  # noqa: E402
from speed_setting import OURS, QUICK, Setting  # noqa: E402
from speed_training import inner_moe_case, phase2_case  # noqa: E402

CASES = {
    **dict.fromkeys(["scoring", "scoring_4", "scoring_16", "scoring_64"], scoring_case),
    **{"phase2_k2": phase2_case, "phase2_k4": phase2_case},
    **{"inner_moe": inner_moe_case, "inner_moe_k4": inner_moe_case},
    "scoring_1024": scoring_case,
}
"""Case -> what builds it."""

VARIANTS = ["single", "reference", "peft_loop", "peft_mixed", "ours_unshared", *OURS]

STEPS = {
    "PEFT's loop, padded": "peft_loop",
    "all experts in one pass, packed, the last layer for scored tokens": "ours_unshared",
    "… the prompt once": "ours_all",
    "… LoRA in the top half": "ours_half",
    "… LoRA in the top third": "ours_third",
}
"""What is switched on, one after the other -> variant of the case of 16 responses."""

REAL = {
    "Qwen1.5-1.8B": {"hidden_size": 2048, "intermediate_size": 5504, "layers": 24, "heads": 16, "kv_heads": 16},
    "Qwen1.5-7B": {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "heads": 32, "kv_heads": 32},
}


def run(setting: Setting, repeats: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures the cases; after each it yields what goes into the JSON so far."""
    peak = matmul_peak(setting.device, setting.dtype)
    measured = {}
    for name in names:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):  # the trainers print their logs
            measured[name] = measure(CASES[name](setting, name), repeats, name)
        print(details(name, measured[name], peak), flush=True)
        yield summarise(measured, peak)


def summarise(measured: dict[str, dict[str, Any]], peak: float) -> dict[str, Any]:
    """
    Args:
        measured (`dict`): case -> what [`measure`] returned.
        peak (`float`): FLOPs a second of a large matrix product.
    """
    ratios = {name: case["ratio"] for name, case in measured.items()}
    errors = [case["exactness"] for case in measured.values()]
    return {
        **ratios,
        "exactness": {
            variant: float(torch.tensor([of_case[variant] for of_case in errors if variant in of_case]).max())
            for variant in OURS
            if any(variant in of_case for of_case in errors)
        },
        "exactness_by_case": {name: case["exactness"] for name, case in measured.items()},
        "steps": {step: ratios["scoring_16"][variant] for step, variant in STEPS.items() if "scoring_16" in ratios},
        "peak": {
            "flops_per_second": peak,
            "share": {name: {v: share(case, v, peak) for v in case["ratio"]} for name, case in measured.items()},
        },
        **{
            key: {name: case[key] for name, case in measured.items()}
            for key in ("seconds", "flops", "peak_memory_mib", "once", "scaled")
        },
    }


def share(case: dict[str, Any], variant: str, peak: float) -> float:
    """Share of the achievable peak: FLOPs by count a second."""
    return case["flops"][variant]["counted"] / statistics.median(case["seconds"][variant]) / peak


# Tables.


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def details(name: str, case: dict[str, Any], peak: float) -> str:
    """All that was measured of a case."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = [
        [
            variant + "*" * (variant in case["once"]),
            f"{case['ratio'][variant]:.2f}",
            f"{statistics.median(case['seconds'][variant]):.2f}",
            number(case["peak_memory_mib"][variant], ".0f"),
            f"{case['flops'][variant]['counted'] / 1e9:.0f}",
            number(case["flops"][variant]["ratio"], ".2f"),
            f"{share(case, variant, peak):.0%}",
            number(case["exactness"].get(variant), ".0e"),
        ]
        for variant in case["ratio"]
    ]
    header = [name, "ratio", "seconds", "peak MiB", "GFLOP", "of the limit", "of the peak", "error"]
    return f"\n{table(header, rows)}"


def ratio_table(result: dict[str, Any], names: Sequence[str]) -> str:
    """One row a case, one column a variant."""
    variants = [variant for variant in VARIANTS if any(variant in result[name] for name in names)]
    cells = [[f"{result[name][v]:.2f}" if v in result[name] else "" for v in variants] for name in names]
    return table(["single = 1", *variants], [[name, *row] for name, row in zip(names, cells, strict=True)])


# On a GPU.


def real_sizes(device: str, repeats: int, sizes: dict[str, dict[str, int]] = REAL, **changes: Any) -> dict[str, Any]:
    """
    Scoring of 16 responses a prompt in bf16, at the sizes of real models with random weights.

    Returns:
        `peak` in FLOPs a second, and model -> variant -> `ratio`, `tokens_per_second` (a prompt counts once a response) and
        `share` of the peak, by the FLOPs that the variant ran.
    """
    result: dict[str, Any] = {"peak": matmul_peak(device, "bfloat16")}
    for name, size in sizes.items():
        setting = Setting(**{**size, "vocab_size": 151_936, "device": device, "dtype": "bfloat16", **changes})
        texts = setting.encodings(setting.rows(8, 16))
        result[name] = {}
        for variant in ("single", "ours_all", "ours_third"):  # one model at a time in the memory
            model = setting.single() if variant == "single" else setting.ours(OURS[variant])
            way = partial(single if variant == "single" else ours, model, setting, texts)
            with counter() as count:
                timed(way)
            seconds = statistics.median(timed(way)[0] for _ in range(repeats))
            result[name][variant] = {
                "ratio": seconds / result[name]["single"]["seconds"] if result[name] else 1.0,
                "seconds": seconds,
                "tokens_per_second": tokens(texts) / seconds,
                "share": count.get_total_flops() / seconds / result["peak"],
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--quick", action="store_true", help="a small model, one repetition: within a minute")
    parser.add_argument("--repeats", type=int, help="repetitions; 5, and 1 with --quick")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU")
    parser.add_argument("--spread", type=float, help="standard deviation of the logarithm of the texts' lengths; 0.9")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which cases; all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()

    start = time.perf_counter()
    setting = replace(QUICK if options.quick else Setting(), device="cuda" if torch.cuda.is_available() else "cpu")
    if options.spread is not None:
        setting = replace(setting, spread=options.spread)
    repeats = options.repeats or (1 if options.quick else 5)
    about = {"setting": asdict(setting), "repeats": repeats, "environment": environment()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for result in run(setting, repeats, options.cases):
        result |= {**about, "total_seconds": time.perf_counter() - start}
        options.json.write_text(json.dumps(result, indent=2))
    print(f"\n{ratio_table(result, options.cases)}\n\n{json.dumps(result['exactness'])}")
    if result["steps"]:
        steps = [[step, f"{ratio:.2f}"] for step, ratio in result["steps"].items()]
        print("\n" + table(["step", "16 responses"], steps))
    if setting.device == "cuda" and not options.quick:
        result["real_sizes"] = real_sizes("cuda", repeats)
        print(json.dumps(result["real_sizes"], indent=2))
        options.json.write_text(json.dumps(result, indent=2))
    print(f"\n{time.perf_counter() - start:.0f} seconds; {options.json}")


if __name__ == "__main__":
    main()
