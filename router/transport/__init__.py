"""Channels: how a router's token batches reach a host and come back.

Glossary
    frame       one header and one payload; the unit that is sent, checked and answered
    channel     joins one router and one host, both ways; broken once, broken for good
    incarnation a random number per channel life; a frame of another life is dropped
    attempt     how often a batch has been sent; an answer to an earlier attempt is dropped
"""
