"""How many long requests decode at once in the same memory, with the plugin and without, and how fast."""

from serving_engine import LONGEST, LUKV, MODEL, drive, long_prompts

from headwise.serving import vllm_arguments

FIT = 6  # full requests that the pool holds: 6 x 2048 tokens
BLOCK = 32  # tokens; stock vLLM on CPUs takes no fewer
PROMPTS, COUNT = 30, 120
HEADS, HEAD_DIM = 24, 32


def _serve(folder, arguments, pool_bytes, block_bytes):
    engine = {
        "block_size": BLOCK,
        "max_num_batched_tokens": LONGEST,
        "max_num_seqs": 32,
        "num_gpu_blocks_override": pool_bytes // block_bytes,
        **arguments,
    }
    return drive(folder, engine=engine, prompts=long_prompts(PROMPTS), max_tokens=COUNT)


def _throughput(found):
    """Answer tokens per second, prompts included."""
    return PROMPTS * COUNT / sum(step["seconds"] for step in found["steps"])


def test_three_times_as_many_decode_at_once(tmp_path):
    page = BLOCK * 2 * HEAD_DIM * 4  # bytes of one head's block, float32
    pool = (FIT * LONGEST // BLOCK + 1) * HEADS * page
    stock = _serve(tmp_path, {}, pool, HEADS * page)
    ours = _serve(tmp_path, vllm_arguments(LUKV[0], keep=LUKV[1], context=LONGEST), pool, page)
    assert stock["pool_bytes"] >= ours["pool_bytes"]
    most = [max(step["decoding"] for step in found["steps"]) for found in (stock, ours)]
    steps = [len(found["steps"]) for found in (stock, ours)]
    speed = [_throughput(found) for found in (stock, ours)]
    print(
        f"\n{MODEL.rsplit('/', 1)[-1]} model, {PROMPTS} prompts of {len(long_prompts(1)[0])} tokens, {COUNT} answered, "
        f"pool {pool / 2**20:.1f} MiB; stock against {LUKV[0]} keep {LUKV[1]}:\n"
        f"decoding at once {most[0]} / {most[1]} ({most[1] / most[0]:.2f}x), steps {steps[0]} / {steps[1]}, "
        f"answer tokens per second {speed[0]:.0f} / {speed[1]:.0f} ({speed[1] / speed[0]:.2f}x)"
    )
    assert most[1] >= 3 * most[0]
