"""An artificial voice, whose phones are bands of noise at times that are known."""

from itertools import pairwise

import numpy as np

RATE = 8000
BANDS = {"a": (300, 600), "b": (800, 1100), "c": (1400, 1800), "d": (2200, 2600), "e": (3000, 3500)}


def say(words, generator, *, pause=0.15):
    """A waveform of these words of phones, and [(phone, start, stop), ...] in seconds, pauses "_" between words."""
    parts, times, now = [], [], 0.0
    sequence = ["_"]
    for word in words:
        sequence += [*word, "_"]
    for phone in sequence:
        seconds = pause if phone == "_" else generator.uniform(0.06, 0.16)
        count = round(seconds * RATE)
        noise = generator.standard_normal(count)
        if phone == "_":
            part = 1e-3 * noise
        else:
            low, high = BANDS[phone]
            spectrum = np.fft.rfft(noise)
            frequencies = np.fft.rfftfreq(count, 1 / RATE)
            spectrum[(frequencies < low) | (frequencies > high)] = 0
            part = 0.2 * np.fft.irfft(spectrum, count)
        parts.append(part)
        times.append((phone, now, now + count / RATE))
        now += count / RATE
    return np.concatenate(parts).astype(np.float32), times


def heard(samples):
    """The phones a waveform says, by its loudest band every 10 ms; "_" where it is quiet."""
    names, found = list(BANDS), []
    for start in range(0, len(samples) - 160, 80):
        power = np.abs(np.fft.rfft(samples[start : start + 160] * np.hanning(160))) ** 2
        frequencies = np.fft.rfftfreq(160, 1 / RATE)
        energy = [power[(frequencies >= low) & (frequencies <= high)].sum() for low, high in BANDS.values()]
        found.append(names[int(np.argmax(energy))] if max(energy) > 0.5 else "_")
    steady = [one for one, other in pairwise(found) if one == other]  # two frames at least
    return [phone for index, phone in enumerate(steady) if index == 0 or steady[index - 1] != phone]
