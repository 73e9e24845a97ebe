"""The grammar of composed sentences."""

import pytest

from coloss.data.image_text import words_of
from coloss.errors import UnknownNameError
from coloss.motion.motion_captions import ACTIONS, STYLES, compose_captions


def test_every_action_and_style_has_sentences_of_its_own():
    owner = {}
    for action in ACTIONS:
        for style in STYLES:
            for held_out in (False, True):
                for sentence in compose_captions(action, style, held_out=held_out):
                    assert owner.setdefault(sentence, (action, style, held_out)) == (action, style, held_out)
    assert len(owner) == len(ACTIONS) * (len(STYLES) * 32 + 8)
    assert max(len(words_of(sentence)) for sentence in owner) <= 16


def test_held_out_templates_bring_order_but_no_words():
    for action in ACTIONS[::5]:
        for style in STYLES[::2]:
            trained = {word for sentence in compose_captions(action, style) for word in words_of(sentence)}
            held = compose_captions(action, style, held_out=True)
            assert {word for sentence in held for word in words_of(sentence)} <= trained
            orders = {tuple(words_of(sentence)) for sentence in compose_captions(action, style)}
            assert not orders & {tuple(words_of(sentence)) for sentence in held}


def test_the_sentence_that_a_user_is_promised():
    assert "a person walks proudly and turns left" in compose_captions("walk-turn-left", "proud")
    assert "a person walks" in compose_captions("walk", "normal")
    assert not any("left" in words_of(s) for s in compose_captions("walk-turn-right", "exhausted"))


def test_unknown_names_are_refused():
    with pytest.raises(UnknownNameError, match="no words for action 'wlak'; did you mean 'walk'"):
        compose_captions("wlak", "proud")
    with pytest.raises(UnknownNameError, match="no words for style 'purple'"):
        compose_captions("walk", "purple")
