"""Five small ideas for generative models: a cache of keys and values in a staircase of precisions, and four beside it.

Fu Li 2024, arXiv 2410.18441, proposes them without measurements; what is not published in a form that can be built is a project definition.

    SAQ, staircase adaptive quantisation of the cache     `StaircaseKVCache`, `StaircaseCache`, `cached_loss` (levels reconstructed)
    CEHPO, hyper-parameters by the cross-entropy method    `coloss.train.cross_entropy_search` (usual constants)
    SWE, sub-words by likelihood                           `coloss.data.likelihood_merges`, `viterbi_encode`, `LikelihoodSubwords` (project definition)
    rotary positions with a harmonic ALiBi                 `coloss.nn.rotary_alibi_bias`, `CausalLanguageModel(positions="rotary-harmonic")` (project definition)
    PrFlashAttention, sampled distances between blocks     `coloss.nn.sampled_block_attention`, `SampledBlockAttention` (project definition)

`coloss bench generative` measures the last four; their modules have the numbers.

The claim is about the first, at equal size: a model of two layers of 64 on tiny Shakespeare, 256 characters read through the cache, means of
five seeds, loss in nats a character above that of a float32 cache (2.0621), stored bits for each number with scales and zeros:

                                               at the end    on average    loss
    uniform 3 bits, groups of 32                  4.00          5.45      +0.0009
    uniform 3 bits, nested, groups of 32          4.00          5.45      +0.0003
    staircase 4 2 1, nested, groups of 16         3.50          5.41      -0.0006
    staircase 4 2 1, nested, groups of 32         2.50          4.53      -0.0001
    staircase 8 4 2, nested                       4.00          6.26      -0.0002
    staircase 8 4 2, as published                 4.00          6.26      +0.0013
    staircase 4 2, as published                   3.25          5.01      +0.0021
    uniform 2 bits / 4 bits                    3.00 / 5.00   4.57 / 6.33  +0.0061 / +0.0003

When it helps: with nested grids the staircase holds the loss at fewer bits than any uniform cache tried, one on
the nested grid included (0.0009 nats between them, 0.0004 to 0.0015). As published (requantising what comes
back on grids through the range's ends) it is worse than 3 bits for all tokens at the same final size.

When not: all differences are below 0.01 nats, and a small character model looks near: with all but the newest two or three chunks of 32 forgotten
its loss changes by +0.0014 (4.00 bits for each number of the text, in float16) and -0.0002 (6.00 bits). So what old tokens need here is little, and a
model that must find far tokens may say otherwise. Short texts: at the end of 32, 64 and 96 tokens the staircase in groups of 16 takes 6.00, 5.00
and 4.33 bits, 3 bits for all tokens 4.00; from 128 tokens on it takes no more.
"""

from coloss.compression.staircase_trial import staircase_against_uniform
from coloss.train import Claim, System

SYSTEM = System(
    slug="genai-optimization",
    title="The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI",
    paper="Li, 2024, arXiv 2410.18441",
    family="compression",
    acts_on=("batch", "model", "evaluation"),
    api=(
        "coloss.compression.StaircaseCache",
        "coloss.compression.QuantizedCache",
        "coloss.compression.StaircaseKVCache",
        "coloss.compression.quantize_groups",
        "coloss.compression.cached_loss",
        "coloss.train.cross_entropy_search",
        "coloss.data.LikelihoodSubwords",
        "coloss.data.likelihood_merges",
        "coloss.nn.rotary_alibi_bias",
        "coloss.nn.SampledBlockAttention",
    ),
    method="coloss.compression.QuantizedCache",
    kinds=("next-token",),
)

CLAIM = Claim(
    statement=(
        "With no more stored bits for each cached number, both on average over a text of 256 characters and at its end, a cache that gives older "
        "tokens fewer bits (4, 2, 1, on nested grids) leaves a character model a lower loss on test text than a cache of 3 bits for all "
        "of them; each is the best of its kind on validation text."
    ),
    metric="loss",
    direction="lower",
    baseline="uniform",
    method="staircase",
    trial=staircase_against_uniform,
    tried=(
        "Both kinds chosen alike before the claim ran, on validation text and models of seeds 100 and 101 (trained with batches of 8 for 300 steps): "
        "grids with the range's ends and nested bins, chunks of 32 or 16 tokens with groups of 16 or 32, within the bits that 3 bits take with chunks and groups of 32: 4.00 at the end, "
        "5.45 on average over all tokens (5.09 as counted then, after every eighth); chunks of 64 take more on average. Uniform: 1, 2, 3 bits, and 2 and 3 or 2 and 4 bits "
        "by layer; loss above float32's, mean of both seeds: 3 bits +0.0008 (ends) and +0.0013 (bins), 2 bits +0.0048 and +0.0061 in groups of 16, "
        "1 bit +0.028 at best, by layer +0.0030 at best. Staircases on nested grids: 4 2 1 in groups of 16 0.0000 and of 32 +0.0002, 4 4 2 +0.0002, "
        "4 3 2 +0.0001, 4 2 +0.0002; with the published grid 4 2 +0.0017, 4 4 2 +0.0016. The published levels 8 4 2 take 4.00 bits at the "
        "end but 5.88 on average: -0.0003 on nested grids, +0.0014 on published ones, so at the same final size the published form lost to 3 bits. "
        "Forgetting all but the newest 65 to 96 tokens cost nothing on validation text (-0.0005), all but the newest 33 to 64 +0.0017."
    ),
)
