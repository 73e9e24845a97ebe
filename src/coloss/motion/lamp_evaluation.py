"""How good a trained LaMP is on clips and sentences that it was not trained on: the measures of its papers."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from coloss.metrics.caption_scores import TokenMatchScorer, caption_score, overlap_scores
from coloss.metrics.generation import generation_metrics, multimodality, repeated_evaluation
from coloss.metrics.grouped_retrieval import retrieval_protocols
from coloss.metrics.inference import evaluation_mode
from coloss.motion.attention_rank import attention_ranks
from coloss.motion.lamp_model import Lamp
from coloss.motion.masked_tokens import MaskedTokenTransformer, mask_tokens
from coloss.motion.motion_representation import recover_joints
from coloss.motion.text_motion_data import TextMotion

_STEPS, _GUIDANCE = 10, 2.0
_TURN = math.radians(40)


def evaluate_lamp(
    lamp: Lamp,
    test: TextMotion,
    rivals: Mapping[str, tuple[MaskedTokenTransformer, nn.Module]] | None = None,
    *,
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, float]:
    """All measures on some clips, with one sentence of each.

    Numbers that stand on the evaluator (FID, R-precision, multimodal distance, diversity) compare with others of this evaluator alone; the
    caption score with others of this captioner and text encoder.

    Args:
        lamp: trained.
        test: clips that it was not trained on, at least two.
        rivals: other generators with their conditions, by name.
        repeats: generations for each sentence; FID and its like are means over them.
        seed: of all draws.

    Returns:
        - `tokenizer_joint_error`: mean distance of joints, relative to the root, after tokens and back (the clips' unit); `tokenizer_codes_used`;
          `tokenizer_turn_kept`: share of the turn of clips that turn by more than 40 degrees (NaN if none does).
        - `fid`, `r_precision@1..3` (in galleries of 32, or of all where there are fewer), `multimodal_distance`, `diversity`, of real clips with `real_` in front; `multimodality`; of rivals with their
          name in front.
        - `generated_turn_right`: of the clips that turn by more than 40 degrees, the share whose generated motion turns by so much to the same side;
          `generated_turn_wrong`: of the others, the share whose generated motion turns by so much to either (each NaN if there are none).
        - `motion_to_text_*` and `text_to_motion_*`: R@1, 3, 5 and the median rank among all test clips (groups count as right), and among 32 with
          `small_` in front.
        - `bleu@1`, `bleu@4`, `rouge_l`, `caption_right` (share of sentences that are among the right ones word for word), and
          `caption_score_real`, `caption_score_generated`: how near captions of real and of generated motion come to the sentence.
        - `attention_rank` and, of a rival called "bidirectional", `bidirectional_attention_rank`: effective rank of the last layer's attention
          matrices, as a share of the places; `*_output_rank` likewise of what attention adds.

    Examples:
        >>> test = load_text_motion("bandai").part(2)  # doctest: +SKIP
        >>> evaluate_lamp(load_lamp("runs/lamp-bandai"), test)["motion_to_text_medr"]  # doctest: +SKIP
        2.0
    """
    texts = [captions[row % len(captions)] for row, captions in enumerate(test.captions)]
    words = lamp.vocabulary.encode(texts)  # too long a sentence is cut, as in training
    features, lengths = test.padded(lamp.tokenizer_normalizer)
    metrics: dict[str, float] = {}
    with evaluation_mode(lamp):
        codes = lamp.tokenizer.tokens(features, lengths)
        vectors = lamp.tokenizer.encode(features, lengths)
        valid = codes >= 0
        metrics |= _tokenizer_metrics(lamp, test, codes, lengths)
        generated, found = _generation_metrics(
            lamp, test, words, lengths, lamp.generator, lamp.condition, repeats, seed
        )
        metrics |= found | _multimodality(lamp, words, lengths, seed)
        for name, (generator, condition) in (rivals or {}).items():
            with evaluation_mode(condition), evaluation_mode(generator):
                _, found = _generation_metrics(
                    lamp, test, words, lengths, generator, condition, repeats, seed
                )
            metrics |= {
                f"{name}_{key}": value
                for key, value in found.items()
                if not key.startswith(("real_", "fid_"))
            }
        metrics |= _turn_metrics(lamp, test, generated)
        metrics |= _retrieval_metrics(lamp, test, words, vectors, valid)
        metrics |= _caption_metrics(lamp, test, texts, vectors, valid, generated)
        metrics |= _rank_metrics(lamp, words, codes, rivals or {}, seed)
    return metrics


def _tokenizer_metrics(lamp: Lamp, test: TextMotion, codes: Tensor, lengths: Tensor) -> dict[str, float]:
    decoded = lamp.decode(codes)
    errors, turns = [], []
    for clip, made, count in zip(test.features, decoded, lengths.tolist(), strict=True):
        real, again = (recover_joints(each[:count], test.num_joints, root=test.root) for each in (clip, made))
        turned = [_turned(each[:count]) for each in (clip, made)]
        if abs(turned[0]) > _TURN:
            turns.append(turned[1] / turned[0])
        relative = [joints - joints[:, [test.root]] for joints in (real, again)]
        errors.append((relative[0] - relative[1]).norm(dim=-1).mean())
    return {
        "tokenizer_joint_error": float(torch.stack(errors).mean()),
        "tokenizer_turn_kept": sum(turns) / len(turns) if turns else math.nan,
        "tokenizer_codes_used": float(len(codes[codes >= 0].unique())),
    }


def _turn_metrics(lamp: Lamp, test: TextMotion, generated: Tensor) -> dict[str, float]:
    lengths = (generated >= 0).sum(1) * lamp.tokenizer.frames_per_token
    made = [_turned(clip[:count]) for clip, count in zip(lamp.decode(generated), lengths.tolist())]
    right, wrong = [], []
    for turn, real in zip(made, map(_turned, test.features), strict=True):
        if abs(real) > _TURN:
            right.append(turn * math.copysign(1, real) > _TURN)
        else:
            wrong.append(abs(turn) > _TURN)
    return {
        "generated_turn_right": sum(right) / len(right) if right else math.nan,
        "generated_turn_wrong": sum(wrong) / len(wrong) if wrong else math.nan,
    }


def _turned(features: Tensor) -> float:
    """By how much a body has turned at the end, rad, to the left where > 0; whole turns count."""
    return float(-2 * features[:, 0].sum())


def _generation_metrics(
    lamp: Lamp,
    test: TextMotion,
    words: Tensor,
    lengths: Tensor,
    generator: MaskedTokenTransformer,
    condition: nn.Module,
    repeats: int,
    seed: int,
) -> tuple[Tensor, dict[str, float]]:
    """The last generation's codes, and the means over repeats."""
    real = lamp.evaluator.embed_motion(*test.padded(lamp.normalizer))
    said = lamp.evaluator.embed_text(words, (words != lamp.vocabulary.padding_id).sum(1))
    wanted = condition(words)
    tokens = lengths // lamp.tokenizer.frames_per_token
    last: list[Tensor] = []

    def once(draws: torch.Generator) -> dict[str, float]:
        codes = generator.generate(wanted, tokens, steps=_STEPS, guidance=_GUIDANCE, generator=draws)
        last[:] = [codes]
        made = lamp.normalizer(lamp.decode(codes))
        embedded = lamp.evaluator.embed_motion(made, lengths)
        return generation_metrics(
            said, real, embedded, test.groups, batch_size=min(32, len(test)), generator=draws
        )

    found = repeated_evaluation(once, repeats, seed=seed)
    return last[0], {name: value.mean for name, value in found.items()}


def _multimodality(lamp: Lamp, words: Tensor, lengths: Tensor, seed: int) -> dict[str, float]:
    """Ten generations for each of some sentences, evenly spaced among all."""
    rows = torch.linspace(0, len(words) - 1, min(len(words), 20)).round().long().unique()
    many = rows.repeat_interleave(10)
    draws = torch.Generator().manual_seed(seed)
    tokens = lengths[many] // lamp.tokenizer.frames_per_token
    codes = lamp.generator.generate(
        lamp.condition(words[many]), tokens, steps=_STEPS, guidance=_GUIDANCE, generator=draws
    )
    embedded = lamp.evaluator.embed_motion(lamp.normalizer(lamp.decode(codes)), lengths[many])
    return {
        "multimodality": multimodality(embedded.unflatten(0, (len(rows), 10)), 10, generator=draws).item()
    }


def _retrieval_metrics(
    lamp: Lamp, test: TextMotion, words: Tensor, vectors: Tensor, valid: Tensor
) -> dict[str, float]:
    motions, texts = lamp.language_motion.embed_motion(vectors, valid), lamp.language_motion.embed_text(words)
    alike = torch.nn.functional.normalize(lamp.generic_text(words), dim=1)
    found = retrieval_protocols(motions @ texts.T, alike @ alike.T, test.groups, ks=(1, 3, 5))
    return {
        f"{prefix}{name}": value
        for protocol, prefix in (("all", ""), ("small", "small_"))
        for name, value in found.get(protocol, {}).items()
    }


def _caption_metrics(
    lamp: Lamp, test: TextMotion, texts: Sequence[str], vectors: Tensor, valid: Tensor, generated: Tensor
) -> dict[str, float]:
    def write(motions: tuple[Tensor, Tensor]) -> list[str]:
        ids = lamp.captioner.write(*motions, max_words=lamp.vocabulary.max_words, beams=3)
        return lamp.vocabulary.decode(ids)

    def encode(sentences: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        ids = lamp.vocabulary.encode([sentence or "<unknown>" for sentence in sentences])
        found, there = lamp.generic_text.token_vectors(ids)
        return found[:, 1:], there[:, 1:], ids

    spoken = [tuple(_plain(lamp, sentence) for sentence in right) for right in test.references]
    written = write((vectors, valid))
    scorer = TokenMatchScorer(encode)
    frames = (generated >= 0).sum(1) * lamp.tokenizer.frames_per_token
    made = lamp.tokenizer.encode(lamp.tokenizer.decode(generated), frames)
    given = [_plain(lamp, text) for text in texts]
    return overlap_scores(written, spoken) | {
        "caption_right": sum(said in right for said, right in zip(written, spoken)) / len(written),
        "caption_score_real": caption_score(lambda _: written, scorer, None, given),
        "caption_score_generated": caption_score(write, scorer, (made, generated >= 0), given),
    }


def _plain(lamp: Lamp, sentence: str) -> str:
    """A sentence as the captioner could write it: small letters, no marks, words it does not know as such."""
    return lamp.vocabulary.decode(lamp.vocabulary.encode([sentence]))[0]


def _rank_metrics(
    lamp: Lamp,
    words: Tensor,
    codes: Tensor,
    rivals: Mapping[str, tuple[MaskedTokenTransformer, nn.Module]],
    seed: int,
) -> dict[str, float]:
    """On up to 32 sequences with tokens hidden as in training; only those of full length, which padding does not confuse."""
    order = (codes >= 0).sum(1).argsort(descending=True)[:32]
    hidden = mask_tokens(
        codes[order], lamp.tokenizer.codes, generator=torch.Generator().manual_seed(seed)
    ).tokens
    pairs = {"": (lamp.generator, lamp.condition)} | {
        f"{name}_": pair for name, pair in rivals.items() if not pair[0].causal
    }
    metrics = {}
    for name, (generator, condition) in pairs.items():
        found = attention_ranks(generator, hidden, condition(words[order]))
        metrics[f"{name}attention_rank"] = float(found.weights_effective[-1]) / found.places
        metrics[f"{name}attention_output_rank"] = float(found.outputs_effective[-1]) / found.places
    return metrics
