"""Strong views of images and captions, as CLIP's improved recipe takes them: random crops and colours, dropped and exchanged words."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coloss.data import WordVocabulary, default_views, random_views
from coloss.data.image_text import words_of
from coloss.data.views import seeded_globally

STOP_WORDS = tuple(
    words_of(
        "a about an and are as at be been but by for from had has have he her him his i in into is it its me my no not of on or our she "
        "so such than that the their them then there these they this those to was we were what which who will with would you your"
    )
)
"""Common English words that carry little of a caption's meaning."""


def strong_image_views(
    images: Float[Tensor, "batch channels height width"],
    views: int = 2,
    generator: torch.Generator | None = None,
    *,
    crop: tuple[float, float] = (0.08, 1.0),
    jitter: float = 0.4,
    grey: float = 0.2,
    blur: float = 0.5,
    flip: bool = True,
) -> Float[Tensor, "views batch channels height width"]:
    """Random crops, recoloured, perhaps grey, blurred and mirrored.

    Args:
        images: in [0, 1].
        views: of each image, >= 1.
        generator: decides every choice.
        crop: smallest and largest share of the area that is kept; the published recipe's by default. Small drawings suffer less from
            (0.3, 1).
        jitter: of brightness, contrast and saturation (a quarter of it of hue), applied with probability 0.8.
        grey: probability to lose the colours (three channels only).
        blur: probability of a Gaussian blur of standard deviation 0.1 to 2 over 3 x 3 pixels.
        flip: mirror left and right with probability 1/2. Captions that say left or right are then wrong for half of the views.

    Raises:
        ValueError: for a value out of range.

    Source:
        Fini et al. 2023, arXiv 2305.08675 (the strong views of the improved recipe); kornia.augmentation.

    Examples:
        >>> strong_image_views(torch.rand(4, 3, 16, 16), views=2).shape
        torch.Size([2, 4, 3, 16, 16])
    """
    if not 0 <= blur <= 1:
        raise ValueError(f"blur must be in [0, 1], got {blur}")
    made = random_views(
        images,
        views,
        generator,
        crop=crop,
        rotation=0.0,
        translation=0.0,
        flip=flip,
        jitter=jitter,
        grey=grey,
        erasing=0.0,
    )
    if not blur or not len(images):
        return made
    from kornia.augmentation import RandomGaussianBlur

    with seeded_globally(generator, images.device):
        blurred = RandomGaussianBlur((3, 3), (0.1, 2.0), p=blur)(made.flatten(0, 1))
    return blurred.unflatten(0, (views, len(images)))


def strong_views(inputs: Tensor, views: int = 2, generator: torch.Generator | None = None) -> Tensor:
    """Strong views that suit what the inputs are, for a start: images of three channels, rows of word ids, or anything else.

    Args:
        inputs: for `strong_image_views`, for `WordAugment` (integers), or for `coloss.data.default_views`.
        views: of each sample, >= 1.
        generator: decides every choice.

    Examples:
        >>> (
        ...     strong_views(torch.rand(4, 3, 8, 8)).shape,
        ...     strong_views(torch.ones(4, 5, dtype=torch.int64)).shape,
        ... )
        (torch.Size([2, 4, 3, 8, 8]), torch.Size([2, 4, 5]))
    """
    if not inputs.is_floating_point():
        return WordAugment(views)(inputs, generator)
    if inputs.ndim == 4 and inputs.shape[1] == 3:
        return strong_image_views(inputs, views, generator)
    return default_views(inputs, views, generator)


class WordAugment:
    """Views of captions that are rows of word ids: common words dropped, then some words exchanged, swapped or dropped.

    For each view of each caption: with probability `stop` all stop words go; then one of three edits is made, drawn by the weights
    `synonym`, `swap` and `delete` (without synonyms there are two). About a share of the words is edited, at least one: exchanged for a
    synonym, swapped in pairs, or dropped, each with probability `share`. At least one word always stays.

    Args:
        views: of each caption, >= 1.
        stop_ids: ids of stop words.
        synonyms: ids of the words that may stand in for an id.
        stop: probability of dropping stop words.
        synonym, swap, delete: weights of the three edits, >= 0.
        share: of a caption's words that are edited, in [0, 1].
        padding_id: fills captions up.

    Returns:
        From `augment(word_ids, generator=None)`: (views, batch, words), padded as the captions were.

    Raises:
        ValueError: for a value out of range; when called, for ids that are no integer matrix.

    Cost:
        Some sorts of the rows; a loop over the swaps of the longest caption.

    Source:
        Fini et al. 2023, arXiv 2305.08675; the edits: Wei and Zou 2019 (EDA), arXiv 1901.11196.

    Examples:
        >>> augment = WordAugment(views=1, stop_ids=[7], stop=1.0, share=0.0)
        >>> augment(torch.tensor([[7, 5, 7, 6, 0]])).tolist()
        [[[5, 6, 0, 0, 0]]]
    """

    def __init__(
        self,
        views: int = 2,
        *,
        stop_ids: Sequence[int] = (),
        synonyms: Mapping[int, Sequence[int]] | None = None,
        stop: float = 0.8,
        synonym: float = 0.4,
        swap: float = 0.4,
        delete: float = 0.2,
        share: float = 0.1,
        padding_id: int = 0,
    ) -> None:
        if views < 1:
            raise ValueError(f"views must be >= 1, got {views}")
        synonyms = {word: tuple(others) for word, others in (synonyms or {}).items() if others}
        self.weights = _checked_weights(stop, synonym, swap, delete, share, bool(synonyms))
        self.views, self.stop, self.share, self.padding_id = views, stop, share, padding_id
        self.stop_ids = torch.tensor(sorted(set(stop_ids)), dtype=torch.int64)
        # Row r of the table holds what may stand in for word `replaced[r]`, repeated up to one length.
        self.replaced = torch.tensor(sorted(synonyms), dtype=torch.int64)
        longest = max(map(len, synonyms.values()), default=0)
        rows = [[*synonyms[word], *[0] * (longest - len(synonyms[word]))] for word in sorted(synonyms)]
        self.table = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), longest)
        self.choices = torch.tensor([len(synonyms[word]) for word in sorted(synonyms)])

    @classmethod
    def of_vocabulary(
        cls,
        vocabulary: WordVocabulary,
        views: int = 2,
        *,
        stop_words: Sequence[str] = STOP_WORDS,
        synonyms: Mapping[str, Sequence[str]] | None = None,
        **options: float,
    ) -> "WordAugment":
        """The same by words; those that the vocabulary does not hold are left out.

        Args:
            vocabulary: of the word ids.
            views: of each caption.
            stop_words, synonyms: words.
            options: as above.

        Examples:
            >>> vocabulary = WordVocabulary(["cat", "a", "kitten"], max_words=3)
            >>> augment = WordAugment.of_vocabulary(
            ...     vocabulary, 1, synonyms={"cat": ["kitten"]}, stop=1.0, swap=0, delete=0
            ... )
            >>> vocabulary.decode(augment(vocabulary.encode(["a cat"]))[0])
            ['kitten']
        """
        ids = {word: number for number, word in enumerate(vocabulary.words)}
        known = {
            ids[word]: [ids[other] for other in others if other in ids]
            for word, others in (synonyms or {}).items()
            if word in ids
        }
        return cls(
            views,
            stop_ids=[ids[word] for word in stop_words if word in ids],
            synonyms=known,
            padding_id=vocabulary.padding_id,
            **options,
        )

    def __call__(
        self, word_ids: Int[Tensor, "batch words"], generator: torch.Generator | None = None
    ) -> Int[Tensor, "views batch words"]:
        if word_ids.ndim != 2 or word_ids.is_floating_point():
            found = f"{word_ids.dtype} {tuple(word_ids.shape)}"
            raise ValueError(f"word_ids must be integers (batch, words), got {found}")
        ids = word_ids.repeat(self.views, 1)
        if ids.numel():
            ids = self._without_stop_words(ids, generator)
            ids = self._edited(ids, generator)
        return ids.unflatten(0, (self.views, len(word_ids)))

    def _without_stop_words(self, ids: Tensor, generator: torch.Generator | None) -> Tensor:
        drop = torch.isin(ids, self.stop_ids.to(ids.device))
        drop &= _uniform((len(ids), 1), ids, generator) < self.stop
        left = ((ids != self.padding_id) & ~drop).any(1, keepdim=True)
        return self._without(ids, drop & left)

    def _edited(self, ids: Tensor, generator: torch.Generator | None) -> Tensor:
        words = ids != self.padding_id
        length = words.sum(1, keepdim=True)
        count = (self.share * length).round().long().clamp(min=1 if self.share else 0)
        bounds = torch.tensor(self.weights, device=ids.device).cumsum(0)
        edit = torch.bucketize(_uniform((len(ids), 1), ids, generator) * bounds[-1], bounds[:2], right=True)
        draw = _uniform(tuple(ids.shape), ids, generator)
        exchanged = self._exchanged(ids, count, draw, generator)
        swapped = _swapped(ids, length, count, generator)
        # The word of the largest number stays, whatever the share.
        first = draw.masked_fill(~words, -1.0).argmax(1, keepdim=True)
        dropped = self._without(ids, words & (draw < self.share).scatter(1, first, False))
        return torch.where(edit == 0, exchanged, torch.where(edit == 1, swapped, dropped))

    def _exchanged(
        self, ids: Tensor, count: Tensor, draw: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        if not len(self.replaced):
            return ids
        replaced, table, choices = (part.to(ids.device) for part in (self.replaced, self.table, self.choices))
        row = torch.searchsorted(replaced, ids.contiguous()).clamp(max=len(replaced) - 1)
        known = replaced[row] == ids
        rank = draw.masked_fill(~known, -1.0).argsort(1, descending=True).argsort(1)
        pick = (_uniform(tuple(ids.shape), ids, generator) * choices[row]).long()
        return torch.where(known & (rank < count), table[row, pick], ids)

    def _without(self, ids: Tensor, drop: Bool[Tensor, "rows words"]) -> Tensor:
        order = drop.to(torch.uint8).argsort(dim=1, stable=True)
        return ids.masked_fill(drop, self.padding_id).gather(1, order)


class TextAugment:
    """Views of a caption as a string: stop words dropped, then some words exchanged for synonyms, swapped or dropped.

    The edits are those of `WordAugment`, on words between spaces; so words that no vocabulary knows take part, and synonyms may be new.

    Args:
        stop_words: dropped together; compared in lower case without punctuation.
        synonyms: what may stand in for a word, by the word in lower case. None: words are swapped and dropped only.
        stop: probability of dropping stop words.
        synonym, swap, delete: weights of the three edits, >= 0.
        share: of the words that are edited, in [0, 1].

    Returns:
        From `augment(text, generator=None)`: the changed text, with at least one word if it had one.

    Raises:
        ValueError: for a value out of range.

    Source:
        Fini et al. 2023, arXiv 2305.08675; Wei and Zou 2019 (EDA), arXiv 1901.11196.

    Examples:
        >>> augment = TextAugment(synonyms={"cat": ["kitten"]}, stop=1.0, swap=0, delete=0)
        >>> augment("A cat in the rain")
        'kitten rain'
    """

    def __init__(
        self,
        stop_words: Sequence[str] = STOP_WORDS,
        synonyms: Mapping[str, Sequence[str]] | None = None,
        *,
        stop: float = 0.8,
        synonym: float = 0.4,
        swap: float = 0.4,
        delete: float = 0.2,
        share: float = 0.1,
    ) -> None:
        self.synonyms = {word: tuple(others) for word, others in (synonyms or {}).items() if others}
        self.weights = _checked_weights(stop, synonym, swap, delete, share, bool(self.synonyms))
        self.stop_words, self.stop, self.share = frozenset(stop_words), stop, share

    def __call__(self, text: str, generator: torch.Generator | None = None) -> str:
        words = text.split()
        if not words:
            return text
        draw = _uniform((4, len(words)), torch.empty(0), generator)
        if draw[0, 0] < self.stop:
            words = [word for word in words if _plain(word) not in self.stop_words] or words
        edit = int(
            torch.bucketize(
                draw[1, 0] * sum(self.weights), torch.tensor(self.weights[:2]).cumsum(0), right=True
            )
        )
        count = max(1, round(self.share * len(words))) if self.share else 0
        order, pick = draw[2, : len(words)], draw[3].tolist()
        if edit == 0:
            known = [place for place in order.argsort().tolist() if _plain(words[place]) in self.synonyms]
            for place in known[:count]:
                others = self.synonyms[_plain(words[place])]
                words[place] = others[int(pick[place] * len(others))]
        elif edit == 1:
            for turn in range(min(count, len(words) - 1)):
                one, other = int(order[turn] * len(words)), int(pick[turn] * len(words))
                words[one], words[other] = words[other], words[one]
        else:
            stays = int(order.argmax())
            words = [word for place, word in enumerate(words) if place == stays or order[place] >= self.share]
        return " ".join(words)


class CaptionViews:
    """Views of captions by sample id, edited as they were written and only then turned into word ids.

    Args:
        captions: by sample id.
        vocabulary: of the word ids.
        augment: text, generator -> text; default: `TextAugment()`.
        views: of each caption, >= 1.

    Examples:
        >>> vocabulary = WordVocabulary(["cat", "red"], max_words=2)
        >>> views = CaptionViews(["the cat"], vocabulary, TextAugment(stop=1.0), views=2)
        >>> views.of_ids(torch.tensor([0])).tolist()
        [[[3, 0]], [[3, 0]]]
    """

    def __init__(
        self,
        captions: Sequence[str],
        vocabulary: WordVocabulary,
        augment: Callable[[str, torch.Generator | None], str] | None = None,
        views: int = 2,
    ) -> None:
        if views < 1:
            raise ValueError(f"views must be >= 1, got {views}")
        self.captions, self.vocabulary, self.views = captions, vocabulary, views
        self.augment = augment if augment is not None else TextAugment()

    def of_ids(
        self, ids: Int[Tensor, " batch"], generator: torch.Generator | None = None
    ) -> Int[Tensor, "views batch words"]:
        """Views of the captions of some samples; a loop over them in Python, for they are strings."""
        texts = [self.captions[sample] for sample in ids.tolist()] * self.views
        encoded = self.vocabulary.encode([self.augment(text, generator) for text in texts])
        return encoded.to(ids.device).unflatten(0, (self.views, len(ids)))


def _checked_weights(
    stop: float, synonym: float, swap: float, delete: float, share: float, synonyms: bool
) -> tuple[float, float, float]:
    for name, value in (("stop", stop), ("share", share)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    weights = (float(synonym) if synonyms else 0.0, float(swap), float(delete))
    if min(synonym, swap, delete) < 0 or sum(weights) <= 0:
        raise ValueError(
            f"synonym, swap and delete must be >= 0 and one that applies > 0, got {synonym}, {swap}, {delete}"
        )
    return weights


def _swapped(ids: Tensor, length: Tensor, count: Tensor, generator: torch.Generator | None) -> Tensor:
    for turn in range(int(count.max())):
        place = (_uniform((len(ids), 2), ids, generator) * length).long()
        # A row that is done swaps a word with itself.
        place = torch.where(turn < count, place, place[:, :1])
        ids = ids.scatter(1, place, ids.gather(1, place.flip(1)))
    return ids


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=device).to(like.device)


def _plain(word: str) -> str:
    return " ".join(words_of(word))
