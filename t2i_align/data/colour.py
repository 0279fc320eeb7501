"""Colours of images as screens show them."""

from __future__ import annotations

import io

from PIL import Image, ImageCms


def to_srgb(image: Image.Image) -> Image.Image:
    """The image in the colours of sRGB, where its profile is another; one that does not fit the image is ignored."""
    if not (content := image.info.get("icc_profile")):
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return image
        mode = "RGBA" if image.has_transparency_data else "RGB"
        if image.mode == "P" or image.has_transparency_data:
            image = image.convert(mode)
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode=mode) or image
    except (ImageCms.PyCMSError, OSError):
        return image
