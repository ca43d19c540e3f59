"""
Load a DMoERM and score two responses to a prompt, by capability point: `dmoerm score` as a script to copy and change.

    python examples/score.py runs/demo/model
"""

from dmoerm_trl import run  # imported first, to silence the libraries

# isort: split
from argparse import ArgumentParser

from dmoerm_trl import describe, load_reward_model


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="score.py")
    parser.add_argument("model", help="Folder or hub name of a DMoERM.")
    model, formatter = load_reward_model(parser.parse_args(argv).model, max_length=1024)
    prompt = [{"role": "user", "content": "I am a bit lonely, even football did not help."}]
    responses = ["That sounds hard, tell me more. How about tomorrow.", "Noted for later, stop your whining."]
    described = describe(model, formatter, [(prompt, response) for response in responses])
    for response, scores in zip(responses, described, strict=True):
        print(f"\n{response}\n  reward {scores['reward']:+.3f} from the inner model of {scores['route']}")
        for point, score in scores["capability_scores"].items():
            print(f"  {point}: {score:+.3f}")


if __name__ == "__main__":
    run(main)
