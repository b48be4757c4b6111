"""A small HTTP client of Shoal for the command line: standard library only, one sentence on every failure."""

import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from typing import Any

from cluster.errors import RequestFailed

TIMEOUT_S = 60.0
KEY_VARIABLE = "SHOAL_API_KEY"
CA_VARIABLE = "SHOAL_CA_FILE"


@dataclass(frozen=True)
class Access:
    """What a guarded door wants: an API key, and whom to trust over HTTPS (PEM; None: whom the system trusts).

    `is_own` for a server of ours on this machine, which may be certified under another name.
    """

    key: str | None = None
    ca_file: str | None = None
    is_own: bool = False

    @classmethod
    def from_environment(cls) -> "Access":
        """By SHOAL_API_KEY and SHOAL_CA_FILE."""
        return cls(os.environ.get(KEY_VARIABLE) or None, os.environ.get(CA_VARIABLE) or None)

    def headers(self) -> dict[str, str]:
        """Beside the others."""
        return {} if self.key is None else {"authorization": f"Bearer {self.key}"}

    def tls(self) -> ssl.SSLContext:
        """Raises RequestFailed for a file that has no certificates."""
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise RequestFailed(f"{self.ca_file} has no certificates to trust ({error})") from error
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # a server's own certificate will do
        context.check_hostname = not self.is_own
        return context


class Refused(RequestFailed):
    """The server answered with an error: its HTTP status and its `code`."""

    def __init__(self, message: str, status: int, code: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def open_url(url: str, body: dict[str, Any] | None = None, method: str | None = None, access: Access | None = None) -> HTTPResponse:
    """GET, or POST of a JSON body, unless `method` says otherwise; `access` None is the environment's.

    Raises Refused with the server's own sentence, or RequestFailed.
    """
    access = access or Access.from_environment()
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", **access.headers()}
    try:
        request = urllib.request.Request(url, data=data, headers=headers, method=method)
    except ValueError as error:
        raise RequestFailed(f"{url!r} is no URL ({error}): give one such as http://127.0.0.1:8000") from error
    try:
        context = access.tls() if request.type == "https" else None
        response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context)
    except urllib.error.HTTPError as error:
        sentence, code = _sentence(error)
        if error.code == HTTPStatus.UNAUTHORIZED and access.key is None:
            sentence += f" Set {KEY_VARIABLE} to one."
        raise Refused(f"{url} answered {error.code}: {sentence}", error.code, code) from error
    except (OSError, HTTPException) as error:
        raise RequestFailed(f"nothing answers at {url} ({error}): is `shoal serve` running there?") from error
    return response


def get_json(url: str) -> Any:
    """The JSON at `url`. Raises RequestFailed."""
    return ask_json(url)


def ask_json(url: str, body: dict[str, Any] | None = None, method: str | None = None, access: Access | None = None) -> Any:
    """The JSON that answers. Raises RequestFailed."""
    with open_url(url, body, method, access) as response:
        try:
            return json.load(response)
        except (OSError, HTTPException) as error:
            raise RequestFailed(f"{url} broke off ({_reason(error)})") from error
        except ValueError as error:
            raise RequestFailed(f"{url} answered with something other than JSON: is it Shoal that listens there?") from error


def post_events(url: str, body: dict[str, Any], access: Access | None = None) -> Iterator[dict[str, Any]]:
    """The server-sent events that answer `body`, parsed, up to [DONE].

    Raises RequestFailed if one is an error, or if the stream ends before [DONE]: half an answer must not look like a whole one.
    """
    with open_url(url, body, access=access) as response:
        for line in _lines(url, response):
            if not line.startswith(b"data: "):
                continue
            payload = line.removeprefix(b"data: ").strip()
            if payload == b"[DONE]":
                return
            try:
                event = json.loads(payload)
            except ValueError as error:
                raise RequestFailed(f"{url} sent an event that is not JSON: {payload[:80]!r}") from error
            if "error" in event:
                raise RequestFailed(f"{url} failed in mid-stream: {event['error']['message']}")
            yield event
    raise RequestFailed(f"{url} ended before [DONE]: the answer is not whole")


def fetch_view(url: str) -> dict[str, Any]:
    """Everything that the Coordinator tells of a running application."""
    view: dict[str, Any] = get_json(f"{url}/cluster")
    return view


def fetch_status(url: str) -> dict[str, Any]:
    """The same without the tables that have a line for each expert."""
    status: dict[str, Any] = get_json(f"{url}/cluster/status")
    return status


def model_id(url: str) -> str:
    """The name of the one model that is served there."""
    try:
        return str(get_json(f"{url}/v1/models")["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise RequestFailed(f"{url}/v1/models names no model: is it Shoal that listens there?") from error


def stream_text(url: str, prompt: str, *, max_tokens: int, temperature: float, chat: bool) -> Iterator[str]:
    """The answer's text as it comes."""
    body: dict[str, Any] = {"model": model_id(url), "max_tokens": max_tokens, "temperature": temperature, "stream": True}
    if chat:
        body["messages"] = [{"role": "user", "content": prompt}]
        for event in post_events(f"{url}/v1/chat/completions", body):
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""
        return
    body["prompt"] = prompt
    for event in post_events(f"{url}/v1/completions", body):
        for choice in event["choices"]:
            yield choice["text"]


def _lines(url: str, response: HTTPResponse) -> Iterator[bytes]:
    try:
        yield from response
    except (OSError, HTTPException) as error:
        raise RequestFailed(f"{url} broke off in mid-stream ({_reason(error)}): it ended before [DONE]") from error


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _sentence(answer: urllib.error.HTTPError) -> tuple[str, str | None]:
    """What the answer says, and its code if it is one of ours."""
    try:
        body = answer.read()
    except (OSError, HTTPException) as error:
        return _reason(error), None
    try:
        problem = json.loads(body)["error"]
        return str(problem["message"]), problem.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        return body[:200].decode(errors="replace"), None
