from router.transport.tickets import Tickets


def test_ticket_is_redeemed_once():
    tickets = Tickets(2, 100)
    ticket = tickets.issue(1, 1, 10)
    assert not ticket.cancelled()
    assert tickets.redeem(ticket)
    assert not tickets.redeem(ticket)


def test_cancelled_ticket_is_not_redeemed():
    tickets = Tickets(9, 100)
    first, second, third = (tickets.issue(sequence, 1, 10) for sequence in (1, 2, 3))
    tickets.cancel(1)
    tickets.cancel(77)
    assert (first.cancelled(), second.cancelled()) == (True, False)
    assert not tickets.redeem(first)
    tickets.cancel_all()
    assert third.cancelled()
    assert not tickets.redeem(second)


def test_limits_on_frames_and_bytes_count_open_tickets_only():
    tickets = Tickets(2, 100)
    first = tickets.issue(1, 1, 60)
    assert tickets.issue(2, 1, 60) is None
    second = tickets.issue(3, 1, 40)
    assert tickets.issue(4, 1, 0) is None
    tickets.redeem(second)
    tickets.redeem(first)
    assert tickets.issue(5, 1, 1000) is not None, "one frame alone is always taken: the reader has bounded it"


def test_second_frame_of_a_sequence_voids_the_first():
    tickets = Tickets(1, 100)
    first = tickets.issue(1, 1, 60)
    second = tickets.issue(1, 2, 60)
    assert first.cancelled()
    assert not tickets.redeem(first)
    assert tickets.redeem(second)
