"""The whole training under DeepSpeed and FSDP, by real processes on the CPU: the weights of one process, kills, and what is refused."""

import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from accelerate import DistributedType
from models import PROMPTS, RESPONSES, make_backbone, make_dmoerm, make_tokenizer
from safetensors.torch import load_file
from torch import Tensor, nn

from dmoerm_trl.commands.train import train as train_script
from dmoerm_trl.data.formatting import Formatter
from dmoerm_trl.data.rows import PreferenceRow
from dmoerm_trl.distributed.engines import check_engine
from dmoerm_trl.training.checkpoints import check_checkpoint, last_checkpoint
from dmoerm_trl.training.phases import phase1, phase2
from dmoerm_trl.training.pipeline import Pipeline
from dmoerm_trl.training.ranked_config import RankedRewardConfig
from dmoerm_trl.training.recipe import Recipe
from dmoerm_trl.training.stages import Stage, stage_records

LIMIT = 200
"""Seconds after which a run is taken to hang."""

launches = pytest.mark.skipif(
    not shutil.which("g++"), reason="DeepSpeed compiles how CPU processes talk, which needs g++"
)

TABLE = {"chitchat": ["logic", "empathy"], "maths": ["logic", "correctness"]}


def make_rows() -> Iterator[dict]:
    """24 prompts of each task, of which every part that is trained on gets an even number; every fifth has no label of "logic"."""
    for number in range(48):
        task, point = list(TABLE.items())[number % 2]
        labels = {name: [(number * (i + 1) + k * (i + 2)) % 5 + 1 for k in range(3)] for i, name in enumerate(point)}
        if number % 5 == 2:
            del labels["logic"]
        yield {
            "prompt": f"{PROMPTS[task]} {number}",
            "responses": [f"{text} {number}" for text in RESPONSES],
            "ranks": [(number + k) % 3 + 1 for k in range(3)],
            "task": task,
            "capability_ranks": labels,
        }


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """A folder with the base, the tasks and the rows."""
    folder = tmp_path_factory.mktemp("zero")
    tokenizer = make_tokenizer()
    make_backbone(tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"tasks": TABLE, "overall": ["logic", "empathy"]}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    return folder


def zero(stage: int, **more) -> dict:
    """A DeepSpeed configuration in which no weight is too small for a shard of its own."""
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    optimization = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    return {"zero_optimization": optimization, **dict.fromkeys(auto, "auto"), **more}


def write_recipe(material: Path, output: Path, processes: int, deepspeed: dict | None, **changes) -> Path:
    """A recipe of eight steps a stage whose global batch is two prompts; Adam's epsilon is one that no noise can pass."""
    few = {"max_steps": 8, "eval_steps": 2, "learning_rate": 3e-3, "adam_epsilon": 1e-4, "weight_decay": 0.1}
    few |= {
        "per_device_train_batch_size": 2 // processes,
        "max_grad_norm": 0.05,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    few |= {"patience": 2, "metric_for_best_model": "eval_loss", "deepspeed": deepspeed, **changes}
    recipe = {
        "output_dir": str(output),
        "base_model": str(material / "base"),
        "train_data": str(material / "rows.jsonl"),
        "tasks": str(material / "tasks.yaml"),
        **{"lora_rank": 4, "lora_alpha": 4, "lora_dropout": 0.0, "max_length": 256, "validation_share": 0.3},
        **{"without_outer": False, "ensemble_size": 0},
        **dict.fromkeys(("router", "phase1", "phase2", "phase3", "baselines"), few),
    }
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(json.loads(json.dumps(recipe))))
    return path


def launched(*command: str, processes: int, machines: Sequence[str] = ("--standalone",)) -> subprocess.Popen:
    """A program, run by that many processes of a launcher, or (0) without one; with the launcher's arguments for machines."""
    launcher = ["-m", "torch.distributed.run", *machines, f"--nproc_per_node={processes}"] if processes else []
    paths = os.pathsep.join(
        [str(Path(__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.Popen(
        [sys.executable, *launcher, *command],
        env={
            **os.environ,
            **{"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONFAULTHANDLER": "1"},
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start(recipe: Path, processes: int) -> subprocess.Popen:
    """`dmoerm train`."""
    return launched("-m", "dmoerm_trl.cli", "train", "--config", str(recipe), processes=processes)


FSDP = """
from accelerate import DistributedType
from accelerate.state import PartialState
from torch import distributed
init = PartialState.__init__
def init_with_fsdp(self, *args, **kwargs):
    init(self, *args, **kwargs)
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    if self.distributed_type in (DistributedType.MULTI_CPU, DistributedType.NO):
        self.distributed_type = DistributedType.MULTI_GPU
PartialState.__init__ = init_with_fsdp
from dmoerm_trl.cli import main
main()
"""
"""`dmoerm`, where accelerate, which has FSDP on GPUs alone, takes CPU processes for such."""


def start_fsdp(recipe: Path, processes: int, monkeypatch) -> subprocess.Popen:
    """`dmoerm train` by that script, with the variables that `accelerate launch` sets for recipes/accelerate/fsdp.yaml."""
    script = recipe.with_name("fsdp.py")
    script.write_text(FSDP)
    config = yaml.safe_load((Path(__file__).parents[2] / "recipes/accelerate/fsdp.yaml").read_text())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in config["fsdp_config"].items():
        monkeypatch.setenv(name.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    return launched(str(script), "train", "--config", str(recipe), processes=processes)


def said_by(*launchers: subprocess.Popen) -> str:
    """All that they print until their end. If they hang, the failure says where each of their processes stands."""
    try:
        return "".join(launcher.communicate(timeout=LIMIT)[0] for launcher in launchers)
    except subprocess.TimeoutExpired:
        for left in still_running(launchers):
            left.send_signal(signal.SIGABRT)  # of which Python prints its stack
        pytest.fail("hangs: " + "".join(launcher.communicate(timeout=LIMIT)[0] for launcher in launchers))
    finally:
        for left in still_running(launchers):
            left.kill()


def still_running(launchers: Sequence[subprocess.Popen]) -> list[psutil.Process]:
    """The processes of launchers, and those."""
    running = [psutil.Process(launcher.pid) for launcher in launchers if launcher.poll() is None]
    return [process for launcher in running for process in [*launcher.children(recursive=True), launcher]]


def train(recipe: Path, processes: int) -> None:
    process = start(recipe, processes)
    said = said_by(process)
    assert process.returncode == 0, said[-5000:]


@pytest.fixture(scope="session")
def alone(material, tmp_path_factory) -> Path:
    """What one process leaves without DeepSpeed."""
    output = tmp_path_factory.mktemp("alone") / "run"
    train(write_recipe(material, output, 1, None), 0)
    return output


def close(output: Path, expected: Path) -> None:
    """All weights that two runs left, tensor by tensor: to 1e-5 of the norm, of 0.01 where it is less."""
    files = {path.relative_to(expected) for path in expected.rglob("*.safetensors")}
    assert files == {path.relative_to(output) for path in output.rglob("*.safetensors")}
    assert {path.parent.as_posix() for path in files} >= {"router", "chitchat/phase1", "maths/phase3", "model"}
    for path in sorted(files):
        close_weights(load_file(output / path), load_file(expected / path))


def close_weights(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in found:
        difference = float((found[name] - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-2))
        assert difference < 1e-5, (name, difference)


@launches
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_under_zero_end_with_the_weights_of_one(stage, alone, material, tmp_path):
    """Router, phases, experts, normalisation, best weights and patience; some rows have no label of a point."""
    output = tmp_path / "run"
    train(write_recipe(material, output, 2, zero(stage)), 2)
    close(output, alone)
    for history in output.rglob("history.json"):
        metric = (
            "eval_accuracy" if history.parent.name == "router" else "eval_loss"
        )  # transformers' own loss is not exact
        found, expected = (
            {entry["step"]: entry[metric] for entry in json.loads(path.read_text()) if metric in entry}
            for path in (history, alone / history.relative_to(output))
        )
        assert found == pytest.approx(expected, rel=1e-4)


@launches
@pytest.mark.slow
@pytest.mark.timeout(4 * LIMIT)
def test_a_killed_process_ends_the_run_and_it_goes_on_with_as_many_processes(alone, material, tmp_path):
    output = tmp_path / "run"
    recipe = write_recipe(material, output, 2, zero(3))
    launcher = start(recipe, 2)
    until(lambda: states(output, "chitchat/experts", 2), launcher)
    (checkpoint,) = states(output, "chitchat/experts", 2)
    psutil.Process(launcher.pid).children()[1].kill()
    said = said_by(launcher)
    assert launcher.returncode != 0 and "Signal 9 (SIGKILL)" in said
    assert checkpoint.exists() and not (output / "model").exists()

    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    accelerator = SimpleNamespace(state=state, num_processes=1)
    other = SimpleNamespace(is_fsdp_enabled=False, is_deepspeed_enabled=True, accelerator=accelerator)
    says = re.escape("got a checkpoint of ZeRO-3 (2 processes) training and ZeRO-3 (1 processes) training now")
    with pytest.raises(ValueError, match=says):
        check_checkpoint(checkpoint.parent, other)

    train(recipe, 2)
    close(output, alone)


@pytest.mark.slow
@pytest.mark.timeout(4 * LIMIT)
def test_a_run_under_fsdp_that_is_killed_goes_on_with_another_number_of_processes(
    alone, material, tmp_path, monkeypatch
):
    output = tmp_path / "run"
    two = start_fsdp(write_recipe(material, output, 2, None), 2, monkeypatch)
    until(lambda: states(output, "maths/experts", 4), two)
    psutil.Process(two.pid).children()[1].kill()
    said = said_by(two)
    assert two.returncode != 0 and "Signal 9 (SIGKILL)" in said
    assert (output / "chitchat/experts").exists() and not (output / "model").exists()

    one = start_fsdp(write_recipe(material, output, 1, None), 1, monkeypatch)
    said = said_by(one)
    assert one.returncode == 0, said[-5000:]
    close(output, alone)


def states(output: Path, stage: str, step: int) -> list[Path]:
    """The last file of a stage's checkpoint, once it is written; the folder between tells what the stage is made of."""
    return list(output.glob(f"work/{stage}/*/checkpoints/checkpoint-{step}/trainer_state.json"))


def until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)


REFUSED = """
import json, sys
from pathlib import Path
from test_zero import refused
print("refused:" + json.dumps({name: refused(name, Path(sys.argv[1])) for name in sys.argv[2:]}))
"""


def refused(case: str, folder: Path) -> str:
    """In a launched process: what the error of a case says."""
    config, folder = zero(2), folder / case
    if case == "memory":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**10))
            with pytest.raises(ValueError) as error:
                experts(folder, deepspeed=config)
        experts(folder, deepspeed=config, learning_rate=1.0)  # it was trained to its end
        return f"{error.value} {last_checkpoint(folder)}"
    if case == "disk":
        free = shutil.disk_usage(folder.parent)._replace(free=2**10)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dmoerm_trl.distributed.engines.shutil.disk_usage", lambda _: free)
            with pytest.raises(ValueError) as error:
                experts(folder, deepspeed=config)
        return str(error.value)
    if case == "batch":
        config["train_batch_size"] = 3
    elif case == "optimizer":
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3}}
    elif case == "sub_group_size":
        config = zero(3)
        config["zero_optimization"]["sub_group_size"] = 10
    elif case == "checkpoint":
        (folder / "checkpoint-2/global_step2").mkdir(parents=True)
        (folder / "checkpoint-2/trainer_state.json").write_text(
            json.dumps({"global_step": 2, "stateful_callbacks": STATE})
        )
        for rank in range(2):
            (folder / f"checkpoint-2/global_step2/zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
            (folder / f"checkpoint-2/global_step2/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    try:
        experts(folder, deepspeed=config)
    except ValueError as error:
        return str(error)
    return "nothing"


STATE = {"TrainerControl": {"args": {"should_training_stop": False}}}


def experts(folder: Path, **changes) -> dict[str, Tensor]:
    """Phase 2 on a few rows, of which one has no label of "logic": the weights."""
    tokenizer = make_tokenizer()
    formatter = Formatter(tokenizer, 256)
    rows = [PreferenceRow(row["prompt"], row["responses"], row["ranks"], row["task"], row["capability_ranks"])
            for row in islice(make_rows(), 0, 12, 2)]  # fmt: skip
    settings = {"max_steps": 4, "eval_steps": 2, "use_cpu": True, "learning_rate": 3e-3, "adam_epsilon": 1e-4}
    settings |= {"load_best_model_at_end": False, "report_to": "none"}
    args = RankedRewardConfig(str(folder), **{**settings, **changes})
    base = make_dmoerm(tokenizer, {"chitchat": []}, lora_dropout=0.0)
    return phase2(base, ["logic", "empathy"], rows, rows, formatter, args)[0].state_dict()


TRAINED = """
import json, sys
from pathlib import Path
from accelerate import PartialState
from safetensors.torch import save_file
from test_zero import experts
from dmoerm_trl.distributed.processes import is_main
weights = experts(Path(sys.argv[1]), **json.loads(sys.argv[3]))
if is_main():
    save_file(weights, sys.argv[2])
PartialState().destroy_process_group()
"""


@launches
@pytest.mark.slow
def test_zero_1_with_its_optimizer_offloaded_and_gradients_accumulated_ends_with_the_weights_of_one_process(tmp_path):
    (tmp_path / "script.py").write_text(TRAINED)
    config = zero(1, zero_force_ds_cpu_optimizer=False)  # DeepSpeed's own Adam for the CPU takes minutes to compile
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    paths = [str(tmp_path / name) for name in ("script.py", "run", "two.safetensors")]
    process = launched(*paths, json.dumps({"gradient_accumulation_steps": 2, "deepspeed": config}), processes=2)
    said = said_by(process)
    assert process.returncode == 0, said[-3000:]
    close_weights(load_file(tmp_path / "two.safetensors"), experts(tmp_path / "alone", per_device_train_batch_size=4))


@launches
@pytest.mark.slow
def test_in_bf16_small_steps_are_kept(tmp_path):
    """The experts are saved in fp32: steps of a paper's learning rate are lost between two numbers of bf16."""
    (tmp_path / "script.py").write_text(TRAINED)
    few = {"bf16": True, "learning_rate": 1e-6, "load_best_model_at_end": True, "eval_steps": 4}
    config = zero(2, bf16={"enabled": "auto"})
    command = [str(tmp_path / name) for name in ("script.py", "run", "two.safetensors")]
    process = launched(*command, json.dumps({"deepspeed": config, **few}), processes=2)
    said = said_by(process)
    assert process.returncode == 0, said[-3000:]

    found = load_file(tmp_path / "two.safetensors")
    start = experts(tmp_path / "start", per_device_train_batch_size=2, **{**few, "learning_rate": 0.0})
    alone = experts(tmp_path / "alone", per_device_train_batch_size=2, **few)
    trained = [name for name in alone if not torch.equal(alone[name], start[name])]
    assert len(trained) > 10 and all(found[name].dtype == torch.float32 for name in trained)
    rounded = {name: start[name].bfloat16().float() for name in trained}  # DeepSpeed's weights begin so
    moved = torch.cat([(found[name] - rounded[name]).flatten() for name in trained])
    expected = torch.cat([(alone[name] - start[name]).flatten() for name in trained])
    assert float((moved - expected).norm() / expected.norm()) < 0.2


LEFT = """
import json, sys
from pathlib import Path
from accelerate import PartialState
from test_zero import left_by
print("left:" + json.dumps([left_by(stage, Path(sys.argv[1])) for stage in (1, 2, 3, 3)]))
PartialState().destroy_process_group()
"""


def left_by(stage: int, folder: Path) -> tuple[int, int]:
    """In a launched process: bytes of the tensors that are there after phase 1 beside the model, and after the model."""
    tokenizer = make_tokenizer()
    make_backbone(tokenizer).save_pretrained(folder / "base")
    rows = [
        PreferenceRow(row["prompt"], row["responses"], row["ranks"], row["task"]) for row in islice(make_rows(), 4)
    ]
    few = {"max_steps": 3, "eval_steps": 2, "use_cpu": True, "report_to": "none", "metric_for_best_model": "eval_loss"}
    args = RankedRewardConfig(str(folder / "run"), **few, deepspeed=zero(stage))
    model, _ = phase1(str(folder / "base"), "chitchat", rows, rows, Formatter(tokenizer, 256), args)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    beside = sum(size for address, size in tensors().items() if address not in own)
    del model
    shutil.rmtree(folder / "run")
    return beside, sum(tensors().values())


def tensors() -> dict[int, int]:
    """Address and bytes of the memory of all tensors that the garbage collector knows."""
    gc.collect()
    storages = [found.untyped_storage() for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@launches
@pytest.mark.slow
def test_a_stage_under_zero_leaves_nothing_but_its_model(tmp_path):
    (tmp_path / "script.py").write_text(LEFT)
    said = said_by(launched(str(tmp_path / "script.py"), str(tmp_path), processes=1))
    (line,) = [line for line in said.splitlines() if line.startswith("left:")] or [pytest.fail(said[-3000:])]
    size = sum(weight.numel() * 4 for weight in make_backbone(make_tokenizer()).parameters())
    for beside, after in json.loads(line.removeprefix("left:")):
        assert beside < size / 10 and after < size / 10


@pytest.mark.slow
def test_two_machines_end_with_the_weights_of_one_process_which_can_go_on(tmp_path):
    """
    Two launchers of one process each, without DeepSpeed, with gradient checkpointing, where not every process has a pair of
    every point in a step. One process goes on from their checkpoint, two prompts a step still.
    """
    (tmp_path / "script.py").write_text(TRAINED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    paths = (str(tmp_path / name) for name in ("script.py", "run", "two.safetensors"))
    command = [*paths, json.dumps({"gradient_checkpointing": True})]
    machines = [launched(*command, processes=1, machines=[*where, f"--node_rank={rank}"]) for rank in range(2)]
    said = said_by(*machines)
    assert [machine.returncode for machine in machines] == [0, 0], said[-3000:]

    alone = experts(tmp_path / "alone", per_device_train_batch_size=2)
    close_weights(load_file(tmp_path / "two.safetensors"), alone)

    shutil.rmtree(tmp_path / "run/checkpoint-4")
    rate = 1.0  # that of the checkpoint is taken, so that a run from the start would end elsewhere
    close_weights(experts(tmp_path / "run", gradient_accumulation_steps=2, learning_rate=rate), alone)


@launches
@pytest.mark.slow
def test_what_cannot_be_is_an_error_that_names_the_way_out(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(REFUSED)
    cases = {
        "memory": "got 0.000 GiB of the machine's memory, need ",
        "disk": "got 0.000 GiB on the disk of",
        "batch": "ds train_batch_size=3 vs hf train_batch_size",
        "optimizer": "got an `optimizer` in the DeepSpeed configuration of phase 2, need none",
        "sub_group_size": "got sub_group_size=10 in the DeepSpeed configuration, need",
        "checkpoint": "got a checkpoint of ZeRO-3 (2 processes) training and ZeRO-1 or 2 (1 processes) training now",
    }
    said = said_by(launched(str(script), str(tmp_path), *cases, processes=1))
    (line,) = [line for line in said.splitlines() if line.startswith("refused:")] or [pytest.fail(said[-3000:])]
    found = json.loads(line.removeprefix("refused:"))
    for case, text in cases.items():
        assert text in found[case], (case, found[case])
    assert found["memory"].endswith("checkpoint-4")


def test_deepspeed_without_a_launcher_is_an_error(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="in a process that no launcher started.*torchrun"):
        experts(tmp_path, deepspeed=zero(2))


def test_deepspeed_that_is_not_installed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("dmoerm_trl.distributed.engines.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"no DeepSpeed, need the package: pip install 'dmoerm-trl\[deepspeed\]'"):
        RankedRewardConfig(str(tmp_path), use_cpu=True, deepspeed=zero(2))


def test_deepspeed_that_would_not_run_is_an_error():
    """As accelerate has it on CPU processes that it launched itself."""
    trainer = SimpleNamespace(
        is_fsdp_enabled=False,
        args=SimpleNamespace(fsdp=None, deepspeed_plugin=object()),
        accelerator=SimpleNamespace(distributed_type=DistributedType.MULTI_CPU),
    )
    with pytest.raises(ValueError, match=r"a run without DeepSpeed \(MULTI_CPU\).*start with `torchrun`"):
        check_engine(trainer)
    trainer.accelerator.distributed_type = DistributedType.DEEPSPEED
    check_engine(trainer)


def test_fsdp_that_would_not_run_is_an_error(tmp_path, monkeypatch):
    """As accelerate leaves it out on a CPU."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"a run without FSDP \(NO\), need several GPUs"):
        experts(tmp_path)


def test_the_first_version_of_fsdp_is_an_error():
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    trainer = SimpleNamespace(
        is_fsdp_enabled=True,
        args=SimpleNamespace(fsdp=None, deepspeed_plugin=None),
        accelerator=SimpleNamespace(distributed_type=DistributedType.FSDP, state=state),
    )
    with pytest.raises(ValueError, match="got FSDP's first version, need the second.*`fsdp_version: 2`"):
        check_engine(trainer)


def test_a_checkpoint_of_fsdp_is_no_plain_one(tmp_path):
    experts(tmp_path, max_steps=2)
    (tmp_path / "checkpoint-2/pytorch_model_fsdp.bin").touch()
    with pytest.raises(ValueError, match="got a checkpoint of FSDP training and plain training now"):
        experts(tmp_path)


def test_a_changed_global_batch_is_a_changed_recipe_and_its_division_is_not(material, tmp_path, monkeypatch):
    def pipeline(processes: int, batch: int, **changes) -> Pipeline:
        changes |= {"per_device_train_batch_size": batch}
        recipe = Recipe(**yaml.safe_load(write_recipe(material, tmp_path / "run", 1, None, **changes).read_text()))
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        return Pipeline(recipe)

    first = pipeline(2, 2)
    (tmp_path / "run/router").mkdir(parents=True)  # as if the router were trained
    (tmp_path / "run/router/history.json").write_text("[]")
    first.run_stage("data")
    manifest = first.manifest | {"stages": stage_records(first.stages, first.run_data.digests(first.tasks))}
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest))
    for processes, batch, accumulation in ((1, 4, 1), (1, 2, 2), (4, 1, 1)):
        monkeypatch.delenv("WORLD_SIZE")
        pipeline(processes, batch, gradient_accumulation_steps=accumulation).check_finished()
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match="differs in .*'prompts a step of router'.*`gradient_accumulation_steps`"):
        pipeline(1, 2).check_finished()


def test_a_stage_s_checkpoints_are_there_until_all_processes_are_done_with_it(material, tmp_path, monkeypatch):
    run = Pipeline(Recipe(**yaml.safe_load(write_recipe(material, tmp_path / "run", 1, None).read_text())))
    work, result, seen = run.root / "work/router", run.root / "router", []
    monkeypatch.setattr(
        "dmoerm_trl.training.pipeline.wait_for_all", lambda: seen.append((work.exists(), result.exists()))
    )
    run.stages["router"] = Stage(lambda folder: seen.append("run") or [])
    run.run_stage("router")
    assert seen == [(True, False), "run", (True, False), (False, True)]


def test_only_the_main_process_prints(material, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Pipeline, "run", lambda self: None)
    monkeypatch.setenv("RANK", "1")
    train_script(Recipe(**yaml.safe_load(write_recipe(material, tmp_path / "run", 1, None).read_text())))
    assert capsys.readouterr().out == ""


def test_processes_that_are_not_joined_or_have_workers_are_an_error(material, tmp_path, monkeypatch):
    recipe = Recipe(**yaml.safe_load(write_recipe(material, tmp_path / "run", 1, None).read_text()))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="got 2 processes that are not joined.*use_cpu: true"):
        Pipeline(recipe).run()
    recipe.workers = 2
    with pytest.raises(ValueError, match="got workers=2 in each of 2 processes"):
        Pipeline(recipe).run()
