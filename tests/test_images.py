"""Images: whatever a file holds, boxes mean its displayed pixels, and what cannot be read whole is named."""

import base64
import io
import os
import random
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import conversation
from conversation import load_image
from crop_tool import CropContract, shown_image_size

ROOT = Path(__file__).parent.parent


def encoded_image(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sources(image, tmp_path, kind="PNG", **options):
    """The image as PIL, path and data URI."""
    raw = encoded_image(image, kind, **options)
    path = tmp_path / f"image.{kind.lower()}"
    path.write_bytes(raw)
    uri = f"data:image/{kind.lower()};base64,{base64.b64encode(raw).decode()}"
    return {"PIL": Image.open(io.BytesIO(raw)), "path": path, "data URI": uri}


@pytest.mark.parametrize("size", [(101, 67), (13, 29), (30, 1000)])
def test_every_source_keeps_the_original_pixels_in_which_boxes_are_given(tmp_path, size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    for name, source in sources(Image.fromarray(pixels), tmp_path).items():
        image = load_image(source)
        assert (image.mode, image.size) == ("RGB", size), name
        assert np.array_equal(np.asarray(image), pixels), name


@pytest.mark.parametrize("source", ["PIL", "path", "data URI"])
def test_a_photograph_taken_on_its_side_is_upright(tmp_path, source):
    image = Image.new("RGB", (60, 40))
    image.paste((255, 0, 0), (0, 0, 60, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter: the upper half goes to the right
    upright = load_image(sources(image, tmp_path, "JPEG", quality=100, subsampling=0, exif=exif)[source])
    assert upright.size == (40, 60)
    assert upright.getpixel((30, 30))[0] > 250 and upright.getpixel((10, 30))[0] < 5


@pytest.mark.parametrize("source", ["PIL", "path", "data URI"])
def test_what_is_transparent_is_white(tmp_path, source):
    image = Image.new("RGBA", (40, 30), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (0, 0, 20, 30))
    shown = load_image(sources(image, tmp_path)[source])
    assert (shown.getpixel((5, 5)), shown.getpixel((30, 5))) == ((255, 255, 255), (255, 0, 0))


def coloured(mode):
    """A picture of that mode: left half red (or dark grey), right half white."""
    image = Image.new("RGB", (40, 30), "white")
    image.paste((255, 0, 0), (0, 0, 20, 30))
    return image.convert(mode)


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("P", "PNG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG")])
@pytest.mark.parametrize("source", ["PIL", "path", "data URI"])
def test_other_colour_modes_become_rgb(tmp_path, mode, kind, source):
    image = load_image(sources(coloured(mode), tmp_path, kind)[source])
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image).astype(int)[:, [5, 35]] - [[255, 0, 0], [255, 255, 255]])
    assert difference.max() < 12


def test_a_palette_with_a_transparent_entry_is_over_white(tmp_path):
    image = coloured("RGB").quantize(2)
    index = image.getpixel((5, 5))
    for source in ("PIL", "path"):
        shown = load_image(sources(image, tmp_path, "PNG", transparency=index)[source])
        assert (shown.getpixel((5, 5)), image.mode) == ((255, 255, 255), "P")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_grey_of_16_bits_is_scaled_and_not_clipped_to_white(tmp_path, kind, order):
    values = np.linspace(0, 65535, 60 * 40).reshape(40, 60)
    image = Image.fromarray(values.astype(np.uint16))
    if kind == "TIFF" and order == ">u2":
        image = Image.frombytes("I;16B", (60, 40), values.astype(">u2").tobytes())
    for source in ("PIL", "path", "data URI"):
        grey = np.asarray(load_image(sources(image, tmp_path, kind)[source]))
        assert np.abs(grey - values[:, :, None] / 257).max() <= 1


@pytest.mark.parametrize("source", ["data:image/png;base64,AAAA", "http://127.0.0.1:9/none.png"])
def test_a_url_or_data_uri_that_gives_no_image_is_named(source):
    with pytest.raises(ValueError, match="unreadable image " + re.escape(source[:40])):
        load_image(source)


def test_an_image_behind_a_url_is_read_within_bounds(serve, monkeypatch):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    content = encoded_image(picture)

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(10_000))

    def trickling(handler):
        handler.send_response(200)
        handler.end_headers()
        for byte in content:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.01)

    pages = {
        "/picture.png": lambda handler: handler.send(content),
        "/moved.png": lambda handler: handler.send(b"", 302, Location="/picture.png"),
        "/none.png": lambda handler: handler.send(b"", 404),
        "/page.html": lambda handler: handler.send(b"<p>sign in</p>"),
        "/endless.png": endless,
        "/trickle.png": trickling,
        "/silent.png": lambda handler: time.sleep(3),
    }
    host = serve(lambda handler, _: pages[handler.path](handler)).url.removesuffix("/v1")
    for name in ("picture", "moved"):
        assert np.array_equal(np.asarray(load_image(f"{host}/{name}.png")), np.asarray(picture))
    monkeypatch.setattr(conversation, "URL_BYTES", 1_000_000)
    monkeypatch.setattr(conversation, "URL_TIMEOUT", 0.3)
    faults = {"none.png": "404", "page.html": "cannot identify", "endless.png": "more than 1,000,000 bytes"}
    monkeypatch.setattr(conversation, "URL_SECONDS", 1)
    faults["trickle.png"] = "not complete after 1 s"
    for name, reason in {**faults, "silent.png": "timed out"}.items():
        with pytest.raises(ValueError, match=f"unreadable image {host}/{name}: .*{reason}"):
            load_image(f"{host}/{name}")


# ------------------------------------------------------------------------------------------ unusual files


def png(size, depth, colour, rows):
    """A PNG by its chunks, for what Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def test_colours_and_alpha_of_16_bits_are_scaled_as_well(tmp_path):
    values = np.linspace(0, 65535, 40).astype(">u2")
    rgb = np.zeros((30, 40, 3), ">u2")
    rgb[..., 0] = values
    (tmp_path / "rgb.png").write_bytes(png((40, 30), 16, 2, b"".join(b"\0" + row.tobytes() for row in rgb)))
    shown = np.asarray(load_image(tmp_path / "rgb.png"))
    assert np.abs(shown[..., 0] - values / 257).max() <= 1 and not shown[..., 1:].any()
    Image.fromarray(np.tile(values.astype(np.uint16), (30, 1))).save(tmp_path / "grey.png", transparency=0)
    grey = np.asarray(load_image(tmp_path / "grey.png"))[..., 0]
    assert grey[0, 0] == 255 and np.abs(grey[:, 1:] - values[1:] / 257).max() <= 1


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_of_32_bits_are_refused_and_not_clipped(tmp_path, kind):
    Image.fromarray(np.full((30, 40), 70000, kind)).save(tmp_path / "wide.tif")
    with pytest.raises(ValueError, match=r"unreadable image .*wide\.tif: its values have 32 bits"):
        load_image(tmp_path / "wide.tif")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_picture_is_seen(tmp_path, kind):
    first, second = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "moving", kind, save_all=True, append_images=[second])
    with Image.open(tmp_path / "moving") as image:
        assert image.n_frames == 2
    shown = load_image(tmp_path / "moving")
    assert shown.size == (40, 30) and np.abs(np.asarray(shown).astype(int) - [255, 0, 0]).max() < 4


@pytest.mark.parametrize("size", [(1, 1), (1, 150), (150, 1), (2, 400)])
def test_strips_of_a_pixel_are_shown_whole_up_to_200_times_as_long_as_wide(tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "strip.png")
    image = load_image(tmp_path / "strip.png")
    assert image.size == size
    width, height = shown_image_size(*size, CropContract())
    assert width % 28 == height % 28 == 0 and width * height <= CropContract().max_pixels
    with pytest.raises(ValueError, match="its aspect ratio is over 200"):
        shown_image_size(1, 201, CropContract())


BOMB = """
import base64, resource, sys
import conversation
from conversation import load_image
load_image(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
encoded = base64.b64encode(open(sys.argv[2], "rb").read()).decode()
for source in (sys.argv[2], "data:image/png;base64," + encoded):
    try:
        load_image(source)
    except ValueError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    side = 30_000
    (tmp_path / "bomb.png").write_bytes(png((side, side), 1, 0, (b"\0" * (side // 8 + 1)) * side))
    Image.new("RGB", (40, 30)).save(tmp_path / "sound.png")
    assert (tmp_path / "bomb.png").stat().st_size < 200_000
    command = [sys.executable, "-c", BOMB, str(tmp_path / "sound.png"), str(tmp_path / "bomb.png")]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert re.fullmatch(r"unreadable image .*bomb\.png: Image size \(900000000 pixels\) exceeds limit.*", lines[0])
    assert lines[1].endswith("DecompressionBombError")
    assert int(lines[2]) < 20, "MiB; decoded it would be 860, and 2,600 as RGB"


def test_a_program_in_place_of_a_picture_is_not_run(tmp_path, monkeypatch):
    interpreter = tmp_path / "gs"
    interpreter.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    interpreter.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    Image.new("RGB", (40, 30)).save(tmp_path / "picture.eps")
    with pytest.raises(ValueError, match=r"unreadable image .*picture\.eps"):
        load_image(tmp_path / "picture.eps")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_file_or_may_not_be_read_is_named_and_nothing_waits(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in ("pipe.jpg", "/dev/zero"):
        with pytest.raises(ValueError, match=rf"unreadable image .*{path}: it is no file"):
            load_image(tmp_path / path)
    for path in ("a\0b.jpg", "x" * 5000):
        with pytest.raises(ValueError, match=r"null character|unreadable image"):
            load_image(path, tmp_path)
    Image.new("RGB", (40, 30)).save(tmp_path / "secret.png")
    (tmp_path / "secret.png").chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        with pytest.raises(ValueError, match=r"unreadable image .*Permission denied"):
            load_image(tmp_path / "secret.png")
    finally:
        os.seteuid(user)


def broken(kind, count, seed):
    """`count` pictures of a kind with a few bytes changed, or their end cut off."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a note"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    whole = encoded_image(Image.fromarray(pixels), kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
    dice = random.Random(seed)
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(dice.choice((1, 2, 8))):
            data[dice.randrange(min(len(data), dice.choice((60, 200, 10**6))))] = dice.randrange(256)
        yield bytes(data[: dice.randrange(len(data))] if dice.random() < 0.2 else data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_broken_bytes_give_a_picture_or_a_named_fault_and_no_other_error(tmp_path, kind):
    refused = 0
    for data in broken(kind, 250, seed=1):
        (tmp_path / "image").write_bytes(data)
        try:
            assert load_image(tmp_path / "image").mode == "RGB"
        except ValueError as error:
            assert str(error).startswith("unreadable image")
            refused += 1
    assert 0 < refused <= 250


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", [0, 26])
def test_a_broken_note_of_the_camera_is_a_named_fault(tmp_path, value):
    """Pillow writes the notes anew when it turns a picture upright; these two end in struct.error and TypeError."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a note"
    data = bytearray(encoded_image(Image.new("RGB", (40, 30)), "JPEG", exif=exif))
    data[data.find(b"Exif") + 17] = value
    (tmp_path / "image.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=r"unreadable image .*image\.jpg: "):
        load_image(tmp_path / "image.jpg")
