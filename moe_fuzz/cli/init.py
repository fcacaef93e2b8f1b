"""`moe-fuzz init workflow`: a gate for somebody's CI, as a file to read, change and commit."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import click
import jinja2

from moe_fuzz._version import __version__
from moe_fuzz.campaign.gate.plan import PROFILES
from moe_fuzz.errors import EnvironmentProblem, UsageError
from moe_fuzz.ops import OPS
from moe_fuzz.targets import registry

NIGHTLY = "deep"  # the profile of a scheduled run
_FOLDER = Path(__file__).parent / "ci"
_NOT_PLAIN = re.compile(r"""["'$`\\\n]|\s#|:\s""")


@dataclass(frozen=True)
class _Kind:
    template: str
    output: str  # where the file goes, from the root of the repository
    sign: str  # a file or folder that shows that a repository uses it
    runner: str  # what its machines are called where nobody says


KINDS = {
    "github": _Kind("github.yml.j2", ".github/workflows/moe-fuzz.yml", ".github", "[self-hosted, gpu]"),
    "buildkite": _Kind("buildkite.yml.j2", ".buildkite/moe-fuzz.yml", ".buildkite", "gpu"),
    "gitlab": _Kind("gitlab.yml.j2", ".gitlab/moe-fuzz.yml", ".gitlab-ci.yml", "gpu"),
    "jenkins": _Kind("jenkins.groovy.j2", "moe-fuzz.Jenkinsfile", "Jenkinsfile", "gpu"),
}


@click.group(short_help="Write a workflow for your CI.")
def command() -> None:
    """Write files to start from."""


@command.command(short_help="A gate for pull requests.")
@click.argument("kind", required=False, type=click.Choice(tuple(KINDS)))
@click.option("--target", "targets", multiple=True, metavar="TARGET", help="May be given several times. [default: all]")
@click.option("--profile", type=click.Choice(tuple(PROFILES)), default="quick", show_default=True)
@click.option("--runner", metavar="LABEL", help="What the machines with the GPU are called in your CI.")
@click.option("--install", "requirement", metavar="REQUIREMENT", default=f"moe-fuzz=={__version__}", show_default=True,
              help="What pip installs: a release, a git URL, a path.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="- prints it. [default: the CI's own]")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def workflow(
    kind: str | None, targets: tuple[str, ...], profile: str, runner: str | None, requirement: str,
    output: Path | None, force: bool,
) -> None:  # fmt: skip
    """Write a gate for pull requests in the language of KIND; without it, of the CI that this repository uses."""
    for target in targets:
        if ":" not in target:  # a file of the repository need not be here yet
            registry.resolve(target)
        elif "@" not in target:  # of several targets each has its own op
            raise UsageError(f"which op does {target} implement?", f"write OP@{target}, with one of {', '.join(OPS)}")
    if _NOT_PLAIN.search(requirement):  # it goes through a shell inside of YAML or Groovy
        raise UsageError(f"--install {requirement!r} has quotes, $, a backslash, ' #' or ': ' in it",
                         "write a plain requirement, and change the file by hand")  # fmt: skip
    chosen = KINDS[kind or used_here(Path.cwd())]
    text = render(chosen, targets, profile, runner, requirement)
    path = output or Path(chosen.output)
    if str(path) == "-":
        click.echo(text, nl=False)
        return
    if path.exists() and not force:
        raise UsageError(f"{path} is there already", "--force replaces it, --output writes elsewhere")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(f"{path} cannot be written: {error.strerror}", "--output writes elsewhere") from error
    click.echo(f"{path}: read it, say how your project is built, and commit it")


def used_here(folder: Path) -> str:
    """The kind of CI that a repository uses. UsageError where that cannot be told."""
    found = [name for name, kind in KINDS.items() if (folder / kind.sign).exists()]
    if len(found) != 1:
        what = f"this repository uses {' and '.join(found)}" if found else "which CI this repository uses is not known"
        raise UsageError(what, f"say which is meant: {', '.join(KINDS)}")
    return found[0]


def render(kind: _Kind, targets: tuple[str, ...], profile: str, runner: str | None, requirement: str) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), undefined=jinja2.StrictUndefined, autoescape=False,
        variable_start_string="[[", variable_end_string="]]", keep_trailing_newline=True,
    )  # fmt: skip
    text = environment.get_template(kind.template).render(
        targets=" ".join(map(shlex.quote, targets)), profile=profile, runner=runner or kind.runner,
        minutes=_minutes(profile), nightly=NIGHTLY, nightly_minutes=_minutes(NIGHTLY), requirement=requirement,
    )  # fmt: skip
    return text.replace("gate  --", "gate --")  # where no target is named


def _minutes(profile: str) -> int:
    """A limit for the job that a gate of this profile keeps."""
    return round(PROFILES[profile].seconds / 60) + 18  # to check out, install, and start workers
