"""`lowrank-ds bench`: speed, memory and traffic of our optimizers beside torch's and the published packages'.

Every figure comes from one process in which the contenders take turns, so that a slow moment of the machine hits all of
them; results are JSON, from which the tables of docs/benchmarks.md are made (`render`).

    command    the command line                     facts       machine, versions, commit, load
    micro      one matrix: step, refresh, memory    clock       interleaved rounds and their statistics
    model      all of a LLaMA's parameters          contenders  who is measured, and what is not installed
    sharded    two ranks, ZeRO and FSDP2            gemms       the floor: a step's own GEMMs, nothing else
    gpu        the same on CUDA, a 7B step          held        bytes of state, by storage, beside the formula
    render     JSON to Markdown                     tracking    what is alive at the worst moment of a step
"""
