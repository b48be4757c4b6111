"""What the tensors do: architectures, attention, experts, weights, sampling. Knows no process, no network, no Ray."""
