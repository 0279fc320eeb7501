"""Parity with the originals' own code, which is fetched into a temporary folder; nothing of it is kept or imported.

hpsv2 1.2.0 lacks its tokenizer's vocabulary, which open_clip has; its package file imports modules that no score
needs. image-reward 1.5 imports names that transformers 5 dropped and fairscale's checkpointing; both are stood in for
by what they did (head pruning is never used in a score).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from reward_scorers.clip import HPSv2Scorer
from reward_scorers.imagereward import ImageRewardScorer
from reward_scorers.images import to_rgb
from tests.reward_scorers.small import MODES, PROMPTS, SIZES, TEXT, TINY, VISION, noise, write_imagereward

pytestmark = pytest.mark.slow

HPS = """
import importlib, json, sys, types
from pathlib import Path
import torch
from PIL import Image
root, model_name, weights, listing, out = sys.argv[1:]
package = types.ModuleType("hpsv2"); package.__path__ = [root + "/hpsv2"]; sys.modules["hpsv2"] = package
oc = importlib.import_module("hpsv2.src.open_clip")
model, _, preprocess = oc.create_model_and_transforms(
    model_name, None, precision="fp32", device="cpu", light_augmentation=True, output_dict=True)
model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["state_dict"])
model.eval()
tokenize, scores = oc.get_tokenizer(model_name), []
with torch.no_grad():
    for file, prompt in json.loads(Path(listing).read_text()):
        outputs = model(preprocess(Image.open(file))[None], tokenize([prompt]))
        scores.append(torch.diagonal(outputs["image_features"] @ outputs["text_features"].T)[0].item())
Path(out).write_text(json.dumps(scores))
"""

IMAGE_REWARD = """
import importlib, json, sys, types
from pathlib import Path
import torch, transformers.modeling_utils as mu, transformers.pytorch_utils as pu
from transformers import BertTokenizer
root, weights, listing, words, vision, text, out = sys.argv[1:]
for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
    if not hasattr(mu, name):
        setattr(mu, name, getattr(pu, name, None))
for name in ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint", "fairscale.nn.checkpoint.checkpoint_activations"):
    sys.modules[name] = types.ModuleType(name)
sys.modules[name].checkpoint_wrapper = lambda module, *rest, **more: module
package = sys.modules["ImageReward"] = types.ModuleType("ImageReward")
package.__path__ = [root + "/ImageReward"]
for folder in ("models", "models/BLIP"):
    inner = sys.modules["ImageReward." + folder.replace("/", ".")] = types.ModuleType(folder)
    inner.__path__ = [root + "/ImageReward/" + folder]
whole = sys.modules["ImageReward.models.BLIP.blip_pretrain"] = types.ModuleType("blip_pretrain")
whole.BLIP_Pretrain = None  # of fixed sizes; its parts are put together below
own = importlib.import_module("ImageReward.ImageReward")
med, vit = (importlib.import_module("ImageReward.models.BLIP." + name) for name in ("med", "vit"))
med.BertModel.init_weights = lambda self: None
med.BertModel.get_head_mask = lambda self, mask, count, *rest: [None] * count
med.BertModel.invert_attention_mask = lambda self, mask: (1.0 - mask[:, None, None, :].float()) * -10000.0
v, t = json.loads(vision), json.loads(text)
config = med.BertConfig(vocab_size=30524, **t)
config.encoder_width, config.add_cross_attention, config._attn_implementation = v["hidden_size"], True, "eager"
bert = med.BertModel(config=config, add_pooling_layer=False).eval()
wide = v["hidden_size"]
eyes = vit.VisionTransformer(img_size=v["image_size"], patch_size=v["patch_size"], embed_dim=wide,
    depth=v["num_hidden_layers"], num_heads=v["num_attention_heads"], mlp_ratio=v["intermediate_size"] / wide).eval()
head = own.MLP(t["hidden_size"]).eval()
state = torch.load(weights, weights_only=True)
for module, prefix in ((bert, "blip.text_encoder."), (eyes, "blip.visual_encoder."), (head, "mlp.")):
    given = {key[len(prefix):]: value for key, value in state.items() if key.startswith(prefix)}
    given = {key: value for key, value in given.items() if not key.endswith("position_ids")}
    missing, unexpected = module.load_state_dict(given, strict=False)
    assert not unexpected and all(key.endswith("position_ids") for key in missing), (missing, unexpected)
reward = types.SimpleNamespace(
    blip=types.SimpleNamespace(visual_encoder=eyes, text_encoder=bert, tokenizer=BertTokenizer.from_pretrained(words)),
    preprocess=own._transform(v["image_size"]), mlp=head, device="cpu",
    mean=0.16717362830052426, std=1.0333394966054072)
with torch.no_grad():
    scores = [own.ImageReward.score(reward, prompt, file) for file, prompt in json.loads(Path(listing).read_text())]
Path(out).write_text(json.dumps(scores))
"""


def fetched(requirement: str, folder: Path) -> Path:
    """A published wheel, unpacked."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "-q", requirement, "-d", str(folder)],
        capture_output=True,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"{requirement} cannot be fetched here")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder / "code")
    return folder / "code"


@pytest.fixture(scope="module")
def hpsv2_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    code = fetched("hpsv2==1.2.0", tmp_path_factory.mktemp("hpsv2"))
    clip = code / "hpsv2" / "src" / "open_clip"
    shutil.copy(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz", clip)
    (clip / "model_configs" / "tiny-original.json").write_text(json.dumps(TINY))
    return code


def images(folder: Path, count: int, sizes: Sequence[tuple[int, int]]) -> list[tuple[str, str]]:
    """Files of several sizes and modes, as the scorers decode them, each with a prompt."""
    rows = []
    for number in range(count):
        file = folder / f"{number}.tif"
        to_rgb(noise(sizes[number % len(sizes)], number).convert(MODES[number % len(MODES)])).save(file)
        rows.append((str(file), PROMPTS[number % len(PROMPTS)]))
    (folder / "list.json").write_text(json.dumps(rows))
    return rows


def original(script: str, *arguments: object, timeout: int = 5400) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def compare_hpsv2(code: Path, folder: Path, model: str, ours: str, rows: list[tuple[str, str]], weights: Path) -> float:
    original(HPS, code, model, weights, folder / "list.json", folder / "scores.json")
    expected = torch.tensor(json.loads((folder / "scores.json").read_text()))
    scorer = HPSv2Scorer("2.1", str(weights), model=ours)
    images = [Image.open(file) for file, _ in rows]
    prompts = [prompt for _, prompt in rows]
    starts = range(0, len(rows), 10)
    scores = torch.cat([scorer.score_images(images[i : i + 10], prompts[i : i + 10]) for i in starts])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    return (scores - expected).abs().max().item()


def test_hpsv2s_own_code_on_100_images_with_a_reduced_model(hpsv2_code: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny-ours.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "tiny-ours.json")
    torch.manual_seed(0)
    weights = tmp_path / "weights.pt"
    torch.save({"state_dict": open_clip.create_model("tiny-ours").state_dict()}, weights)
    rows = images(tmp_path, 105, SIZES)
    worst = compare_hpsv2(hpsv2_code, tmp_path, "tiny-original", "tiny-ours", rows, weights)
    print(f"hpsv2, reduced depth, {len(rows)} images: {worst:.1e}")


def test_hpsv2s_own_code_on_100_images_with_vit_h(hpsv2_code: Path, tmp_path: Path) -> None:
    """The published size, random weights: some 6 GB, and 20 minutes or more on one core."""
    torch.manual_seed(0)
    weights = tmp_path / "weights.pt"
    torch.save({"state_dict": open_clip.create_model("ViT-H-14").state_dict()}, weights)
    count = int(os.environ.get("ORIGINALS_IMAGES", "100"))
    rows = images(tmp_path, count, [(224, 224), (512, 512), (97, 31), (640, 480)])
    worst = compare_hpsv2(hpsv2_code, tmp_path, "ViT-H-14", "ViT-H-14", rows, weights)
    print(f"hpsv2, ViT-H-14, {len(rows)} images: {worst:.1e}")


def test_imagerewards_own_code_on_100_pairs(tmp_path: Path) -> None:
    """Its own steps and `score`, on its own BLIP at a reduced depth."""
    code = fetched("image-reward==1.5", tmp_path)
    checkpoint, tokenizer = write_imagereward(tmp_path)
    scorer = ImageRewardScorer(str(checkpoint), str(tokenizer), vision=VISION, text=TEXT)
    rows = images(tmp_path, 105, SIZES)
    original(IMAGE_REWARD, code, checkpoint, tmp_path / "list.json", tokenizer, json.dumps(VISION), json.dumps(TEXT),
             tmp_path / "scores.json")  # fmt: skip
    expected = torch.tensor(json.loads((tmp_path / "scores.json").read_text()))
    scores = scorer.score_images([Image.open(file) for file, _ in rows], [prompt for _, prompt in rows])
    assert scores.std() > 0.1 and scores.abs().max() < 10
    print(
        f"image-reward, reduced depth, {len(rows)} pairs: {(scores - expected).abs().max():.1e} of {scores.std():.2f}"
    )
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
