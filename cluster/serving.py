"""`shoal serve`: Ray up, application deployed, progress shown, ready line printed, everything gone again at the end."""

import contextlib
import io
import logging
import os
import signal
import socket
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.schema import ApplicationStatus, LoggingConfig
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.app import build, check_layout, resolve_device
from cluster.config import ShoalConfig
from cluster.errors import StartError
from cluster.greeting import greet
from model.loading import check_checkpoint

GRPC_SERVICES = [
    "cluster.api.grpc_servicers.add_inference",
    "cluster.api.grpc_servicers.add_cluster",
]
JOIN_TIMEOUT_S = 10.0
FAILED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)


@dataclass(frozen=True)
class Doors:
    """Where the outside comes in. `address` None: a Ray of our own."""

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 9000
    address: str | None = None


def serve_until_stopped(config: ShoalConfig, doors: Doors, console: Console) -> None:
    """Serves until SIGINT or SIGTERM, then leaves no process behind. Raises StartError, ConfigError or a ModelError at start."""
    check_layout(config, check_checkpoint(config.model.path))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    stop = _StopSignal()
    _connect(doors)
    stop.listen()  # Ray puts a SIGTERM handler of its own in place
    try:
        _check_resources(config)
        route = "/" if doors.address is None else f"/{config.name}"
        _deploy(config, doors, route)
        view = _View(config.name)
        events = _Events(console)
        _wait_until_running(config, view, console, events, stop)
        if not stop.requested:
            http = f"http://{doors.host}:{doors.http_port}{'' if route == '/' else route}"
            grpc_address = f"{doors.host}:{doors.grpc_port}"
            console.print(f"shoal ready  model {config.name}  http {http}  grpc {grpc_address}", highlight=False, soft_wrap=True)
            greet(console, config.name, http, grpc_address)
        while not stop.requested:
            events.show(view.ask())
            stop.wait(1.0)
        console.print("stopping ...")
    finally:
        stop.ignore()
        # Ray prints, to whatever stdout is now, that Serve's own actors were ended; the console has the stdout of before.
        with contextlib.redirect_stdout(io.StringIO()):
            _disconnect(config, doors)
    console.print("stopped")


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
        self._shown: set[str] = set()
        self._last = 0

    def show(self, view: dict[str, Any] | None) -> None:
        events = view["events"] if view else []
        if events and events[-1]["n"] < self._last:
            self._last = 0  # the Coordinator was restarted and counts anew
        for event in events:
            if event["n"] > self._last:
                self._last = event["n"]
                self._console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {event['text']}", highlight=False)


def _connect(doors: Doors) -> None:
    if doors.address is None:
        for port, flag in ((doors.http_port, "--http-port"), (doors.grpc_port, "--grpc-port")):
            _check_port(doors.host, port, flag)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        return
    host, _, gcs_port = doors.address.rpartition(":")
    if doors.address != "auto":
        try:
            socket.create_connection((host, int(gcs_port)), timeout=JOIN_TIMEOUT_S).close()
        except (OSError, ValueError) as error:
            raise StartError(f"no Ray answers at {doors.address} (--address): {error}") from error
    try:
        ray.init(address=doors.address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StartError(f"cannot join the Ray at {doors.address} (--address): {error}") from error


def _check_port(host: str, port: int, flag: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartError(f"port {port} on {host} is taken ({error.strerror}): choose another with {flag}") from error


def _check_resources(config: ShoalConfig) -> None:
    """Serve would wait for ever for CPUs or GPUs that do not exist."""
    on_gpu = resolve_device(config) == "cuda"
    needed = {
        "CPU": config.router.replicas * config.router.cpus
        + config.expert_host.replicas * config.expert_host.cpus
        + config.gateway.replicas * config.gateway.cpus
        + config.coordinator.cpus,
        "GPU": on_gpu * (config.router.replicas * config.router.gpus + config.expert_host.replicas * config.expert_host.gpus),
    }
    there = ray.cluster_resources()
    for resource, number in needed.items():
        if number > there.get(resource, 0):
            raise StartError(
                f"the layout needs {number:g} {resource}s, but Ray has {there.get(resource, 0):g}: "
                f"fewer --routers or --expert-hosts, or a smaller share each (router.{resource.lower()}s, expert_host.{resource.lower()}s)"
            )


def _deploy(config: ShoalConfig, doors: Doors, route: str) -> None:
    serve.start(
        http_options=HTTPOptions(host=doors.host, port=doors.http_port),
        grpc_options=gRPCOptions(port=doors.grpc_port, grpc_servicer_functions=GRPC_SERVICES),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    target = serve.RunTarget(build(config), name=config.name, route_prefix=route)
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


def _disconnect(config: ShoalConfig, doors: Doors) -> None:
    """A Ray of our own ends with us; from a Ray that others use only our application goes."""
    if not ray.is_initialized():
        return
    if doors.address is None:
        serve.shutdown()
    else:
        serve.delete(config.name)
    ray.shutdown()
