"""Everything that talks to DeepSpeed, torch.distributed or the launcher."""
