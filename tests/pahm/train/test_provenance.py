"""What checkpoints say of the code and the machine that made them."""

import subprocess

from pahm.model import read_metadata, shipped_checkpoint
from pahm.model.checkpoint import read_provenance
from pahm.train.provenance import _revision


def test_the_shipped_checkpoint_says_what_made_it_and_not_where():
    made = read_provenance(shipped_checkpoint())
    assert made["torch"] and not any("/" in (value or "") for value in made.values())
    assert read_metadata(shipped_checkpoint())[0].model.backbone_weights is None


def test_the_revision_is_that_of_the_packages_own_checkout(tmp_path):
    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "pahm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert _revision(package) is None
    git("init", "--quiet")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "--quiet", "-m", "another project")
    assert _revision(package) is None, "installed inside another project's checkout"
    git("add", "pahm")
    git("commit", "--quiet", "-m", "ours")
    assert _revision(package) == git("rev-parse", "HEAD")
    (tmp_path / "notes").write_text("not tracked")
    assert _revision(package) == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("import os")
    assert _revision(package) == git("rev-parse", "HEAD") + "+dirty"
