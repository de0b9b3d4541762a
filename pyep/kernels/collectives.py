"""Collectives stand in a kernel exactly as often as in its source.

Threads that come from different branches must meet at one barrier: at two copies of it they wait for each other for ever, on a GPU.
CPython makes such copies.  A branch that would jump to the short end of a function gets the end itself (`inline_small_exit_blocks`
in its flowgraph.c), and the condition of a `while` stands before the loop and again in it.  What is copied differs between
releases, so a function that calls collectives, or functions that have some, is

* compiled anew, in a form that gives no reason to copy: see `WithoutReasonsToCopy`;
* and its calls are counted then, in the source and in the bytecode, whatever the release: see `check`.
"""
import __future__

import ast
import collections
import dis
import functools
import linecache
import platform
from types import CodeType, FunctionType

LONG = 16                                       # names that an end is made longer by; CPython copies up to 4 instructions


def code_of(fn):
    """The code of a function for Numba.  ValueError if it has collectives and its source is not there, or if it has copies."""
    names = names_of_collectives(fn)
    if not names:
        return fn.__code__
    where = f"{fn.__qualname__} ({fn.__code__.co_filename}, line {fn.__code__.co_firstlineno})"
    code, calls = compiled(fn.__code__)
    if code is None:
        raise ValueError(f"{where} calls {', '.join(sorted(names))}, and its source is not there or was changed since it was "
                         "imported: a function that calls collectives must come from a file, where its calls are counted")
    check(where, code, calls, names)
    return code


def names_of_collectives(fn):
    """The global names that a function uses for collectives, and for functions that have some."""
    values = ((name, fn.__globals__.get(name)) for name in fn.__code__.co_names)
    return {name for name, value in values
            if getattr(value, "collective", False) or isinstance(value, FunctionType) and has_collectives(value)}


@functools.cache
def has_collectives(fn):
    return len(names_of_collectives(fn)) > 0


def check(where, code, calls, names):
    """ValueError unless each of `names` is there in a code object as often as it is called in the source: `calls`, by name."""
    found = collections.Counter(i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")
    for name in sorted(names):
        if found[name] != calls[name]:
            raise ValueError(f"{where} calls {name}, which is or has a collective, {calls[name]} times in its source, but "
                             f"{found[name]} times in what Python {platform.python_version()} makes of it. Threads would wait for "
                             "each other for ever, some at one copy, some at another. Call it by its name, where it can be "
                             "reached; if that is so, move the branches around it into a function of their own")


# ---- compiling anew --------------------------------------------------------------------------------------------------

@functools.cache
def compiled(wanted):
    """(code, how often it calls what, by name) of the function of a code object, from its source; (None, None) if its file does not
    have it."""
    lines = linecache.getlines(wanted.co_filename)
    for first, last in statements("".join(lines)):
        if first <= wanted.co_firstlineno <= last:
            tree = ast.parse("\n" * (first - 1) + "".join(lines[first - 1:last]))
            if find(wanted, tree) == wanted:
                calls = calls_in(tree, wanted)
                return find(wanted, ast.fix_missing_locations(WithoutReasonsToCopy().visit(tree))), calls
    return None, None


@functools.cache
def statements(text):
    """(first line, last line) of each statement of a module."""
    return [(first_line(statement), statement.end_lineno) for statement in ast.parse(text).body]


def first_line(statement):
    """Where CPython says that a function begins: with its first decorator."""
    return min([statement.lineno, *[decorator.lineno for decorator in getattr(statement, "decorator_list", ())]])


def find(wanted, tree):
    """The code of a function in a tree, compiled: the one of the same name at the same line; None if there is none."""
    pending = [compile(tree, wanted.co_filename, "exec", wanted.co_flags & __future__.annotations.compiler_flag, True)]
    while pending:
        code = pending.pop()
        if (code.co_name, code.co_firstlineno) == (wanted.co_name, wanted.co_firstlineno):
            return code
        pending += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return None


def calls_in(tree, wanted):
    """How often the function of a code object calls what, by name."""
    function, = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == wanted.co_name
                 and first_line(node) == wanted.co_firstlineno)
    called = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    return collections.Counter(callee.id for callee in called if isinstance(callee, ast.Name))


class WithoutReasonsToCopy(ast.NodeTransformer):
    """Makes all ends of functions long, by names that LLVM drops again, and gives no `while` a condition with a call."""

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.body.append(self.longer(node.body[-1]))
        return node

    def visit_Return(self, node):
        return [self.longer(node), node]

    def visit_While(self, node):
        """`while condition: body` becomes `while True: if not condition: break; body`."""
        self.generic_visit(node)
        if not node.orelse and any(isinstance(part, ast.Call) for part in ast.walk(node.test)):
            leave = ast.If(ast.UnaryOp(ast.Not(), node.test), [ast.Break()], [])
            node.body.insert(0, ast.copy_location(leave, node.test))
            node.test = ast.copy_location(ast.Constant(True), node.test)
        return node

    @staticmethod
    def longer(place):
        names = [ast.Name(f"_longer_{k}", ast.Store()) for k in range(LONG)]
        return ast.copy_location(ast.Assign(names, ast.Constant(0)), place)
