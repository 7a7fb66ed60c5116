"""What the documents show is what happens: tables by the scripts that printed them, recipes by running them."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import range_server
from small_models import read_model, same, triple
from torch import nn

import ires_kernels as ik
from ires_kernels.bench import scale
from ires_kernels.cli import main
from ires_kernels.command_line import parser

ROOT = Path(__file__).parent.parent


def test_the_table_of_roundings(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(f"{ROOT / 'examples/rounding.py'}")
    printed = capsys.readouterr().out
    assert printed in (ROOT / "docs/merging.md").read_text()


def test_all_names(capsys: pytest.CaptureFixture[str]) -> None:
    """Where this fails: python docs/api.py > docs/api.md"""
    runpy.run_path(f"{ROOT / 'docs/api.py'}", run_name="__main__")
    assert capsys.readouterr().out == (ROOT / "docs/api.md").read_text()


def test_the_report_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the models that it names, all but how long it took, and where lines were folded."""
    block = re.search(
        r"^```console\n\$ ires (.*?)\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert block
    shutil.copytree(ROOT / "examples/continual/family", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(block[1])) == 0
    printed, shown = (re.sub(r"(?m)^time .*", "", text).split() for text in (capsys.readouterr().out, block[2]))
    assert printed == shown


def recipes() -> dict[str, str]:
    """The shell blocks of the cookbook by their headings."""
    text = (ROOT / "docs/cookbook.md").read_text()
    return dict(re.findall(r"^## (.+?)\n.*?^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The bucket `models` of a store."""
    for needed in ("obstore", "flask_cors", "moto.server"):
        pytest.importorskip(needed)
    import s3_server

    with s3_server.serving() as bucket:
        for key, value in bucket.environment().items():
            monkeypatch.setenv(key, value)
        yield


def module_of(folder: Path) -> nn.Module:
    """What a loader makes of a model: a module whose parameters have the names of its tensors."""
    root = nn.Module()
    for name, tensor in read_model(folder).items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    return root.eval()


@pytest.mark.parametrize("title", recipes())
def test_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, title: str
) -> None:
    """Recipes begin in a folder that has the models that they name."""
    triple(tmp_path)
    monkeypatch.chdir(tmp_path)
    if "s3://" in recipes()[title]:
        request.getfixturevalue("bucket")
    section = (ROOT / "docs/cookbook.md").read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    for text in re.findall(r"^```yaml\n(.*?)^```", section, re.DOTALL | re.MULTILINE):
        Path("recipe.yml").write_text(text)
    for line in recipes()[title].replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["ires"]:
            assert main(words[1:]) == 0, line
    for text in re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE):
        assert_undone(text, module_of(Path("target")))


def assert_undone(text: str, model: nn.Module) -> None:
    """A recipe in Python that scores a model as it is with each of three alphas leaves it as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[float] = []

    def score(model: nn.Module) -> float:
        seen.append(sum(float(tensor.double().norm()) for tensor in model.state_dict().values()))
        return seen[-1]

    exec(text, {"ik": ik, "model": model, "score": score})
    assert len({*seen}) == len(seen) == 3
    assert all(same(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_files_of_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)
    target.rename(tmp_path / "served")
    ik.extract(base, instruct, tmp_path / "RESIDUAL")
    monkeypatch.chdir(tmp_path)
    block = re.search(r"^```sh\n(.*?)^```", (ROOT / "docs/serving.md").read_text(), re.DOTALL | re.MULTILINE)
    assert block
    copy, *commands = (shlex.split(line, comments=True) for line in block[1].splitlines())
    assert (copy[0], *copy[-2:]) == ("cp", "served/", "next/")
    shutil.copytree("served", "next")
    assert [words[1] for words in commands] == ["apply", "verify"]
    for words in commands:
        assert main(words[1:]) == 0


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_recipes_of_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/merging.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    triple(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("recipe.yml").write_text(blocks[number])
    assert main(["merge", "recipe.yml", "-o", "out", "--quiet"]) == 0
    assert main(["verify", "out", "--quiet"]) == 0


def test_links() -> None:
    """What a document points to is there, its heading too."""
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md"), *ROOT.glob("examples/*/*.md")):
        for path, _, heading in re.findall(r"\]\((?!\w+:)([^)#\s]*)(#([^)\s]*))?\)", page.read_text()):
            target = page.parent / path if path else page
            assert target.exists(), (page.name, path)
            if heading:
                headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
                assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}, (
                    page.name,
                    heading,
                )


def blocks_of(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def commands_of(text: str) -> list[list[str]]:
    """What is given to ires in a block, whatever stands before it."""
    lines = (shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines())
    return [words[words.index("ires") + 1 :] for words in lines if "ires" in words]


def test_what_is_shown_can_be_asked() -> None:
    """Every command has a command line that is understood, and every name of ours is there."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md")]
    shown = 0
    for page in pages:
        name = f"{page.relative_to(ROOT)}"
        for block in blocks_of(name, "sh"):
            for words in commands_of(block.replace(" · ", "\n")):
                parser.parse(words)
                shown += 1
        assert [each for each in re.findall(r"\bik\.(\w+)", page.read_text()) if not hasattr(ik, each)] == []
    assert shown > 50


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders that the recipes for several machines name; the shared disk is this one."""
    base, instruct, target = triple(tmp_path)
    target.rename(tmp_path / "cpt-base")
    ik.extract(base, instruct, tmp_path / "residual")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def here(words: list[str]) -> list[str]:
    return [word.removeprefix("/shared/") for word in words]


@pytest.mark.usefixtures("cluster")
def test_the_ranks() -> None:
    apply, status, finish = commands_of(blocks_of("docs/scale.md", "sh")[0])
    world = int(apply[-1])
    for rank in range(world):
        words = ["--rank", f"{rank}"]
        at = apply.index("--rank")
        assert main([*apply[:at], *words, *apply[at + 2 :]]) == 0
    assert main(status) == 0
    assert main(finish) == 0
    assert main(["verify", "merged", "--quiet"]) == 0


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("launcher", ["torchrun", "array", "step"])
def test_what_launchers_start(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    number = ["torchrun", "array", "step"].index(launcher)
    words = here(commands_of(blocks_of("docs/scale.md", "sh")[1])[number])
    for rank in range(2):
        variables = {
            "torchrun": {"RANK": rank, "WORLD_SIZE": 2},
            "array": {
                "SLURM_ARRAY_TASK_ID": rank,
                "SLURM_ARRAY_TASK_MIN": 0,
                "SLURM_ARRAY_TASK_MAX": 1,
                "SLURM_ARRAY_TASK_COUNT": 2,
            },
            "step": {"SLURM_PROCID": rank, "SLURM_NTASKS": 2},
        }[launcher]
        for name, value in variables.items():
            monkeypatch.setenv(name, f"{value}")
        assert main(words) == 0
    assert main(["verify", "merged", "--quiet"]) == 0


@pytest.mark.usefixtures("cluster")
def test_the_job_of_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    yaml = pytest.importorskip("yaml")
    (text,) = blocks_of("docs/scale.md", "yaml")
    job = yaml.safe_load(text)["spec"]
    (container,) = job["template"]["spec"]["containers"]
    words = here(container["command"])
    assert words[0] == "ires"
    assert int(words[words.index("--world") + 1]) == job["completions"] == job["parallelism"]
    assert job["completionMode"] == "Indexed"
    for index in range(job["completions"]):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", f"{index}")
        assert main(words[1:]) == 0
    assert main(["verify", "merged", "--quiet"]) == 0


def test_a_model_elsewhere(cluster: Path) -> None:
    pytest.importorskip("obstore")
    block = next(each for each in blocks_of("docs/scale.md", "sh") if "https://" in each)
    with range_server.serving() as files:
        for role in ("instruct", "base"):
            files.add(cluster / role, f"/{role}")
        for words in commands_of(block):
            assert main([word.replace("https://models.example", files.address) for word in words]) == 0
        assert main(["verify", "merged", "--quiet"]) == 0


def test_the_tables_of_scale() -> None:
    """What the documents predict is what the formula says."""
    text = (ROOT / "docs/scale.md").read_text()
    for cluster in scale.TABLES.values():
        assert scale.table(cluster) in text
