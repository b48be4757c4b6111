"""How every process of the cluster writes its log; apart from the device side, so that the control loop need not import torch."""

import logging
import sys


def configure_logging(role: str) -> None:
    """One line per event on stderr, named by role; Ray's own log file of the process keeps it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {role} %(levelname)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("shoal")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
