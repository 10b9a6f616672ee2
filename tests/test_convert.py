"""The authors' files become ours number by number, and nothing in them is ever run."""

import ast
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import diffusers_softrepa
from diffusers_softrepa.checkpoint import load_checkpoint, save_checkpoint
from diffusers_softrepa.convert import convert_reference, main, read_reference

PUBLISHED = os.environ.get("SOFTREPA_PUBLISHED_SD3", "")
needs_published = pytest.mark.skipif(
    not PUBLISHED, reason="SOFTREPA_PUBLISHED_SD3 does not name the folder of the authors' SD3 files"
)


def write_reference(folder: Path, tokens: Tensor, table: Tensor | None = None) -> Path:
    """Writes the authors' layout: a Parameter and a whole Embedding, both tagged as saved from the second GPU."""
    folder.mkdir(exist_ok=True)
    with mock.patch.object(torch.serialization, "location_tag", lambda storage: "cuda:1"):
        torch.save(nn.Parameter(tokens), folder / "dc_tokens.pth")
        if table is not None:
            torch.save(nn.Embedding.from_pretrained(table, freeze=False), folder / "dc_t_tokens.pth")
    return folder


def stored_numbers(path: Path) -> Tensor:
    """Reads the one storage of a `torch.save` archive as raw little-endian float32, without torch's reader."""
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data/0")]
        return torch.frombuffer(bytearray(archive.read(name)), dtype=torch.float32)


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    return write_reference(tmp_path / "authors", torch.randn(5, 4, 24), torch.randn(100, 5 * 24))


@pytest.fixture(params=["stand-in", pytest.param("published", marks=needs_published)])
def sd3_folder(request: pytest.FixtureRequest, stand_in: Path) -> Path:
    return stand_in if request.param == "stand-in" else Path(PUBLISHED)


def test_every_number_of_the_files_arrives_in_its_place(sd3_folder: Path):
    config, tensors = convert_reference(*read_reference(sd3_folder), family="sd3")
    layers, tokens, width = 5, 4, config.token_dim
    expected = {
        "tokens": stored_numbers(sd3_folder / "dc_tokens.pth").reshape(layers, tokens, width),
        "timestep_tokens": stored_numbers(sd3_folder / "dc_t_tokens.pth").reshape(100, layers, width),
    }
    assert config.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0)
    assert all(tensor.isfinite().all() and not tensor.requires_grad for tensor in tensors.values())


@needs_published
def test_the_published_sd3_adapter_has_the_papers_size():
    tokens, table = read_reference(PUBLISHED)
    assert table is not None
    assert (tuple(tokens.shape), tuple(table.shape)) == ((5, 4, 1536), (100, 7680))
    config, _ = convert_reference(tokens, table, family="sd3", base_model="stabilityai/some-sd3")
    assert config.num_parameters == 798_720
    assert config.base_model_name_or_path == "stabilityai/some-sd3"


def test_converting_back_into_the_authors_layout_is_the_inverse(stand_in: Path, tmp_path: Path):
    _, first = convert_reference(*read_reference(stand_in), family="sd3")
    back = write_reference(tmp_path / "back", first["tokens"], first["timestep_tokens"].flatten(1))
    _, second = convert_reference(*read_reference(back), family="sd3")
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_the_stand_in_is_tagged_as_the_authors_files_are(stand_in: Path):
    with zipfile.ZipFile(stand_in / "dc_t_tokens.pth") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        content = archive.read(name)
    assert b"cuda:1" in content
    assert b"torch.nn.modules.sparse\nEmbedding" in content


def test_four_identical_sd15_tokens_convert_as_they_are(tmp_path: Path):
    """All four published SD1.5 tokens are equal to the last bit, and stay so."""
    row = torch.randn(768)
    tokens, table = read_reference(write_reference(tmp_path / "sd15", row.repeat(4, 1), torch.randn(100, 768)))
    config, tensors = convert_reference(tokens, table, family="unet")
    assert (config.stages, config.num_parameters) == (["down"], 79_872)
    torch.testing.assert_close(tensors["tokens"], row.expand(1, 4, 768), rtol=0, atol=0)


def test_sdxl_has_two_stages_and_no_bins(tmp_path: Path):
    tokens, table = read_reference(write_reference(tmp_path / "sdxl", torch.randn(4, 2048)))
    config, tensors = convert_reference(tokens, table, family="unet")
    assert (config.stages, config.num_timestep_bins, config.num_parameters) == (["down", "mid"], None, 8_192)
    assert list(tensors) == ["tokens"]


def test_half_precision_files_become_float32(tmp_path: Path):
    folder = write_reference(tmp_path / "half", torch.randn(2, 4, 24).half(), torch.randn(10, 48).bfloat16())
    _, tensors = convert_reference(*read_reference(folder), family="sd3")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_converted_tokens_load_into_a_denoiser(tmp_path: Path):
    denoiser = UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=768,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    tokens, table = torch.randn(4, 768), torch.randn(100, 768)
    config, tensors = convert_reference(tokens, table, family="unet")
    save_checkpoint(tmp_path, config, tensors)
    diffusers_softrepa.load_softrepa(denoiser, tmp_path)
    loaded = diffusers_softrepa.softrepa_parameters(denoiser)
    torch.testing.assert_close(loaded["tokens"].data, tokens[None], rtol=0, atol=0)
    torch.testing.assert_close(loaded["timestep_tokens"].data, table[:, None], rtol=0, atol=0)


# What the files may not be.


class Malicious:
    """A pickle that makes a file when somebody runs it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f'echo > "{self.mark}"',)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path):
    mark = tmp_path / "mark"
    path = tmp_path / "dc_tokens.pth"
    torch.save(Malicious(mark), path)
    with pytest.raises(ValueError, match=r"contains only tensors, but .*dc_tokens.pth refers to (posix|nt)\.system"):
        read_reference(tmp_path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the file does what it threatens
    assert mark.exists()


def test_code_hidden_inside_an_embedding_is_refused_and_not_run(stand_in: Path, tmp_path: Path):
    mark = tmp_path / "mark"
    table = nn.Embedding(4, 4)
    table.extra = Malicious(mark)
    torch.save(table, stand_in / "dc_t_tokens.pth")
    with pytest.raises(ValueError, match=r"dc_t_tokens.pth refers to (posix|nt)\.system"):
        read_reference(stand_in)
    assert not mark.exists()


def test_a_bare_malicious_pickle_stream_is_refused_and_not_run(tmp_path: Path):
    mark = tmp_path / "mark"
    (tmp_path / "dc_tokens.pth").write_bytes(pickle.dumps(Malicious(mark), protocol=2))
    with pytest.raises(ValueError, match="refers to"):
        read_reference(tmp_path)
    assert not mark.exists()


def test_not_even_torchs_embedding_is_built(stand_in: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nn.Embedding, "__setstate__", mock.Mock(side_effect=AssertionError), raising=False)
    _, table = read_reference(stand_in)
    assert table is not None and table.shape == (100, 120)


def test_reading_leaves_no_class_allowed_behind(stand_in: Path):
    before = set(torch.serialization.get_safe_globals())
    read_reference(stand_in)
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("content", [b"", b"hello world", None], ids=["empty", "text", "half of a file"])
def test_a_damaged_file_is_named(stand_in: Path, content: bytes | None):
    path = stand_in / "dc_tokens.pth"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=r"dc_tokens.pth is not a complete file"):
        read_reference(stand_in)


@pytest.mark.parametrize(
    "held",
    [{"tokens": torch.zeros(2)}, [1.0], torch.zeros(1).expand(10**6), torch.zeros(2, 4, 8).to_sparse()],
    ids=["dict", "list", "one number repeated by strides", "sparse"],
)
def test_anything_but_one_dense_tensor_is_refused(tmp_path: Path, held: object):
    torch.save(held, tmp_path / "dc_tokens.pth")
    with pytest.raises(ValueError, match="must hold one dense Parameter or Embedding, but holds"):
        read_reference(tmp_path)


def test_a_missing_folder_or_file_is_named(tmp_path: Path):
    with pytest.raises(OSError, match="there is no folder"):
        read_reference(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"there is no dc_tokens.pth in"):
        read_reference(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "table", "settings", "message"),
    [
        (torch.zeros(4, 24), None, {"family": "sd3"}, r"'sd3' are floating point of shape \(L, K, D\)"),
        (torch.zeros(5, 4, 768), None, {"family": "unet"}, r"'unet' are floating point of shape \(K, D\)"),
        (torch.zeros(2, 4, 24).long(), None, {"family": "sd3"}, r"these are torch.int64"),
        (torch.zeros(2, 4, 24), torch.zeros(100, 47), {"family": "sd3"}, r"L\*D = 2\*24 = 48 numbers.*\(100, 47\)"),
        (torch.zeros(2, 4, 24), torch.zeros(100, 2, 24), {"family": "sd3"}, r"L\*D = 2\*24 = 48 numbers"),
        (torch.zeros(2, 4, 24), torch.zeros(0, 48), {"family": "sd3"}, "num_timestep_bins must be"),
        (torch.zeros(2, 4, 24), None, {"family": "sd3", "stages": ["down"]}, "numbered layers, not stages"),
        (torch.zeros(4, 1024), None, {"family": "unet"}, r"are \[768, 2048\] wide, these 1024"),
        (torch.zeros(4, 768), None, {"family": "unet", "stages": ["left"]}, "stages must name some of"),
        (torch.zeros(4, 768), None, {"family": "flux"}, "families 'sd3' and 'unet', but family is 'flux'"),
        (torch.full((2, 4, 24), torch.nan), None, {"family": "sd3"}, "must be finite, but holds 192 NaN"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(
    tokens: Tensor, table: Tensor | None, settings: dict[str, object], message: str
):
    with pytest.raises(ValueError, match=message):
        convert_reference(tokens, table, **settings)  # type: ignore[arg-type]


# The command line.


def test_the_command_line_writes_an_adapter_that_loads(stand_in: Path, tmp_path: Path, capsys):
    output = tmp_path / "ours"
    main([str(stand_in), str(output), "--family", "sd3", "--base-model", "some/sd3"])
    assert "12,480 parameters written to" in capsys.readouterr().out
    config, tensors = load_checkpoint(output)
    expected = convert_reference(*read_reference(stand_in), family="sd3", base_model="some/sd3")
    assert config == expected[0]
    torch.testing.assert_close(tensors, expected[1], rtol=0, atol=0)


def test_the_command_line_takes_stages_and_says_when_there_are_no_bins(tmp_path: Path, capsys):
    source = write_reference(tmp_path / "source", torch.randn(4, 768))
    main([str(source), str(tmp_path / "ours"), "--family", "unet", "--stages", "down", "mid"])
    assert "the adapter has no timestep bins" in capsys.readouterr().out
    config, _ = load_checkpoint(tmp_path / "ours")
    assert (config.stages, config.num_timestep_bins) == (["down", "mid"], None)


def test_the_command_line_answers_a_mistake_with_one_sentence(tmp_path: Path):
    command = [sys.executable, "-m", "diffusers_softrepa.convert", str(tmp_path), str(tmp_path / "ours")]
    done = subprocess.run([*command, "--family", "sd3"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: there is no dc_tokens.pth in" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ours").exists()


def test_no_other_room_but_the_command_imports_convert():
    package = Path(diffusers_softrepa.__file__).parent
    for path in set(package.rglob("*.py")) - {package / "commands" / "convert.py"}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not any("convert" in name.split(".") for name in names), f"{path} imports convert"
