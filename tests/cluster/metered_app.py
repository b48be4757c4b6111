"""The application with metered expert hosts, as an import path of a Serve config."""

from ray.serve import Application

from cluster import app
from cluster.config import ShoalConfig
from tests.cluster.metered import MeteredExpertHost


def build(args: ShoalConfig) -> Application:
    """As cluster.app.build, in the process that Serve starts for it."""
    app.ExpertHostReplica = MeteredExpertHost  # type: ignore[misc]
    return app.build(args)
