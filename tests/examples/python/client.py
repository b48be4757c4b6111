"""A client of shoal.v1 in Python, from the .proto file alone.

    python -m pip install grpcio grpcio-tools
    python -m grpc_tools.protoc -I PROTO_DIRECTORY --python_out=. --grpc_python_out=. shoal/v1/inference.proto
    python client.py ADDRESS PROMPT [APPLICATION]

Prints one JSON object a line: the model, a streamed answer, two answers over one call, and how a mistake is told.
"""

import json
import os
import sys

import grpc
from shoal.v1 import inference_pb2 as pb
from shoal.v1 import inference_pb2_grpc as rpc

address, prompt, *application = sys.argv[1:]
metadata = [("x-request-id", "python-example"), *(("application", name) for name in application)]
if "SHOAL_API_KEY" in os.environ:
    metadata.append(("authorization", f"Bearer {os.environ['SHOAL_API_KEY']}"))
sampling = pb.SamplingParams(temperature=0.0, max_tokens=24)


def say(name, value):
    print(json.dumps({name: value}), flush=True)


def models(stub):
    answer = stub.ListModels(pb.ListModelsRequest(), timeout=60, metadata=metadata)
    return [{"id": model.id, "max_model_len": model.max_model_len} for model in answer.models]


def generate(stub):
    text, last = "", None
    for delta in stub.Generate(pb.GenerateRequest(text=prompt, sampling=sampling), timeout=60, metadata=metadata):
        text += delta.text
        last = delta
    usage = {"prompt_tokens": last.usage.prompt_tokens, "completion_tokens": last.usage.completion_tokens}
    return {"text": text, "finish_reason": pb.FinishReason.Name(last.finish_reason), "usage": usage}


def batch(stub):
    """Many requests over one call: grpc takes the next one from the iterator when the server does, and answers come interleaved."""
    texts = {"first": "", "second": ""}
    requests = (pb.BatchRequest(id=name, generate=pb.GenerateRequest(text=prompt, sampling=sampling)) for name in texts.copy())
    for response in stub.GenerateBatch(requests, timeout=60, metadata=metadata):
        if response.HasField("error"):
            raise RuntimeError(response.error.message)
        texts[response.id] += response.delta.text
    return texts


def mistake(stub):
    try:
        list(stub.Generate(pb.GenerateRequest(text=prompt, sampling=pb.SamplingParams(temperature=-1.0)), timeout=60, metadata=metadata))
    except grpc.RpcError as error:
        trailing = dict(error.trailing_metadata())
        return {"code": error.code().value[0], "kind": trailing["shoal-error-kind"], "id": trailing["x-request-id"]}
    raise RuntimeError("a negative temperature was taken")


with grpc.insecure_channel(address) as channel:
    stub = rpc.InferenceStub(channel)
    say("models", models(stub))
    say("answer", generate(stub))
    say("batch", batch(stub))
    say("mistake", mistake(stub))
