"""Who may use the front door, and how much.

Key      a secret of at least 256 random bits that a client sends as `Authorization: Bearer KEY`. Kept as its SHA-256 only: what is
         random enough cannot be guessed from its hash, so no slow hash is needed, and a request costs microseconds.
Scope    `inference` (models, text in, text out) or `operator` (what changes the cluster); `any` where either will do.
Grant    what a checked key gives one call; it ends when the key is revoked.
Stream   one call that generates, from its first step to its last, however many answers it has.
Counts   what keys have used of their limits: in Redis, shared by all gateways, or in each gateway.
"""
