"""What the picture of a token's experts says in words."""

from __future__ import annotations

from collections.abc import Sequence

from .arrange import printable

VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "": "▯"}


def summary(at, pieces: Sequence[str], token: int, rules: tuple[bool, bool] = (True, True), shared: bool = True) -> str:
    """Return one line: the token, its experts with their weights and shares, and what the two rules changed."""
    choice = at.choices[rules]
    weights = ", ".join(f"{weight:.2f}" for _, weight in by_number(choice, token))
    said, made = brings(choice, token), ""
    if said:
        made = f" They bring {', '.join(said[expert] for expert, _ in by_number(choice, token))} of the output, the "
        made += f"shared expert {said['shared']}{', which is lost' * (not shared)}."
    return f"{headline(at, pieces, token, rules)} with weights {weights}.{made} {' '.join(changes(at, token))}"


def headline(at, pieces: Sequence[str], token: int, rules: tuple[bool, bool] = (True, True)) -> str:
    """Return the token and its experts as text. rules: whether bias and group limit are on."""
    experts = ", ".join(str(expert) for expert, _ in by_number(at.choices[rules], token))
    off = "".join(f", {name} off" for name, on in zip(("bias", "groups"), rules, strict=True) if not on)
    return f"{token_name(pieces, token)}, layer {at.layer}{off}: experts {experts}"


def brings(choice, token: int) -> dict[int | str, str]:
    """Return in per cent of the output what each chosen expert brings, all of them ("routed") and the "shared" one.

    It is empty for a trace without shares.
    """
    if choice.shares is None:
        return {}
    *own, shared = choice.shares[token].tolist()
    parts = dict(zip(choice.chosen[token].tolist(), own, strict=True)) | {"routed": 1 - shared, "shared": shared}
    return {name: f"{round(100 * part)} %".replace("-", "\N{MINUS SIGN}") for name, part in parts.items()}


def token_name(pieces: Sequence[str], token: int) -> str:
    """Return a token by its position and text; one without a text is a special token, such as the boundary."""
    return f'token {token} "{visible(pieces[token])}"' if pieces[token] else f"token {token} (special)"


def visible(piece: str) -> str:
    """Return a token's text with spaces, line ends and tabs made visible, shortened to 12 characters."""
    shown = printable("".join(VISIBLE.get(c, c) for c in piece) or VISIBLE[""])
    return shown if len(shown) <= 12 else shown[:11] + "…"


def by_number(choice, token: int) -> list[tuple[int, float]]:
    """Return the chosen experts and their weights in the order in which the experts stand."""
    return sorted(zip(choice.chosen[token].tolist(), choice.weights[token].tolist(), strict=True))


def changes(at, token: int) -> list[str]:
    """Return two sentences: who would have been chosen without the bias, and without the group limit."""
    limited = not at.kept.all()
    first = _instead(at.chosen[token], at.without_bias[token]) if at.bias.any() else "this layer has none."
    second = _instead(at.chosen[token], at.without_groups[token]) if limited else "this layer has none."
    return [f"Without the bias: {first}", f"Without the group limit: {second}"]


def bias_note(at) -> str:
    """Return from where the drawn biases are counted: trained biases drift together, and that changes no choice."""
    if not at.bias.any():
        return ""
    mean = f"{round(at.shared_bias, 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}")
    return f"Biases are shown less their mean in this layer, {mean}: what all share changes no choice."


def _instead(chosen, other) -> str:
    here, there = set(chosen.tolist()), set(other.tolist())
    if here == there:
        return "the same experts."
    come, gone = (", ".join(map(str, sorted(part))) for part in (there - here, here - there))
    count = len(there - here)
    if count > 5:  # two long lists would not fit on a line
        return f"{count} of {len(there)} would change, to {come}."
    return f"expert{'s' * (count > 1)} {come} in place of {gone}."
