"""The `shoal` command."""

import json
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.errors import ClusterError
from model.errors import ModelError

app = typer.Typer(
    name="shoal",
    help="Serve Mixture-of-Experts language models with every expert a stateless service on Ray.\n\n"
    "Start with:  shoal demo-model demo  &&  shoal serve demo/smollm2-8x135m-upcycled",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
DEFAULT_URL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option("--url", help="Where Shoal's HTTP listens. An API key is taken from SHOAL_API_KEY.")]
keys_app = typer.Typer(help="API keys.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(keys_app, name="keys")


class KeyScope(StrEnum):
    """What a key is for."""

    INFERENCE = "inference"
    OPERATOR = "operator"


class ScalingRole(StrEnum):
    """What follows its load."""

    EXPERT_HOST = "expert-host"
    ROUTER = "router"
    GATEWAY = "gateway"


@app.command("serve")
def serve_command(
    model_dir: Annotated[Path, typer.Argument(help="Checkpoint directory: config.json, safetensors, tokenizer.")],
    name: Annotated[str | None, typer.Option(help="Serve application and model id. [default: the directory's name]")] = None,
    http_port: Annotated[int, typer.Option(help="HTTP port.", min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(help="gRPC port. Ray Serve binds it on every interface.", min=1, max=65535)] = 9000,
    host: Annotated[str, typer.Option(help="Address that HTTP binds.")] = "127.0.0.1",
    routers: Annotated[int | None, typer.Option(help="Gating routers: dense part and KV cache. [default: 1]")] = None,
    expert_hosts: Annotated[int | None, typer.Option(help="Hosts of routed experts; none for a dense model. [default: 2]")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16. [default: auto]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. [default: auto]")] = None,
    gpus_per_router: Annotated[float | None, typer.Option(help="GPUs of one router. [default: 1]")] = None,
    gpus_per_host: Annotated[float | None, typer.Option(help="GPUs of one host. [default: 1]")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and answer. [default: the checkpoint's]")] = None,
    address: Annotated[str | None, typer.Option(help="Ray to join (HOST:PORT or auto). [default: a Ray of its own]")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with the whole configuration; flags go over it.")] = None,
    keys: Annotated[Path | None, typer.Option(help="File with API keys, as `shoal keys new` makes it.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Without API keys: open to whoever reaches the ports.")] = False,
    certificate: Annotated[Path | None, typer.Option(help="PEM with the certificate chain: HTTP becomes HTTPS.")] = None,
    certificate_key: Annotated[Path | None, typer.Option(help="PEM with the certificate's private key.")] = None,
) -> None:
    """Serve a checkpoint over HTTP (OpenAI) and gRPC (shoal.v1) until Ctrl-C."""
    from cluster.config import read_config
    from cluster.doors import Doors
    from cluster.serving import serve_until_stopped

    flags = {
        "model.path": str(model_dir),
        "name": name,
        "router.replicas": routers,
        "expert_host.replicas": expert_hosts,
        "model.dtype": dtype,
        "model.device": device,
        "router.gpus": gpus_per_router,
        "expert_host.gpus": gpus_per_host,
        "model.max_model_len": max_model_len,
        "security.keys_file": _text(keys),
        "security.insecure": insecure or None,
        "security.certificate_file": _text(certificate),
        "security.certificate_key_file": _text(certificate_key),
    }
    serve_until_stopped(read_config(config, flags), Doors(host, http_port, grpc_port, address), Console(file=sys.stdout))


@app.command()
def config(
    model_dir: Annotated[Path, typer.Argument(help="Checkpoint directory as the pods will see it.")],
    file: Annotated[Path | None, typer.Option("--config", help="YAML with the whole configuration.")] = None,
    name: Annotated[str | None, typer.Option(help="Serve application and model id. [default: the directory's name]")] = None,
) -> None:
    """Print the Serve config that `serve deploy` and KubeRay's serveConfigV2 take."""
    from cluster.config import read_config
    from cluster.guard.setup import asks_for_keys
    from cluster.serve_config import serve_config

    wanted = read_config(file, {"model.path": str(model_dir), "name": name})
    typer.echo(yaml.safe_dump(serve_config(wanted), sort_keys=False), nl=False)
    if not wanted.security.insecure and not asks_for_keys(wanted.security):
        note = "gateways will not start without API keys: give security.keys_file or the variable SHOAL_KEYS, or security.insecure: true"
        typer.echo(f"# {note}", err=True)


@keys_app.command("new")
def new_key_command(
    name: Annotated[str, typer.Argument(help="What logs and metrics call it.")],
    scope: Annotated[list[KeyScope], typer.Option(help="What it is for; give it twice for both.")] = [KeyScope.INFERENCE],  # noqa: B006 - as below
    file: Annotated[Path | None, typer.Option(help="The file that gets its entry. [default: it is shown]")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Calls in any minute. [default: no limit]", min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Tokens in any minute. [default: no limit]", min=1)] = None,
    concurrent_streams: Annotated[int | None, typer.Option(help="Calls at once. [default: no limit]", min=1)] = None,
) -> None:
    """Make an API key. It is shown this once, on stdout; what is kept is its hash.

    Gateways that run with the file take it within a second.

    For example:  shoal keys new alice --file keys.yaml --requests-per-minute 600
    """
    from cluster.guard.keys import KeyLimits, entry_text, new_key
    from cluster.guard.keys_file import add_key

    limits = KeyLimits(requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute, concurrent_streams=concurrent_streams)
    key, entry = new_key(name, [one.value for one in scope], limits)
    if file is None:
        typer.echo("its entry, for `keys:` in a keys file:\n" + entry_text(entry), err=True)
    else:
        add_key(file, entry)
        typer.echo(f"{file} has its entry; this is the key, and it is shown only now:", err=True)
    typer.echo(key)


@app.command("demo-model")
def demo_model(directory: Annotated[Path, typer.Argument(help="Where to write the two checkpoints (3 GB).")]) -> None:
    """Write SmolLM2-135M-Instruct as a dense `llama` checkpoint and as an upcycled `mixtral` one with 8 experts a layer."""
    from cluster.demo_model import write_demo_model

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("demo model", total=1.0)
        paths = write_demo_model(directory, lambda done, what: bar.update(task, completed=done, description=what))
    typer.echo(f"dense    {paths.dense}\nexperts  {paths.mixtral}")


@app.command()
def status(
    url: Url = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="Everything the cluster tells, for programs.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every second, until Ctrl-C.")] = False,
) -> None:
    """Show what a running application does, and why.

    Hosts, routers, the hottest experts, bounds of scaling, operations, and the Coordinator's last decisions with their reasons.

    balancedness is the mean load of the hosts over that of the busiest: 1 is perfect. An expert that stands alone is on one host only.
    """
    from cluster.client import fetch_status, fetch_view
    from cluster.status import show_status
    from cluster.watching import Frames, watch_json
    from cluster.watching import watch as watch_screen

    if as_json and watch:
        watch_json(lambda: fetch_view(url))
    elif as_json:
        typer.echo(json.dumps(fetch_view(url), indent=2))
    elif watch:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a script that starts it with & has had SIGINT ignored
        watch_screen(Frames(url, lambda: fetch_status(url)), Console())
    else:
        show_status(fetch_status(url), Console())


@app.command()
def drain(host: Annotated[str, typer.Argument(help="The host's id, as `shoal status` shows it.")], url: Url = DEFAULT_URL) -> None:
    """Move a host's experts to the other hosts, and give it no more.

    No request notices: experts are loaded elsewhere first. If the others have no room, nothing changes and the command says why.
    """
    from cluster.operating import ask_drain

    _follow(url, ask_drain(url, host))


@app.command("leave-node")
def leave_node_command(
    timeout_s: Annotated[float, typer.Option("--timeout-s", help="Longest time it takes, in seconds.", min=1)] = 120.0,
    node_id: Annotated[str | None, typer.Option(help="Ray's id of the node. [default: the one that runs here]")] = None,
) -> None:
    """Move everything that Serve runs on this Ray node to other nodes, and wait until it has gone.

    What a pod runs before it ends (preStop): hosts hand over their experts, routers and gateways finish their answers.

    Keep it above the drain_timeout_s of placement, router and gateway: what is above is there for starting replacements first.
    """
    from cluster.leaving import Surroundings, ask_ray, leave_node
    from cluster.local_nodes import read_processes

    leave_node(timeout_s, node_id, Surroundings(read_processes, ask_ray), _say)


@app.command()
def rebalance(url: Url = DEFAULT_URL) -> None:
    """Place the experts as the load of late asks for.

    They move by themselves too, but only where that is worth the bytes; here it may cost what it costs.
    """
    from cluster.operating import ask_rebalance

    _follow(url, ask_rebalance(url))


@app.command()
def scale(
    role: Annotated[ScalingRole, typer.Argument(help="What scales.")],
    min_replicas: Annotated[int | None, typer.Option("--min", help="Fewer do not run, whatever the load.", min=1)] = None,
    max_replicas: Annotated[int | None, typer.Option("--max", help="More do not run, whatever the load.", min=1)] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Back to the bounds that are configured.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Set the bounds within which a role follows its load.

    They hold until they are set again, without a restart; what is not given is as configured.

    The role needs a branch under `autoscaling` in the configuration; its `ceiling` is what --max can go up to.

    For example:  shoal scale expert-host --min 2 --max 8
    """
    from cluster.operating import ask_scaling

    if reset == (min_replicas is not None or max_replicas is not None):
        raise typer.BadParameter("give --min, --max or both, or else --reset")
    _follow(url, ask_scaling(url, role.value.replace("-", "_"), min_replicas, max_replicas))


def _say(line: str) -> None:
    """At once: whoever follows a pod's end reads it while it lasts."""
    print(line, flush=True)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _follow(url: str, operation: dict[str, Any]) -> None:
    """To the operation's end; one that was rolled back is exit status 1."""
    from cluster.operating import follow

    if not follow(url, operation, Console()):
        raise typer.Exit(1)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to go on from, or to ask with --chat.")],
    url: Url = DEFAULT_URL,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template.")] = False,
) -> None:
    """Ask a running application once and stream the answer."""
    from cluster.client import stream_text

    for text in stream_text(url, prompt, max_tokens=max_tokens, temperature=temperature, chat=chat):
        typer.echo(text, nl=False)
    typer.echo()


@app.command()
def bench(
    url: Url = DEFAULT_URL,
    concurrency: Annotated[list[int], typer.Option(help="Clients at once; give it several times.")] = [1, 8, 32],  # noqa: B006 - typer reads it
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 64,
    output_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    requests: Annotated[int, typer.Option(help="Requests of each client.")] = 2,
) -> None:
    """Measure a running application: output tokens a second, time to first token, time between tokens."""
    from cluster.bench import Load, measure, table

    results = [measure(url, Load(clients, prompt_tokens, output_tokens, requests)) for clients in concurrency]
    Console().print(table(results))


def main(arguments: list[str] | None = None) -> Any:
    """Runs the command; an error of ours is one sentence on stderr and exit status 1."""
    try:
        return app(args=arguments, standalone_mode=True)
    except (ClusterError, ModelError) as error:
        print(f"shoal: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
