"""A LaMP with random weights and small made-up clips, for tests of what people do with a trained one."""

import json
from pathlib import Path

import numpy as np
import torch

from coloss.data import Skeleton
from coloss.motion.lamp_model import Lamp, skeleton_record
from coloss.train import save_model
from coloss.train.run_folder import claim_folder

BODY = Skeleton(
    (-1, 0, 0, 0, 0, 1, 2),
    ("hips", "left_hip", "right_hip", "left_shoulder", "right_shoulder", "left_foot", "right_foot"),
    feet=(5, 5, 6, 6),
    face=(2, 1, 4, 3),
)
TINY = {
    "tokenizer": {"width": 8, "depth": 1, "down": 2, "codes": 8, "code_dim": 4},
    "evaluator": {"embed_dim": 4, "conv_width": 4, "motion_hidden": 4, "text_hidden": 4, "word_dim": 4},
    "text": {"dim": 8, "depth": 1, "heads": 2},
    "pretraining": {"dim": 8, "layers": 2, "heads": 2, "embedding_dim": 4},
    "generator": {"dim": 8, "depth": 1, "heads": 2},
    "condition": {"dim": 8},
}


def walk(frames, seed, fps=15.0):
    """A stiff body that goes ahead at a speed of its own and shakes a little."""
    generator = np.random.default_rng(seed)
    pose = np.array(
        [[0, 1, 0], [0.1, 0.9, 0], [-0.1, 0.9, 0], [0.2, 1.4, 0], [-0.2, 1.4, 0], [0.1, 0, 0], [-0.1, 0, 0]]
    )
    clip = np.repeat(pose[None], frames, axis=0) + 0.02 * generator.normal(size=(frames, 7, 3))
    clip[..., 2] += (np.arange(frames) / fps)[:, None] * generator.uniform(0.2, 2)
    return clip.astype(np.float32)


def stored_lamp(folder: Path) -> Path:
    """A model with random weights, as a finished run stores it."""
    words = ["a", "person", "someone", "walks", "runs", "proudly"]
    motion = {
        "numbers": 6 * 7 + 5,
        "num_joints": 7,
        "rotations": False,
        "fps": 15.0,
        "contact_step": 0.03,
        "max_frames": 16,
        "composed": True,
        "skeleton": skeleton_record(BODY),
    }
    run = {
        "data": "made up",
        "seed": 0,
        "size": "small",
        "sizes": TINY,
        "motion": motion,
        "words": words,
        "max_words": 6,
        "sentences": ["a person walks", "someone runs"],
    }
    claim_folder(folder, run)
    torch.manual_seed(0)
    save_model(Lamp(json.loads(json.dumps(run))), folder / "model.safetensors")
    return folder
