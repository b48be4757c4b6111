import contextlib
import json
import socketserver
import ssl
import threading
from dataclasses import replace

import pytest

from cluster.bench import Load, measure
from cluster.client import Access, get_json, model_id, open_url, post_events, stream_text
from cluster.errors import RequestFailed
from tests.cluster_unit.redis_server import write_certificate
from tests.free_ports import free_port

HEAD = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
MODELS = HEAD + b'{"data": [{"id": "tiny"}]}'


def event(text):
    return b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n"


@contextlib.contextmanager
def answering(seen=None, tls=None, **answers):
    """A server that says these bytes, by the last part of the path, and hangs up."""

    class Handler(socketserver.StreamRequestHandler):
        timeout = 5

        def handle(self):
            path = self.rfile.readline().split()[1].decode()
            length = 0
            while (line := self.rfile.readline()).strip():
                if seen is not None:
                    seen.append(line.decode().strip().lower())
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            self.rfile.read(length)
            self.wfile.write(answers[path.rsplit("/", 1)[1]])

    class Server(socketserver.ThreadingTCPServer):
        def get_request(self):
            connection, address = super().get_request()
            return (connection if tls is None else tls.wrap_socket(connection, server_side=True)), address

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http{'' if tls is None else 's'}://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(5)


def texts(answer):
    seen = []
    with answering(completions=answer) as url:
        try:
            seen.extend(one["choices"][0]["text"] for one in post_events(f"{url}/completions", {}))
        except RequestFailed as error:
            return seen, str(error)
    return seen, None


def test_a_whole_stream():
    assert texts(HEAD + b": a comment\n\n" + event("a") + event("b") + DONE) == (["a", "b"], None)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (HEAD + event("a"), "ended before [DONE]"),
        (CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(event("a")), event("a")), "ended before [DONE]"),
        (CHUNKED + b"%x\r\n%b\r\n" % (len(event("a")), event("a")), "ended before [DONE]"),
        (CHUNKED + b"%x\r\n%b\r\nzzz\r\n" % (len(event("a")), event("a")), "ended before [DONE]"),
        (HEAD + event("a") + b'data: {"error": {"message": "no expert"}}\n\n' + DONE, "no expert"),
        (HEAD + event("a") + b'data: {"choi\n\n' + DONE, "not JSON"),
    ],
)
def test_half_a_stream_is_a_failure(answer, sentence):
    seen, problem = texts(answer)
    assert seen == ["a"]
    assert sentence in problem


def test_the_servers_own_sentence():
    refused = b'HTTP/1.1 429 Too Many\r\nconnection: close\r\n\r\n{"error": {"message": "the queue is full"}}'
    with answering(models=refused) as url, pytest.raises(RequestFailed, match="answered 429: the queue is full"):
        get_json(f"{url}/v1/models")


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"SSH-2.0 hello\r\n", "nothing answers"),
        (b"", "nothing answers"),
        (HEAD + b"<html>", "other than JSON"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{", "broke off"),
        (HEAD + b'{"data": []}', "names no model"),
        (HEAD + b"[]", "names no model"),
    ],
)
def test_what_is_not_shoal_is_said(answer, sentence):
    with answering(models=answer) as url, pytest.raises(RequestFailed, match=sentence):
        model_id(url)


@pytest.mark.parametrize("url", ["nonsense", "http://127.0.0.1:99999999/v1"])
def test_no_url(url):
    with pytest.raises(RequestFailed):
        open_url(url)


def test_nobody_listens():
    with pytest.raises(RequestFailed, match="is `shoal serve` running there"):
        open_url(f"http://127.0.0.1:{free_port()}/v1/models")


def test_stream_text():
    with answering(models=MODELS, completions=HEAD + event("a") + event("b") + DONE) as url:
        assert "".join(stream_text(url, "go on", max_tokens=2, temperature=0.0, chat=False)) == "ab"


def test_bench_without_a_token_is_no_measurement():
    with answering(models=MODELS, completions=HEAD + DONE) as url, pytest.raises(RequestFailed, match="without a token"):
        measure(url, Load(clients=1, prompt_tokens=2, output_tokens=2, requests=1))


def test_the_key_comes_from_the_environment(monkeypatch):
    for value, wanted in (("shoal-x", ["authorization: bearer shoal-x"]), ("", [])):
        seen = []
        monkeypatch.setenv("SHOAL_API_KEY", value)
        with answering(seen, models=MODELS) as url:
            assert model_id(url) == "tiny"
        assert [line for line in seen if line.startswith("authorization")] == wanted


def test_a_door_that_asks_for_a_key_says_where_to_put_it(monkeypatch):
    refused = b'HTTP/1.1 401 Unauthorized\r\nconnection: close\r\n\r\n{"error": {"message": "This needs an API key."}}'
    monkeypatch.delenv("SHOAL_API_KEY", raising=False)
    with answering(models=refused) as url, pytest.raises(RequestFailed, match=r"401: This needs an API key\. Set SHOAL_API_KEY"):
        model_id(url)


def test_https_with_a_certificate_of_our_own(tmp_path):
    write_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    trusting = Access(ca_file=str(tmp_path / "cert.pem"))
    with answering(models=MODELS, tls=context) as url:
        with open_url(f"{url}/models", access=trusting) as response:
            assert json.load(response)["data"][0]["id"] == "tiny"
        with pytest.raises(RequestFailed, match="certificate"):
            open_url(f"{url}/models", access=Access())
        elsewhere = url.replace("127.0.0.1", "localhost")
        with pytest.raises(RequestFailed, match="certificate"):
            open_url(f"{elsewhere}/models", access=trusting)
        with open_url(f"{elsewhere}/models", access=replace(trusting, is_own=True)) as response:
            assert response.status == 200
    with pytest.raises(RequestFailed, match="no certificates to trust"):
        open_url("https://127.0.0.1:1/models", access=Access(ca_file=str(tmp_path / "none.pem")))
