"""
Loads a DMoERM and scores two responses to a prompt, capability by capability.

    python examples/score.py runs/demo/model
"""

from dmoerm_trl.console import run  # first, so that the libraries are quiet

# isort: split
from argparse import ArgumentParser

from transformers import AutoTokenizer

from dmoerm_trl import DMoERMForSequenceClassification, Formatter
from dmoerm_trl.evaluation.scoring import score_one
from dmoerm_trl.modeling.loading import loading


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="score.py")
    parser.add_argument("model", help="Folder or hub name of a DMoERM.")
    name = parser.parse_args(argv).model
    with loading(name, "a DMoERM"):
        model = DMoERMForSequenceClassification.from_pretrained(name)
        formatter = Formatter.for_model(model.config, AutoTokenizer.from_pretrained(name), max_length=1024)
    prompt = [{"role": "user", "content": "I am a bit lonely, even football did not help."}]
    for response in ("That sounds hard, tell me more. How about tomorrow.", "Noted for later, stop your whining."):
        output = score_one(model, formatter.encode(prompt, response))
        task = list(model.config.tasks)[int(output.route)]
        print(f"\n{response}\n  reward {float(output.logits):+.3f} from the inner model of {task}")
        for point in model.config.tasks[task]:
            print(f"  {point}: {float(output.capability_scores[point]):+.3f}")


if __name__ == "__main__":
    run(main)
