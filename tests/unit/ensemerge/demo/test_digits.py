import torch

from ensemerge.demo import digits


def test_the_split_is_fixed_and_nothing_is_on_both_sides() -> None:
    train, held_out = digits.load()
    assert (len(train), len(held_out)) == (1257, 540)
    again, _ = digits.load()
    assert torch.equal(train.pixels, again.pixels)
    assert not {bytes(image) for image in train.pixels.numpy()} & {bytes(image) for image in held_out.pixels.numpy()}
    assert float(train.pixels.min()) == 0.0
    assert float(train.pixels.max()) == 1.0


def test_the_stream_is_seeded_and_every_request_is_distorted_afresh() -> None:
    _, held_out = digits.load()
    stream = digits.traffic(held_out, 2000, seed=1)
    assert torch.equal(stream.pixels, digits.traffic(held_out, 2000, seed=1).pixels)
    assert not torch.equal(stream.pixels, digits.traffic(held_out, 2000, seed=2).pixels)
    assert len(torch.unique(stream.pixels.flatten(1), dim=0)) == 2000
    assert stream.pixels.shape == (2000, 1, 8, 8)


def test_without_distortion_images_stay_as_they_are() -> None:
    train, _ = digits.load()
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(digits.Distortion()(train.pixels[:10], generator), train.pixels[:10], atol=1e-5, rtol=0)
