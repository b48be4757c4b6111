"""Errors of the cluster package, one tree.

ClusterError
├── ConfigError       the configuration is wrong: names the key
├── StartError        Ray, a port or a resource is not to be had
├── RequestFailed     a running application did not answer, or said no
└── NoRouter          no router has adopted a complete placement map
"""


class ClusterError(Exception):
    """Base of the tree. `kind` is stable: metrics, HTTP and gRPC show it."""

    kind = "cluster_error"


class ConfigError(ClusterError):
    """Names the key, the value and what is allowed."""

    kind = "bad_config"


class StartError(ClusterError):
    """Names what could not be had (Ray, a port, CPUs, GPUs) and what to do."""

    kind = "cannot_start"


class RequestFailed(ClusterError):
    """Where it was sent, and the server's own sentence."""

    kind = "request_failed"


class NoRouter(ClusterError):
    """No router can take a request now; a client may try again."""

    kind = "no_router"
