"""A folder of images and clips that a browser may fetch, named by their content."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import imageio_ffmpeg
from PIL import Image, ImageSequence
from torch import Tensor

from t2i_align.data.media import ImageError, decode, frames_of, is_clip, save_clip
from t2i_align.data.schema import Media
from t2i_align.errors import UserError
from t2i_align.inference.generate import Sample, save_image
from t2i_align.utils.files import WRITING

VIDEOS = (".mp4", ".webm")
SHOWN_CLIPS = (*VIDEOS, ".apng", ".gif", ".webp")  # which browsers play


class MediaFolder:
    """Images as PNG and clips as they are, each once.

    A name is a hash of the content, so that it does not give away where a sample comes from.

    Args:
        limit: so many files are kept, the newest (None: all).

    Raises:
        UserError: a link in it, through which a browser could be given any file.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self.path, self.limit = path.absolute(), limit
        self.path.mkdir(parents=True, exist_ok=True)
        if links := [file.name for file in self.path.iterdir() if file.is_symlink()]:
            raise UserError(f"{self.path / links[0]}: is a link; what a browser may fetch must be files")

    def add(self, media: Media | Sample, fps: float = 16) -> str:
        """Copy an image or clip into the folder, if it is not there yet; returns its name.

        Images are decoded to their last pixel and written anew, so that nothing but pixels is passed on.

        Raises:
            ImageError: it cannot be decoded, or no browser plays it.
        """
        with tempfile.TemporaryDirectory(prefix=WRITING, dir=self.path) as folder:
            if isinstance(media, Tensor):
                file = Path(folder) / "clip.mp4"
                save_clip(media, file, fps)
            elif isinstance(media, Path) and (is_clip(media) or _moves(media)):
                if media.suffix.lower() not in SHOWN_CLIPS:
                    raise ImageError(f"a clip that browsers do not play; expected {', '.join(SHOWN_CLIPS)}")
                file = Path(folder) / f"clip{media.suffix.lower()}"
                shutil.copyfile(media, file)
                for _ in frames_of(file):  # to its end
                    pass
            else:
                file = Path(folder) / "image.png"
                save_image(media if isinstance(media, Image.Image) else decode(media), file)
            name = hashlib.sha256(file.read_bytes()).hexdigest()[:24] + file.suffix
            os.replace(file, self.path / name)
        if self.limit:
            files = [entry for entry in self.path.iterdir() if entry.is_file()]
            for old in sorted(files, key=lambda entry: -entry.stat().st_mtime_ns)[self.limit :]:
                old.unlink(missing_ok=True)
        return name

    def seconds(self, name: str) -> float:
        """How long a clip is."""
        if name.endswith(VIDEOS):
            return float(imageio_ffmpeg.count_frames_and_secs(self.path / name)[1])
        total = 0.0
        with Image.open(self.path / name) as image:
            for frame in ImageSequence.Iterator(image):
                frame.load()  # before which a WebP has no duration
                total += frame.info.get("duration", 0)
        return total / 1000

    def check(self, name: str) -> str:
        """The name, if it is that of a file here. Raises UserError for anything else, such as a path."""
        if Path(name).name != name or not (self.path / name).is_file():
            raise UserError(f"{name!r} is no file of {self.path}")
        return name


def is_shown_clip(name: str) -> bool:
    """Whether a name in a folder is a clip's; images are all PNG."""
    return not name.endswith(".png")


def _moves(file: Path) -> bool:
    """Whether an image file is an animation."""
    try:
        with Image.open(file) as image:
            return bool(getattr(image, "is_animated", False)) and image.format in ("GIF", "WEBP", "PNG")
    except (OSError, ValueError, Image.DecompressionBombError):  # decoding it gives the reason
        return False
