"""Counts in Redis, shared by all gateways of an application. Each change is one script, so it is atomic; the clock is Redis's own."""

import math
from collections.abc import Sequence

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from cluster.guard.counts import STREAM_RETRY_S, Demand, Refusal, Use
from cluster.guard.windows import NUM_SLOTS, SLOT_S

CALL_TIMEOUT_S = 0.5
MAX_CONNECTIONS = 16
STREAM_LEASE_S = 15.0  # a gateway that died keeps its streams counted for no longer
LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent_streams")

# ARGV begins with a time in seconds that stands in for Redis's clock ('' for none), SLOT_S and NUM_SLOTS.
_CLOCK = """
local now, slot_s, num_slots = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
if not now then local t = redis.call('TIME') now = t[1] + t[2] / 1e6 end
local slot = math.floor(now / slot_s)
local function add(key, num)
  if num > 0 then
    redis.call('HINCRBY', key, string.format('%d', slot), num)
    redis.call('EXPIRE', key, slot_s * num_slots)
  end
end
"""

# KEYS: requests, tokens, streams. ARGV goes on with number and limit of requests and of tokens (limit '': none), streams' limit, stream
# ('': none), lease. Answers {0}, or {which limit, wait in seconds as text}; a wait of -1 is for ever.
_TAKE = (
    _CLOCK
    + """
local function wait(key, num, limit)
  if num == 0 or not limit then return 0 end
  if num > limit then return -1 end
  local used, slots, total = redis.call('HGETALL', key), {}, 0
  for i = 1, #used, 2 do
    local at = tonumber(used[i])
    if at > slot - num_slots then
      slots[#slots + 1] = {at, tonumber(used[i + 1])}
      total = total + tonumber(used[i + 1])
    else
      redis.call('HDEL', key, used[i])
    end
  end
  table.sort(slots, function(a, b) return a[1] < b[1] end)
  local left = 0
  for _, one in ipairs(slots) do
    if total + num <= limit then break end
    total = total - one[2]
    left = (one[1] + num_slots) * slot_s - now
  end
  return left
end
local requests, tokens = tonumber(ARGV[4]), tonumber(ARGV[6])
local waits = {wait(KEYS[1], requests, tonumber(ARGV[5])), wait(KEYS[2], tokens, tonumber(ARGV[7]))}
for which = 1, 2 do
  if waits[which] ~= 0 then return {which, tostring(waits[which])} end
end
if ARGV[9] ~= '' then
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
  local limit = tonumber(ARGV[8])
  if limit and redis.call('ZCARD', KEYS[3]) >= limit then return {3, ''} end
  redis.call('ZADD', KEYS[3], now + tonumber(ARGV[10]), ARGV[9])
  redis.call('EXPIRE', KEYS[3], math.ceil(2 * tonumber(ARGV[10])))
end
add(KEYS[1], requests)
add(KEYS[2], tokens)
return {0}
"""
)

# KEYS: tokens, streams. ARGV goes on with number of tokens, stream, lease (0: it has ended).
_TELL = (
    _CLOCK
    + """
add(KEYS[1], tonumber(ARGV[4]))
local lease = tonumber(ARGV[6])
if lease > 0 then
  redis.call('ZADD', KEYS[2], now + lease, ARGV[5])
  redis.call('EXPIRE', KEYS[2], math.ceil(2 * lease))
else
  redis.call('ZREM', KEYS[2], ARGV[5])
end
"""
)


class RedisCounts:
    """Raises RedisError or OSError where Redis does not answer within CALL_TIMEOUT_S. Keys: `shoal:{application}:{cluster}:guard:...`.

    `clock_s` is for tests: seconds in place of Redis's own.
    """

    def __init__(self, redis_url: str, application: str, cluster_id: str, clock_s: float | None = None) -> None:
        self.clock_s = clock_s
        self._prefix = f"shoal:{application}:{cluster_id}:guard"
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            redis_url,
            max_connections=MAX_CONNECTIONS,
            timeout=CALL_TIMEOUT_S,
            socket_timeout=CALL_TIMEOUT_S,
            socket_connect_timeout=CALL_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )
        self._redis = redis.asyncio.Redis.from_pool(pool)
        self._take = self._redis.register_script(_TAKE)
        self._tell = self._redis.register_script(_TELL)

    async def take(self, demand: Demand) -> Refusal | None:
        """See Counts."""
        limits = demand.limits
        arguments = [*self._time(), demand.num_requests, _text(limits.requests_per_minute), demand.num_tokens]
        arguments += [_text(limits.tokens_per_minute), _text(limits.concurrent_streams), demand.stream_id or "", str(STREAM_LEASE_S)]
        keys = [self._key(demand.key_id, name) for name in ("requests", "tokens", "streams")]
        which, *rest = await self._take(keys=keys, args=arguments)
        if which == 0:
            return None
        wait = STREAM_RETRY_S if which == len(LIMITS) else float(rest[0])
        return Refusal(LIMITS[which - 1], None if wait < 0 or wait == math.inf else wait)

    async def tell(self, uses: Sequence[Use]) -> None:
        """See Counts."""
        if not uses:
            return
        async with self._redis.pipeline(transaction=False) as pipe:
            for use in uses:
                keys = [self._key(use.key_id, name) for name in ("tokens", "streams")]
                arguments = [*self._time(), use.num_tokens, use.stream_id, STREAM_LEASE_S if use.is_open else 0]
                await self._tell(keys=keys, args=arguments, client=pipe)
            await pipe.execute()

    async def close(self) -> None:
        """See Counts."""
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    def _time(self) -> list[str | int]:
        return ["" if self.clock_s is None else str(self.clock_s), int(SLOT_S), NUM_SLOTS]

    def _key(self, key_id: str, name: str) -> str:
        # The braces keep the keys of one script on one node of a Redis Cluster.
        return f"{self._prefix}:{{{key_id}}}:{name}"


def _text(limit: int | None) -> str:
    return "" if limit is None else str(limit)
