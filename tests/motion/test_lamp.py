import torch

from coloss.lab.claims import verify
from coloss.motion.lamp_trial import ARMS, TOKENS, Steps, common_ground, judged_sentences


def test_the_claim_can_be_run(as_users_call: None) -> None:
    found = verify("lamp", smoke=True, seeds=1)
    assert set(ARMS) | {"clips as tokens", "real clips"} == set(found["arms"])
    for arm in found["arms"].values():
        assert {"r_precision@1", "fid", "multimodal_distance"} <= set(arm["metrics"])
    assert abs(found["arms"]["real clips"]["metrics"]["fid"]["mean"]) < 1e-3
    # What the smoke run stood on, kept: the arms train on pairs of action and style and on sentences that the test has not.
    ground = common_ground("compositional", Steps(2, 2, 2, 2, 2), 40)
    assert not set(ground.train.groups.tolist()) & set(ground.test.groups.tolist())
    trained = {sentence for several in ground.train.captions for sentence in several}
    assert not trained & set(judged_sentences(ground))
    assert ground.encoded.inputs.shape[1:] == torch.Size([TOKENS, 32])  # type: ignore[union-attr]
    assert len(ground.encoded) == len(ground.train)
