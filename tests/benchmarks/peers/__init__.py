"""Shoal beside the engines that a user could pick instead: one machine, one checkpoint, one workload, each alone in its turn.

A *peer* is another engine. A *side* is an engine in one precision (Shoal's own is what `shoal serve` chooses). A *shape* is one of the
two seeded checkpoints. A side *counts* if its greedy tokens are those of transformers in float32, which the *oracle* holds.
"""
