"""The launch contract: the interface of each phase's kernels, and the refusal of any other."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from surgeon.runtime.errors import PackageError
from surgeon.runtime.package.interface import (
    PAGED_INTERFACES,
    POINTEES,
    ROUTED_INTERFACES,
    SCRATCH,
    Interface,
    check_interface,
    interfaces_of,
)
from surgeon.runtime.package.manifest import Argument, KernelEntry, Launch

CASES = pytest.mark.parametrize(
    ("phase", "by_table", "routed", "persistent"),
    [
        (*case, routed, persistent)
        for routed in (False, True)
        for case in interfaces_of(routed)
        for persistent in ((False, True) if case[0] == "prefill" else (False,))
    ],
)


def interface_of(phase: str, by_table: bool, routed: bool = False, persistent: bool = False) -> Interface:
    interface = interfaces_of(routed)[phase, by_table]
    return interface.persistent if persistent else interface


def entry_of(phase: str, by_table: bool, routed: bool = False, persistent: bool = False) -> KernelEntry:
    interface = interface_of(phase, by_table, routed, persistent)
    return KernelEntry(
        target="cuda:90",
        dtype="bf16",
        layers=(0,),
        schedule="attention_000",
        file="kernel.cubin",
        symbol="kernel",
        arguments=interface.binary_arguments,
        launch=Launch(interface.grid, 64, 128, 0),
        preconditions=interface.preconditions,
        phase=phase,
        table="table" if by_table else "",
    )


@CASES
def test_a_kernel_that_is_built_to_its_interface(phase: str, by_table: bool, routed: bool, persistent: bool) -> None:
    check_interface(entry_of(phase, by_table, routed, persistent), "kernels[0]", [0] if routed else [1])


@CASES
def test_every_difference_is_refused_and_named(phase: str, by_table: bool, routed: bool, persistent: bool) -> None:
    entry = entry_of(phase, by_table, routed, persistent)
    for index, argument in enumerate(entry.arguments):
        others = (*entry.arguments[:index], Argument("secret", argument.type), *entry.arguments[index + 1 :])
        with pytest.raises(PackageError, match=rf"arguments\[{index}\]: expected {argument.name} {argument.type}, got"):
            check_interface(dataclasses.replace(entry, arguments=others), "kernels[0]", [0] if routed else [])


def changed(**fields: Any) -> Callable[[KernelEntry], KernelEntry]:
    return lambda entry: dataclasses.replace(entry, **fields)


@pytest.mark.parametrize(
    ("phase", "by_table", "change", "message"),
    [
        (
            "prefill",
            False,
            changed(phase="any"),
            r"phase: expected one of prefill, decode, combine, paged.*, got 'any'",
        ),
        ("decode", True, changed(table=""), r"table: expected a table for the phase decode, got ''"),
        ("combine", False, changed(table="x"), r"table: expected no table for the phase combine, got 'x'"),
        ("prefill", False, changed(arguments=()), r"arguments\[0\]: expected q pointer, got none"),
        ("prefill", False, changed(table="x"), r"arguments\[22\]: expected table_rows pointer, got 'global_scratch po"),
        ("prefill", True, changed(table=""), r"arguments\[22\]: expected global_scratch pointer, got 'table_rows po"),
        (
            "combine",
            False,
            lambda entry: dataclasses.replace(entry, arguments=(*entry.arguments, *SCRATCH)),
            r"arguments\[8\]: expected no more, got 'global_scratch pointer'",
        ),
        ("decode", True, changed(preconditions=()), r"preconditions\[0\]: expected q % 16 == 0, got none"),
        ("combine", False, changed(preconditions=("lse % 8 == 0",)), r"preconditions\[0\]: expected no more, got 'lse"),
        ("combine", False, changed(launch=None), r"launch\.grid\[0\]: expected query_heads, got none"),
        (
            "combine",
            False,
            changed(launch=Launch(("query_heads", "pages", "one"), 1, 32, 0)),
            r"launch\.grid\[1\]: expected batch, got 'pages'",
        ),
    ],
)
def test_another_interface(
    phase: str, by_table: bool, change: Callable[[KernelEntry], KernelEntry], message: str
) -> None:
    with pytest.raises(PackageError, match=rf"kernels\[3\]\.{message}.*; compile the package with this version"):
        check_interface(change(entry_of(phase, by_table)), "kernels[3]")


@CASES
def test_an_interface_agrees_with_itself(phase: str, by_table: bool, routed: bool, persistent: bool) -> None:
    interface = interface_of(phase, by_table, routed, persistent)
    kinds = {argument.name: argument.type for argument in interface.binary_arguments}
    assert len(kinds) == len(interface.binary_arguments)
    assert set(interface.aligned) <= {name for name, kind in kinds.items() if kind in ("pointer", "i64")}
    assert all(kinds.get(name, "pointer") == "pointer" for name in POINTEES)
    assert len(interface.grid) == 3
    assert ("table_rows" in kinds) == by_table
    assert ("tasks_taken" in kinds) == persistent


@pytest.mark.parametrize(
    ("entry", "routed", "message"),
    [
        (entry_of("prefill", False), [0], r"arguments\[22\]: expected partial pointer, got 'global_scratch pointer'"),
        (entry_of("prefill", False, True), [1], r"arguments\[22\]: expected global_scratch pointer, got 'partial po"),
        (entry_of("choose", True, True), [1], r"phase: expected one of prefill, decode, combine, .*, got 'choose'"),
        (
            changed(layers=(0, 1))(entry_of("decode", True)),
            [0],
            r"layers: expected all with routed heads, or none, got",
        ),
        (
            changed(phase="any")(entry_of("decode", True)),
            [0],
            r"phase: expected one of prefill, decode, combine, write",
        ),
    ],
)
def test_layers_with_routed_heads_have_interfaces_of_their_own(
    entry: KernelEntry, routed: list[int], message: str
) -> None:
    with pytest.raises(PackageError, match=message):
        check_interface(entry, "kernels[3]", routed)


def test_layers_of_both_kinds_share_what_combines_splits() -> None:
    check_interface(changed(layers=(0, 1))(entry_of("combine", False)), "kernels[3]", [0])


def test_every_pointee_is_an_argument() -> None:
    interfaces = [*ROUTED_INTERFACES.values(), *PAGED_INTERFACES.values()]
    names = {argument.name for interface in interfaces for argument in interface.persistent.arguments}
    assert set(POINTEES) <= names
