"""Gluon kernel of attention's forward on Hopper: one warp loads, two warpgroups multiply.

Triton's own pipeline puts a block's softmax behind its product. Here a warpgroup issues the next block's q kᵀ before
the softmax of this one (FlashAttention-3, Shah et al. 2024), also over the border of two tiles: programs are
persistent, and the loads and first scores of the next tile come before the last sums of this one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
ROWS = gl.constexpr(64)  # of one warpgroup: what one wgmma instruction takes
WARPGROUPS = gl.constexpr(2)
HEIGHT = gl.constexpr(128)  # rows of a tile, and columns of a block at least: only a tile's last block needs a mask

# Triton 3.7 renamed them.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _tile(index, n_blocks, n_pairs, HEADS: gl.constexpr, CAUSAL: gl.constexpr):
    """(block of rows, pair of batch and head) of a tile; with a causal mask the longest rows of a group come first."""
    group = index // (HEADS * n_blocks)
    first = group * HEADS
    some = gl.minimum(n_pairs - first, HEADS)
    within = index - first * n_blocks
    block = within // some
    if CAUSAL:
        block = n_blocks - 1 - block
    return block, first + within % some


@gluon.jit
def _turn(turn):
    """Number of this program's next tile. Every other turn goes round the other way: who got
    a long tile of a causal mask gets a short one."""
    here, all_ = gl.program_id(0), gl.num_programs(0)
    return turn * all_ + gl.where(turn & 1 == 1, all_ - 1 - here, here)


@gluon.jit
def _turns(n_tiles):
    """How many tiles are this program's."""
    whole = n_tiles // gl.num_programs(0)
    return whole + gl.where(_turn(whole) < n_tiles, 1, 0)


@gluon.jit
def _columns(row, n_k, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """Blocks of columns that rows `row` … `row + HEIGHT` see."""
    return gl.cdiv(gl.minimum(row + HEIGHT, n_k) if CAUSAL else n_k, BLOCK_N)


@gluon.jit
def _fetch(x, tiles, full, empty, batch, head, column, at,
           D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Block number `at` of k or v into its place of the ring, once that is free."""
    stage = at % STAGES
    mbarrier.wait(empty.index(stage), ((at // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), BLOCK_N * D * 2)
    _load(x, [batch, head, column, 0], full.index(stage), tiles.index(stage))


@gluon.jit
def _produce(
    q, k, v, buffers, barriers, sizes,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HEADS: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """Loads: q of each tile, then its blocks of k and v from the last to the first; v a block behind, as it is used."""
    q_tiles, k_tiles, v_tiles, _o_tiles = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    n_tiles, n_blocks, n_pairs, n_heads, group, _n_q, n_k = sizes
    at = 0
    v_batch, v_head, v_column = 0, 0, 0
    for turn in range(_turns(n_tiles)):
        block, pair = _tile(_turn(turn), n_blocks, n_pairs, HEADS, CAUSAL)
        batch, head = pair // n_heads, pair % n_heads
        kv_head = head // group
        row = block * HEIGHT
        blocks = _columns(row, n_k, BLOCK_N, CAUSAL)
        side = turn & 1
        mbarrier.wait(q_empty.index(side), ((turn >> 1) & 1) ^ 1)
        mbarrier.expect(q_full.index(side), HEIGHT * D * 2)
        for part in gl.static_range(WARPGROUPS):
            at_part = q_tiles.index(side * WARPGROUPS + part)
            _load(q, [batch, head, row + part * ROWS, 0], q_full.index(side), at_part)
        for step in range(blocks):
            column = (blocks - 1 - step) * BLOCK_N
            _fetch(k, k_tiles, k_full, k_empty, batch, kv_head, column, at, D, BLOCK_N, STAGES)
            if at > 0:
                _fetch(v, v_tiles, v_full, v_empty, v_batch, v_head, v_column, at - 1, D, BLOCK_N, STAGES)
            v_batch, v_head, v_column = batch, kv_head, column
            at += 1
    _fetch(v, v_tiles, v_full, v_empty, v_batch, v_head, v_column, at - 1, D, BLOCK_N, STAGES)


@gluon.jit
def _masked(s, rows, column, n_k, SCORES: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """Without what the rows of a tile's last block of columns do not see."""
    columns = column + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
    if CAUSAL:
        s = gl.where(columns[None, :] < gl.minimum(rows + 1, n_k)[:, None], s, -float("inf"))
    elif column + BLOCK_N > n_k:
        s = gl.where(columns[None, :] < n_k, s, -float("inf"))
    return s


@gluon.jit
def _soften(s, m_i, factor, BLOCK_N: gl.constexpr, SCORES: gl.constexpr):
    """p = exp2(factor · s - maximum), the new maximum, what old sums decay by, and each thread's own part of Σ p.

    A thread's columns of a row are every eighth and its neighbour. Their maximum in two steps is two chains of 16 and
    not one of 32, and Σ p meets the other threads' only when the tile is done.
    """
    own = gl.max(s.reshape([ROWS, BLOCK_N // 8, 8]), 1)
    highest = gl.convert_layout(gl.max(own, 1), gl.SliceLayout(1, SCORES))
    higher = gl.maximum(m_i, highest * factor)
    decay = gl.exp2(m_i - higher)
    p = gl.exp2(s * factor - higher[:, None])
    return p, higher, decay, gl.sum(p.reshape([ROWS, BLOCK_N // 8, 8]), 1)


@gluon.jit
def _advance(
    q_tile, k_tiles, v_tiles, barriers, neighbours, phase,
    acc, p, m_i, l_i, at, more, factor,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, SCORES: gl.constexpr,
    SUMS: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """One more block of columns: its scores and weights, while the block before it is added to the sums."""
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty = barriers
    my_turn, your_turn = neighbours
    stage = at % STAGES
    before = (at - 1) % STAGES
    if TURNS:
        mbarrier.wait(my_turn, phase)
    s = warpgroup_mma_init(gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES))
    s = warpgroup_mma(
        q_tile, k_tiles.index(stage).reshape([BLOCK_N, D]).permute([1, 0]), s, use_acc=False, is_async=True
    )
    mbarrier.wait(v_full.index(before), ((at - 1) // STAGES) & 1)
    sums = warpgroup_mma(p, v_tiles.index(before).reshape([BLOCK_N, D]), warpgroup_mma_init(acc), is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(stage))
    if TURNS:  # the neighbour's products come after these scores, and beside their softmax
        mbarrier.arrive(your_turn)
    p_next, m_i, decay, total = _soften(s, m_i, factor, BLOCK_N, SCORES)
    # Waiting for what the next block needs keeps the compiler from moving the other wait in front of the exponentials:
    # it moves nothing across a branch. The weights are rounded after it, into the registers that the product reads.
    mbarrier.wait(k_full.index((at + 1) % STAGES), ((at + 1) // STAGES) & 1, pred=more)
    acc, _p, p_next = warpgroup_mma_wait(0, deps=[sums, p, p_next])
    mbarrier.arrive(v_empty.index(before))
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, SUMS))[:, None]
    l_i = l_i * gl.convert_layout(decay, gl.SliceLayout(1, l_i.type.layout))[:, None] + total
    return acc, gl.convert_layout(p_next.to(p.dtype), WEIGHTS), m_i, l_i


@gluon.jit
def _finish(sums, l_i, m_i, o, o_tile, lse, batch_head, row, rows, n_q, D: gl.constexpr, PART: gl.constexpr,
            SCORES: gl.constexpr, SUMS: gl.constexpr):  # fmt: skip
    """o and log-sum-exp of a tile's rows."""
    batch, head, pair = batch_head
    whole = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, SCORES))
    share = gl.convert_layout(1.0 / whole, gl.SliceLayout(1, SUMS))
    tma.store_wait(0)
    o_tile.reshape([ROWS, D]).store((sums * share[:, None]).to(o_tile.dtype))
    fence_async_shared()
    _store(o, [batch, head, row + PART * ROWS, 0], o_tile)
    gl.store(lse + pair.to(gl.int64) * n_q + rows, (m_i + gl.log2(whole)) * LN2, mask=rows < n_q)


@gluon.jit
def _consume(
    buffers, barriers, sizes, out,
    PART: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    HEADS: gl.constexpr, CAUSAL: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Warpgroup `PART`: its 64 rows of each tile. The first scores of a tile are made while the last sums of the one
    before are, so that the tensor cores have work across the border."""
    q_tiles, k_tiles, v_tiles, o_tiles = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    n_tiles, n_blocks, n_pairs, n_heads, _group, n_q, n_k = sizes
    turns, o, lse, scale = out
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    dtype: gl.constexpr = q_tiles.dtype
    nothing = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, SCORES))
    neighbours = turns.index(PART), turns.index((PART + 1) % WARPGROUPS)
    o_tile = o_tiles.index(PART)
    within = PART * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    factor = scale * LOG2E
    phase = 1 if PART == 0 else 0  # the first begins, without waiting for anyone

    n_turns = _turns(n_tiles)
    block, pair = _tile(_turn(0), n_blocks, n_pairs, HEADS, CAUSAL)
    row = block * HEIGHT
    blocks = _columns(row, n_k, BLOCK_N, CAUSAL)
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    keys = k_tiles.index(0).reshape([BLOCK_N, D]).permute([1, 0])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    s = warpgroup_mma(q_tiles.index(PART).reshape([ROWS, D]), keys, zeros, use_acc=False)
    mbarrier.arrive(k_empty.index(0))
    s = _masked(s, row + within, (blocks - 1) * BLOCK_N, n_k, SCORES, BLOCK_N, CAUSAL)
    p, m_i, _decay, l_i = _soften(s, nothing, factor, BLOCK_N, SCORES)
    p = gl.convert_layout(p.to(dtype), WEIGHTS)
    at = 1
    for turn in range(n_turns):
        # The weights of the tile's last block of columns are there: masked whether they need be or not.
        q_tile = q_tiles.index((turn & 1) * WARPGROUPS + PART).reshape([ROWS, D])
        acc = gl.zeros([ROWS, D], gl.float32, SUMS)
        rows = row + within
        mbarrier.wait(k_full.index(at % STAGES), (at // STAGES) & 1, pred=blocks > 1)
        for step in range(1, blocks):
            acc, p, m_i, l_i = _advance(
                q_tile, k_tiles, v_tiles, barriers, neighbours, phase,
                acc, p, m_i, l_i, at, step + 1 < blocks, factor,
                D, BLOCK_N, STAGES, TURNS, SCORES, SUMS, WEIGHTS,
            )  # fmt: skip
            phase ^= 1
            at += 1
        mbarrier.arrive(q_empty.index(turn & 1))

        # Over the border; after the last tile the scores are of what the buffers happen to hold, and nobody's.
        following = turn + 1
        more = following < n_turns
        next_block, next_pair = _tile(_turn(following), n_blocks, n_pairs, HEADS, CAUSAL)
        next_row = next_block * HEIGHT
        next_blocks = _columns(next_row, n_k, BLOCK_N, CAUSAL)
        stage = at % STAGES
        before = (at - 1) % STAGES
        mbarrier.wait(q_full.index(following & 1), (following >> 1) & 1, pred=more)
        mbarrier.wait(k_full.index(stage), (at // STAGES) & 1, pred=more)
        q_next = q_tiles.index((following & 1) * WARPGROUPS + PART).reshape([ROWS, D])
        keys = k_tiles.index(stage).reshape([BLOCK_N, D]).permute([1, 0])
        s = warpgroup_mma(q_next, keys, warpgroup_mma_init(zeros), use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((at - 1) // STAGES) & 1)
        sums = warpgroup_mma(p, v_tiles.index(before).reshape([BLOCK_N, D]), warpgroup_mma_init(acc), is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(stage), pred=more)
        s = _masked(s, next_row + within, (next_blocks - 1) * BLOCK_N, n_k, SCORES, BLOCK_N, CAUSAL)
        p_next, next_m_i, _decay, next_l_i = _soften(s, nothing, factor, BLOCK_N, SCORES)
        mbarrier.wait(v_full.index(before), ((at - 1) // STAGES) & 1)  # again, for the branch
        acc, _p, p_next = warpgroup_mma_wait(0, deps=[sums, p, p_next])
        mbarrier.arrive(v_empty.index(before))

        old = pair // n_heads, pair % n_heads, pair
        _finish(acc, l_i, m_i, o, o_tile, lse, old, row, rows, n_q, D, PART, SCORES, SUMS)
        p = gl.convert_layout(p_next.to(dtype), WEIGHTS)
        m_i, l_i, pair, row, blocks = next_m_i, next_l_i, next_pair, next_row, next_blocks
        at += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_tiles", "n_blocks", "n_pairs", "n_heads", "group", "n_q", "n_k"])
def attention_fwd_gluon(
    q, k, v, o, lse, n_tiles, n_blocks, n_pairs, n_heads, group, n_q, n_k, scale,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HEADS: gl.constexpr,
    CAUSAL: gl.constexpr, TURNS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """`full` barriers count bytes that have come, `empty` ones the warpgroups that are done with a buffer."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(q.dtype, [2 * WARPGROUPS, 1, 1, ROWS, D], q.layout)
    o_tiles = gl.allocate_shared_memory(q.dtype, [WARPGROUPS, 1, 1, ROWS, D], o.layout)
    k_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_N, D], k.layout)
    v_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_N, D], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], BARRIER)
    for side in gl.static_range(2):
        mbarrier.init(q_full.index(side), count=1)
        mbarrier.init(q_empty.index(side), count=WARPGROUPS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=WARPGROUPS)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=WARPGROUPS)
    for part in gl.static_range(WARPGROUPS):
        mbarrier.init(turns.index(part), count=1)

    buffers = q_tiles, k_tiles, v_tiles, o_tiles
    barriers = q_full, q_empty, k_full, k_empty, v_full, v_empty
    sizes = n_tiles, n_blocks, n_pairs, n_heads, group, n_q, n_k
    out = turns, o, lse, scale
    # 168 registers a thread: what the loading warp and its idle neighbours give up, the others take.
    gl.warp_specialize(
        [
            (_consume, (buffers, barriers, sizes, out, 0, D, BLOCK_N, STAGES, HEADS, CAUSAL, TURNS)),
            (_consume, (buffers, barriers, sizes, out, 1, D, BLOCK_N, STAGES, HEADS, CAUSAL, TURNS)),
            (_produce, (q, k, v, buffers, barriers, sizes, D, BLOCK_N, STAGES, HEADS, CAUSAL)),
        ],
        [4, 1],
        [240, 24],
    )
