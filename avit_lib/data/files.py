"""Image files: which files are images, where they lie in a folder; and many read at once."""

import os
import sys
from collections import deque
from collections.abc import Callable, Collection, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from avit_lib.errors import UserError, name_some

Image.init()
# What cameras, browsers and editors write. Of the rest Pillow reads some wrongly, without a word.
KNOWN = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM")
FORMATS = [kind for kind in KNOWN if kind in Image.OPEN]
ENDINGS = tuple(name for name, kind in Image.EXTENSION.items() if kind in (*FORMATS, "MPO"))
# What systems and programs put beside images, with images of their own in it.
HIDDEN = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")


class Unreadable(UserError):
    """Files that cannot be read as images: "path (reason)" of each is an argument.

    The message shows the first few.
    """

    def __str__(self) -> str:
        told = f"cannot be read as images: {name_some(self.args)}; mend or remove them"
        # What a DataLoader's worker hands on is a whole traceback, which ends in this line.
        return told[told.rindex("cannot be read as images") :].partition("\n")[0]


def tell(message: str) -> None:
    """Print one line on stderr, even if a name in it has several."""
    print(*message.split(), file=sys.stderr)


def find_images(
    folder: Path, depth: int = 0, leave_out: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """The names below ``folder``, with slashes, of image files (sorted) and of folders.

    What is hidden, no image by its name, or less than ``depth`` folders down is told in one line on
    stderr; what has a name in ``leave_out`` is passed over without a word. Links are followed, but
    every file and folder counts once, by its own name if it has one here, and what holds ``folder``
    never does. Raises OSError, which names it, for a folder that cannot be read.
    """
    root = os.path.realpath(folder)
    seen = {str(parent) for parent in Path(root).parents}
    waiting = deque([("", root)] if os.path.isdir(root) else [])
    images, folders, left_out = [], [], []
    while waiting:
        name, place = waiting.popleft()
        own = name.rpartition("/")[2]
        if place in seen or own.startswith(".") or own in HIDDEN:
            left_out.append(name)
        elif os.path.isdir(place):
            folders.append(name)
            for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
                inner = f"{name}/{entry.name}".lstrip("/")
                if entry.name in leave_out:
                    continue
                if entry.is_symlink():  # last: what it leads to may have a name of its own
                    waiting.append((inner, os.path.realpath(entry)))
                else:
                    waiting.appendleft((inner, entry.path))
        elif name.lower().endswith(ENDINGS) and name.count("/") >= depth:
            images.append(name)
        else:
            left_out.append(name)
        seen.add(place)
    if left_out:
        tell(
            f"{len(left_out)} left out of {folder} (no image by its name, in no folder of a class, "
            f"a link to what is there, or hidden): {name_some(sorted(left_out))}"
        )
    return sorted(images, key=lambda name: name.split("/")), folders


def read_all(read: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """What ``read`` makes of each item, in threads.

    Raises Unreadable with the faults of all items.
    """
    faults = []

    def attempt(item: Any) -> Any:
        try:
            return read(item)
        except Unreadable as error:
            faults.extend(error.args)

    with ThreadPool(worker_count()) as threads:  # Pillow lets other threads run while it decodes
        running = threads.imap(attempt, items, chunksize=16)
        made = list(tqdm(running, "reading", total=len(items), unit="image", disable=None))
    if faults:
        raise Unreadable(*sorted(faults))
    return made


def worker_count() -> int:
    """Processes that decode images: the processors, shared among those that torchrun started."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
