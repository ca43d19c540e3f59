"""
Loads a DMoERM and scores two responses to a prompt, capability by capability.

    python examples/score.py runs/demo/model
"""

import sys

from transformers import AutoTokenizer

from dmoerm_trl import DMoERMForSequenceClassification, Formatter
from dmoerm_trl.evaluation.scoring import score_one

model = DMoERMForSequenceClassification.from_pretrained(sys.argv[1])
formatter = Formatter.for_model(model.config, AutoTokenizer.from_pretrained(sys.argv[1]), max_length=1024)
prompt = [{"role": "user", "content": "I am a bit lonely, even football did not help."}]
for response in ("That sounds hard, tell me more. How about tomorrow.", "Noted for later, stop your whining."):
    output = score_one(model, formatter.encode(prompt, response))
    task = list(model.config.tasks)[int(output.route)]
    print(f"\n{response}\n  reward {float(output.logits):+.3f} from the inner model of {task}")
    for point in model.config.tasks[task]:
        print(f"  {point}: {float(output.capability_scores[point]):+.3f}")
