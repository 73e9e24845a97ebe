"""Sentences for clips that only have names: composed from an action and a style by a small grammar.

Nobody wrote these sentences about these clips. Bandai-Namco's set names each clip's action and style; a caption is put together from the
names, so it says nothing that the names do not say, and a number measured with such captions is a number about this grammar.

    caption    = subject verb style rest | subject "is" verbing style resting                 (to train with)
               | style "," subject verb rest | style "," subject "is" verbing resting         (held out, for the test)
    subject    = "a person" | "someone"
    verb, rest = two phrasings of each action: "walks" ... "and turns left", "goes" ... "and makes a left turn"
    style      = two phrasings of each style: "proudly", "in a proud way"

The held-out templates have the words of the others in an order that training never saw. "normal" may also go unsaid: "a person walks".
"""

from typing import NamedTuple

from coloss.errors import UnknownNameError, suggest_names


class _Verb(NamedTuple):
    """A phrasing of an action: what comes before the style and after it, plain and in the continuous form."""

    plain: str
    rest: str
    continuous: str
    continuous_rest: str


def _verb(plain: str, continuous: str, rest: str = "", continuous_rest: str = "") -> _Verb:
    return _Verb(plain, rest, continuous, continuous_rest or rest)


_VERBS: dict[str, tuple[_Verb, _Verb]] = {
    "bow": (_verb("bows", "bowing"), _verb("bends forward", "bending forward", "to greet")),
    "bye": (
        _verb("waves goodbye", "waving goodbye", "with one hand"),
        _verb("says goodbye", "saying goodbye", "by waving one hand"),
    ),
    "byebye": (
        _verb("waves goodbye", "waving goodbye", "with both hands"),
        _verb("says goodbye", "saying goodbye", "by waving both hands"),
    ),
    "call": (_verb("calls someone over", "calling someone over"), _verb("beckons", "beckoning")),
    "dance-short": (_verb("dances", "dancing"), _verb("performs", "performing", "a short dance")),
    "dash": (_verb("dashes", "dashing"), _verb("sprints", "sprinting")),
    "guide": (
        _verb("shows the way", "showing the way"),
        _verb("guides someone", "guiding someone", "with one hand"),
    ),
    "kick": (_verb("kicks", "kicking"), _verb("gives kicks", "giving kicks")),
    "punch": (_verb("punches", "punching"), _verb("throws punches", "throwing punches")),
    "raise-up-both-hands": (
        _verb("raises both hands", "raising both hands"),
        _verb("lifts both arms up", "lifting both arms up"),
    ),
    "raise-up-left-hand": (
        _verb("raises the left hand", "raising the left hand"),
        _verb("lifts the left arm up", "lifting the left arm up"),
    ),
    "raise-up-right-hand": (
        _verb("raises the right hand", "raising the right hand"),
        _verb("lifts the right arm up", "lifting the right arm up"),
    ),
    "respond": (_verb("responds", "responding"), _verb("answers a call", "answering a call", "by a gesture")),
    "run": (_verb("runs", "running"), _verb("jogs", "jogging")),
    "slash": (_verb("slashes", "slashing", "with a sword"), _verb("swings a sword", "swinging a sword")),
    "walk": (_verb("walks", "walking"), _verb("goes", "going", "on foot")),
    "walk-back": (_verb("walks backward", "walking backward"), _verb("goes back", "going back", "on foot")),
    "walk-left": (
        _verb("walks to the left", "walking to the left"),
        _verb("goes left", "going left", "on foot"),
    ),
    "walk-right": (
        _verb("walks to the right", "walking to the right"),
        _verb("goes right", "going right", "on foot"),
    ),
    "walk-turn-left": (
        _verb("walks", "walking", "and turns left", "and turning left"),
        _verb("goes", "going", "and makes a left turn", "and making a left turn"),
    ),
    "walk-turn-right": (
        _verb("walks", "walking", "and turns right", "and turning right"),
        _verb("goes", "going", "and makes a right turn", "and making a right turn"),
    ),
    "wave-both-hands": (
        _verb("waves both hands", "waving both hands"),
        _verb("swings both arms", "swinging both arms", "to wave"),
    ),
    "wave-left-hand": (
        _verb("waves the left hand", "waving the left hand"),
        _verb("swings the left arm", "swinging the left arm", "to wave"),
    ),
    "wave-right-hand": (
        _verb("waves the right hand", "waving the right hand"),
        _verb("swings the right arm", "swinging the right arm", "to wave"),
    ),
}

_STYLES: dict[str, tuple[str, str]] = {
    "active": ("actively", "with much energy"),
    "angry": ("angrily", "in an angry way"),
    "childish": ("childishly", "like a child"),
    "chimpira": ("like a thug", "with a swagger"),
    "elderly": ("like an elderly person", "with the care of age"),
    "exhausted": ("exhaustedly", "without any strength"),
    "feminine": ("femininely", "in a feminine way"),
    "giant": ("like a giant", "in a huge and heavy way"),
    "happy": ("happily", "in a happy way"),
    "masculine": ("like a man", "in a masculine way"),
    "masculinity": ("with masculinity", "in a manly way"),
    "musical": ("musically", "as if to music"),
    "normal": ("normally", "in a normal way"),
    "not-confident": ("without confidence", "in an unsure way"),
    "old": ("like an old person", "in an aged way"),
    "proud": ("proudly", "in a proud way"),
    "sad": ("sadly", "in a sad way"),
    "tired": ("tiredly", "in a tired way"),
    "youthful": ("youthfully", "like a young person"),
}

_SUBJECTS = ("a person", "someone")

ACTIONS: tuple[str, ...] = tuple(_VERBS)
"""Actions that the grammar has words for: those of Bandai-Namco's set."""

STYLES: tuple[str, ...] = tuple(_STYLES)
"""Styles that the grammar has words for."""


def compose_captions(action: str, style: str, *, held_out: bool = False) -> tuple[str, ...]:
    """All sentences of the grammar for a clip of this action in this style.

    Args:
        action: one of `ACTIONS`.
        style: one of `STYLES`.
        held_out: the templates that are kept for the test, instead of the others.

    Returns:
        Distinct sentences without capitals and full stop: 16, or 24 in the normal style, where it may go unsaid.

    Raises:
        UnknownNameError: for an action or a style that the grammar has no words for; close names are proposed.

    Examples:
        >>> compose_captions("walk-turn-left", "proud")[0]
        'a person walks proudly and turns left'
        >>> compose_captions("walk-turn-left", "proud", held_out=True)[0]
        'proudly, a person walks and turns left'
        >>> compose_captions("run", "normal")[2]
        'a person runs'
    """
    for kind, name, known in (("action", action, ACTIONS), ("style", style, STYLES)):
        if name not in known:
            raise UnknownNameError(
                f"the grammar has no words for {kind} {name!r}{suggest_names(name, list(known))}"
            )
    styles: tuple[str, ...] = _STYLES[style]
    if style == "normal" and not held_out:
        styles = (*styles, "")
    found = []
    for subject in _SUBJECTS:
        for verb in _VERBS[action]:
            for manner in styles:
                for said, rest in ((verb.plain, verb.rest), (f"is {verb.continuous}", verb.continuous_rest)):
                    if held_out:
                        words = [f"{manner},", subject, said, rest]
                    else:
                        words = [subject, said, manner, rest]
                    found.append(" ".join(word for word in words if word))
    # The plain form before the continuous one, as a person would ask.
    return tuple(dict.fromkeys(found[::2] + found[1::2]))
