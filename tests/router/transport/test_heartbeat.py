from router.transport.heartbeat import Heartbeat, HeartbeatLimits


def test_ping_is_due_after_silence_once_and_again_after_a_sign_of_life():
    heartbeat = Heartbeat(HeartbeatLimits(interval_s=1.0, dead_after_s=5.0), now=10.0)
    assert not heartbeat.is_ping_due(10.9)
    assert heartbeat.is_ping_due(11.0)
    heartbeat.ping(11.0)
    assert not heartbeat.is_ping_due(12.5)
    heartbeat.hear(13.0)
    assert heartbeat.last_heard == 13.0
    assert not heartbeat.is_ping_due(13.5)
    assert heartbeat.is_ping_due(14.0)


def test_silence_counts_from_when_an_answer_is_owed():
    heartbeat = Heartbeat(HeartbeatLimits(interval_s=1.0, dead_after_s=5.0), now=10.0)
    heartbeat.owe(100.0)
    assert not heartbeat.is_ping_due(100.9)
    assert heartbeat.is_ping_due(101.0)
    assert heartbeat.last_heard == 10.0


def test_a_ping_stays_unanswered_whatever_is_sent_after_it():
    heartbeat = Heartbeat(HeartbeatLimits(interval_s=1.0, dead_after_s=5.0), now=10.0)
    assert heartbeat.is_answered
    heartbeat.ping(11.0)
    heartbeat.owe(12.0)
    assert not heartbeat.is_answered
    assert not heartbeat.is_silent(11.125, after_s=0.25)
    assert heartbeat.is_silent(11.25, after_s=0.25)
    assert heartbeat.is_dead(16.0)
    heartbeat.hear(17.0)
    assert heartbeat.is_answered
    assert not heartbeat.is_silent(100.0, after_s=0.25)


def test_only_an_unanswered_ping_is_death():
    heartbeat = Heartbeat(HeartbeatLimits(interval_s=1.0, dead_after_s=5.0), now=10.0)
    assert not heartbeat.is_dead(1000.0)
    heartbeat.ping(1000.0)
    assert not heartbeat.is_dead(1004.9)
    assert heartbeat.is_dead(1005.0)
    heartbeat.hear(1006.0)
    assert not heartbeat.is_dead(2000.0)
