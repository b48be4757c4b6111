"""Node hours of an elastic fleet against a fixed one, in simulated time: `python -m tests.benchmarks.elasticity [--write]`."""
