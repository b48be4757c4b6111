"""A fixed number of micro-batches, for tests and benchmarks that must know how many there are."""

from router.micro_batches import MicroBatches


class Always(MicroBatches):
    """The same number wherever there are sequences enough, whatever it takes."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def number_for(self, num_tokens: int, num_sequences: int) -> int:
        """It."""
        return min(self._number, num_sequences)

    def observe(self, num_tokens: int, num_sequences: int, number: int, step_s: float, waited_s: float) -> None:
        """Learns nothing."""
