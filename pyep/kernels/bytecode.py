"""What CPython has done to a kernel and must not have, taken back.

CPython copies the short end of a function into branches that would jump there (`inline_small_exit_blocks` in its flowgraph.c; since
3.12 a call is short enough).  Where that end is a `syncthreads`, threads that come from different branches meet at different
barriers, which on a GPU means never.
"""
import dis

CALLS = {"CALL"}                                # instructions that must not be copied: an op is called, and so is what calls one
RETURNS = {dis.opmap[name] for name in ("RETURN_VALUE", "RETURN_CONST") if name in dis.opmap}
JUMP, EXTENDED_ARG, NOP = (dis.opmap[name] for name in ("JUMP_FORWARD", "EXTENDED_ARG", "NOP"))


def without_copies(code):
    """A code object like `code` in which every copy of an end with a call jumps to the last one instead."""
    if sum(opcode in RETURNS for opcode in code.co_code[::2]) < 2:
        return code                                              # most functions; `dis` takes its time
    instructions = list(dis.get_instructions(code))
    ends = [k for k, i in enumerate(instructions) if i.opcode in RETURNS]
    patched = bytearray(code.co_code)
    for at, k in enumerate(ends):
        for last in reversed(ends[at + 1:]):
            n = common(instructions, k, last)
            copy = instructions[k + 1 - n:k + 1]
            if any(i.opname in CALLS for i in copy):
                start, size = copy[0].offset, copy[-1].offset + 2 - copy[0].offset
                patched[start:start + size] = jump(start, instructions[last + 1 - n].offset, size)
                break
    return code.replace(co_code=bytes(patched))


def common(instructions, k, last):
    """How many instructions up to the k-th and up to the last are of the same place in the source."""
    n = 0
    while n < last - k and n <= k and source(instructions[k - n]) == source(instructions[last - n]):
        n += 1
    return n


def source(instruction):
    return instruction.opcode, instruction.arg, instruction.positions


def jump(start, goal, size):
    """`size` bytes of instructions that jump from byte `start` forward to byte `goal`.  They count in words of two bytes."""
    words = (goal - start - 4) // 2
    return bytes((EXTENDED_ARG, words >> 8, JUMP, words & 0xFF)) + bytes((NOP, 0)) * (size // 2 - 2)
