"""`GET /metrics`: the whole application for Prometheus, whichever gateway is asked."""

from fastapi import FastAPI
from starlette.responses import PlainTextResponse, Response

from cluster.api.control import ClusterControl
from cluster.metrics.exposition import CONTENT_TYPE_LATEST


def add_metrics(app: FastAPI, control: ClusterControl) -> None:
    """Adds the route. 503 while the Coordinator is away: a scrape that fails is seen, sums that begin again are not."""

    @app.get("/metrics", tags=["probes"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """The whole application's metrics in Prometheus' text format."""
        return Response(await control.metrics(), media_type=CONTENT_TYPE_LATEST)
