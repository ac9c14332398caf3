"""What a run costs, from its recipe alone: parameters, FLOPs, memory. Plain arithmetic, no torch, no GPU."""
