"""What `shoal serve` does once it is ready: asks one question over HTTP and one over gRPC, and says what to try next."""

from concurrent.futures import ThreadPoolExecutor

import grpc
from rich.console import Console

from cluster.api.proto.shoal.v1 import inference_pb2, inference_pb2_grpc
from cluster.client import post_events
from cluster.errors import RequestFailed

QUESTION = "The capital of France is"
MAX_TOKENS = 24
TIMEOUT_S = 60.0


def greet(console: Console, model: str, http: str, grpc_address: str) -> None:
    """Asks over both doors at once and prints the answers beside the question. Never raises: serving goes on regardless."""
    with ThreadPoolExecutor(2) as pool:
        asked = {"HTTP": pool.submit(_ask_http, model, http), "gRPC": pool.submit(_ask_grpc, model, grpc_address)}
        for door, answer in asked.items():
            try:
                text = " ".join(answer.result(TIMEOUT_S).split())
                console.print(f"{door}  [bold]{QUESTION}[/bold] {text}", highlight=False, soft_wrap=True)
            except (RequestFailed, grpc.RpcError, TimeoutError) as error:
                console.print(f"{door}  no answer: {error}", highlight=False, soft_wrap=True)
    console.print(_next_steps(model, http, grpc_address), highlight=False, soft_wrap=True, markup=False)


def _ask_http(model: str, http: str) -> str:
    body = {"model": model, "prompt": QUESTION, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True}
    return "".join(choice["text"] for event in post_events(f"{http}/v1/completions", body) for choice in event["choices"])


def _ask_grpc(model: str, address: str) -> str:
    sampling = inference_pb2.SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    request = inference_pb2.GenerateRequest(model=model, text=QUESTION, sampling=sampling)
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        answers = stub.Generate(request, timeout=TIMEOUT_S, metadata=(("application", model),))
        return "".join(answer.text for answer in answers)


def _next_steps(model: str, http: str, grpc_address: str) -> str:
    return f"""
try next, in another terminal:
  curl {http}/v1/completions -H 'content-type: application/json' \\
    -d '{{"model": "{model}", "prompt": "{QUESTION}", "max_tokens": 24, "temperature": 0}}'
  python -c 'import openai; print(openai.OpenAI(base_url="{http}/v1", api_key="-").chat.completions.create(model="{model}",
    messages=[{{"role": "user", "content": "Name three rivers."}}]).choices[0].message.content)'
  grpcurl -plaintext -import-path cluster/api/proto -proto shoal/v1/inference.proto \\
    -d '{{"model": "{model}", "text": "{QUESTION}"}}' {grpc_address} shoal.v1.Inference/Generate
  shoal status --url {http}
Ctrl-C stops it.
"""
