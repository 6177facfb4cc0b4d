"""Peak memory is that of a step, not of all that came before it."""

from avit_lib.evaluation.memory import peak_memory


def test_memory_of_a_training_step_grows_with_the_batch():
    small, large = (
        peak_memory("avit_tiny_patch16_224", "DeiT", batch, 7.0, "training", "float32", gpu=False)
        for batch in (1, 4)
    )
    assert large > 20 and large > small
