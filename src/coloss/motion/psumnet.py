"""Recognises actions from skeletons with one network for four modalities, and smaller ones for arms and legs.

PSUMNet: Trivedi and Sarvadevabhatla, 2022, arXiv 2208.05775. The usual way to better scores is four networks: on joints, on bones, and on
the steps of both from frame to frame. Here the four are twelve channels of one network (`unify_modalities`), and further networks see the
arms and the legs alone (`streams_of_parts`), in the frame of the whole body. Scores are added (`fuse_scores`) with weights from validation
data (`fit_fusion_weights`; the authors' look chosen on their test parts). `PartStreamNet` takes clips of positions and does the rest
itself; `PartStreamEnsemble` is several of them as one model, to be trained apart (as published) or with one loss on the fused score.
`coloss run psumnet` does all of it for any skeleton: parts and parents come with the data.

When it helps: in place of four networks, where a share of the parameters and of the time is worth some accuracy. Measured on MSR Action3D, test
subjects new (5 seeds; 16 frames, three graph blocks of 16, 32 and 64 channels with weights for all pairs of joints, 300 steps for each network
at its own learning rate on random stretches of the clips, validation subjects for the weights; processor seconds):

                                           accuracy    parameters    training    a clip
    four networks, one modality each       79.3%       173,872       15.8 s      0.9 ms
    body, arms, legs, unified              75.9%       126,510       9.9 s       0.5 ms
    one network, unified modalities        72.1%       44,260        3.9 s       0.2 ms
    arms alone, unified                    70.1%       41,125        2.9 s       0.1 ms
    one network, bones                     71.0%       43,468        3.9 s       0.2 ms
    one network, joints                    68.3%       43,468        4.1 s       0.2 ms
    five neighbours by raw coordinates     57.2%
    neighbours by the untrained network    26.0%

The claim, that one network on unified modalities beats one on joints, is inconclusive: +3.8 points, 95% interval -3.6 to +11.1, for 2% more
parameters. Arms and legs add 3.8 points to it (fitted weights; 74.8% with equal ones), less than three networks of other modalities do.

When not: for the highest accuracy, and where training is short. In weaker settings (fewer steps, whole clips, weights along bones alone) twelve
channels were no better than joints, or worse by 4.6 points; see what was tried. Legs alone have 39.6%: the set's gestures are mostly of the arms.

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
        "learning rates 0.003, 0.006, 0.012, 0.024 and 0.048 for each network on the validation persons of seeds 100 to 103: 0.006 was best for joints "
        "(70.3%), bones (77.1%) and the steps of both (77.6%, 77.9%), 0.012 for the unified body (77.8%), 0.024 for arms (80.8%) and legs (39.7%); each trains at its "
        "own, on random stretches of the clips that are turned a little, as published. The blocks have learnt weights between all pairs of "
        "joints, not relations that depend on the clip, which take four times as long on a CPU. Three weaker settings were measured before, test persons "
        "included: weights along bones alone, which labels can hardly teach, 75 steps, rates searched likewise, joints 44.4%, unified 43.3% (-6.7 to "
        "+4.5 points); the same with 150 steps and one rate for all, 56.4% and 58.4% (-1.1 to +5.0); and weights between all pairs, 150 steps, whole clips, "
        "65.2% and 60.7% (-7.7 to -1.5), where twelve channels fitted 200 clips too soon, which is why the published stretches and turns came in. On "
        "validation persons stretches and turns with 300 steps had been seen to bring both arms on by 7 points and more"
    ),
)
