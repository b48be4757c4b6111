import logging
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from cluster.guard.key_source import KeySource
from cluster.guard.keys import KeyLimits, KeyRing, entry_text, hash_key, new_key, parse_keys
from cluster.guard.keys_file import add_key


def test_a_key_is_found_by_its_text_and_kept_as_its_hash_only():
    text, entry = new_key("alice", ("inference",), KeyLimits(requests_per_minute=3))
    assert len(text) > 40
    assert (entry.id, entry.scopes, entry.requests_per_minute) == ("alice", {"inference"}, 3)
    ring = KeyRing([new_key("bob", ("operator",))[1], entry])
    assert ring.find(text) is entry
    assert text not in repr(ring.keys) + entry_text(entry)
    assert entry.sha256 not in repr(entry)
    for wrong in ("", text[:-1], text + "x", text.upper(), entry.sha256):
        assert ring.find(wrong) is None


@given(st.text())
def test_whatever_is_sent_is_looked_up_without_harm(presented):
    assert KeyRing([new_key("a", ("inference",))[1]]).find(presented) is None


def test_hashes_that_begin_alike_are_told_apart():
    text, entry = new_key("a", ("inference",))
    twin = entry.model_copy(update={"id": "twin", "sha256": entry.sha256[:-1] + ("0" if entry.sha256[-1] != "0" else "1")})
    assert KeyRing([twin, entry]).find(text) is entry
    assert KeyRing([twin]).find(text) is None


def test_hashing_is_what_sha256sum_says():
    assert hash_key("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


ENTRY = {"id": "a", "sha256": "0" * 64, "scopes": ["inference"]}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("keys: [", r"is no YAML \(line"),
        ("keys: 5", "must be `keys:` with a list"),
        ("other: []", "must be `keys:` with a list"),
        ("- {id: a, scopes: [inference]}", r"keys\[0\]\.sha256: Field required"),
        (f"- {ENTRY | {'scopes': []}}", r"keys\[0\]\.scopes"),
        (f"- {ENTRY | {'scopes': ['root']}}", r"keys\[0\]\.scopes"),
        (f"- {ENTRY | {'sha256': 'a-key-in-plain-text'}}", r"keys\[0\]\.sha256"),
        (f"- {ENTRY | {'requests_per_minute': 0}}", r"keys\[0\]\.requests_per_minute"),
        (f"- {ENTRY | {'requests': 1}}", r"keys\[0\]\.requests"),
        (f"- {ENTRY}\n- {ENTRY | {'sha256': '1' * 64}}", r"keys\[1\]\.id: is there twice"),
        (f"- {ENTRY}\n- {ENTRY | {'id': 'b'}}", r"keys\[1\]\.sha256: is there twice"),
    ],
)
def test_a_wrong_entry_is_named_and_its_value_is_not(text, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        parse_keys(text, "keys.yaml")
    assert str(caught.value).startswith("keys.yaml: ")
    assert "plain-text" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "keys:\n", "keys: []"])
def test_no_keys(text):
    assert parse_keys(text, "keys.yaml") == ()


def test_entries_are_added_to_a_file_that_only_its_owner_reads(tmp_path):
    file = tmp_path / "keys.yaml"
    entries = [new_key(name, ("inference", "operator"), KeyLimits(tokens_per_minute=5))[1] for name in ("a", "b")]
    for entry in entries:
        add_key(file, entry)
    assert parse_keys(file.read_text(), "") == tuple(entries)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="has a key a already"):
        add_key(file, new_key("a", ("inference",))[1])
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys.yaml"]


def test_a_file_is_read_again_when_it_changes_and_never_when_it_is_wrong(tmp_path, caplog):
    file = tmp_path / "keys.yaml"
    (first, one), (second, two), (fixed, three) = (new_key(name, ("inference",)) for name in ("one", "two", "three"))
    add_key(file, one)
    source = KeySource([three], file)
    assert not source.refresh()
    add_key(file, two)
    assert source.refresh()
    assert all(source.ring.find(text) for text in (first, second, fixed))
    with caplog.at_level(logging.ERROR):
        for break_it in (lambda: file.write_text("keys: ["), lambda: file.write_bytes(b"\xff"), file.unlink):
            break_it()
            assert not source.refresh()
            assert not source.refresh()
            assert source.ring.find(second)
            assert "keys.yaml" in source.problem
    assert sum(record.levelno == logging.ERROR for record in caplog.records) == 3, "each trouble is told once"
    target = tmp_path / "mounted"
    target.write_text(entry_text(one))
    os.symlink(target, file)  # as a Secret's update
    assert source.refresh()
    assert source.problem is None
    assert source.ring.find(first)
    assert not source.ring.find(second)


def test_a_file_that_cannot_be_used_at_the_start_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="keys_file"):
        KeySource((), tmp_path / "none.yaml")
