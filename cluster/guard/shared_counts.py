"""Counts in Redis while it answers, else of each gateway for itself: a Redis that is away stops nobody."""

import logging
from collections.abc import Sequence
from urllib.parse import urlsplit

from redis import RedisError

from cluster.guard.counts import Demand, LocalCounts, Refusal, Use
from cluster.guard.redis_counts import RedisCounts

logger = logging.getLogger("shoal")
RETRY_S = 1.0  # how often a Redis that is away is asked; only that one call waits for it


class SharedCounts:
    """Counts on both sides, so that what this gateway has used is known when Redis goes away. See Counts."""

    def __init__(self, redis_url: str, application: str, cluster_id: str) -> None:
        parts = urlsplit(redis_url)
        self._where = f"{parts.scheme}://{parts.hostname or ''}:{parts.port or 6379}{parts.path}"
        self._redis = RedisCounts(redis_url, application, cluster_id)
        self._local = LocalCounts()
        self._away: str | None = None
        self._ask_again_at = 0.0

    @property
    def name(self) -> str:
        """See Counts; without any password."""
        return f"shared by {self._where}" if self._away is None else f"each gateway for itself: {self._where} is away ({self._away})"

    @property
    def is_shared(self) -> bool:
        """Whether Redis has answered the last call."""
        return self._away is None

    async def take(self, demand: Demand, now_s: float) -> Refusal | None:
        """See Counts."""
        if self._may_ask(now_s):
            try:
                refusal = await self._redis.take(demand)
            except (RedisError, OSError, ValueError) as error:
                self._note_away(error, now_s)
            else:
                self._note_there()
                if refusal is None:
                    self._local.note(demand, now_s)
                return refusal
        return await self._local.take(demand, now_s)

    async def tell(self, uses: Sequence[Use], now_s: float) -> None:
        """See Counts. Streams that began while Redis was away are counted there from here on."""
        await self._local.tell(uses, now_s)
        if uses and self._may_ask(now_s):
            try:
                await self._redis.tell(uses)
            except (RedisError, OSError, ValueError) as error:
                self._note_away(error, now_s)
            else:
                self._note_there()

    async def close(self) -> None:
        """See Counts."""
        await self._redis.close()

    def _may_ask(self, now_s: float) -> bool:
        if self._away is None:
            return True
        if now_s < self._ask_again_at:
            return False
        self._ask_again_at = now_s + RETRY_S
        return True

    def _note_away(self, error: Exception, now_s: float) -> None:
        self._ask_again_at = now_s + RETRY_S
        if self._away is None:
            logger.warning("%s is away (%s): limits hold for each gateway by itself", self._where, type(error).__name__)
        self._away = type(error).__name__

    def _note_there(self) -> None:
        if self._away is not None:
            logger.warning("%s is back: limits hold over all gateways again", self._where)
        self._away = None
