"""Small data sets in the layout of the real ones, in which every image carries its own index."""

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


def write_images(folder, counts):
    """A folder a class of PNG images whose colour is (place of the class, index, 0)."""
    for label, (name, count) in enumerate(sorted(counts.items())):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            path = folder / name / f"image_{index:04d}.png"
            Image.new("RGB", (20, 30), (label, index, 0)).save(path)


def carried(data):
    """Label and index that the colours of the decoded images carry."""
    return [tuple(image[:2, 8, 8].tolist()) for image in data.images]
