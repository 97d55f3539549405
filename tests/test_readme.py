"""What the documentation tells users to type. (Its Python is run as doctests.)"""

import doctest
import re
import subprocess
from pathlib import Path

import pytest
from cli_helpers import NO_SYSTEM_METRICS, QUIET, check_command

from lit_sigsoftmax.cli import main

CHECKOUT = Path(__file__).resolve().parents[1]
README = (CHECKOUT / "README.md").read_text()
PAGES = [CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^(lit-sigsoftmax .+)$|`(lit-sigsoftmax [^`]+)`", re.M)


def commands(page):
    found = [line or inline for line, inline in COMMAND.findall(page.read_text())]
    return [command for command in found if "..." not in command]


COMMANDS = [(page.name, command) for page in PAGES for command in commands(page)]


def test_ci_finds_the_two_commands():
    function = next(line for line in (CHECKOUT / ".ci" / "run").read_text().splitlines() if line.startswith("readme()"))
    script = f'{function}\nfor i in 1 2 3; do echo "[$(readme $i)]"; done'
    done = subprocess.run(["bash", "-c", script], cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=True)
    train, test, none = (line[1:-1] for line in done.stdout.splitlines())
    setup = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e "
    assert re.fullmatch(
        re.escape(setup + ". && .venv/bin/lit-sigsoftmax compare --config python_docs/lstm.yaml ") + ".*", train
    )
    assert test == setup + '".[test]" && .venv/bin/pytest -q'
    assert none == ""
    section = re.search(r"^## Two commands\n(.*?)^## ", README, re.M | re.S)[1]
    assert re.findall(r"^```\n(.*?)^```\n", section, re.M | re.S) == [f"{train}\n", f"{test}\n"]


def test_the_first_command_compares(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"&& \.venv/bin/(lit-sigsoftmax compare .*)", README)
    configs = check_command(command, monkeypatch, capsys)
    layers = {(c["model"]["init_args"]["activation"], c["model"]["init_args"]["n_experts"]) for c in configs}
    assert layers == {(activation, k) for activation in ("softmax", "sigsoftmax") for k in (1, 4)}


def test_there_are_commands_of_every_kind():
    kinds = {command.split()[1] for _, command in COMMANDS}
    assert kinds == {"fit", "test", "compare", "report", "ui"}
    assert len(commands(CHECKOUT / "README.md")) >= 7


@pytest.fixture
def my_model(tmp_path, monkeypatch):
    """The working directory with the README's own classes in ``my_model.py``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_model", raising=False)
    examples = [example.source for example in doctest.DocTestParser().get_examples(README)]
    wanted = [source for source in examples if source.startswith(("from ", "import ", "class "))]
    Path("my_model.py").write_text("\n".join(wanted))
    return tmp_path


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command[15:55]}" for page, command in COMMANDS])
def test_a_command_of_the_documentation_is_right(page, command, my_model, monkeypatch, capsys):
    check_command(command, monkeypatch, capsys)


@pytest.mark.parametrize("command", [c for c in commands(CHECKOUT / "README.md") if "my_model" in c])
def test_the_readmes_own_classes_train(command, my_model, capsys):
    words = [*command.split()[1:], "--data.max_tokens=5000", "--trainer.fast_dev_run=true", NO_SYSTEM_METRICS, *QUIET]
    main(words)
    assert "test/perplexity" in capsys.readouterr().out


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not re.match(r"\w+:", link) and not (page.parent / link).exists():
                broken.append(f"{page.name}: {link}")
    assert broken == []
