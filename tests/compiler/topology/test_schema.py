"""The JSON Schema for editors: it judges a document's structure as the reader does."""

import importlib.resources
import json
from typing import Any

import pytest
from hypothesis import given
from jsonschema import Draft202012Validator

import strategies
import topologies
from topology_faults import FAULTS, Fault

SCHEMA = json.loads(
    importlib.resources.files("surgeon.compiler.topology").joinpath("topology.schema.json").read_text("utf-8")
)
validator = Draft202012Validator(SCHEMA)


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def test_the_example_passes() -> None:
    validator.validate(topologies.example())


@given(strategies.documents())
def test_every_valid_document_passes(document: dict[str, Any]) -> None:
    validator.validate(document)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.structural], ids=str)
def test_a_structural_fault_fails(fault: Fault) -> None:
    assert not validator.is_valid(fault.document())


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if not fault.structural], ids=str)
def test_a_fault_of_meaning_is_left_to_the_reader(fault: Fault) -> None:
    assert validator.is_valid(fault.document()), "the schema sees it: call it structural"


def test_every_property_of_a_tree_head_and_root_has_a_description() -> None:
    parts = {"root": SCHEMA} | {
        name: SCHEMA["$defs"][name] for name in ("linkage", "paths", "sparse_head", "window_head")
    }
    for part in parts.values():
        for name, schema in part["properties"].items():
            if "$ref" in schema:
                schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
            assert schema.get("description"), name
