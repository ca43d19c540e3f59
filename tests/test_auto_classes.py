"""`import dmoerm_trl` is enough for the Auto classes and pipelines, whatever is imported before or after, and costs nothing."""

import subprocess
import sys

import pytest
from models import make_dmoerm, make_tokenizer

ORDERS = {
    "alone": "import dmoerm_trl",
    "before peft": "import dmoerm_trl, peft",
    "before trl": "import dmoerm_trl; from trl import RewardTrainer",
    "after the Auto classes": "from transformers import AutoModel; import dmoerm_trl",
    "after the configurations": "from transformers import AutoConfig; import dmoerm_trl",
    "after all": "import trl, peft; from trl import RewardConfig; import dmoerm_trl",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
    make_dmoerm(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_the_auto_classes_load_a_dmoerm(order, folder):
    program = f"""
{order}
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline
assert type(AutoConfig.from_pretrained({str(folder)!r})).__name__ == "DMoERMConfig"
assert type(AutoModel.from_pretrained({str(folder)!r})).__name__ == "DMoERMModel"
model = AutoModelForSequenceClassification.from_pretrained({str(folder)!r})
assert type(model).__name__ == "DMoERMForSequenceClassification"
turns = [{{"role": "user", "content": "Hello there"}}, {{"role": "assistant", "content": "Hi."}}]
chat = AutoTokenizer.from_pretrained({str(folder)!r}).apply_chat_template(turns, tokenize=False)
assert pipeline("text-classification", {str(folder)!r})(chat)[0]["score"] is not None
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_the_command_itself_imports_no_library(arguments):
    program = f"""
import sys
from dmoerm_trl.cli import main
main({arguments})
assert not {{"torch", "transformers", "numpy", "yaml"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "command", ["train", "label", "prepare", "eval", "score", "ppo", "grpo", "best-of-n", "export", "demo", "world"]
)
def test_the_options_of_a_command_are_listed_without_torch(command):
    program = f"""
import sys
from dmoerm_trl.cli import main
try:
    main([{command!r}, "--help"])
except SystemExit as ended:
    assert not ended.code
assert not {{"torch", "datasets", "trl", "peft"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: dmoerm" in done.stdout, done.stderr[-3000:]
