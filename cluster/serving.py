"""`shoal serve`: Ray up, application deployed, progress shown, ready line printed, everything gone again at the end."""

import contextlib
import io
import logging
import os
import signal
import socket
import time
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray._private.state import available_resources_per_node  # nothing public tells what is free on each node
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.context import _get_global_client  # nothing public tells a running Serve's ports
from ray.serve.schema import ApplicationStatus, LoggingConfig
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from cluster.app import build, check_layout
from cluster.config import ShoalConfig
from cluster.doors import GRPC_SERVICES, Doors, check_ports, check_tls, doors_of, tls_options
from cluster.errors import StartError
from cluster.greeting import Address, greet
from cluster.guard.setup import check_binding, settle_keys
from cluster.layout import choose_device
from cluster.ray_cluster import has_haproxy
from model.loading import check_checkpoint

JOIN_TIMEOUT_S = 10.0
CLOSING_TIMEOUT_S = 2.0
HEAD = "node:__internal_head__"
FAILED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)

logger = logging.getLogger(__name__)


def serve_until_stopped(config: ShoalConfig, doors: Doors, console: Console) -> None:
    """Serves until SIGINT or SIGTERM, then leaves no process behind. Raises StartError, ConfigError or a ModelError at start."""
    num_hosts = check_layout(config, check_checkpoint(config.model.path))
    keys, security = settle_keys(config.security)
    config = config.model_copy(update={"security": security})
    if doors.address is None:
        check_tls(security, has_haproxy=has_haproxy())
        check_binding(doors.host, security)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    stop = _StopSignal()
    _connect(doors, config.gateway.max_body_bytes)
    stop.listen()  # Ray puts a SIGTERM handler of its own in place
    stay = _Stay(config.name, ray_is_ours=doors.address is None)
    try:
        doors = _agree_on_doors(config.name, doors)
        check_binding(doors.host, security)
        config = _settle_device(config, num_hosts, console)
        route = "/" if doors.address is None else f"/{config.name}"
        _deploy(config, doors, route, stay)
        view = _View(config.name)
        events = _Events(console)
        _wait_until_running(config, view, console, events, stop)
        if not stop.requested:
            scheme = "http" if security.certificate_file is None else "https"
            http = f"{scheme}://{doors.host}:{doors.http_port}{'' if route == '/' else route}"
            address = Address(config.name, http, f"{doors.host}:{doors.grpc_port}", keys, security.certificate_file)
            if keys.is_for_clients:
                said = f"gRPC listens on every interface, so it asks for this key: {keys.grpc}  (own keys: `shoal keys new`)"
                console.print(said, highlight=False, soft_wrap=True, markup=False)
            ready = f"shoal ready  model {address.model}  http {address.http}  grpc {address.grpc}"
            console.print(ready, highlight=False, soft_wrap=True, markup=False)
            greet(console, address, stop)
        while not stop.requested:
            events.show(view.ask())
            stop.wait(1.0)
        console.print("stopping ...")
    finally:
        stop.ignore()
        # Ray prints, to whatever stdout is now, that Serve's own actors were ended; the console has the stdout of before.
        with contextlib.redirect_stdout(io.StringIO()):
            stay.end()
    console.print("stopped")


class _Stay:
    """What is ours on a Ray, and so is taken down again: a Ray of our own whole, from one that others use only our application."""

    def __init__(self, application: str, *, ray_is_ours: bool) -> None:
        self._application = application
        self._ray_is_ours = ray_is_ours
        self.deployed = False

    def end(self) -> None:
        """Never raises: what ended the serving is what the user reads."""
        if not ray.is_initialized():
            return
        if self.deployed:
            announce_closing(self._application)
        try:
            if self._ray_is_ours:
                serve.shutdown()
            elif self.deployed:
                serve.delete(self._application)
        except Exception:
            logger.exception("the application %s could not be taken down", self._application)
        ray.shutdown()


def announce_closing(application: str) -> None:
    """So that hosts do not wait for others to take over their experts. Without it they wait until the Coordinator is silent."""
    try:
        serve.get_deployment_handle("Coordinator", application).announce_closing.remote().result(timeout_s=CLOSING_TIMEOUT_S)
    except Exception as error:  # whatever Serve raises for a deployment that never came up
        logger.debug("the coordinator was not told of the closing: %s", error)


class _StopSignal:
    """SIGINT and SIGTERM as a flag: the main thread decides when to act on it."""

    def __init__(self) -> None:
        self.requested = False
        self.listen()

    def listen(self) -> None:
        """From here on both signals set the flag."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature is the interpreter's
        self.requested = True

    def wait(self, timeout_s: float) -> None:
        """Until the signal or the time-out."""
        until = time.monotonic() + timeout_s
        while not self.requested and time.monotonic() < until:
            time.sleep(0.05)

    def ignore(self) -> None:
        """From here on the shutdown runs to its end."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


class _View:
    """The Coordinator's view; None while it is starting or restarting."""

    def __init__(self, application: str) -> None:
        self._application = application
        self._handle: Any = None

    def ask(self) -> dict[str, Any] | None:
        """Never raises: the next poll asks again."""
        try:
            if self._handle is None:
                self._handle = serve.get_deployment_handle("Coordinator", self._application)
            answer: dict[str, Any] = self._handle.view.remote().result(timeout_s=2.0)
        except Exception:  # whatever Serve raises for a deployment or a replica that is not there yet
            return None
        return answer


class _Events:
    """Prints each of the Coordinator's events once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = 0

    def show(self, view: dict[str, Any] | None) -> None:
        events = view["events"] if view else []
        if events and events[-1]["n"] < self._last:
            self._last = 0  # the Coordinator was restarted and counts anew
        for event in events:
            if event["n"] > self._last:
                self._last = event["n"]
                self._console.print(Text.assemble((time.strftime("%H:%M:%S"), "dim"), " ", event["text"]), highlight=False)


def _connect(doors: Doors, max_message_bytes: int) -> None:
    if doors.address is None:
        check_ports(doors)
        # Serve's proxy would take messages of 2 GiB.
        os.environ.setdefault("RAY_SERVE_GRPC_MAX_MESSAGE_SIZE", str(max_message_bytes))
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Ray runs its workers at nice 15, behind everything else; on a Ray of our own they are what the machine is for.
        os.environ.setdefault("RAY_worker_niceness", "0")
        try:
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises whatever its first failing process led to
            raise StartError(f"Ray cannot start on this machine: {error}") from error
        return
    host, _, gcs_port = doors.address.rpartition(":")
    if doors.address != "auto":
        try:
            socket.create_connection((host, int(gcs_port)), timeout=JOIN_TIMEOUT_S).close()
        except (OSError, ValueError, OverflowError) as error:
            raise StartError(f"no Ray answers at {doors.address} (--address): {error}") from error
    try:
        ray.init(address=doors.address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # as above
        raise StartError(f"cannot join the Ray at {doors.address} (--address): {error}") from error


def _agree_on_doors(application: str, doors: Doors) -> Doors:
    """Those of the Serve that runs already, else ours. Raises StartError if the name is taken there or a port is not to be had."""
    if doors.address is None:
        return doors
    node_id = ray.get_runtime_context().get_node_id()
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        # Serve puts its proxy on the head node: from another machine nothing is known of its ports.
        if any(node["NodeID"] == node_id and HEAD in node["Resources"] for node in ray.nodes()):
            check_ports(doors)
        return doors
    if application in serve.status().applications:
        raise StartError(
            f"an application {application} is already served at {doors.address} (--address): choose another --name, "
            f"or end that one first (Ctrl-C in its terminal, or `serve delete` for one left behind)"
        )
    return doors_of(client.get_serve_details(), doors, node_id)


def _settle_device(config: ShoalConfig, num_hosts: int, console: Console) -> ShoalConfig:
    """The configuration with cpu or cuda in place of `auto`. Raises StartError for a layout that Ray has no room for."""
    there, free = ray.cluster_resources(), available_resources_per_node()
    choice = choose_device(config, num_hosts, there, free)
    if choice.remark:
        console.print(choice.remark, highlight=False, soft_wrap=True, markup=False)
    return config.model_copy(update={"model": config.model.model_copy(update={"device": choice.device})})


def _deploy(config: ShoalConfig, doors: Doors, route: str, stay: _Stay) -> None:
    target = serve.RunTarget(build(config), name=config.name, route_prefix=route)
    serve.start(
        http_options=HTTPOptions(host=doors.host, port=doors.http_port, **tls_options(config.security)),
        grpc_options=gRPCOptions(port=doors.grpc_port, grpc_servicer_functions=GRPC_SERVICES),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    stay.deployed = True
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _wait_until_running(config: ShoalConfig, view: _View, console: Console, events: _Events, stop: _StopSignal) -> None:
    """Shows progress until Serve says RUNNING. Raises StartError with Serve's own reason if it gives up."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} experts"),
        TimeElapsedColumn(),
        console=console,
    )
    until = time.monotonic() + config.gateway.start_timeout_s
    with bar:
        task = bar.add_task("starting", total=None)
        while not stop.requested:
            application = serve.status().applications.get(config.name)
            if application is not None and application.status == ApplicationStatus.RUNNING:
                return
            seen = view.ask()
            if seen is not None:
                events.show(seen)
                bar.update(task, description="loading", completed=seen["num_ready"], total=seen["num_experts"])
            if seen is not None and seen["failure"]:
                raise StartError(seen["failure"])
            if application is not None and application.status in FAILED:
                reasons = [application.message] + [part.message for part in application.deployments.values() if part.message]
                raise StartError("the application cannot start: " + " ".join(reason for reason in reasons if reason))
            if time.monotonic() > until:
                raise StartError(f"not ready within {config.gateway.start_timeout_s:.0f} s (gateway.start_timeout_s)")
            stop.wait(0.25)
