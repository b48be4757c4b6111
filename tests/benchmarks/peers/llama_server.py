"""llama.cpp's own server, in this process, until SIGINT: run by the Python of its environment.

    python -m tests.benchmarks.peers.llama_server MODEL.gguf PORT {default,exact}

`exact` keeps keys and values in float32 and sums attention in float32. Its defaults, an f16 cache and flash attention, are what most
users run, and round enough to turn a greedy token of a float32 model.
"""

import signal
import sys

import xllamacpp  # type: ignore[import-not-found]

NUM_THREADS, NUM_SLOTS, TOKENS_OF_SLOT = 2, 32, 1024


def main() -> None:
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.hostnames = ["127.0.0.1"]
    params.port = int(sys.argv[2])
    params.n_parallel = NUM_SLOTS
    params.n_ctx = NUM_SLOTS * TOKENS_OF_SLOT
    params.cont_batching = True
    params.cache_prompt = False
    params.cache_ram_mib = 0  # no prompt comes twice: keeping them would only cost time
    params.cache_idle_slots = False
    if sys.argv[3] == "exact":
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = NUM_THREADS
    params.cpuparams_batch.n_threads = NUM_THREADS
    stops = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # in the server's threads too, which begin with this one's mask
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    signal.sigwait(stops)


if __name__ == "__main__":
    main()
