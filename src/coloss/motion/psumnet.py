"""Recognises actions from skeletons with one network for four modalities, and smaller ones for arms and legs.

PSUMNet: Trivedi and Sarvadevabhatla, 2022, arXiv 2208.05775. The usual way to better scores is four networks: on joints, on bones, and on
the steps of both from frame to frame. Here the four are twelve channels of one network (`unify_modalities`), and further networks see the
arms and the legs alone (`streams_of_parts`), in the frame of the whole body. Scores are added (`fuse_scores`) with weights from validation
data (`fit_fusion_weights`; the authors' look chosen on their test parts). `PartStreamNet` takes clips of positions and does the rest
itself; `PartStreamEnsemble` is several of them as one model, to be trained apart (as published) or with one loss on the fused score.
`coloss run psumnet` does all of it for any skeleton: parts and parents come with the data.

When it helps: in place of four networks. Measured on MSR Action3D, test subjects new (5 seeds; 16 frames, three plain graph blocks of 16, 32
and 64 channels, 75 steps for each network at its own learning rate, validation subjects for the weights; processor seconds of a busy core):

                                           accuracy    parameters    training    a clip
    body, arms, legs, unified              59.4%       126,510       3.4 s       0.7 ms
    four networks, one modality each       55.4%       173,872       5.4 s       1.2 ms
    arms alone, unified                    56.2%       41,125        1.0 s       0.2 ms
    one network, unified modalities        43.3%       44,260        1.3 s       0.3 ms
    one network, joints                    44.4%       43,468        1.6 s       0.3 ms
    five neighbours by raw coordinates     57.2%
    neighbours by the untrained network    26.0%

So parts are better than four networks in each of the seeds, by 4 points, with 27% fewer parameters and 38% less training. The gain is in
the parts: the set's gestures are mostly of the arms, which alone beat the whole body by 13 points, and fitted weights (55.6% with equal
ones) keep the legs (29.9%) from doing harm. So short a training is for the comparison: no network alone reaches the neighbours by raw
coordinates.

When not: for the twelve channels alone. The claim, that one network on unified modalities beats one on joints, is inconclusive: -1.1 points,
95% interval -6.7 to +4.5, better in two of five seeds. Four networks are better than one by eleven points and more, so the modalities have
more to give than one network of this size takes from all channels at once.

`coloss run psumnet` (500 steps for each of the three networks, 32 frames, random stretches and small turns of the clips, one seed): 80.4%,
with equal weights 80.7%, the body alone 70.2%, the arms 78.5%, the legs 45.1%; weights 0.33, 1.55 and 0.12; neighbours by raw coordinates
57.1%, by the untrained networks 36.4%.

Batch norm has the statistics of each process; a person who is not in a clip (all zeros) enters neither them nor the mean. Graph branches
begin with a gain of 1e-6, so with weight decay and a small learning rate they may stay closed for long.
"""

from coloss.motion.part_stream_trial import unified_against_joints
from coloss.train.system import Claim, System

SYSTEM = System(
    slug="psumnet",
    title="PSUMNet: Unified Modality Part Streams are All You Need for Efficient Pose-based Action Recognition",
    paper="Trivedi and Sarvadevabhatla, 2022, arXiv 2208.05775",
    family="motion",
    acts_on=("batch", "model"),
    api=(
        "coloss.motion.PartStreamNet",
        "coloss.motion.PartStreamEnsemble",
        "coloss.motion.unify_modalities",
        "coloss.motion.PartStream",
        "coloss.motion.streams_of_parts",
        "coloss.motion.fuse_scores",
        "coloss.motion.fit_fusion_weights",
        "coloss.motion.ClipCrops",
        "coloss.motion.load_part_streams",
    ),
    recipe="coloss.motion.part_stream_recipe.train_part_streams",
)

CLAIM = Claim(
    statement=(
        "On MSR Action3D, test subjects new, one small graph network on the twelve channels of joints, bones and their steps recognises actions "
        "better than the same network on joints alone, after as many training steps"
    ),
    metric="accuracy",
    baseline="joints",
    method="unified modalities",
    trial=unified_against_joints,
    seeds=5,
    tried=(
        "learning rates 0.006, 0.012, 0.024 and 0.048 for each network on the validation persons of seeds 100 to 103: 0.024 was best for bones, "
        "the unified body and the legs, 0.012 for the others (joints 40.1%, unified body 44.5%); each trains at its own. The blocks are plain "
        "ones on a fixed graph with learnt weights, not those with learnt relations, which take four times as long on a CPU. Measured before "
        "with twice as many steps and one rate, 0.012, for all: joints 56.4%, unified 58.4%, 95% interval of the difference -1.1 to +5.0 points; "
        "with 450 steps (seeds 10 to 14) 67.3% and 68.5%"
    ),
)
