"""Image files: which files are images, where they lie in a folder; and many read at once."""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from avit_lib.errors import UserError

Image.init()
COMMON = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM")  # tried first
# Of what Pillow opens, the pictures by their media types: no PostScript, no films, no measurements.
# In an order of our own: Pillow's depends on what was imported before.
_OTHERS = {kind for kind in Image.OPEN if Image.MIME.get(kind, "").startswith("image/")} - {*COMMON}
FORMATS = (*(kind for kind in COMMON if kind in Image.OPEN), *sorted(_OTHERS))
ENDINGS = {ending for ending, kind in Image.EXTENSION.items() if kind in {*FORMATS, "MPO"}}
# What systems and programs put beside images, with images of their own in it.
HIDDEN = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")
SHOWN = 5


class Unreadable(UserError):
    """Files that cannot be read as images: "path (reason)" of each is an argument.

    The message shows the first few.
    """

    def __str__(self) -> str:
        what = "1 file" if len(self.args) == 1 else f"{len(self.args)} files"
        return f"{what} cannot be read as images: {name_some(self.args)}; mend or remove them"


def name_some(names: Sequence[str]) -> str:
    """The first few names, printable even if they are not UTF-8, and how many there are besides."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]).encode(errors="backslashreplace").decode() + more


def tell(message: str) -> None:
    """Print one line on stderr."""
    print(message, file=sys.stderr, flush=True)


def find_images(
    folder: Path, wanted: Callable[[str], bool] = bool, leave_out: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """The names below ``folder``, with slashes, of image files (sorted) and of folders.

    What is hidden, no image by its name, or not ``wanted`` by it, is told in one line on stderr;
    folders and files in ``leave_out`` are passed over without a word. Links are followed, but every
    file and folder counts once, by its own name if it has one here, and what holds ``folder`` never
    does. Raises UserError for a folder that cannot be read.
    """
    root = os.path.realpath(folder)
    seen = {str(parent) for parent in Path(root).parents}
    waiting, links = [("", root)] if os.path.isdir(root) else [], deque()
    images, folders, others, hidden = [], [], [], []
    while waiting or links:  # links last: what they lead to may have a name of its own
        name, place = waiting.pop() if waiting else links.popleft()
        if place in seen:
            others.append(name)
        elif os.path.isdir(place):
            folders.append(name)
            for entry in _list_folder(place):
                inner = f"{name}/{entry.name}".lstrip("/")
                if entry.name in leave_out:
                    continue
                if entry.name.startswith(".") or entry.name in HIDDEN:
                    hidden.append(inner)
                    continue
                if entry.is_symlink():
                    links.append((inner, os.path.realpath(entry)))
                else:
                    waiting.append((inner, entry.path))
        else:
            known = os.path.splitext(name)[1].lower() in ENDINGS and not _is_special(place)
            (images if known and wanted(name) else others).append(name)
        seen.add(place)
    left_out = sorted(others) + sorted(hidden)
    if left_out:
        why = "no image by its name, in no folder of a class, a link to what is there, or hidden"
        tell(f"{len(left_out)} left out of {folder} ({why}): {name_some(left_out)}")
    # By class, then folder, then file, as torchvision has it.
    images.sort(key=lambda name: (name.partition("/")[0], *name.rpartition("/")))
    return images, folders


def _is_special(place: str) -> bool:
    """Whether it is there, and no file: a named pipe, say, which nobody may ever fill."""
    return os.path.exists(place) and not os.path.isfile(place)


def _list_folder(folder: str) -> list[os.DirEntry]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        mend = "allow reading it, or remove it"
        raise UserError(f"{folder} cannot be read ({error.strerror}); {mend}") from None


def read_all(read: Callable[[Any], Any], items: Iterable[Any], verb: str) -> list[Any]:
    """What ``read`` makes of each item, in threads; raises Unreadable with the faults of all
    items.
    """

    def attempt(item: Any) -> tuple[Any, tuple[str, ...]]:
        try:
            return read(item), ()
        except Unreadable as error:
            return None, error.args

    items = list(items)
    with ThreadPool(worker_count()) as threads:  # Pillow lets other threads run while it decodes
        tasks = threads.imap(attempt, items, chunksize=16)
        results = list(tqdm(tasks, desc=verb, total=len(items), unit="image", disable=None))
    faults = [fault for _, found in results for fault in found]
    if faults:
        raise Unreadable(*faults)
    return [made for made, _ in results]


def worker_count() -> int:
    """Processes that decode images: the processors, shared among those that torchrun started."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
