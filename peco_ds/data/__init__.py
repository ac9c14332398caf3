"""Shards, order, views, masks and batches."""
