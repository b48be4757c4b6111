"""The example clients, which have nothing of ours but the .proto files, against a real gRPC server."""

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from cluster.gateway import Gateway
from model.tokenizer import Tokenizer
from tests.cluster_unit.front_door import MODEL, STILL, make_service, says
from tests.cluster_unit.grpc_door import grpc_door
from tests.model.tiny_tokenizer import write_byte_level

EXAMPLES = Path(__file__).parents[1] / "examples"
PROTO = Path(__file__).parents[2] / "cluster" / "api" / "proto"
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")))


async def run(*command, cwd):
    """What a program says. AssertionError with its own words where it fails."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            said, complained = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, complained.decode()
    return said.decode()


async def talk(tokenizer, *command, cwd):
    """What a client prints, as one value, of a conversation with a front door of its own."""
    service, _ = make_service(tokenizer, says([*tokenizer.encode("world"), 1]))
    async with grpc_door(Gateway(service, STILL, lambda: True)) as address:
        said = await run(*command, address, "hello", cwd=cwd)
    return {name: value for line in said.splitlines() for name, value in json.loads(line).items()}


def check(said, name, num_tokens):
    assert [model["id"] for model in said["models"]] == [MODEL]
    assert said["answer"]["text"] == "world"
    assert said["answer"]["finish_reason"] == "FINISH_REASON_STOP"
    assert said["answer"]["usage"] == {"prompt_tokens": 1, "completion_tokens": num_tokens}
    assert said["batch"] == {"first": "world", "second": "world"}
    assert said["mistake"] == {"code": 3, "kind": "invalid_request", "id": f"{name}-example"}


async def test_python(tokenizer, tmp_path):
    shutil.copytree(EXAMPLES / "python", tmp_path, dirs_exist_ok=True)
    protoc = ("-m", "grpc_tools.protoc", "-I", PROTO, "--python_out=.", "--grpc_python_out=.", "shoal/v1/inference.proto")
    await run(sys.executable, *protoc, cwd=tmp_path)
    said = await talk(tokenizer, sys.executable, "client.py", cwd=tmp_path)
    check(said, "python", len(tokenizer.encode("world")) + 1)


async def npm_ci(directory):
    """Installs what the lock file says; skips where there is no node, or no registry to be reached."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    ping = await asyncio.create_subprocess_exec(
        "npm", "ping", "--fetch-timeout=5000", "--fetch-retries=0", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, complained = await ping.communicate()
    if ping.returncode != 0:
        pytest.skip(f"npm does not reach its registry: {complained.decode()[-200:]}")
    await run("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", cwd=directory)


async def test_node(tokenizer, tmp_path):
    shutil.copytree(EXAMPLES / "node", tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules"))
    await npm_ci(tmp_path)
    said = await talk(tokenizer, "node", "client.mjs", PROTO, cwd=tmp_path)
    check(said, "node", len(tokenizer.encode("world")) + 1)
