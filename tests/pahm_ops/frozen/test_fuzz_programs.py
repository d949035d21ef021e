"""Damaged and random programs given to the op that runs them: a result or a ValueError, and nothing else.

`tools/sanitize.sh` runs the same with the address and undefined-behaviour sanitizers.
"""

import random

import pytest
import torch

import pahm_ops
from pahm_ops.frozen.constants import Constants
from pahm_ops.frozen.steps import (
    KINDS,
    Source,
    Step,
    attention_step,
    elementwise_step,
    map_step,
    norm_step,
    product_step,
    sample_step,
    soft_argmax_step,
    sparse_product_step,
    winograd_step,
)
from pahm_ops.frozen.tape import Value

pytestmark = pytest.mark.skipif(
    pahm_ops.backends()["spiral_conv"]["cpu"] == "reference", reason="no compiled kernels here"
)
SPECIAL = (0, 1, 2, 3, -1, -2, 7, 64, 2**20, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63), -(2**31))


def lanes() -> int:
    return {"plain": 4, "neon": 4, "avx2": 8}.get(pahm_ops.backends()["spiral_conv"]["cpu"], 16)


def value(*shape: int) -> Value:
    return Value(0, shape, torch.float32, None)


def steps(constants: Constants) -> list[Step]:
    """One of each kind, and a product with several sources, tables and a residual."""
    ones = torch.ones
    image, same, half = value(2, 16, 6, 5), value(2, 16, 6, 5), value(2, 16, 3, 3)
    vertices, wide, narrow = value(2, 9, 16), value(2, 9, 48), value(2, 9, 3)
    zeros = constants.zeros(16)
    weight, bias = constants.product([ones(19, 32)], ones(19, 32), ones(19))
    table = constants.table(torch.arange(-1, 8).int())
    square, offset = constants.product([ones(20, 256)], ones(20, 256), ones(20))
    norm, taps = constants.vector(ones(16)), constants.vector(ones(9, 16))
    pointers, columns = (
        constants.table(torch.tensor([0, 2, 2, 3]).int()),
        constants.table(torch.tensor([0, 8, 3]).int()),
    )
    sources = [Source(vertices, 9, 16, 16, table), Source(vertices, 9, 16, 16)]
    common = {"weight": weight, "bias": bias, "zeros": zeros, "activation": "gelu"}
    maps = (2, 6, 5, 16)
    winograd = {"weight": square, "bias": offset, "zeros": zeros, "activation": "none", "threads": 2}
    made = [
        product_step(value(2, 9, 19), sources, batch=2, **common, residual=value(2, 9, 19), mode=1),
        winograd_step(image, value(2, 20, 6, 5), residual=None, mode=0, **winograd),
        map_step("depthwise", image, (*maps, 3, 3), half, [3, 3, 2, 2, 1, 1, *taps, *norm, 1]),
        map_step("max_pool", image, (*maps, 3, 3), half, [3, 3, 2, 2, 1, 1]),
        map_step("pad", image, (*maps, 8, 8), value(2, 16, 8, 8), [1, 2]),
        map_step("upsample", image, (*maps, 12, 7), value(2, 16, 12, 7), []),
        norm_step(vertices, value(2, 9, 16), 1e-5, norm, norm),
        elementwise_step(image, same, scale=2.0, added=same, activation="silu"),
        sparse_product_step(
            vertices, value(2, 3, 16), pointers, columns, constants.vector(ones(3)), entries=3
        ),
        attention_step(wide, value(2, 9, 16), 2, 0.3),
        sample_step(
            [image, half], narrow, value(2, 3), value(2, 9, 32), align_corners=False, border=True, zeros=zeros
        ),
        soft_argmax_step(image, value(2, 16, 2), constants.vector(ones(2, 30))),
    ]
    constants.seal()
    return made


class Case:
    """A program of one step, or several, and its memory."""

    def __init__(self) -> None:
        self.constants = Constants(lanes())
        self.steps = steps(self.constants)
        held = {part: None for step in self.steps for part in (*step.reads, step.output, *step.scratch)}
        self.offsets, end = {}, 0
        for part in held:
            self.offsets[part] = end
            end += -(-(part.size if hasattr(part, "size") else torch.Size(part.shape).numel()) // 16) * 16
        self.memory = [torch.full((end,), 0.5), *self.constants.memory[1:]]

    def program(self, *chosen: Step) -> list[int]:
        fields = [lanes()]
        for step in chosen:
            fields += step.fields(self.offsets.__getitem__)
        return fields

    def fresh(self) -> list[torch.Tensor]:
        # Each tensor ends where its memory ends, so that a sanitizer sees what is read beyond.
        return [tensor.clone() for tensor in self.memory]


def run(memory, program, threads=1):
    torch.ops.pahm_ops._frozen_run(memory, torch.tensor(program, dtype=torch.int64), threads)


def attempt(memory, program, threads=1) -> bool:
    try:
        run(memory, program, threads)
    except ValueError as error:
        assert str(error)
        return False
    return True


def damaged(draw: random.Random, program: list[int]) -> list[int]:
    program = list(program)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        place = draw.randrange(len(program))
        kind = draw.randrange(7)
        if kind == 0:
            program[place] = draw.choice(SPECIAL)
        elif kind == 1:
            program[place] += draw.choice((-1, 1, 16, -16))
        elif kind == 2:
            program[place] = draw.randrange(-(2**63), 2**63)
        elif kind == 3:
            program[place] = program[draw.randrange(len(program))]
        elif kind == 4:
            del program[place]
        elif kind == 5:
            program.insert(place, draw.choice((*SPECIAL, *range(20))))
        else:
            program[place] = max(-(2**63), min(2**63 - 1, program[place] * draw.choice((2, -1, 2**32, 1000))))
    return [max(-(2**63), min(2**63 - 1, number)) for number in program]


def test_whole_programs_run(isa):
    case = Case()
    assert [step.kind for step in case.steps] == KINDS[:1] + ["winograd"] + [
        k for k in KINDS[1:] if k != "winograd"
    ]
    for step in case.steps:
        run(case.fresh(), case.program(step), 3)
    run(case.fresh(), case.program(*case.steps), 2)


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_each_field_with_special_numbers(kind, isa):
    case = Case()
    program = case.program(case.steps[kind])
    for place in range(len(program)):
        for number in (*SPECIAL, program[place] + 1, program[place] - 1, program[place] * 2):
            attempt(case.fresh(), [*program[:place], number, *program[place + 1 :]])


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_programs_that_end_early(kind):
    case = Case()
    program = case.program(case.steps[kind])
    for length in range(1, len(program)):
        assert not attempt(case.fresh(), program[:length]) or length == 1


def cases(count, seed):
    draw, case, ran = random.Random(seed), Case(), 0
    for _ in range(count):
        chosen = draw.choices(case.steps, k=draw.choice((1, 1, 2, 4)))
        ran += attempt(case.fresh(), damaged(draw, case.program(*chosen)), draw.choice((1, 2)))
    return ran


def test_damaged_programs(isa):
    assert 0 < cases(1500, 1) < 1500


@pytest.mark.slow
def test_damaged_programs_at_length():
    assert cases(100_000, 2) > 0


def test_random_programs():
    draw, case = random.Random(3), Case()
    for _ in range(1000):
        length, limit = draw.randrange(60), draw.choice((3, 12, 2**20, 2**62))
        attempt(case.fresh(), [lanes(), *(draw.randrange(-1, limit) for _ in range(length))])


def test_tables_out_of_range():
    case = Case()
    tables = next(i for i, tensor in enumerate(case.memory) if tensor.dtype == torch.int32)
    for number in (-2, -(2**31), 9, 2**31 - 1):
        for place in range(case.memory[tables].numel()):
            memory = case.fresh()
            memory[tables][place] = number
            attempt(memory, case.program(case.steps[0], case.steps[8]))
        memory = case.fresh()
        memory[tables].fill_(number)
        for kind in (0, 8):
            assert not attempt(memory, case.program(case.steps[kind]))


def test_memory_of_every_kind():
    case = Case()
    program = case.program(*case.steps)
    for i in range(len(case.memory)):
        for change in (
            lambda t: t.double(),
            lambda t: t.long(),
            lambda t: t.half(),
            lambda t: t[: t.numel() // 2],
            lambda t: t[:0],
            lambda t: t.repeat_interleave(2)[::2],
            lambda t: t[:1].expand(t.numel()),
            lambda t: t.int() if t.is_floating_point() else t.float(),
        ):
            memory = case.fresh()
            memory[i] = change(memory[i])
            assert not attempt(memory, program), i
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)):
        run([tensor.to("meta") for tensor in case.memory], program)
    assert not attempt([], program) and not attempt(case.fresh()[:1], program)
    run(case.fresh(), [lanes()])


def test_integers_that_steps_would_overwrite():
    case = Case()
    memory = [torch.zeros(100_000), torch.zeros(0)]
    memory[1] = memory[0].view(torch.int32)
    with pytest.raises(ValueError, match="memory must not hold floats and integers in one place"):
        run(memory, [lanes()])
    assert case


def test_programs_of_every_kind():
    case = Case()
    numbers = torch.tensor(case.program(case.steps[0]))
    for program in (
        numbers.int(),
        numbers[None],
        numbers.repeat_interleave(2)[::2],
        numbers[:0],
        numbers.double(),
    ):
        with pytest.raises(ValueError, match="program"):
            torch.ops.pahm_ops._frozen_run(case.fresh(), program, 1)
    for threads in (0, -1, -(2**63)):
        with pytest.raises(ValueError, match="threads must be at least 1"):
            run(case.fresh(), numbers.tolist(), threads)
    run(case.fresh(), numbers.tolist(), 2**62)


def test_rows_that_overlap_are_not_written():
    case = Case()
    program = case.program(case.steps[6])
    with pytest.raises(ValueError, match="program has rows that overlap"):
        run(case.fresh(), [*program[:-1], 15])
