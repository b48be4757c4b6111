import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.errors import HandshakeError
from router.transport.handshake import HELLO_BYTES, PROOF_BYTES, Handshake, Hello, Role

ROLES = frozenset({Role.ROUTER, Role.GATEWAY})


def client(secret=b"secret", application="app", role=Role.ROUTER):
    return Handshake(secret, application, role, "client-node", 7).as_client()


def host(secret=b"secret", application="app", roles=ROLES):
    return Handshake(secret, application, Role.HOST, "host-node", 9).as_host(roles)


def shake(client, host, tamper=lambda index, message: message):
    """Drives both sides against each other; (what the client learns, what the host learns)."""
    results = []
    hello = next(client)
    assert next(host) == len(hello) == HELLO_BYTES
    answer = host.send(tamper(0, hello))
    assert next(host) == PROOF_BYTES
    assert next(client) == len(answer) == HELLO_BYTES
    proof = client.send(tamper(1, answer))
    answer = host.send(tamper(2, proof))
    with pytest.raises(StopIteration) as end:
        next(host)
    results.append(end.value.value)
    assert next(client) == PROOF_BYTES
    with pytest.raises(StopIteration) as end:
        client.send(tamper(3, answer))
    return end.value.value, results[0]


@pytest.mark.parametrize("role", ROLES)
def test_both_learn_who_the_other_is(role):
    of_host, of_client = shake(client(role=role), host())
    assert (of_host.role, of_host.node_id, of_host.incarnation) == (Role.HOST, "host-node", 9)
    assert (of_client.role, of_client.node_id, of_client.incarnation) == (role, "client-node", 7)


@pytest.mark.parametrize(
    "other",
    [
        {"secret": b"Secret"},
        {"secret": b"secret\0"},
        {"application": "app2"},
        {"application": ""},
        {"secret": b"secretapp", "application": ""},
    ],
)
def test_host_proves_nothing_to_a_client_without_the_secret_or_of_another_application(other):
    with pytest.raises(HandshakeError, match="does not know"):
        shake(client(**other), host())


@given(st.integers(0, 3), st.data())
def test_any_changed_byte_ends_it(which, data):
    def tamper(index, message):
        if index != which:
            return message
        changed = bytearray(message)
        changed[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
        return bytes(changed)

    with pytest.raises(HandshakeError):
        shake(client(), host(), tamper)


def test_proof_of_an_earlier_handshake_is_worth_nothing():
    recorded = {}
    shake(client(), host(), lambda index, message: recorded.setdefault(index, message))
    with pytest.raises(HandshakeError, match="does not know"):
        shake(client(), host(), lambda index, message: recorded[index] if index in (0, 2) else message)


def test_client_s_proof_does_not_serve_as_the_host_s():
    """An impostor that reflects what it hears."""
    proofs = {}

    def reflect(index, message):
        proofs[index] = message
        return proofs[2] if index == 3 else message

    with pytest.raises(HandshakeError, match="does not know"):
        shake(client(), host(), reflect)


def test_client_is_not_answered_by_a_client_and_unserved_roles_are_refused():
    with pytest.raises(HandshakeError, match="no GATEWAY is served"):
        shake(client(role=Role.GATEWAY), host(roles=frozenset({Role.ROUTER})))
    with pytest.raises(HandshakeError, match="ROUTER listens"):
        shake(client(), host(), lambda index, message: Hello(Role.ROUTER, 1, "x", bytes(32)).pack() if index == 1 else message)


@given(st.binary(max_size=2 * HELLO_BYTES))
def test_greeting_of_another_protocol_is_refused(junk):
    with pytest.raises(HandshakeError):
        Hello.unpack(junk)


def test_no_handshake_without_a_secret():
    with pytest.raises(ValueError, match="secret is empty"):
        client(secret=b"")
    with pytest.raises(ValueError, match="node id"):
        Hello(Role.HOST, 1, "x" * 129, bytes(32)).pack()
