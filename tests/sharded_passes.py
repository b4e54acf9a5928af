"""Run as one of several processes: share out a model's weights, make as many passes as asked, say what was found.

python -m accelerate.commands.launch --use_fsdp --fsdp_version 2 ... sharded_passes.py PASSES_OF_RANK_0 PASSES_OF_RANK_1
"""

import json
import sys

import torch
from families import tiny_model

from headwise.models.families import view
from headwise.models.fingerprint import model_fingerprint
from headwise.models.processes import launched

passes = [int(argument) for argument in sys.argv[1:]]
processes, whole, model = launched("cpu"), tiny_model("qwen3"), tiny_model("qwen3")
processes.adopt(model)
made = 0


def count(*_):
    global made
    made += 1


model.get_decoder().layers[0].register_forward_hook(count)
ids = torch.arange(3, 9)[None]
apart = 0.0
with torch.no_grad():
    for _ in range(passes[processes.rank]):
        apart = max(apart, float((model(input_ids=ids).logits - whole(input_ids=ids).logits).abs().max()))
    processes.catch_up()
shares = processes.gather(
    [torch.tensor([float(at), processes.rank]) for at in processes.share(5)], items=5, like=torch.zeros(2)
)
found = {
    "rank": processes.rank,
    "held": sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in model.parameters()),
    "whole": sum(p.nbytes for p in whole.parameters()),
    "projections": sum(view(whole).output_weight(layer).nbytes for layer in range(3)),
    "made": made,
    "apart": apart,
    "shares": shares.tolist(),
    "same_fingerprint": model_fingerprint(model) == model_fingerprint(whole),
    "same_projections": all(
        view(model).output_weight(layer).equal(view(whole).output_weight(layer)) for layer in range(3)
    ),
}
sys.stdout.write(f"{json.dumps(found)}\n")  # at once: print() lets the other process come in between
processes.wait()
