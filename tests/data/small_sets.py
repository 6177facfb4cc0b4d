"""Small data sets in the formats of the real ones, in which every image carries its own index."""

from PIL import Image

from avit_lib.data import Data

COLOUR = Data(
    dataset="Caltech101",
    image_size=16,
    train_per_class=6,
    validation_per_class=3,
    test_per_class=5,
    augmentation="standard",
    classes=("Faces", "ant", "bass", "emu"),
)


def write_images(folder, counts, size=(20, 30)):
    """``counts[class]`` PNG images of one colour in ``folder``/<class>: the i-th has red 10 i."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", size, (10 * index, 200, 100)).save(folder / name / f"{index:02d}.png")


def write_pool(folder, counts):
    """A folder a class of images whose colour is (class, index, 0)."""
    for label, (name, count) in enumerate(sorted(counts.items())):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            path = folder / name / f"image_{index:04d}.jpg"
            Image.new("RGB", (20, 30), (label, index, 0)).save(
                path, "PNG"
            )  # Pillow goes by content


def carried(data):
    """Label and index that the colours of the decoded images carry."""
    return [tuple(image[:2, 8, 8].tolist()) for image in data.images]


def assert_named(error, folder):
    """The message is one line that names the folder."""
    message = str(error.value)
    assert str(folder) in message and "\n" not in message
