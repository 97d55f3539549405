"""Every YAML file under recipes/ is found, documented, complete, and runs."""

import configparser
import re
from importlib.resources import files
from pathlib import Path

import pytest
from cli_helpers import NO_SYSTEM_METRICS, QUIET, check_command, printed_config, write_text_corpus

from lit_sigsoftmax.cli import main
from lit_sigsoftmax.recipes.penn_treebank import PennTreebank
from lit_sigsoftmax.recipes.wikitext2 import WikiText2

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGED = Path(str(files("lit_sigsoftmax.recipes")))
RECIPES = sorted(path.relative_to(PACKAGED).as_posix() for path in PACKAGED.rglob("*.yaml"))
SHORT = (
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=2",
    "--trainer.limit_test_batches=2",
    "--trainer.log_every_n_steps=1",
    NO_SYSTEM_METRICS,
    *QUIET,
)
PUBLISHED = {"penn_treebank": PennTreebank, "wikitext2": WikiText2}


def test_every_file_is_in_the_readmes_table_and_in_the_package():
    rows = re.findall(r"^\| \[`([^`]+)`\]\(recipes/([^)]+)\)", (CHECKOUT / "README.md").read_text(), re.M)
    assert [name for name, _ in rows] == [link for _, link in rows]
    assert len(RECIPES) >= 5
    assert sorted(name for name, _ in rows) == RECIPES
    here = CHECKOUT / "recipes"
    assert sorted(path.relative_to(here).as_posix() for path in here.rglob("*.yaml")) == RECIPES
    setup = configparser.ConfigParser()
    setup.read(CHECKOUT / "setup.cfg")
    packages = set(setup["options"]["packages"].split())
    assert {f"lit_sigsoftmax.recipes.{Path(name).parent.as_posix()}" for name in RECIPES} <= packages


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The folder of a small text under the published corpus's file names, where the machine has no corpus."""
    monkeypatch.delenv("LIT_SIGSOFTMAX_DATA", raising=False)

    def write(recipe):
        published = PUBLISHED.get(recipe.split("/")[0])
        if published is None:
            return []
        names = {split: published.file_name.format(split=split) for split in ("train", "valid", "test")}
        return [f"--data.root={write_text_corpus(tmp_path / 'corpus', n_lines=300, **names)}"]

    return write


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.filterwarnings("ignore:.*(many workers|ModelCheckpoint|not the published corpus)")
def test_a_recipe_runs(recipe, stand_in, store, recwarn):
    root = stand_in(recipe)
    main(["fit", "--config", recipe, *root, *SHORT])
    run = store.run()
    assert run.info.status == "FINISHED"
    assert run.data.tags["dataset"] == recipe.split("/")[0]
    assert {"val/best_perplexity", "test/perplexity", "train/tokens_per_second"} <= set(run.data.metrics)
    assert store.steps(run, "train/loss") == [0, 1]
    types = int(run.data.params["corpus.types"])
    for name in ("val/perplexity", "test/perplexity"):
        assert 1 < run.data.metrics[name] < 2 * types
    warned = [str(warning.message) for warning in recwarn if "is not the published corpus" in str(warning.message)]
    assert len(warned) == (1 if root else 0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_printed_configuration_gives_itself(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, text = printed_config(capsys, "fit", "--config", recipe, "--model.activation=sigsoftmax")
    assert first["model"]["init_args"]["activation"] == "sigsoftmax"
    assert first["data"]["class_path"].startswith("lit_sigsoftmax.recipes.")
    Path("printed.yaml").write_text(text)
    assert printed_config(capsys, "fit", "--config", "printed.yaml")[0] == first


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_begins_with_its_own_command(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = (PACKAGED / recipe).read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    commands = re.findall(r"lit-sigsoftmax (?:fit|compare) .*", "\n".join(head))
    assert len(head) > 2
    assert commands
    assert all(f"--config {recipe}" in command for command in commands)
    for command in commands:
        for config in check_command(command, monkeypatch, capsys):
            assert config["trainer"]["max_epochs"] >= 1
    for options in re.findall(r":   (--.*)", "\n".join(head)):
        check_command(f"lit-sigsoftmax fit --config {recipe} {options}", monkeypatch, capsys)
