"""Laws of images: buckets, frames, and every way in which a file can hold, or fail to hold, a picture."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from diffusers_softrepa.training.data.image import (
    BrokenExample,
    Framing,
    content_id,
    decode,
    fetch,
    image_size,
    render,
)

RAMP = np.arange(20 * 30 * 3, dtype=np.float64).reshape(20, 30, 3) / (20 * 30 * 3) * 255


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(height=20, width=30):
    return Image.fromarray(RAMP.astype(np.uint8)).resize((width, height))


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("resolution", [256, 512, 1024, 628])
@pytest.mark.parametrize("multiple_of", [16, 64])
def test_buckets_have_about_equal_area_and_sides_that_are_multiples(resolution, multiple_of):
    framing = Framing(resolution, aspect_buckets=True, multiple_of=multiple_of)
    for height, width in framing.sizes:
        assert height % multiple_of == width % multiple_of == 0
        assert max(height, width) <= 2 * min(height, width)
        assert abs(height * width - resolution**2) <= multiple_of * min(height, width)
        assert (width, height) in framing.sizes
    assert len(set(framing.sizes)) == len(framing.sizes) > 1


def test_the_bucket_of_an_image_is_the_one_of_nearest_aspect():
    framing = Framing(512, aspect_buckets=True)
    assert framing.sizes[0] == (384, 704)
    assert framing.sizes_of((3000, 3000)) == framing.sizes_of((30, 30)) == ((512, 512),)
    assert framing.sizes_of((300, 900)) == ((384, 704),)
    assert framing.sizes_of((900, 300)) == ((704, 384),)


def test_without_buckets_there_is_one_size_as_given():
    assert Framing(48, multiple_of=16).sizes == ((48, 48),)
    assert Framing(72, multiple_of=16).sizes_of((10, 99)) == ((72, 72),)
    assert Framing(72, multiple_of=16, further_resolutions=(48,)).sizes_of((10, 99)) == ((72, 72), (48, 48))


def test_settings_hold_the_seed_only_where_something_is_drawn():
    assert Framing(512).settings(1) == Framing(512).settings(2)
    assert Framing(512, random_crop=True).settings(1) != Framing(512, random_crop=True).settings(2)
    assert Framing(512).settings(1) != Framing(256).settings(1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resolution": 0}, "resolutions must be at least 64 pixels, .* but got 0; give a multiple of 64"),
        ({"multiple_of": 1024}, "resolutions must be at least 1024 pixels, .* but got 512"),
        ({"further_resolutions": (32,)}, "resolutions must be at least 64 pixels, .* but got 32"),
    ],
)
def test_framings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Framing(**fields)


@pytest.mark.parametrize("original", [(20, 30), (301, 97), (64, 64), (7, 500), (333, 1000), (1, 1)])
@pytest.mark.parametrize("size", [(32, 48), (24, 24), (96, 7)])
@pytest.mark.parametrize("crop_at", [0.0, 0.3, 0.999, 1 - 2**-53])
def test_a_crop_lies_inside_the_image_and_keeps_its_aspect(original, size, crop_at, monkeypatch):
    boxes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda *args, **given: boxes.append(given["box"]) or resize(*args, **given)
    )
    assert render(Image.new("RGB", original[::-1]), size, crop_at=crop_at).shape == (3, *size)
    ((left, top, right, bottom),) = boxes
    assert left >= 0 <= top and right <= original[1] + 1e-9 and bottom <= original[0] + 1e-9
    assert math.isclose((right - left) / (bottom - top), size[1] / size[0], rel_tol=1e-9)
    assert math.isclose(right - left, original[1]) or math.isclose(bottom - top, original[0])


def test_a_frame_of_the_size_of_the_image_changes_nothing():
    pixels = render(photo(), (20, 30))
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 20, 30)
    assert_close(pixels, torch.from_numpy(np.array(photo())).permute(2, 0, 1) / 127.5 - 1)


def test_pixels_fill_the_range_from_minus_one_to_one():
    assert (render(Image.new("RGB", (4, 4), "white"), (8, 8)) == 1).all()
    assert (render(Image.new("RGB", (4, 4), "black"), (8, 8)) == -1).all()


def test_a_flip_mirrors_the_part_that_is_kept():
    plain, flipped = (render(photo(), (20, 20), crop_at=0.2, flip=flip) for flip in (False, True))
    assert_close(flipped, plain.flip(-1))
    assert_close(plain, render(photo(), (20, 30))[:, :, 2:22])


def test_a_crop_is_in_the_centre_where_no_other_place_is_given():
    assert_close(render(photo(), (20, 20)), render(photo(), (20, 30))[:, :, 5:25])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_images_are_turned_upright_and_their_header_says_the_same_size(kind, orientation):
    image = Image.new("RGB", (32, 16), "red")
    image.paste("blue", (16, 0, 32, 16))
    data = encoded(image, kind, exif=exif(orientation))
    upright = decode(data)
    turned = {1: image, 3: image.rotate(180), 6: image.rotate(-90, expand=True), 8: image.rotate(90, expand=True)}
    assert upright.size == turned[orientation].size
    assert image_size(data) == (upright.height, upright.width)
    difference = np.abs(np.asarray(upright, int) - np.asarray(turned[orientation], int))
    assert difference.mean() < 20  # JPEG blurs the edge


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("L", (4, 4), 100), (100, 100, 100)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("LA", (4, 4), (40, 255)), (40, 40, 40)),
        (Image.new("RGB", (4, 4), (9, 8, 7)).quantize(2), (9, 8, 7)),
        (Image.fromarray(np.full((4, 4), 100 * 257, dtype=np.uint16)), (100, 100, 100)),
        (Image.fromarray(np.full((4, 4), 200 * 257, dtype=np.int32)), (200, 200, 200)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_becomes_rgb(image, colour):
    assert decode(image).mode == "RGB" and decode(image).getpixel((1, 1)) == colour
    stored = decode(encoded(image, "TIFF" if image.mode in ("CMYK", "I") else "PNG"))
    assert stored.getpixel((1, 1)) == colour


def test_a_transparent_palette_colour_is_white():
    image = Image.new("P", (4, 4), 3)
    image.putpalette([10] * 768)
    assert decode(encoded(image, transparency=3)).getpixel((0, 0)) == (255, 255, 255)


def test_the_first_picture_of_an_animation_counts():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("store", ["path", "text", "bytes", "dict", "dict of a path", "url", "pil", "array", "tensor"])
def test_however_an_image_is_stored_its_pixels_are_the_same(store, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(photo()))
    image = {
        "path": tmp_path / "a.png",
        "text": str(tmp_path / "a.png"),
        "bytes": encoded(photo()),
        "dict": {"bytes": encoded(photo()), "path": "a.png"},
        "dict of a path": {"bytes": None, "path": str(tmp_path / "a.png")},
        "url": (tmp_path / "a.png").as_uri(),
        "pil": photo(),
        "array": np.array(photo()),
        "tensor": torch.from_numpy(np.array(photo())).permute(2, 0, 1) / 255,
    }[store]
    assert decode(fetch(image)).tobytes() == photo().tobytes()
    assert image_size(image) == (20, 30)
    alike = fetch(tmp_path / "a.png") if isinstance(fetch(image), bytes) else photo()
    assert content_id(fetch(image)) == content_id(alike)
    assert 0 <= content_id(fetch(image)) < 2**63


def test_different_images_have_different_ids():
    black, palette = Image.new("L", (4, 6)), Image.new("P", (4, 6))
    palette.putpalette([200] * 768)
    other = palette.copy()
    other.putpalette([100] * 768)
    assert len({content_id(image) for image in (black, Image.new("L", (6, 4)), palette, other)}) == 4


def test_a_users_own_image_stays_open(tmp_path):
    photo().save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image_size(image) == (20, 30)
        assert decode(image).tobytes() == decode(image).tobytes() == photo().tobytes()


JPEG = encoded(photo(200, 300), "JPEG")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (JPEG[: len(JPEG) // 2], "cannot be decoded: image file is truncated"),
        (b"no image at all", "cannot be decoded: cannot identify"),
        (encoded(photo())[:40], "cannot be decoded"),
        (b"", "there is no image"),
        (None, "there is no image"),
        ({"bytes": None, "path": None}, "there is no image"),
        ("/nowhere/a.jpg", "cannot be read"),
        (OSError("bad sector"), "the data set cannot read it: bad sector"),
        (Image.fromarray(np.zeros((3, 3), dtype=np.float32)), "it holds floats"),
        (np.zeros((3, 3, 3)), "arrays must be uint8"),
        (np.zeros((3, 20, 20), dtype=np.uint8), r"arrays must be uint8 and \(h, w\) .* but it is uint8 \(3, 20, 20\)"),
        (np.zeros((1, 20, 20, 3), dtype=np.uint8), "arrays must be uint8"),
        (np.zeros((0, 3, 3), dtype=np.uint8), "arrays must be uint8"),
        (torch.full((3, 2, 2), 7.0), r"floats must be in \[0, 1\]"),
    ],
)
def test_what_holds_no_picture_is_a_broken_example(image, message):
    with pytest.raises(BrokenExample, match=message):
        decode(fetch(image))


def test_an_opened_image_whose_file_is_cut_off_is_a_broken_example():
    for use in (content_id, decode):
        with pytest.raises(BrokenExample, match="cannot be decoded: image file is truncated"):
            use(Image.open(io.BytesIO(JPEG[: len(JPEG) // 2])))


def test_an_image_of_size_zero_is_broken():
    with pytest.raises(BrokenExample, match="its size is 3 x 0"):
        decode(Image.new("RGB", (0, 3)))


def test_a_broken_header_is_a_broken_example(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    for image in (tmp_path / "a.png", b"nothing"):
        with pytest.raises(BrokenExample, match="its header cannot be read"):
            image_size(image)


def test_what_is_no_image_at_all_is_a_type_error():
    with pytest.raises(TypeError, match="images must be bytes, paths, PIL images, arrays or tensors"):
        fetch(3)


def png_with(metadata: str) -> bytes:
    """Returns a PNG of a tall picture that is stored lying, with its orientation where `metadata` says."""
    import struct
    import zlib

    from PIL import PngImagePlugin

    stored = Image.new("RGB", (24, 10), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = exif.tobytes().removeprefix(b"Exif\0\0")
    texts = PngImagePlugin.PngInfo()
    if metadata == "XMP":
        texts.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    if metadata == "profile":
        digits = (b"Exif\0\0" + raw).hex()
        texts.add_text("Raw profile type exif", f"\nexif\n{len(digits) // 2:8d}\n{digits}\n", zip=True)
    file = io.BytesIO()
    stored.save(file, "PNG", pnginfo=texts, **({"exif": exif} if metadata == "eXIf" else {}))
    data = file.getvalue()
    if metadata == "eXIf behind the pixels":
        chunk = struct.pack(">I", len(raw)) + b"eXIf" + raw + struct.pack(">I", zlib.crc32(b"eXIf" + raw))
        end = data.rindex(b"IEND") - 4
        data = data[:end] + chunk + data[end:]
    return data


@pytest.mark.parametrize("metadata", ["eXIf", "eXIf behind the pixels", "XMP", "profile", "none"])
def test_header_and_pixels_of_a_png_have_one_idea_of_upright(metadata: str, tmp_path):
    data = png_with(metadata)
    (tmp_path / "a.png").write_bytes(data)
    expected = (10, 24) if metadata == "none" else (24, 10)
    opened = Image.open(io.BytesIO(data))
    assert image_size(data) == image_size(tmp_path / "a.png") == image_size(opened) == expected
    assert (decode(data).height, decode(data).width) == (decode(opened).height, decode(opened).width) == expected


def test_the_size_of_a_png_is_read_without_decoding_it(monkeypatch):
    def load(_self):
        raise AssertionError("decoded")

    data = png_with("XMP")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    assert image_size(data) == (24, 10)
