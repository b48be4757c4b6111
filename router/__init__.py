"""Where tokens go: gating, dispatch and combine, the channels that carry them, and the engine that drives a step."""
