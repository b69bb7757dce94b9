"""Opening images and converting them to RGB: the same for training, evaluation and prediction."""

import io

import numpy as np
from PIL import Image

# Image formats that are read, whatever the member's name. Not PostScript: Pillow runs another program for it
FORMATS = ("JPEG", "PNG", "WEBP", "MPO", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


def open_image(raw: bytes) -> Image.Image:
    """Open, without decoding it, an image of one of FORMATS."""
    Image.init()
    return Image.open(io.BytesIO(raw), formats=[name for name in FORMATS if name in Image.OPEN])


def to_rgb(image: Image.Image) -> Image.Image:
    """The RGB image that a transform gets, in training and evaluation, from a PIL image of any mode.

    Of 16-bit grey the upper 8 bits are kept, where `image.convert("RGB")` makes nearly all of it white. A lazily opened
    file is decoded here, which may raise nearly anything if it is broken.
    """
    if is_deep(image):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    return image.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether an image has 16-bit grey values (which Pillow may hold in 32 bits)."""
    return image.mode.startswith("I")
