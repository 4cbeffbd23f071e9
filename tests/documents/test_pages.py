"""README is short and in order, links lead somewhere, and the pages know every option and no other."""

from __future__ import annotations

import argparse
import importlib
import re

import pytest
from pages import JOBS, PAGES, README, ROOT, anchors

import hf_to_megatron
import megatron_to_hf
from weights_conversion import demo

verify = importlib.import_module("weights_conversion.verify")  # the package has a function of this name

OPTIONS = ROOT / "docs" / "options.md"
# Options of other programs that the pages name.
FOREIGN = {
    "--cpus-per-task", "--signal", "--nodes", "--ntasks", "--ntasks-per-node", "--mem", "--mem-per-cpu", "--time",
    "--job-name", "--output", "--kill-on-bad-exit", "--nproc-per-node", "--nnodes", "--node-rank", "--master-addr",
    "--dependency", "--master-port", "--rdzv-conf", "--load", "--save", "--rope-scaling-factor", "--window-size",
    "--rotary-seq-len-interpolation-factor", "--shape", "--folder", "--settings", "--update", "--layers", "--only",
}  # fmt: skip


def shown(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a command in their documented spelling."""
    names: set[str] = set()
    for action in parser._actions:
        names |= set(action.option_strings)
    return {name for name in names if name.startswith("--")} - {"--help", "--version"}


def test_readme_is_short_and_in_order() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 120
    titles = re.findall(r"^## (\w+)", text, re.M)
    order = ["Install", "Import", "Train", "Export", "Verify", "Cluster", "Supported", "Links"]
    assert [title for title in titles if title in order] == order
    start = text.split("## 70B from start to end\n```bash\n")[1].split("```")[0]
    assert len(start.splitlines()) <= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_options_are_those_of_the_commands() -> None:
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", OPTIONS.read_text(), re.M | re.S))

    def listed(title: str) -> set[str]:
        rows = re.findall(r"^\| (`--.*?) \|", sections[title], re.M)
        return {name for row in rows for name in re.findall(r"--[\w-]+", row)}

    both = listed("Both")
    into, out = shown(hf_to_megatron.build_parser()), shown(megatron_to_hf.build_parser())
    of_each = listed("hf_to_megatron.py MODEL") & listed("megatron_to_hf.py")  # of the same name, not the same meaning
    assert into & out - of_each == both, "section Both of docs/options.md"
    assert into == both | listed("hf_to_megatron.py MODEL")
    assert out == both | listed("megatron_to_hf.py")
    assert shown(verify.build_parser()) == listed("verify.py SOURCE CHECKPOINT")
    assert shown(demo.build_parser()) == listed("python -m weights_conversion.demo")


def test_no_page_names_another_option() -> None:
    parsers = [module.build_parser() for module in (hf_to_megatron, megatron_to_hf, verify, demo)]
    known = {name for parser in parsers for action in parser._actions for name in action.option_strings}
    known |= {"--" + name[2:].replace(*dashes) for name in known for dashes in (("-", "_"), ("_", "-"))}
    for page in [*PAGES, *JOBS]:
        if page.name == "reliability.md":  # it names those of the robustness suite too
            continue
        named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", page.read_text()))
        assert named <= known | FOREIGN, f"{page.name}: {named - known - FOREIGN}"


@pytest.mark.parametrize("module", [hf_to_megatron, megatron_to_hf, verify], ids=lambda module: module.__name__)
def test_help_says_what_each_option_is(module) -> None:
    for action in module.build_parser()._actions:
        assert action.help, action.option_strings
