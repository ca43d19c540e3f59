"""What all tests share: the process's settings, and the skip of PPO tests where TRL has no PPO."""

import os

# Read by the libraries when they are first imported, so set before any of them is; the workers of xdist inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator  # noqa: E402
from copy import deepcopy  # noqa: E402
from functools import cache  # noqa: E402
from importlib.metadata import version  # noqa: E402
from importlib.util import find_spec  # noqa: E402

import models  # noqa: E402
import pytest  # noqa: E402
from processes import start  # noqa: E402, F401
from transformers import PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402

from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification  # noqa: E402


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("requires_ppo") and find_spec("trl.experimental.ppo") is None:
        pytest.skip(f"TRL {version('trl')} has no PPO: it was removed in 1.13, install dmoerm-trl[ppo]")


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """The libraries keep settings of a training in the environment, which the next test's processes would inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


# The tiny models of models.py, each built once a process; a test gets a copy, which it may change.


@cache
def _built(make: str, *arguments: str) -> object:
    return getattr(models, make)(*(_built(argument) for argument in arguments))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML; eos is `<|im_end|>`, pad is `<|endoftext|>`."""
    return deepcopy(_built("make_tokenizer"))


@pytest.fixture
def backbone() -> PreTrainedModel:
    """A Qwen2 of two layers and width 32, as `AutoModel` loads it."""
    return deepcopy(_built("make_backbone", "make_tokenizer"))


@pytest.fixture
def dmoerm() -> DMoERMForSequenceClassification:
    """A complete DMoERM of the three tasks `models.TASKS`, whose router sends `models.PROMPTS` to their tasks."""
    return deepcopy(_built("make_dmoerm", "make_tokenizer"))


@pytest.fixture
def inner() -> DMoERMForSequenceClassification:
    """A model of one task, "chitchat", with three experts and no router."""
    return deepcopy(_built("make_inner", "make_tokenizer"))


@pytest.fixture
def single() -> DMoERMForSequenceClassification:
    """A single reward model of the task "chitchat": a base and its head, as phase 1 trains it."""
    return deepcopy(_built("make_single", "make_tokenizer"))
