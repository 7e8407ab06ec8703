"""Colours of the report: one sequential scale in two themes, and one colour for each kind of line.

The sequential scale runs through OKLab (Ottosson 2020) with monotone lightness, so it reads the same to
colour-blind people and on grey paper. On a light page more accuracy is more ink, on a dark page more light.
"""

from __future__ import annotations

STEPS = 21  # 0 %, 5 %, ... 100 %

_LIGHT_STOPS = ("#f4f0e6", "#d3e4d3", "#8fc6c0", "#3a8fb0", "#123f73")
_DARK_STOPS = ("#1d232e", "#1e3d5c", "#1f6f8b", "#4fb0a5", "#d8f0c4")

# Okabe and Ito (2008) hues, moved in lightness until each keeps 3:1 against its page.
LINES = (
    ("#6b7280", "#9aa3b2"),  # before: neutral
    ("#0b5cad", "#63b0ff"),  # after: the accent
    ("#a85900", "#f0a13c"),
    ("#00795b", "#3ec9a0"),
    ("#a8457f", "#e58abf"),
    ("#5b4bb5", "#a99bff"),
    ("#7d6300", "#d9c24a"),
    ("#b3382c", "#ff8d80"),
)
DASHES = ("", "", "6 3", "2 3", "8 3 2 3", "1 3", "10 4", "4 2")

_ROLES = {"before": 0, "after": 1, "theta_only": 2, "ntk": 3, "pi": 4, "yarn": 5}


def line_index(label: str, position: int) -> int:
    """Return the colour number of a label: fixed for the usual ones, else by `position` among all labels."""
    return _ROLES.get(label, position % len(LINES))


def step_of(value: float) -> int:
    """Return the step of the sequential scale for a value in 0..1."""
    return round(min(max(value, 0.0), 1.0) * (STEPS - 1))


def sequential(dark: bool = False) -> list[str]:
    """Return the STEPS hex colours of the sequential scale."""
    stops = [_to_oklab(colour) for colour in (_DARK_STOPS if dark else _LIGHT_STOPS)]
    colours = []
    for step in range(STEPS):
        place = step / (STEPS - 1) * (len(stops) - 1)
        low = min(int(place), len(stops) - 2)
        share = place - low
        mixed = tuple(a + (b - a) * share for a, b in zip(stops[low], stops[low + 1]))
        colours.append(_from_oklab(mixed))
    return colours


def ink_on(colour: str) -> str:
    """Return the text colour, near-black or white, with the higher contrast on `colour`."""
    return max(("#0b1016", "#ffffff"), key=lambda ink: contrast(ink, colour))


def contrast(first: str, second: str) -> float:
    """Return the WCAG 2 contrast ratio of two hex colours, 1 to 21."""
    light, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def theme_css() -> str:
    """Return the custom properties of both themes: --h0.. (scale), --i0.. (its ink), --c0.. (lines)."""
    light, dark = _properties(dark=False), _properties(dark=True)
    rules = [
        f":root{{{light}}}",
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}",
        *(f".h{n}{{fill:var(--h{n});background:var(--h{n})}}" for n in range(STEPS)),
        *(f".i{n}{{fill:var(--i{n});color:var(--i{n})}}" for n in range(STEPS)),
        *(f".c{n}{{--c:var(--c{n})}}" for n in range(len(LINES))),
        *(f".p{n}{{--c:var(--h{n})}}" for n in range(STEPS)),
    ]
    return "\n".join(rules)


def _properties(dark: bool) -> str:
    scale = sequential(dark)
    pairs = [f"--h{n}:{colour};--i{n}:{ink_on(colour)}" for n, colour in enumerate(scale)]
    pairs += [f"--c{n}:{colours[dark]}" for n, colours in enumerate(LINES)]
    return ";".join(pairs)


def _linear(colour: str) -> list[float]:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def _luminance(colour: str) -> float:
    red, green, blue = _linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _to_oklab(colour: str) -> tuple[float, float, float]:
    r, g, b = _linear(colour)
    long = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)
    medium = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    short = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return (
        0.2104542553 * long + 0.7936177850 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.8086757660 * short,
    )


def _from_oklab(lab: tuple[float, ...]) -> str:
    lightness, a, b = lab
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    channels = [12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in linear]
    return "#" + "".join(f"{round(min(max(c, 0.0), 1.0) * 255):02x}" for c in channels)
