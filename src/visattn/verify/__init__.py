"""Proof on the user's machine: our blocks against the recorded results of published code."""

from visattn.verify.cases import SHIPPED, Case, load_case, load_cases
from visattn.verify.check import Result, check_case

__all__ = ["SHIPPED", "Case", "Result", "check_case", "load_case", "load_cases"]
