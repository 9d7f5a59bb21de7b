"""What a training run will take, before anything is rented: `lowrank-ds plan`.

models, settings     what is planned for
holding              which entries a rank holds, by engine
ours, wire           the real optimizer on tensors without contents: its state, temporaries, traffic
activations, timeline   what a LLaMA's forward and backward keep and make, event by event
engine, replicated, fsdp, zero, zero3, coordinator   what each engine keeps, gathers and sends at these events
ledger, calculate    bytes alive, the worst moment
find, simulate, report, command
"""

from lowrank_ds.plan.calculate import Plan, Planner
from lowrank_ds.plan.settings import Settings, Zero

__all__ = ["Plan", "Planner", "Settings", "Zero"]
