"""Hub ids: how they are read, and how they are found in a cache of huggingface_hub's layout, without a network."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import circuits
from circuits import hub
from circuits.cli import main
from circuits.errors import CircuitsError
from circuits.hub import HubId, model_folder, parse, replacement_folder
from circuits.replacements.errors import ReplacementError
from circuits.replacements.formats.hub_file import hub_file
from circuits.replacements.loading import load_replacement

CASE = Path(__file__).parents[1] / "data" / "golden" / "gpt2_clt"
COMMIT, OTHER = "1" * 40, "2" * 40


def cached(cache: Path, repo: str, commit: str, folder: str, source: Path, ref: str = "main") -> None:
    """Put files into the cache as huggingface_hub does: blobs, refs, and snapshots of links to blobs."""
    stored = cache / f"models--{repo.replace('/', '--')}"
    for name in ("blobs", "refs"):
        (stored / name).mkdir(parents=True, exist_ok=True)
    (stored / "refs" / ref).write_text(commit)
    for file in sorted(source.iterdir()):
        blob = stored / "blobs" / f"{commit}{folder.replace('/', '')}{file.name}"
        shutil.copy(file, blob)
        link = stored / "snapshots" / commit / folder / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a model, two revisions of a replacement, and a folder of one; the hub is offline."""
    from huggingface_hub import constants

    folder = tmp_path / "cache"
    cached(folder, "someone/tiny-model", COMMIT, "", CASE / "model")
    cached(folder, "someone/tiny-clt", COMMIT, "", CASE / "transcoders")
    cached(folder, "someone/tiny-clt", OTHER, "width/96", CASE / "transcoders", ref="v2")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/repo", HubId("owner/repo")),
        ("owner/repo@v1.0", HubId("owner/repo", "v1.0")),
        ("owner/repo@refs/pr/3:a/b", HubId("owner/repo", "refs/pr/3", "a/b")),
        ("owner/repo:layer_3/width_16k", HubId("owner/repo", None, "layer_3/width_16k")),
        ("hf://owner/repo", HubId("owner/repo")),
        ("hf://owner/re.po@main/a/b", HubId("owner/re.po", "main", "a/b")),
        ("hf://owner/repo@refs/pr/3/a", HubId("owner/repo", "refs/pr/3", "a")),
        ("hf://owner/repo/a/f.npz?revision=abc", HubId("owner/repo", "abc", "a/f.npz")),
        ("gemma", HubId("mwhanna/gemma-scope-transcoders")),
        ("llama", HubId("mntss/transcoder-Llama-3.2-1B")),
        *((path, None) for path in ("gpt2", "./a/b", "/a/b", "~/a", "../a", "a/b/c", "a/", "a b/c", "")),
    ],
)
def test_ids_are_read(text: str, expected: HubId | None) -> None:
    """Every way to write an id, and paths that are none."""
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text", ["hf://owner", "hf://", "hf://owner/repo/../../etc", "owner/repo:../x", "owner/repo:a//b"]
)
def test_ids_that_lead_nowhere_are_refused(text: str) -> None:
    """What begins like an id, or leads out of the repository."""
    with pytest.raises(CircuitsError, match=r"hub id|folder"):
        parse(text)


def test_replacements_come_from_the_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By repository, revision, commit and folder; all have the directory's identity, and a directory goes first."""
    here = load_replacement(CASE / "transcoders").identity
    for given in (
        "someone/tiny-clt",
        f"someone/tiny-clt@{COMMIT}",
        "hf://someone/tiny-clt",
        "someone/tiny-clt@v2:width/96",
        f"hf://someone/tiny-clt@{OTHER}/width/96",
        "hf://someone/tiny-clt/width/96?revision=v2",
    ):
        folder = replacement_folder(given)
        assert folder.is_relative_to(cache)
        assert load_replacement(folder).identity == here
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "tiny-clt").mkdir(parents=True)
    assert replacement_folder("someone/tiny-clt") == Path("someone/tiny-clt")
    assert replacement_folder(Path("someone/none")) == Path("someone/none")


def test_single_files_of_the_hub(cache: Path) -> None:
    """As circuit-tracer's configurations name them; what is not to be had says what to download."""
    wanted = (CASE / "transcoders" / "config.yaml").read_bytes()
    for uri in (
        "config.yaml",
        "config.yaml?revision=main",
        f"config.yaml?revision={COMMIT}",
        "width/96/config.yaml?revision=v2",
    ):
        file = hub_file(f"hf://someone/tiny-clt/{uri}")
        assert file.is_relative_to(cache)
        assert file.read_bytes() == wanted
    with pytest.raises(ReplacementError, match=r"hf download someone/tiny-clt layer_0/a.npz --revision v9"):
        hub_file("hf://someone/tiny-clt/layer_0/a.npz?revision=v9")
    for uri in ("hf://someone/tiny-clt", "https://someone/tiny-clt/a", "hf://someone/tiny-clt/../a", "hf:///a/b/c"):
        with pytest.raises(ReplacementError, match="no file of the hub"):
            hub_file(uri)


def test_model_and_replacement_by_id(cache: Path) -> None:
    """A model by revision is the model in its folder, under the name that was given."""
    named = circuits.load("someone/tiny-model@main", "someone/tiny-clt")
    local = circuits.load(CASE / "model", CASE / "transcoders")
    assert named.base.name == "someone/tiny-model@main"
    assert named.base.identity == local.base.identity
    assert [one.name for one in named.replacements] == ["someone/tiny-clt"]
    assert hub.name_of(replacement_folder("someone/tiny-clt@v2:width/96")) == "someone/tiny-clt:width/96"
    assert hub.name_of(CASE) is None
    assert torch.equal(named.base.embedding, local.base.embedding)
    assert model_folder("gpt2") == "gpt2"
    assert model_folder("someone/tiny-model") == "someone/tiny-model"


def info(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str) -> tuple[int, str]:
    """`circuits info WHAT`: the code that it ends with, and all that it says in one line."""
    monkeypatch.setattr(sys, "argv", ["circuits", "info", what])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, " ".join((captured.out + captured.err).split())


def test_info_takes_ids(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of models and of replacements; what is not in the cache ends with code 2 and with what to do."""
    assert "clt.0" in info(monkeypatch, capsys, "someone/tiny-clt")[1]
    assert "gpt2" in info(monkeypatch, capsys, "someone/tiny-model@main")[1]
    code, said = info(monkeypatch, capsys, "someone/other@v1:a/b")
    assert code == 2
    assert "Traceback" not in said
    for words in (
        "someone/other@v1:a/b",
        "HF_HUB_OFFLINE is set",
        "hf download someone/other --revision v1",
        str(cache),
    ):
        assert words in said
    code, said = info(monkeypatch, capsys, "someone/tiny-clt:nowhere")
    assert code == 2
    assert "no folder 'nowhere'" in said


def test_a_library_is_not_downloaded_for_want_of_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository of hundreds of gigabytes asks for a folder; a folder of it is fetched with that folder's files."""
    import huggingface_hub
    from huggingface_hub.file_download import DryRunFileInfo

    asked: list[dict[str, object]] = []

    def snapshot(repo: str, **options: object) -> object:
        asked.append(options)
        file = DryRunFileInfo("0" * 40, 300 * 10**9, "layer_0/params.npz", "", False, True)
        return [file] if options.get("dry_run") else "/nowhere"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(CircuitsError, match=r"300 GB; name a folder of it, such as some/library:layer_0"):
        replacement_folder("some/library")
    with pytest.raises(CircuitsError, match="no folder"):
        replacement_folder("some/library@main:layer_0")
    assert asked[-1]["revision"] == "main"
    assert "layer_0/*.npz" in asked[-1]["allow_patterns"]  # type: ignore[operator]
    assert all(str(pattern).startswith("layer_0/") for pattern in asked[-1]["allow_patterns"])  # type: ignore[attr-defined]
    assert hub.LARGEST < 300 * 10**9


def test_files_of_a_model_that_are_no_model(cache: Path, tmp_path: Path) -> None:
    """A repository without config.json is described as a replacement."""
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert hub.has_model("someone/tiny-model")
    assert not hub.has_model("someone/tiny-clt")
    assert not hub.has_model("gemma")
    assert hub.has_model("gpt2")
