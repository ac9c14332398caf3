"""What a run costs, from its recipe alone. Plain arithmetic, no torch, no GPU.

Counted of a recipe:  shapes.py, work.py (parameters, FLOP, bytes), memory.py (bytes a GPU by ZeRO stage), traffic.py
                      (collectives of a step), data_side.py (loaders, storage)
Of which machine:     hardware.yaml and its reader hardware.py, network.py (seconds of a collective)
What it comes to:     step_cost.py (seconds of a step), goodput.py (failures and saves), fitting.py (which micro-batch
                      fits), stages.py and chain.py (the stages around a recipe), estimate.py (one stage, and the
                      settings to take)
Who asks:             mfu.py (a run's MFU), dry_run.py (--dry_run), bill.py and bill_text.py (plan.py)
"""
