"""The counts of machine instructions: loops found in disassembled code, and tables that are what the counts say."""

import pytest

from benchmarks.gpu import sass


def code(*operations: str) -> str:
    return "\n".join(f"        /*{16 * n:04x}*/   {text} ;   /* 0x0 */" for n, text in enumerate(operations))


NESTED = code(
    "MOV R1, R2",  # 0x00
    "LDG.E R3, desc[UR4][R2.64]",  # 0x10, the outer loop
    "@!P1 BRA 0x60",  # 0x20, past the inner loop
    "LDG.E R4, desc[UR4][R2.64]",  # 0x30, the inner loop
    "FADD R4, R4, R3",  # 0x40
    "@P0 BRA 0x30",  # 0x50
    "FADD R5, R4, R3",  # 0x60
    "@P2 BRA 0x10",  # 0x70
    "EXIT",  # 0x80
    "BRA 0x90",  # 0x90, never reached
    "NOP",
)


def test_nested_loops_count_by_their_trips():
    found = sass.loops_of(NESTED)
    assert found.own == 2
    (outer,) = found.loops
    (inner,) = outer.inner
    assert (outer.start, outer.own, outer.size(), inner.start, inner.own) == (0x10, 4, 7, 0x30, 3)
    # 2 outside, 5 times 4 in the outer loop and 7 times 3 in the inner one.
    assert sass.executed(found, [(5, [(7, [])])]) == 2 + 5 * (4 + 7 * 3)


def test_an_unrolled_loop_is_known_by_its_loads():
    loads = ["LDG.E R3, desc[UR4][R2.64]"] * 4
    text = code(*loads, "FADD R5, R4, R3", "@P0 BRA 0x0", loads[0], "FADD R5, R4, R3", "@P1 BRA 0x60", "EXIT")
    found = sass.loops_of(text)
    # 11 trips are 2 of the unrolled loop and 3 of the other.
    assert sass.executed(found, [(11, [])]) == 1 + 2 * 6 + 3 * 3


def test_loops_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="1 loops where 2 were expected"):
        sass.executed(sass.loops_of(NESTED), [(5, []), (7, [])])


def test_a_loop_that_does_nothing_is_left_out():
    text = code("IADD3 R1, R1, 0x1, RZ", "@P0 BRA 0x0", "EXIT")
    assert sass.loops_of(text).loops == []


def test_what_only_diverged_warps_reach_does_not_count():
    text = code("BRA.DIV UR5, 0x30", "FADD R1, R1, R2", "EXIT", "WARPSYNC.COLLECTIVE R2", "BRA 0x10")
    assert sass.loops_of(text).size() == 3
