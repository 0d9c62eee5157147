import pytest
import torch

from somf_mergekit.mask import noise

MASK64 = (1 << 64) - 1


def key(**changes):
    return noise.noise_key(**({"seed": 0, "step": 0, "name": "w"} | changes))


def split_mix(state):
    """The published generator, one word after another."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK64
        word = state
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK64
        yield word ^ (word >> 31)


def test_the_reference_gives_the_published_words():
    words = split_mix(1234567)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [next(words) for _ in published] == published


@pytest.mark.parametrize("of", [0, 1234567, -5, key()])
def test_noise_is_made_of_the_words_of_split_mix_64(of):
    words, expected = split_mix(of & MASK64), []
    for _ in range(25):
        word = next(words)
        for lane in range(4):
            bits = (word >> (16 * lane)) & 0xFFFF
            # The bits are read as a signed number; one half is added to the middle of their range.
            signed = bits - 65536 if bits >= 32768 else bits
            expected.append((signed + 32768.5) / 65536)
    assert noise.uniform_noise(of, 99).tolist() == expected[:99]


def test_a_part_is_drawn_as_in_the_whole():
    whole = noise.uniform_noise(key(), 1000)
    for start, count in ((0, 10), (4, 4), (5, 1), (6, 990), (999, 1), (3, 0)):
        part = noise.uniform_noise(key(), count, start=start)
        assert torch.equal(part, whole[start : start + count])


def test_noise_is_a_function_of_seed_step_and_name():
    assert torch.equal(noise.uniform_noise(key(), 9), noise.uniform_noise(key(), 9))
    for change in ({"seed": 1}, {"step": 1}, {"name": "v"}):
        assert not torch.equal(noise.uniform_noise(key(), 9), noise.uniform_noise(key(**change), 9))


def test_noise_is_uniform_and_its_neighbours_are_independent():
    count = 1 << 20
    drawn = noise.uniform_noise(key(), count)
    assert 0 < drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    steps = torch.arange(1, count + 1) / count
    # 1 % of truly uniform draws are further off than this.
    limit = 1.63 / count**0.5
    assert (drawn.sort().values - steps).abs().max() < limit
    centred = drawn.double() - 0.5
    for others in (
        *(centred.roll(shift) for shift in range(1, 9)),
        noise.uniform_noise(key(step=1), count).double() - 0.5,
        noise.uniform_noise(key(name="v"), count).double() - 0.5,
    ):
        correlation = (centred * others).mean() * 12
        assert abs(correlation) < 4 / count**0.5
