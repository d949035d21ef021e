"""The machine that runs CUDA kernels on the CPU (tests/simt): it catches planted faults, and counts right."""

import re

import pytest
import torch
from simt_kernels import SEEDS, Kernels, needs_gxx
from torch import Tensor

pytestmark = needs_gxx
FAULTS = Kernels("faults.cpp")
THREADS = 128
FULL = 0xFFFFFFFF

UNORDERED = "two threads touch shared memory, one writes, no barrier between"
OVERWRITTEN = "shared memory is overwritten that another thread may yet read"
GLOBAL_UNORDERED = UNORDERED.replace("shared", "global")
GLOBAL_OVERWRITTEN = OVERWRITTEN.replace("shared", "global")
READ_ONLY = "the read-only cache is asked for what this launch wrote"
UNWRITTEN = "shared memory is read that nobody wrote"


def numbers(count: int = THREADS, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(count, dtype=torch.float64).to(dtype)


def launch(
    name: str, *arguments: object, shared: int = 0, blocks: int = 1, launches: int = 1, **options: object
):
    """Runs a kernel of faults.cpp; `out` among the arguments stands for a tensor, which is given back."""
    out = torch.zeros(4 * THREADS)
    values = [out if a is OUT else a for a in arguments]
    return out, FAULTS.call(name, blocks, shared, launches, *values, **options)


OUT = object()
IN = numbers()
#: in any order: smallest -7, largest 100
SCATTERED = (torch.arange(THREADS, dtype=torch.int32) * 55 % THREADS).clamp(max=100) - 7


def sound(name: str, *arguments: object, seeds: range = SEEDS, **options: object):
    """The one result of all orders, and its counts."""
    (first, counts), *others = [launch(name, *arguments, seed=seed, **options) for seed in seeds]
    for out, other in others:
        assert torch.equal(out, first)
        assert bytes(other) == bytes(counts)
    return first, counts


def complaints(name: str, *arguments: object, **options: object) -> set[str]:
    """What the machine says of a kernel, without the place: it must speak in every order."""
    found = set()
    for seed in SEEDS:
        with pytest.raises(RuntimeError) as e:
            launch(name, *arguments, seed=seed, **options)
        what = str(e.value)
        assert re.search(r" \(thread \d+ of block \d+, \w+\.\w+:\d+\)$", what), what
        found.add(what[: what.rindex(" (")])
    return found


# ---- races, barriers, shared memory ----


@pytest.mark.parametrize(
    ("kernel", "right", "wrong", "expected"),
    [
        ("reverse", (IN, OUT, True), (IN, OUT, False), {UNORDERED, UNWRITTEN}),
        ("tree_sum", (IN, OUT, True), (IN, OUT, False), {UNORDERED, OVERWRITTEN}),
        ("neighbour", (OUT, 3, 32), (OUT, 0, 1), {UNORDERED, OVERWRITTEN}),
        ("neighbour", (OUT, 1, 31), (OUT, 1, 32), {UNORDERED, OVERWRITTEN}),
        ("neighbour", (OUT, 2, 15), (OUT, 2, 16), {UNORDERED, OVERWRITTEN}),
        ("overwrite", (OUT, 3, 32), (OUT, 0, 1), {UNORDERED, OVERWRITTEN}),
        ("overwrite", (OUT, 1, 31), (OUT, 1, 32), {UNORDERED, OVERWRITTEN}),
        ("overwrite", (OUT, 2, 15), (OUT, 2, 16), {UNORDERED, OVERWRITTEN}),
        ("overwrite_one", (OUT, True), (OUT, False), {UNORDERED, OVERWRITTEN}),
        ("overwrite_lane", (OUT, True), (OUT, False), {UNORDERED, OVERWRITTEN}),
        ("crowd", (OUT, False), (OUT, True), {UNORDERED}),
        ("unwritten", (OUT, True), (OUT, False), {UNWRITTEN}),
        ("extremes", (SCATTERED, SCATTERED.clone(), True, True), (SCATTERED, OUT, True, False), {UNORDERED}),
        ("extremes", (SCATTERED, SCATTERED.clone(), True, True), (SCATTERED, OUT, False, True), {UNWRITTEN}),
        (
            "divergent",
            (OUT, 0),
            (OUT, 1),
            {"a barrier is not reached by a thread that has ended"},
        ),
        ("divergent", (OUT, 0), (OUT, 2), {"threads wait at different barriers"}),
        (
            "warp_sum",
            (IN, OUT, FULL, False),
            (IN, OUT, FULL, True),
            {"a warp operation waits for lane 16, which its mask names and which has ended"},
        ),
        (
            "broadcast",
            (OUT, 0xFFFF, 15),
            (OUT, 0xFFFF, 16),
            {"a shuffle reads lane 16, which its mask leaves out"},
        ),
        (
            "broadcast",
            (OUT, FULL, 31),
            (OUT, FULL, 32),
            {"a shuffle reads lane 32, which its mask leaves out"},
        ),
        ("vote", (OUT, FULL), (OUT, 0x7FFFFFFF), {"lane 31 is not in its own mask"}),
        (
            "two_votes",
            (OUT, True),
            (OUT, False),
            {"a warp operation waits for lane 16, which its mask names and which is elsewhere"},
        ),
        ("shift", (IN, OUT, 0), (IN, OUT, 1), {"an access of 4 bytes outside every buffer"}),
        ("shift", (IN, OUT, 0), (IN, OUT, -1), {"an access of 4 bytes outside every buffer"}),
        (
            "offset",
            (IN, OUT, 0),
            (IN[:-1].clone(), OUT, 0),
            {"an access of 8 bytes outside every buffer"},
        ),
        (
            "offset",
            (IN, OUT, 0),
            (numbers(200), OUT, 1),
            {"an access of 8 bytes at a misaligned address"},
        ),
    ],
)
def test_planted_faults_are_caught_in_every_order(kernel, right, wrong, expected):
    found = complaints(kernel, *wrong)
    assert found and found <= expected
    sound(kernel, *right)


@pytest.mark.parametrize("lanes", [0xFFFF, 0x7FFFFFFF])
def test_a_mask_that_lies_is_caught_in_every_order(lanes):
    for found in complaints("warp_sum", IN, OUT, lanes, False):
        assert re.fullmatch(
            r"a shuffle reads lane \d+, which its mask leaves out|lane \d+ is not in its own mask", found
        )


@pytest.mark.parametrize(
    ("kernel", "arguments", "elements", "expected"),
    [
        ("dynamic", (OUT, 128, 1), 128, "shared memory is touched beyond its end"),
        ("dynamic", (OUT, 129, 0), 128, "shared memory is touched beyond its end"),
        ("dynamic", (OUT, 128, -1), 128, "shared memory is touched beyond its end"),
        ("dynamic", (OUT, 128, 1), 129, UNWRITTEN),
        ("packs", (OUT, 128, 4), 128, "shared memory is touched beyond its end"),
        ("packs", (OUT, 128, 4), 130, "shared memory is touched beyond its end"),
        ("packs", (OUT, 128, 4), 132, UNWRITTEN),
        ("packs", (OUT, 128, 1), 132, "a pack in shared memory begins at a misaligned index"),
        ("two_names", (OUT, False), 128, "dynamic shared memory has two names"),
    ],
)
def test_faults_in_dynamic_shared_memory_are_caught_in_every_order(kernel, arguments, elements, expected):
    assert complaints(kernel, *arguments, shared=4 * elements) == {expected}


def test_sound_kernels_give_the_right_result_in_every_order():
    assert torch.equal(sound("reverse", IN, OUT, True)[0][:THREADS], IN.flip(0))
    assert sound("tree_sum", IN, OUT, True)[0][0] == IN.sum()
    order = torch.arange(THREADS)
    assert torch.equal(sound("neighbour", OUT, 3, 32)[0][:THREADS], IN[order ^ 32])
    assert torch.equal(sound("warp_sum", IN, OUT, FULL, False)[0][:4], IN.view(4, 32).sum(1))
    assert torch.equal(sound("warp_sum", IN, OUT, 0xFFFF, True)[0][:4], IN.view(4, 32)[:, :16].sum(1))
    assert torch.equal(
        sound("broadcast", OUT, 0xFF0, 9)[0][:THREADS].view(4, 32)[:, 4:12], torch.full((4, 8), 9.0)
    )
    assert sound("vote", OUT, FULL)[0][:THREADS].eq(16).all()
    assert torch.equal(sound("dynamic", OUT, 128, 0, shared=4 * 128)[0][:THREADS], IN)
    assert torch.equal(sound("packs", OUT, 132, 4, shared=4 * 132)[0][:THREADS], IN + 4)
    assert torch.equal(sound("move_down", torch.zeros(1025), True, blocks=1)[0], torch.zeros(4 * THREADS))


def test_atomics_of_shared_memory():
    for seed in SEEDS:
        out = torch.zeros(2, dtype=torch.int32)
        counts = FAULTS.call("extremes", 1, 0, 1, SCATTERED, out, True, True, seed=seed)
        assert out.tolist() == [-7, 93]
        assert counts.shared_atomics == 2 * THREADS
        assert counts.atomics == 0


# ---- races for global memory ----


@pytest.mark.parametrize(
    ("kernel", "right", "wrong", "expected"),
    [
        ("count_up", (OUT, True), (OUT, False), {GLOBAL_UNORDERED, GLOBAL_OVERWRITTEN}),
        ("count_and_read", (OUT, True), (OUT, False), {GLOBAL_UNORDERED}),
        ("global_neighbour", (OUT, 3, 32), (OUT, 0, 1), {GLOBAL_UNORDERED, GLOBAL_OVERWRITTEN}),
        ("global_neighbour", (OUT, 1, 31), (OUT, 1, 32), {GLOBAL_UNORDERED, GLOBAL_OVERWRITTEN}),
        ("global_neighbour", (OUT, 2, 15), (OUT, 2, 16), {GLOBAL_UNORDERED, GLOBAL_OVERWRITTEN}),
        (
            "move_down",
            (IN.new_zeros(129), True),
            (IN.new_zeros(129), False),
            {GLOBAL_UNORDERED, GLOBAL_OVERWRITTEN},
        ),
        (
            "halves_and_word",
            (numbers(128, torch.int16), True),
            (numbers(128, torch.int16), False),
            {GLOBAL_UNORDERED, GLOBAL_OVERWRITTEN},
        ),
        ("read_only", (OUT, False, False), (OUT, True, False), {READ_ONLY}),
        ("read_only", (OUT, False, True), (OUT, True, True), {READ_ONLY}),
    ],
)
def test_faults_in_global_memory_are_caught_in_every_order(kernel, right, wrong, expected):
    found = complaints(kernel, *wrong)
    assert found and found <= expected
    sound(kernel, *right)


def test_a_barrier_does_not_hold_back_other_blocks():
    data = torch.zeros(2 * THREADS + 1)
    assert complaints("move_down", data, True, blocks=2) <= {GLOBAL_UNORDERED, GLOBAL_OVERWRITTEN}
    sound("move_down", data, True, blocks=1)
    assert complaints("one_writes", data, 1, blocks=2) <= {GLOBAL_UNORDERED, GLOBAL_OVERWRITTEN}
    sound("one_writes", data, 2, blocks=2)
    out = torch.zeros(2 * THREADS, dtype=torch.int16)
    assert complaints("halves", out, THREADS - 1, blocks=2) == {GLOBAL_UNORDERED}
    sound("halves", out, THREADS, blocks=2)


def test_launches_do_not_race_with_each_other():
    data = numbers(THREADS + 3)
    for seed in SEEDS:
        FAULTS.call("move_down", 1, 0, 3, data := numbers(THREADS + 3), True, seed=seed)
        assert data[0] == 3


def test_where_races_are_not_looked_for_they_show_between_orders():
    found = {float(launch("count_up", OUT, False, seed=seed, races=False)[0][0]) for seed in SEEDS}
    assert len(found) > 1
    assert float(sound("count_up", OUT, True)[0][0]) == THREADS


# ---- limits ----


def test_launches_beyond_the_limits_of_a_device():
    out = torch.zeros(1024)

    def launched(blocks: int = 1, threads: int = 128, shared: int = 0, limit: int = 4096) -> None:
        FAULTS.call("limits", blocks, threads, shared, limit, out)

    launched()
    launched(blocks=0, threads=7)
    launched(shared=4096 - 512)
    with pytest.raises(
        RuntimeError, match="a block asks for 4112 bytes of shared memory, the device has 4096"
    ):
        launched(shared=4096 - 512 + 16)
    with pytest.raises(
        RuntimeError, match="a block asks for 4100 bytes of shared memory, the device has 4096"
    ):
        launched(shared=4100)
    with pytest.raises(RuntimeError, match="a block has 48 threads, not whole warps up to 1024"):
        launched(threads=48)
    with pytest.raises(RuntimeError, match="a block has 1056 threads"):
        launched(threads=1056)
    with pytest.raises(RuntimeError, match="a grid of 2147483648 blocks: at most 2147483647 are possible"):
        launched(blocks=2**31)
    with pytest.raises(RuntimeError, match="arrays of fixed size take 49168 bytes of shared memory"):
        launch("large_array", OUT)


# ---- counts ----


def test_traffic_is_counted_by_request_block_and_launch():
    """Two blocks of 4 warps read the same 16 sectors twice and write 16 each."""
    out = torch.zeros(2 * THREADS)
    for seed in SEEDS:
        counts = FAULTS.call("traffic", 2, 0, 3, IN, out, seed=seed)
        assert counts.launches == 3 and counts.blocks == 6
        assert counts.loaded_bytes == 3 * 2 * 2 * 512 and counts.stored_bytes == 3 * 2 * 512
        assert counts.requests == 3 * 2 * 3 * 4
        assert counts.sectors == counts.ideal_sectors == 3 * 2 * 3 * 16
        assert counts.l2_bytes == 3 * 32 * (2 * 16 + 2 * 16)
        assert counts.dram_bytes == 3 * 32 * (16 + 2 * 16)
        assert counts.threads == THREADS and counts.shared_bytes == 0
        assert counts.shared_requests == counts.atomics == counts.bank_conflicts == 0


def test_sectors_of_requests():
    """Four warps read words that lie 32 bytes apart, two words in turn, and side by side; stores lie so."""
    counts = sound("strided", numbers(1024), OUT, 8, 256)[1]
    assert (counts.sectors, counts.ideal_sectors) == (4 * 32 + 16, 4 * 4 + 16)
    assert counts.dram_bytes == 32 * (32 + 16)
    counts = sound("strided", numbers(1024), OUT, 8, 16)[1]
    assert (counts.sectors, counts.ideal_sectors) == (4 * 2 + 16, 4 * 1 + 16)
    assert counts.dram_bytes == 32 * (2 + 16)
    counts = sound("strided", numbers(1024), OUT, 1, 128)[1]
    assert counts.sectors == counts.ideal_sectors == 32


def test_a_sector_that_is_loaded_and_stored_moves_twice():
    counts = sound("move_down", torch.zeros(THREADS + 1), True)[1]
    assert counts.dram_bytes == counts.l2_bytes == 32 * (17 + 16)


def test_a_request_that_not_all_lanes_come_to_is_counted():
    counts = sound("tree_sum", IN, OUT, True)[1]
    assert counts.requests == 4 + 1 and counts.sectors == 16 + 1
    # One store a warp; 2 + 1 requests a warp in each round, down to one warp; a load.
    assert counts.shared_requests == 4 + 3 * (2 + 1 + 1 + 1 + 1 + 1 + 1) + 1


def test_bank_conflicts():
    assert sound("column", OUT, 33)[1].bank_conflicts == 0
    assert sound("column", OUT, 32)[1].bank_conflicts == 4 * 31
    # A quarter of a warp, 8 packs, passes at a time; 32 words apart they share 4 banks.
    assert sound("pack_column", OUT, 4)[1].bank_conflicts == 0
    assert sound("pack_column", OUT, 36)[1].bank_conflicts == 0
    assert sound("pack_column", OUT, 32)[1].bank_conflicts == 4 * 4 * 7


def test_elements_move_in_pieces_of_their_alignment():
    """Four warps, three words an element: 12 sectors of global memory each, no conflicts in shared memory."""
    out, counts = sound("threes", OUT)
    assert torch.equal(out[: 3 * THREADS].view(-1, 3), torch.tensor([[1.0, 2, 3]]).repeat(THREADS, 1))
    assert counts.shared_requests == 2 * 4 * 3 and counts.bank_conflicts == 0
    assert (counts.requests, counts.sectors, counts.ideal_sectors) == (4 * 3, 4 * 3 * 12, 4 * 3 * 4)
    assert counts.shared_bytes == 12 * THREADS


def test_atomics_and_shared_memory_are_counted():
    counts = sound("count_up", OUT, True)[1]
    assert counts.atomics == THREADS and counts.stored_bytes == 4 * THREADS
    assert (counts.sectors, counts.dram_bytes) == (4, 32)
    assert sound("dynamic", OUT, 128, 0, shared=2000)[1].shared_bytes == 2000
    assert sound("unwritten", OUT, True, shared=2000)[1].shared_bytes == 2512
