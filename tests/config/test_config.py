"""Config files: what they mean, and one clear line for each mistake."""

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guided_diffusion.config import (
    AutoencoderConfig,
    ClassifierConfig,
    Config,
    DatasetConfig,
    DiffusionConfig,
    LatentConfig,
    LatentUNetConfig,
    NetworkConfig,
    ScheduleConfig,
    SpeedConfig,
    TrainingConfig,
    TrainingParams,
    UserError,
    load_config,
    load_training_config,
    pixel_settings,
    to_yaml_dict,
)

CONFS = Path(__file__).parents[2] / "confs"

USERS_FILE = """
name: mine
model_path: data/pretrained/mine.pt
image_size: 64
num_channels: 64
num_head_channels: 32
attention_resolutions: 16  # numbers where text is meant
channel_mult: ''
timestep_respacing: 250
learn_sigma: true
class_cond: false
classifier_scale: 4.0
lr_kernel_n_std: 2
num_samples: 100
show_progress: true
use_ddim: false
latex_name: RePaint
method_name: Repaint
n_jobs: 1
print_estimated_vars: true
inpa_inj_sched_prev_cumnoise: false
respace_interpolate: false
seed: 5
schedule_jump_params:
  t_T: 250
  n_sample: 1
  jump_length: 10
  jump_n_sample: 10
data:
  eval:
    faces:
      ds_conf: {name: faces}
      mask_loader: true
      gt_path: gts
      mask_path: masks
      image_size: 64
      class_cond: false
      deterministic: true
      random_crop: false
      random_flip: false
      return_dict: true
      drop_last: false
      batch_size: 1
      return_dataloader: true
      offset: 0
      max_len: 100
      paths:
        srs: out/inpainted
        lrs: out/gt_masked
        gts: out/gt
        gt_keep_masks: out/gt_keep_mask
"""
GUIDANCE = ["classifier_path=c.pt", "classifier_attention_resolutions=16"]

TINY_NETWORKS = (Path(__file__).parents[1] / "golden" / "ldm" / "tiny_config.json").read_text()
LATENT_FILE = f"""
name: tiny
method: latent
model_path: tiny.ckpt
ddim_steps: 10
ddim_eta: 0.5
precision: fp16
n_jobs: 1  # of no effect, as with pixels
inpa_inj_sched_prev_cumnoise: false
latent: {TINY_NETWORKS}
data:
  eval:
    faces:
      gt_path: gts
      mask_path: masks
      return_dict: true
      class_cond: false
      paths:
        srs: out/inpainted
        lrs: out/gt_masked
        gt_keep_masks: out/gt_keep_mask
"""

TRAINING_FILE = """
image_size: 32
channel_mult: 1,2
num_channels: 32
data_dir: photos
log_dir: log/mine
batch_size: 8
total_steps: 1000
lr: 1e-4
ema_rate: 0.99,0.999
use_ddim: false
"""

DELETED = object()

# Those in C, where PyYAML has them: most of these tests' time is that of writing YAML.
FastLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FastDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def parsed(text: str) -> dict:
    return yaml.load(text, Loader=FastLoader)


def changed(text: str, path: str, value: object) -> str:
    """The YAML `text` with the key at the dotted `path` set, or DELETED."""
    tree = parsed(text)
    *sections, last = path.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[last] = value
    if value is DELETED:
        del node[last]
    return yaml.dump(tree, Dumper=FastDumper, sort_keys=False)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a config file, and give its path relative to the current folder, which is empty."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "mine.yml") -> str:
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write


def refusal(load, *args, **kwargs) -> str:
    """The one line that `load` refuses its arguments with."""
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# ---- What files mean ---------------------------------------------------------------------------


def test_users_file(write):
    config = load_config(write(USERS_FILE))
    assert config.source == "mine.yml"
    assert config == Config(
        source="the source does not count",
        name="mine",
        model_path="data/pretrained/mine.pt",
        network=NetworkConfig(
            image_size=64,
            model_channels=64,
            num_head_channels=32,
            attention_resolutions=(16,),
            channel_mult=(1, 2, 3, 4),
            learn_sigma=True,
        ),
        diffusion=DiffusionConfig(timestep_respacing="250"),
        schedule=ScheduleConfig(
            t_T=250,
            n_sample=1,
            jump_length=10,
            jump_n_sample=10,
            jump2_length=1,
            jump2_n_sample=1,
            jump3_length=1,
            jump3_n_sample=1,
            start_resampling=100_000_000,
        ),
        classifier=None,
        seed=5,
        dataset=DatasetConfig(
            name="faces",
            gt_path="gts",
            mask_path="masks",
            batch_size=1,
            offset=0,
            max_len=100,
            deterministic=True,
            random_flip=False,
            drop_last=False,
            inpainted_dir="out/inpainted",
            gt_masked_dir="out/gt_masked",
            gt_dir="out/gt",
            keep_mask_dir="out/gt_keep_mask",
        ),
    )


def test_defaults(write):
    config = load_config(write("model_path: m.pt", "short.yml"), require_data=False)
    assert asdict(config) == {
        "source": "short.yml",
        "name": "short",
        "model_path": "m.pt",
        "method": "pixel",
        "latent": None,
        "network": {
            "image_size": 64,
            "in_channels": 3,
            "model_channels": 128,
            "num_res_blocks": 2,
            "num_heads": 4,
            "num_heads_upsample": -1,
            "num_head_channels": -1,
            "attention_resolutions": (16, 8),
            "channel_mult": (1, 2, 3, 4),
            "dropout": 0.0,
            "class_cond": False,
            "num_classes": 1000,
            "use_checkpoint": False,
            "use_scale_shift_norm": True,
            "resblock_updown": False,
            "use_fp16": False,
            "use_new_attention_order": False,
            "learn_sigma": False,
        },
        "diffusion": {
            "diffusion_steps": 1000,
            "noise_schedule": "linear",
            "timestep_respacing": "",
            "predict_xstart": False,
            "rescale_timesteps": False,
            "rescale_learned_sigmas": False,
            "use_kl": False,
        },
        "clip_denoised": True,
        "use_ddim": False,
        "ddim_eta": 0.0,
        "schedule": None,
        "start_from": None,
        "merge_known": True,
        "time_shift": 1,
        "sampler": "repaint",
        "langevin": None,
        "classifier": None,
        "unguided": "",
        "cond_y": None,
        "show_progress": True,
        "device": None,
        "speed": {"fast": False, "precision": None, "compile": None, "cuda_graph": None},
        "seed": None,
        "paste_known": False,
        "samples_per_image": 1,
        "checkpoint_every": 300,
        "log_every": 0,
        "dataset": None,
    }


def test_speed_and_automatic_batch_size(write):
    overrides = ["fast=true", "precision=bf16", "compile=false", "cuda_graph=null"]
    config = load_config(write(USERS_FILE), [*overrides, "data.eval.faces.batch_size=auto"])
    assert config.speed == SpeedConfig(fast=True, precision="bf16", compile=False, cuda_graph=None)
    assert config.dataset.batch_size == "auto"


def test_drop_last_needs_a_batch_size_that_is_known_beforehand(write):
    overrides = ["data.eval.faces.batch_size=auto", "data.eval.faces.drop_last=true"]
    with pytest.raises(UserError, match="drop_last: found true; accepted: false with batch_size"):
        load_config(write(USERS_FILE), overrides)


def test_a_dataset_of_another_name_on_the_command_line_is_explained(write):
    with pytest.raises(UserError, match=r"\(faces, NAME\).*with --set, write data.eval.faces, as"):
        load_config(write(USERS_FILE), ["data.eval.NAME.fit=region"])


TYPED = [
    *(
        "[1].jpg",
        "[1]",
        "my: photo.jpg",
        "@me.jpg",
        "!important.jpg",
        "!x y.jpg",
        "%p.jpg",
        "it's.jpg",
    ),
    *("'q'.jpg", "'q' #1.jpg", '"', '"q"uote.jpg', " #1.jpg", "#1.jpg", "a #1.png", "photos #2/x"),
    *("*.jpg", "&a.jpg", "&a b.jpg", "{a}.jpg", "{a: b}", "- x.jpg", "-", "? y.jpg", "?", ": z"),
    *("--- t.jpg", "---", "... t.jpg", "|", "> x.jpg", "`t`.jpg", "a: [", "[", "{", "]", "}", ","),
    *("a\nb.jpg", "a\tb.jpg", "\tb.jpg #1", "<<", "=", "a=b.jpg", "null #1", "5", "1.10", "no"),
    *("null.jpg", "C:\\me.jpg", "me.jpg:", "a\x07.jpg", "Zoë [2].jpg", "名前: #1.jpg"),
]


@pytest.mark.parametrize("text", TYPED, ids=repr)
@pytest.mark.parametrize("key", ["data.eval.faces.gt_path", "start_from.path", "name"])
def test_a_text_on_the_command_line_is_taken_as_it_is_typed(write, key, text):
    config = load_config(write(USERS_FILE), [f"{key}={text}", "start_from.t=9"])
    found = {"data.eval.faces.gt_path": config.dataset.gt_path, "name": config.name}
    assert found.get(key, config.start_from.path) == text


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('"x.jpg"', "x.jpg"),
        ("'x.jpg'", "x.jpg"),
        ("'it''s #1.jpg'", "it's #1.jpg"),
        ('"a\\u00e9.jpg"', "aé.jpg"),
        (" '[1].jpg' ", "[1].jpg"),
        (" me.jpg ", "me.jpg"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'null'", "null"),
        ("a#1.jpg", "a#1.jpg"),
    ],
)
def test_a_text_on_the_command_line_in_yamls_own_words(write, text, path):
    config = load_config(write(USERS_FILE), [f"start_from.path={text}", "start_from.t=9"])
    assert config.start_from.path == path


def test_lists_and_maps_on_the_command_line_are_yamls(write):
    paths = "data.eval.faces.paths={srs: a, lrs: b, gt_keep_masks: '[c]'}"
    config = load_config(write(USERS_FILE), [paths, "attention_resolutions=[16, 8]"])
    assert (config.dataset.inpainted_dir, config.dataset.keep_mask_dir) == ("a", "[c]")
    assert config.network.attention_resolutions == (16, 8)
    paths = "data.eval.faces.paths=srs: photos #2"
    assert "' #' is a comment in YAML" in refusal(load_config, write(USERS_FILE), [paths])


def test_whole_photos_are_not_mirrored(write):
    assert load_config(write(USERS_FILE), ["data.eval.faces.fit=region"]).dataset.fit == "region"
    overrides = ["data.eval.faces.fit=region", "data.eval.faces.random_flip=true"]
    with pytest.raises(UserError, match="random_flip: found true; accepted: false with fit: reg"):
        load_config(write(USERS_FILE), overrides)


def test_dataset_defaults(write):
    text = USERS_FILE
    for key in ("batch_size", "offset", "max_len", "deterministic", "random_flip", "drop_last"):
        text = changed(text, f"data.eval.faces.{key}", DELETED)
    dataset = load_config(write(changed(text, "data.eval.faces.paths.gts", DELETED))).dataset
    assert (dataset.batch_size, dataset.offset, dataset.max_len) == (1, 0, None)
    assert (dataset.deterministic, dataset.random_flip, dataset.drop_last) == (True, False, False)
    assert (dataset.mask_convention, dataset.fit, dataset.gt_dir) == ("keep", "crop", None)


@pytest.mark.parametrize(
    ("size", "mult"),
    [
        (512, (0.5, 1, 1, 2, 2, 4, 4)),
        (256, (1, 1, 2, 2, 4, 4)),
        (128, (1, 1, 2, 3, 4)),
        (64, (1, 2, 3, 4)),
    ],
)
def test_channel_mult_by_image_size(write, size, mult):
    overrides = [f"image_size={size}", f"data.eval.faces.image_size={size}"]
    assert load_config(write(USERS_FILE), overrides).network.channel_mult == mult


def test_classifier(write):
    path = write(USERS_FILE)
    expected = ClassifierConfig(
        scale=4.0,
        path="c.pt",
        use_fp16=False,
        width=128,
        depth=2,
        attention_resolutions=(16,),
        use_scale_shift_norm=True,
        resblock_updown=True,
        pool="attention",
    )
    assert load_config(path, GUIDANCE).classifier == expected
    assert load_config(path, [*GUIDANCE, "classifier_scale=0"]).classifier is None
    assert load_config(path, [*GUIDANCE, "classifier_path=null"]).classifier is None


@pytest.mark.parametrize(
    ("line", "respacing"),
    [
        (None, "50"),  # left out: respace to t_T
        ("''", ""),
        ('""', ""),
        ("", ""),
        ("100", "100"),
        ("'25,50,100'", "25,50,100"),
        ("25, 50", "25, 50"),
        ("ddim50", "ddim50"),
    ],
)
def test_timestep_respacing(write, line, respacing):
    text = changed(USERS_FILE, "timestep_respacing", DELETED)
    if line is not None:
        text += f"timestep_respacing: {line}\n"
    config = load_config(write(text), ["schedule_jump_params.t_T=50"])
    assert config.diffusion.timestep_respacing == respacing


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("name=007", "name", "007"),
        ("name=2024-01-05", "name", "2024-01-05"),
        ("name=1e3", "name", "1e3"),
        ("model_path=2024_01", "model_path", "2024_01"),
        ("model_path=yes", "model_path", "yes"),
        ("model_path='null'", "model_path", "null"),
        ("seed=null", "seed", None),
        ("seed=", "seed", None),
        ("seed=~", "seed", None),
        ("cond_y=999", "cond_y", 999),
        ("device=cuda:1", "device", "cuda:1"),
        ("show_progress=no", "show_progress", False),
        ("paste_known=True", "paste_known", True),
        ("inpa_inj_time_shift=0", "time_shift", 0),
        ("schedule_jump_params=null", "schedule", None),
    ],
)
def test_values_mean_what_they_say(write, override, field, value):
    assert getattr(load_config(write(USERS_FILE), [override]), field) == value


@pytest.mark.parametrize("rate", ["1e-4", "1E-4", "0.0001", "'1e-4'"])
def test_numbers_as_people_write_them(write, rate):
    text = changed(TRAINING_FILE, "lr", DELETED) + f"lr: {rate}\n"
    if "'" in rate:  # quoted: text
        assert "lr: found '1e-4'" in refusal(load_training_config, write(text))
    else:
        assert load_training_config(write(text)).training.lr == 1e-4


def test_whole_numbers_where_others_are_meant(write):
    config = load_config(write(USERS_FILE), [*GUIDANCE, "classifier_scale=2", "channel_mult=1"])
    assert config.classifier.scale == 2.0
    assert isinstance(config.classifier.scale, float)
    assert config.network.channel_mult == (1.0,)


def test_byte_order_mark_and_windows_lines(write):
    path = write("\ufeff" + USERS_FILE.replace("\n", "\r\n"))
    assert load_config(path).name == "mine"


def test_a_dataset_may_have_any_name(write):
    config = load_config(write(USERS_FILE.replace("faces:", "my.faces 2:")))
    assert config.dataset.name == "my.faces 2"
    assert config.dataset.inpainted_dir == "out/inpainted"


# ---- Latent diffusion --------------------------------------------------------------------------


def test_latent_file(write):
    config = load_config(write(LATENT_FILE))
    assert config == Config(
        source="",
        name="tiny",
        model_path="tiny.ckpt",
        method="latent",
        latent=LatentConfig(
            image_size=None,
            ddim_steps=10,
            unet=LatentUNetConfig(
                image_size=16,
                in_channels=7,
                out_channels=3,
                model_channels=32,
                attention_resolutions=(4, 2),
                num_res_blocks=1,
                channel_mult=(1, 2, 3),
                num_heads=4,
                resblock_updown=True,
            ),
            autoencoder=AutoencoderConfig(
                attn_type="none",
                double_z=False,
                z_channels=3,
                resolution=64,
                in_channels=3,
                out_ch=3,
                ch=32,
                ch_mult=(1, 2, 4),
                num_res_blocks=1,
                attn_resolutions=(),
                dropout=0.0,
                n_embed=256,
                embed_dim=3,
            ),
        ),
        network=None,
        diffusion=None,
        ddim_eta=0.5,
        schedule=None,
        classifier=None,
        speed=SpeedConfig(precision="fp16"),
        dataset=DatasetConfig(
            name="faces",
            gt_path="gts",
            mask_path="masks",
            inpainted_dir="out/inpainted",
            gt_masked_dir="out/gt_masked",
            keep_mask_dir="out/gt_keep_mask",
        ),
    )


PUBLISHED_LATENT = {
    "image_size": None,
    "ddim_steps": 50,
    "unet": {
        "image_size": 64,
        "in_channels": 7,
        "out_channels": 3,
        "model_channels": 256,
        "attention_resolutions": (8, 4, 2),
        "num_res_blocks": 2,
        "channel_mult": (1, 2, 3, 4),
        "num_heads": 8,
        "resblock_updown": True,
    },
    "autoencoder": {
        "attn_type": "none",
        "double_z": False,
        "z_channels": 3,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": (1, 2, 4),
        "num_res_blocks": 2,
        "attn_resolutions": (),
        "dropout": 0.0,
        "n_embed": 8192,
        "embed_dim": 3,
    },
}


def test_latent_defaults_are_the_published_model(write):
    config = load_config(write("method: latent\nmodel_path: m.ckpt"), require_data=False)
    assert asdict(config.latent) == PUBLISHED_LATENT
    assert (config.ddim_eta, config.network, config.diffusion) == (0.0, None, None)
    assert (config.schedule, config.start_from, config.start_path) == (None, None, None)


@pytest.mark.parametrize(
    ("overrides", "image_size", "known_from"),
    [([], 64, None), (["paste_known=true"], 64, 255), (["image_size=128"], 128, None)],
)
def test_what_a_config_says_of_pictures(write, overrides, image_size, known_from):
    text = changed(USERS_FILE, "data.eval.faces.image_size", DELETED)
    config = load_config(write(text), overrides)
    assert (config.image_size, config.known_from) == (image_size, known_from)


@pytest.mark.parametrize(
    ("overrides", "image_size"),
    [
        ([], None),
        (["image_size=null"], None),
        (["image_size=500"], 500),
        (["image_size=1"], 1),
        (["data.eval.faces.image_size=null"], None),
        (["image_size=96", "data.eval.faces.image_size=96"], 96),
        (["image_size=96", "data.eval.faces.fit=region"], 96),
    ],
)
def test_what_a_latent_config_says_of_pictures(write, overrides, image_size):
    config = load_config(write(LATENT_FILE), overrides)
    assert (config.image_size, config.known_from) == (image_size, 128)


COMMON = {  # keys that both methods have, beside those of the dataset
    *("name", "model_path", "method", "show_progress", "device", "fast", "precision", "compile"),
    *("cuda_graph", "seed", "samples_per_image", "checkpoint_every", "log_every", "ddim_eta"),
    "image_size",
}


def test_every_key_of_pixels_is_common_or_refused_by_name(write):
    file = write(USERS_FILE)
    tree = to_yaml_dict(load_config(file, [*GUIDANCE, "start_from.t=5"]))
    kept = {key: value for key, value in tree.items() if key in COMMON}
    kept |= {"data": tree["data"], "method": "latent"}
    assert load_config(write(yaml.safe_dump(kept))).image_size == 64
    for key in tree.keys() - COMMON - {"data"}:
        message = refusal(load_config, write(yaml.safe_dump(kept | {key: tree[key]})))
        assert f": {key}: method: latent " in message
        assert message.endswith(("; remove it", " instead"))


def test_every_key_of_a_dataset_is_for_both_methods(write):
    dataset = parsed(USERS_FILE)["data"]["eval"]["faces"]
    overrides = ["image_size=64", f"data.eval.faces={json.dumps(dataset)}"]
    overrides += ["data.eval.faces.fit=region", "data.eval.faces.mask_convention=fill"]
    expected = load_config(write(USERS_FILE), overrides[2:]).dataset
    assert load_config(write(LATENT_FILE), overrides).dataset == expected


UNET, VAE = "latent.unet", "latent.autoencoder"
LATENT_MISTAKES = [
    # keys of pixels
    ("schedule_jump_params", {"t_T": 5}, "schedule_jump_params: method: latent does not resample"),
    (
        "schedule_jump_params",
        None,
        "schedule_jump_params: method: latent does not resample; remove",
    ),
    ("schedule_jump_params", 5, "schedule_jump_params: method: latent does not resample"),
    ("start_from", {"t": 5}, "start_from: method: latent always starts from noise; remove it"),
    ("classifier_scale", 1.0, "classifier_scale: method: latent takes no guidance; remove it"),
    ("cond_y", 3, "cond_y: method: latent knows no classes; remove it"),
    ("num_channels", 256, "num_channels: method: latent takes latent.unet.model_channels instead"),
    ("num_res_blocks", 2, "method: latent takes latent.unet.num_res_blocks instead"),
    ("num_heads", 8, "method: latent takes latent.unet.num_heads instead"),
    ("channel_mult", "1,2", "method: latent takes latent.unet.channel_mult instead"),
    ("resblock_updown", True, "method: latent takes latent.unet.resblock_updown instead"),
    ("attention_resolutions", 8, "latent.unet.attention_resolutions (rates, not sides) instead"),
    ("dropout", 0.0, "dropout: method: latent has no such choice; remove it"),
    ("use_fp16", False, "use_fp16: method: latent takes precision: fp16 instead"),
    ("timestep_respacing", "250", "method: latent takes ddim_steps instead"),
    ("diffusion_steps", 1000, "method: latent has a diffusion process of its own; remove it"),
    ("use_ddim", True, "use_ddim: method: latent always takes DDIM's steps, as many as ddim_steps"),
    ("clip_denoised", False, "clip_denoised: method: latent never clamps; remove it"),
    ("paste_known", True, "paste_known: method: latent always keeps the known pixels exactly"),
    ("inpa_inj_sched_prev", True, "method: latent shows the known pixels to its network; remove"),
    ("inpa_inj_time_shift", 1, "method: latent never goes up in time; remove it"),
    ("lr", 0.1, "lr: a key for train.py alone; remove it here"),
    # unknown keys
    ("ddim_step", 50, "ddim_step: unknown key; the nearest known key is ddim_steps"),
    (f"{UNET}.num_chanels", 1, "latent.unet.num_chanels: unknown key; the nearest known key is nu"),
    (f"{UNET}.ch_mult", "1,2", "the nearest known key is latent.autoencoder.ch_mult"),
    ("latent.ddim_steps", 50, "the nearest known key is ddim_steps"),
    ("latent.unett", {}, "latent.unett: unknown key; the nearest known key is latent.unet"),
    ("embed_dim", 3, "the nearest known key is latent.autoencoder.embed_dim"),
    ("batch_size", 3, "the nearest known key is data.eval.faces.batch_size"),
    # wrong values
    ("method", "pixels", "method: found pixels; accepted: pixel or latent"),
    ("method", None, "method: found null; accepted: pixel or latent"),
    ("ddim_steps", "many", "ddim_steps: found many; accepted: a whole number from 1 to 1000"),
    ("image_size", "big", "found big; accepted: null or a whole number from 1 to 16384"),
    ("image_size", 0, "image_size: found 0; accepted: null or a whole number from 1 to 16384"),
    ("ddim_eta", -0.1, "ddim_eta: found -0.1; accepted: a number >= 0"),
    ("latent", 5, "latent: found 5; accepted: a map of keys"),
    (UNET, "big", "latent.unet: found big; accepted: a map of keys"),
    (f"{UNET}.attention_resolutions", [], "found a list; accepted: whole numbers >= 1"),
    (f"{UNET}.attention_resolutions", [4, "x"], "found a list; accepted: whole numbers >= 1"),
    (f"{UNET}.attention_resolutions", [[4], 2], "found a list; accepted: whole numbers >= 1"),
    (f"{UNET}.attention_resolutions", [4, None], "found a list; accepted: whole numbers >= 1"),
    (f"{UNET}.channel_mult", "", "channel_mult: found ''; accepted: whole numbers from 1 to 999"),
    (f"{UNET}.channel_mult", [1, 0.5], "channel_mult: found a list; accepted: whole numbers from"),
    (f"{UNET}.channel_mult", [0, 1], "channel_mult: found a list; accepted: whole numbers from"),
    (f"{VAE}.ch_mult", 1000, "ch_mult: found 1000; accepted: whole numbers from 1 to 999"),
    (f"{VAE}.attn_type", "vanilla", "attn_type: found vanilla; accepted: only none, because att"),
    (f"{VAE}.attn_resolutions", [16], "attn_resolutions: found a list; accepted: only [], bec"),
    (f"{VAE}.double_z", True, "double_z: found true; accepted: only false, because KL autoenc"),
    (f"{VAE}.in_channels", 1, "in_channels: found 1; accepted: 3 (red, green and blue)"),
    (f"{VAE}.out_ch", 4, "out_ch: found 4; accepted: 3 (red, green and blue)"),
    # combinations that cannot work
    (f"{UNET}.in_channels", 6, "latent.unet.in_channels: found 6; accepted: 7, for two latents of"),
    (f"{VAE}.embed_dim", 4, "latent.unet.in_channels: found 7; accepted: 9, for two latents of"),
    (f"{UNET}.out_channels", 4, "out_channels: found 4; accepted: 3, as latent.autoencoder.embed"),
    (f"{UNET}.image_size", 18, "latent.unet.image_size: found 18; accepted: multiples of 2**2"),
    (f"{UNET}.image_size", 20, None),
    (f"{UNET}.model_channels", 16, "model_channels: found 16; accepted: what makes [16, 32, 48]"),
    (f"{VAE}.ch", 40, "latent.autoencoder.ch: found 40; accepted: multiples of 32"),
    (f"{UNET}.num_heads", 3, "num_heads: found 3; accepted: divisors of [64, 96, 96]"),
    (f"{UNET}.num_heads", 64, "latent.unet.num_heads: found 64; accepted: divisors of"),
    (f"{UNET}.attention_resolutions", "32,16,8", "found 32,16,8; accepted: among [1, 2, 4]"),
    (f"{UNET}.attention_resolutions", "1", None),
    (f"{VAE}.z_channels", 8, None),
    (
        "data.eval.faces.image_size",
        64,
        "image_size: found 64; accepted: null, as image_size at the",
    ),
    ("data.eval.faces.fit", "region", "fit: found region; accepted: crop, or set image_size, the"),
    ("data.eval.faces.paths.srs", "gts", "srs: found gts; accepted: a folder apart from gt_path"),
    ("model_path", DELETED, "model_path: missing; accepted: a path"),
    ("data", DELETED, "data.eval: missing; accepted: exactly one dataset"),
]


@pytest.mark.parametrize(("path", "value", "fragment"), LATENT_MISTAKES)
def test_mistakes_in_latent_files(write, path, value, fragment):
    file = write(changed(LATENT_FILE, path, value))
    if fragment is None:  # a neighbour of a mistake, which is none
        assert load_config(file)
    else:
        message = refusal(load_config, file)
        assert message.startswith("mine.yml")
        assert fragment in message


def test_heads_divide_the_widths_where_attention_is_and_in_the_middle(write):
    overrides = [f"{UNET}.model_channels=32", f"{UNET}.channel_mult=1,2,3"]
    file = write(LATENT_FILE)
    assert load_config(file, [*overrides, f"{UNET}.attention_resolutions=4", f"{UNET}.num_heads=3"])
    message = refusal(
        load_config, file, [*overrides, f"{UNET}.attention_resolutions=2", f"{UNET}.num_heads=64"]
    )
    assert "accepted: divisors of [64, 96]" in message  # the level of rate 2, and the middle


def test_a_dataset_repeats_the_image_size_of_latents(write):
    overrides = ["image_size=96", "data.eval.faces.image_size=null"]
    message = refusal(load_config, write(LATENT_FILE), overrides)
    assert "data.eval.faces.image_size: found null; accepted: 96, as image_size at the" in message


ONLY_LATENT = "a key of method: latent alone; set that method, or remove it"
WITHOUT_LATENT = [
    ("ddim_steps", 50, f"ddim_steps: {ONLY_LATENT}"),
    ("latent", {"unet": {"num_heads": 8}}, f"latent: {ONLY_LATENT}"),
    ("latent", None, f"latent: {ONLY_LATENT}"),
    (
        "image_size",
        None,
        "image_size: found null; accepted: a whole number >= 1, or null with meth",
    ),
    ("ddim_step", 50, f"unknown key; the nearest known key is ddim_steps ({ONLY_LATENT})"),
    ("latnt", {"unet": {}}, f"unknown key; the nearest known key is latent ({ONLY_LATENT})"),
    ("embed_dim", 3, "the nearest known key is latent.autoencoder.embed_dim (a key of method: la"),
    ("num_head", 4, "unknown key; the nearest known key is num_heads"),
    ("data.eval.faces.num_heads", 4, "unknown key; the nearest known key is num_heads"),
    ("steps", 50, "unknown key; the nearest known key is diffusion_steps"),  # not ddim_steps
    ("data.eval.faces.image_size", None, "image_size: found null; accepted: a whole number >= 1"),
]


@pytest.mark.parametrize("method", [DELETED, "pixel"])
@pytest.mark.parametrize(("path", "value", "fragment"), WITHOUT_LATENT)
def test_keys_of_latents_need_the_method(write, method, path, value, fragment):
    text = USERS_FILE if method is DELETED else changed(USERS_FILE, "method", method)
    message = refusal(load_config, write(changed(text, path, value)))
    assert message.startswith("mine.yml, line ")
    assert fragment in message


@pytest.mark.parametrize("methods", [["latent"], ["pixel", "latent"]])
def test_the_method_may_be_given_on_the_command_line(write, methods):
    text = changed(LATENT_FILE, "method", DELETED)
    assert "a key of method: latent alone" in refusal(load_config, write(text))
    assert load_config(write(text), [f"method={method}" for method in methods]).latent


@pytest.mark.parametrize(
    ("key", "taken", "refused", "accepted"),
    [
        ("ddim_steps", [1, 1000], [0, 1001, -1, 1.5], "a whole number from 1 to 1000"),
        ("ddim_eta", [0, 1.5], [-0.1, float("inf")], "a number >= 0"),
        (f"{UNET}.num_res_blocks", [1, 100], [0, 101], "a whole number from 1 to 100"),
        (f"{VAE}.num_res_blocks", [1, 100], [0, 101], "a whole number from 1 to 100"),
        (f"{VAE}.n_embed", [1], [0], "a whole number >= 1"),
        (f"{VAE}.z_channels", [1], [0], "a whole number >= 1"),
        (f"{VAE}.resolution", [1, 100], [0], "a whole number >= 1"),
        (f"{VAE}.dropout", [0, 0.5], [1], "a number >= 0 and < 1"),
        (f"{VAE}.attn_resolutions", [[], ""], [16, "16,8"], "only []"),
        (f"{VAE}.attn_type", ["none"], [False, None], "only none"),
    ],
)
@pytest.mark.usefixtures("write")
def test_ranges_of_latent_keys(key, taken, refused, accepted):
    check_range(load_config, LATENT_FILE, key, taken, refused, accepted)


@pytest.mark.parametrize("line", ["[4, 2]", "'4,2'", "4,2", "4, 2", "['4', '2']", "\n- 4\n- 2"])
def test_lists_as_people_write_them(write, line):
    head = changed(TRAINING_FILE, "channel_mult", [1, 2, 2])
    config = load_training_config(write(f"{head}attention_resolutions: {line}\n"))
    assert config.network.attention_resolutions == (4, 2)
    assert config.network.channel_mult == (1.0, 2.0, 2.0)
    unet = load_config(write(LATENT_FILE), [f"{UNET}.attention_resolutions={line}"]).latent.unet
    assert unet.attention_resolutions == (4, 2)


def test_an_empty_list_is_that_of_the_image_size(write):
    assert load_config(write(USERS_FILE), ["channel_mult=[]"]).network.channel_mult == (1, 2, 3, 4)
    assert "ema_rate: found a list" in refusal(
        load_training_config, write(TRAINING_FILE), ["ema_rate=[]"]
    )


# ---- Overrides ---------------------------------------------------------------------------------


def test_overrides_win_in_order(write):
    overrides = ["schedule_jump_params.jump_n_sample=5", "seed=1", "seed=2", "name=x=y"]
    config = load_config(write(USERS_FILE), overrides)
    assert config.schedule == ScheduleConfig(t_T=250, n_sample=1, jump_length=10, jump_n_sample=5)
    assert (config.seed, config.name) == (2, "x=y")


def test_overrides_make_missing_maps(write):
    path = write(changed(USERS_FILE, "schedule_jump_params", DELETED))
    params = {"t_T": 20, "n_sample": 1, "jump_length": 5, "jump_n_sample": 2}
    overrides = [f"schedule_jump_params.{key}={value}" for key, value in params.items()]
    assert load_config(path, overrides).schedule == ScheduleConfig(**params)
    assert load_config(path, [f"schedule_jump_params={params}"]).schedule == ScheduleConfig(
        **params
    )


def test_an_overridden_map_is_replaced(write):
    path = write(changed(USERS_FILE, "schedule_jump_params.jump2_length", 7))
    override = "schedule_jump_params={t_T: 9, n_sample: 1, jump_length: 2, jump_n_sample: 2}"
    assert load_config(path, [override]).schedule.jump2_length == 1


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("seed", ["--set seed", "KEY=VALUE"]),
        ("=5", ["--set =5", "KEY=VALUE"]),
        ("seed=-1", ["mine.yml", "--set seed=-1: seed: found -1", ">= 0"]),
        ("sed=1", ["--set sed=1: sed: unknown key", "nearest known key is seed"]),
        ("seed.x=1", ["--set seed.x=1", "unknown key"]),
        ("seed=5 #x", ["--set seed=5 #x: seed: found '5 #x'; accepted: null or a whole number"]),
        ("image_size=[64", ["image_size: found '[64'; accepted: a whole number"]),
        ("attention_resolutions=[a]", ["found a list; accepted: whole numbers >= 1 with commas"]),
        ("data.eval.faces.gtpath=@me.jpg", ["nearest known key is data.eval.faces.gt_path"]),
        ("data.eval.faces.gt_path=null", ["gt_path: found null; accepted: a path"]),
        ("data.eval.faces.gt_path=", ["gt_path: found nothing; accepted: a path"]),
        ("schedule_jump_params={t_T: 5", ["--set schedule_jump_params={t_T: 5", "not valid YAML"]),
        ("data.eval.other.gt_path=x", ["data.eval: found 2 datasets (faces, other)"]),
        ("schedule_jump_params.jump_lenght=1", ["nearest", "schedule_jump_params.jump_length"]),
        ("schedule_jump_params.t_T=251", ["--set", "t_T: found 251", "at most 250"]),
    ],
)
def test_mistakes_in_overrides(write, override, fragments):
    message = refusal(load_config, write(USERS_FILE), [override])
    assert [fragment for fragment in fragments if fragment not in message] == []


# ---- Mistakes ----------------------------------------------------------------------------------

MISTAKES = [
    # unknown keys, at each level, and misplaced ones
    ("sed", 1, "sed: unknown key; the nearest known key is seed"),
    ("image_sise", 64, "image_sise: unknown key; the nearest known key is image_size"),
    ("batch_size", 4, "unknown key; the nearest known key is data.eval.faces.batch_size"),
    ("data.eval.faces.mask_path", "gts", "mask_path: found gts; accepted: masks in a folder"),
    ("gts", "out", "gts: unknown key; the nearest known key is data.eval.faces.paths.gts"),
    ("t_T", 5, "the nearest known key is schedule_jump_params.t_T"),
    ("schedule_jump_params.jumps", 5, "schedule_jump_params.jumps: unknown key; the nearest"),
    ("schedule_jump_parms", {"t_T": 5}, "the nearest known key is schedule_jump_params"),
    ("data.evl", {}, "data.evl: unknown key; the nearest known key is data.eval"),
    ("data.eval.faces.gtpath", "x", "the nearest known key is data.eval.faces.gt_path"),
    ("data.eval.faces.gts", "x", "the nearest known key is data.eval.faces.paths.gts"),
    ("data.eval.faces.paths.sr", "x", "the nearest known key is data.eval.faces.paths.srs"),
    ("classifier_pols", 1, "the nearest known key is classifier_pool"),
    ("lr", 0.1, "lr: a key for train.py alone"),
    # wrong types
    ("image_size", "big", "image_size: found big; accepted: a whole number >= 1"),
    ("image_size", "64", "image_size: found '64'; accepted: a whole number >= 1"),
    ("image_size", 64.0, "image_size: found 64.0; accepted: a whole number >= 1"),
    ("image_size", True, "image_size: found true; accepted: a whole number >= 1"),
    ("image_size", None, "image_size: found null; accepted: a whole number >= 1"),
    ("image_size", [64], "image_size: found a list; accepted: a whole number >= 1"),
    ("image_size", {"a": 64}, "image_size: found a map; accepted: a whole number >= 1"),
    ("use_fp16", 1, "use_fp16: found 1; accepted: true or false"),
    ("use_fp16", "false", "use_fp16: found 'false'; accepted: true or false"),
    ("dropout", True, "dropout: found true; accepted: a number >= 0 and < 1"),
    ("name", None, "name: found null; accepted: text"),
    ("name", ["a"], "name: found a list; accepted: text"),
    ("model_path", "", "model_path: found ''; accepted: a path"),
    ("model_path", "a\0b", "model_path: found 'a\\x00b'; accepted: a path"),
    ("name", "two\nlines\0", "name: found 'two\\nlines\\x00'"),
    ("attention_resolutions", "16,x", "attention_resolutions: found 16,x; accepted: whole"),
    ("attention_resolutions", "", "attention_resolutions: found ''; accepted: whole"),
    ("attention_resolutions", "0", "attention_resolutions: found '0'; accepted: whole"),
    ("channel_mult", "1,-2", "channel_mult: found 1,-2; accepted: '' or numbers > 0"),
    ("channel_mult", "1,,2", "channel_mult: found 1,,2; accepted: '' or numbers > 0"),
    ("schedule_jump_params", 5, "schedule_jump_params: found 5; accepted: a map"),
    ("data", "photos", "data: found photos; accepted: a map"),
    ("data.eval", ["faces"], "data.eval: found a list; accepted: a map"),
    ("data.eval.faces.paths", "out", "data.eval.faces.paths: found out; accepted: a map"),
    # out of range
    ("image_size", 10**30, f"image_size: found {10**30}"),
    ("dropout", float("nan"), "dropout: found .nan; accepted: a number"),
    ("noise_schedule", "sqrt", "noise_schedule: found sqrt; accepted: linear or cosine"),
    ("timestep_respacing", "many", "timestep_respacing: found many; accepted: '' (all steps)"),
    ("timestep_respacing", "10,", "timestep_respacing: found 10,; accepted: '' (all steps)"),
    ("timestep_respacing", "ddim", "timestep_respacing: found ddim; accepted: '' (all steps)"),
    ("timestep_respacing", None, "timestep_respacing: found null; accepted: '' (all steps)"),
    ("cond_y", 1000, "cond_y: found 1000; accepted: null or a whole number from 0 to 999"),
    ("cond_y", -1, "cond_y: found -1; accepted: null or a whole number from 0 to 999"),
    ("ddim_eta", -0.1, "ddim_eta: found -0.1; accepted: a number >= 0"),
    ("classifier_scale", float("inf"), "classifier_scale: found .inf; accepted: a number >= 0"),
    ("classifier_pool", "mean", "classifier_pool: found mean; accepted: attention or adaptive or"),
    ("seed", -1, "seed: found -1; accepted: null or a whole number >= 0 and < 2**62"),
    ("seed", 2**62, f"seed: found {2**62}; accepted: null or a whole number"),
    ("device", "gpu", "device: found gpu; accepted: null or cpu, cuda, cuda:N or mps"),
    # refused for now
    ("inpa_inj_sched_prev_cumnoise", True, "only false, because cumulative noise is not supported"),
    ("respace_interpolate", True, "because interpolated respacing is not supported"),
    ("data.eval.faces.random_crop", True, "only false, because random crops are not supported"),
    ("data.eval.faces.class_cond", True, "class_cond: found true; accepted: only false"),
    # missing
    ("model_path", DELETED, "model_path: missing; accepted: a path"),
    ("data", DELETED, "data.eval: missing; accepted: exactly one dataset"),
    ("data", {"eval": None}, "accepted: exactly one dataset"),
    ("data.eval.faces.gt_path", DELETED, "data.eval.faces.gt_path: missing; accepted: a path"),
    ("data.eval.faces.mask_path", DELETED, "data.eval.faces.mask_path: missing"),
    ("data.eval.faces.paths", DELETED, "data.eval.faces.paths.srs: missing"),
    ("data.eval.faces.paths.srs", DELETED, "data.eval.faces.paths.srs: missing"),
    ("data.eval.faces.paths.lrs", DELETED, "data.eval.faces.paths.lrs: missing"),
    ("data.eval.faces.paths.gt_keep_masks", DELETED, "data.eval.faces.paths.gt_keep_masks: miss"),
    ("schedule_jump_params.t_T", DELETED, "schedule_jump_params.t_T: missing"),
    ("schedule_jump_params.n_sample", DELETED, "schedule_jump_params.n_sample: missing"),
    ("schedule_jump_params.jump_length", DELETED, "schedule_jump_params.jump_length: missing"),
    ("schedule_jump_params.jump_n_sample", DELETED, "schedule_jump_params.jump_n_sample: missing"),
    # combinations that cannot work
    ("ddim_eta", 0.5, "ddim_eta: found 0.5; accepted: 0 without use_ddim: true, since it has no"),
    ("ddim_eta", 0, None),
    ("use_ddim", True, None),
    ("data.eval.other", {"gt_path": "x"}, "data.eval: found 2 datasets (faces, other)"),
    ("data.eval.other", None, "data.eval: found 2 datasets (faces, other)"),
    ("data.eval.faces.image_size", 128, "data.eval.faces.image_size: found 128; accepted: 64"),
    ("image_size", 96, "image_size: found 96; accepted: 64, 128, 256, 512, or any if channel_mult"),
    ("channel_mult", "1,1,1,1,1,1,1,1", "image_size: found 64; accepted: multiples of 2**7"),
    ("num_channels", 48, "num_channels: found 48; accepted: what makes [48, 96, 144, 192]"),
    ("channel_mult", "0.1,1", "num_channels: found 64; accepted: what makes [6, 64]"),
    ("channel_mult", "0.001,1", "num_channels: found 64; accepted: what makes [0, 64]"),
    ("num_head_channels", 96, "num_head_channels: found 96; accepted: divisors of [192, 256]"),
    ("num_head_channels", 128, "num_head_channels: found 128; accepted: divisors of [192, 256]"),
    ("schedule_jump_params.t_T", 251, "t_T: found 251; accepted: at most 250"),
    ("timestep_respacing", "", None),
    ("timestep_respacing", "ddim249", "t_T: found 250; accepted: at most 249"),
    ("timestep_respacing", "100,100", "t_T: found 250; accepted: at most 200"),
    ("timestep_respacing", "1001", "timestep_respacing: found '1001'; accepted: from 1 to 1000"),
    ("diffusion_steps", 249, "t_T: found 250; accepted: at most 249"),
    ("data.eval.faces.paths.lrs", "out/x/../inpainted", "lrs: found out/x/../inpainted; accepted"),
    ("data.eval.faces.paths.gt_keep_masks", "./out/gt", "its own; this is that of gts"),
    ("data.eval.faces.paths.srs", "gts", "srs: found gts; accepted: a folder apart from gt_path"),
    ("data.eval.faces.paths.srs", "gts/out", "accepted: a folder apart from gt_path"),
    ("data.eval.faces.paths.gts", "./masks/", "accepted: a folder apart from mask_path"),
    ("data.eval.faces.paths.gts", "masks2", None),
]


@pytest.mark.parametrize(("path", "value", "fragment"), MISTAKES)
def test_mistakes(write, path, value, fragment):
    file = write(changed(USERS_FILE, path, value))
    if fragment is None:  # a neighbour of a mistake, which is none
        assert load_config(file)
    else:
        message = refusal(load_config, file)
        assert message.startswith("mine.yml")
        assert fragment in message


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["classifier_width=48"], "classifier_width: found 48; accepted: what makes [48, 96,"),
        (["classifier_width=32"], "the widths of the levels with attention, multiples of 64"),
        (["image_size=32", "channel_mult='1,2'"], "image_size: found 32; accepted: 64, 128, 256"),
        (["num_head_channels=-1", "num_heads=3"], "num_heads: found 3; accepted: divisors of"),
        (
            ["num_head_channels=-1", "num_heads_upsample=5"],
            "num_heads_upsample: found 5; accepted: divisors of [192]",
        ),
        (["diffusion_steps=20", "schedule_jump_params=null"], "diffusion_steps: found 20"),
        (["timestep_respacing='0'", "schedule_jump_params=null"], "accepted: from 1 to 1000 steps"),
    ],
)
def test_combinations_that_cannot_work(write, overrides, fragment):
    file = write(changed(USERS_FILE, "data.eval.faces.image_size", DELETED))
    assert fragment in refusal(load_config, file, [*GUIDANCE, *overrides])


def test_schedule_above_the_steps_without_respacing(write):
    text = changed(USERS_FILE, "timestep_respacing", DELETED)
    message = refusal(load_config, write(text), ["schedule_jump_params.t_T=1001"])
    assert "schedule_jump_params.t_T: found 1001; accepted: at most 1000" in message


def test_a_single_step(write):
    overrides = ["timestep_respacing=1", "schedule_jump_params=null"]
    assert load_config(write(USERS_FILE), overrides).diffusion.timestep_respacing == "1"


def test_cosine_has_no_fewest_steps(write):
    overrides = ["noise_schedule=cosine", "diffusion_steps=20", "timestep_respacing=''"]
    config = load_config(write(USERS_FILE), [*overrides, "schedule_jump_params=null"])
    assert config.diffusion.diffusion_steps == 20


def test_results_beside_a_single_picture(write):
    Path("photo.png").touch()
    overrides = ["data.eval.faces.gt_path=photo.png"]
    assert load_config(write(USERS_FILE), overrides)
    overrides += ["data.eval.faces.paths.srs=."]
    assert "apart from gt_path" in refusal(load_config, write(USERS_FILE), overrides)


def test_a_mistake_names_its_line(write):
    assert refusal(load_config, write("name: a\nimage_size: x\n")).startswith("mine.yml, line 2:")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ["mine.yml: the file is empty"]),
        ("# nothing\n", ["mine.yml: the file is empty"]),
        ("null", ["mine.yml: the file is empty"]),
        ("- a\n- b\n", ["mine.yml: found a list; accepted: a map"]),
        ("just text", ["mine.yml: found just text; accepted: a map"]),
        ("a: [1, 2\nb: 3\n", ["mine.yml, line 2, column 2: not valid YAML"]),
        ("a: 1\n\tb: 2\n", ["mine.yml, line 2, column 1: not valid YAML"]),
        ("a: 1\n---\nb: 2\n", ["mine.yml, line 2", "not valid YAML"]),
        ("a: \x07", ["mine.yml: not valid YAML"]),
        ('a: "\\UFFFFFFFF"', ["mine.yml: not valid YAML"]),
        ("[" * 1500, ["mine.yml: not valid YAML"]),
        ("seed: 1\nname: a\nseed: 2\n", ["mine.yml, line 3: seed", "the same key as", "line 1"]),
        ("a: &x\n  b: *x\n", ["a: unknown key"]),
        ("data: &x\n  eval: *x\n", ["data.eval.eval.eval: unknown key"]),
        ("schedule_jump_params.t_T: 5", ["schedule_jump_params.t_T: unknown key"]),
        ("[1]: 2", ["unknown key"]),
        ("!!python/object:os.system {}: 2", ["unknown key"]),
        ('"a\\nb": 2', ["a b: unknown key"]),
        ("seed: 99" + "9" * 9000, ["seed: found 999"]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_files_that_are_no_config(write, text, fragments):
    message = refusal(load_config, write(text))
    assert [fragment for fragment in fragments if fragment not in message] == []
    assert len(message) < 300


def test_a_key_twice_in_a_section(write):
    text = USERS_FILE.replace("  n_sample: 1", "  n_sample: 1\n  t_T: 9")
    assert "schedule_jump_params.t_T: the same key as in mine.yml" in refusal(
        load_config, write(text)
    )


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yml").write_bytes("name: Zoë".encode("latin-1"))
    assert "missing.yml: cannot read" in refusal(load_config, str(tmp_path / "missing.yml"))
    assert f"{tmp_path}: cannot read" in refusal(load_config, str(tmp_path))
    assert "latin.yml: not a text file in UTF-8" in refusal(
        load_config, str(tmp_path / "latin.yml")
    )
    assert "cannot read" in refusal(load_config, "a\0b.yml")


# ---- Ranges ------------------------------------------------------------------------------------

COUNT, COUNT_OR_ZERO = "a whole number >= 1", "a whole number >= 0"
DEFAULT_OR_COUNT = "-1 or a whole number >= 1"
NULL_OR_COUNT = "null or a whole number >= 1"
SHARE, NOT_NEGATIVE = "a number >= 0 and < 1", "a number >= 0"
RANGES = [  # key, values at the edge that it takes, and beyond that it does not, what it accepts
    ("image_size", [512], [0, 2**63], COUNT),
    ("num_channels", [32], [0], COUNT),
    ("num_res_blocks", [1, 100], [0, 101], "a whole number from 1 to 100"),
    ("num_heads", [1], [0, -1], COUNT),
    ("num_heads_upsample", [-1, 1], [0, -2], DEFAULT_OR_COUNT),
    ("num_head_channels", [-1, 1], [0, -2], DEFAULT_OR_COUNT),
    ("attention_resolutions", [1], [0], "whole numbers >= 1"),
    ("dropout", [0, 0.99], [1, -0.01], SHARE),
    ("diffusion_steps", [21], [0], COUNT),
]
SAMPLING_RANGES = [
    ("channel_mult", ["", 0.5, 999], [0, -1, 1000], "'' or numbers > 0"),
    *[(f"schedule_jump_params.{key}", [1], [0], COUNT) for key in ("t_T", "n_sample")],
    *[(f"schedule_jump_params.jump{i}_length", [1], [0], COUNT) for i in ("", "2", "3")],
    *[(f"schedule_jump_params.jump{i}_n_sample", [1], [0], COUNT) for i in ("", "2", "3")],
    ("schedule_jump_params.start_resampling", [0], [-1], COUNT_OR_ZERO),
    ("data.eval.faces.batch_size", [1], [0], COUNT),
    ("data.eval.faces.offset", [0], [-1], COUNT_OR_ZERO),
    ("data.eval.faces.max_len", [None, 1], [0], NULL_OR_COUNT),
    ("classifier_scale", [0, 0.1], [-0.1, float("inf")], NOT_NEGATIVE),
    ("classifier_width", [64], [0], COUNT),
    ("classifier_depth", [1], [0], COUNT),
    ("cond_y", [None, 0, 999], [-1, 1000], "null or a whole number from 0 to 999"),
    ("seed", [None, 0, 2**62 - 1], [-1, 2**62], "null or a whole number >= 0 and < 2**62"),
    ("samples_per_image", [1, 10**6], [0, -1, 1.5, 10**6 + 1], "a whole number from 1 to 1000000"),
    ("checkpoint_every", [0, 0.5, 300], [-1, "often", float("inf")], NOT_NEGATIVE),
]
TRAINING_RANGES = [
    ("batch_size", [1], [0], COUNT),
    ("microbatch", [-1, 1], [0, -2], DEFAULT_OR_COUNT),
    ("lr", [1e-9], [0, -1, float("nan")], "a number > 0"),
    ("weight_decay", [0], [-0.1], NOT_NEGATIVE),
    ("ema_rate", [0, 0.99], [1, -0.1], "numbers >= 0 and < 1"),
    ("total_steps", [1], [0], COUNT),
    ("lr_anneal_steps", [0], [-1], COUNT_OR_ZERO),
    ("warmup_steps", [0], [-1], COUNT_OR_ZERO),
    ("grad_clip", [None, 0.1], [0], "null or a number > 0"),
    ("save_interval", [1], [0], COUNT),
    ("sample_interval", [0], [-1], COUNT_OR_ZERO),
    ("log_interval", [1], [0], COUNT),
    ("sample_number", [1], [0], COUNT),
    ("seed", [0, 2**62 - 1], [-1, 2**62], "a whole number >= 0 and < 2**62"),
]


def check_range(load, text: str, key: str, taken: list, refused: list, accepted: str) -> None:
    for value in taken:
        Path("taken.yml").write_text(changed(text, key, value))
        load("taken.yml")
    for value in refused:
        Path("refused.yml").write_text(changed(text, key, value))
        message = refusal(load, "refused.yml")
        assert f"{key}: found {yaml.safe_dump(value).split()[0]}; accepted: {accepted}" in message


@pytest.mark.usefixtures("write")
@pytest.mark.parametrize(("key", "taken", "refused", "accepted"), RANGES + SAMPLING_RANGES)
def test_ranges(key, taken, refused, accepted):
    text = changed(USERS_FILE, "data.eval.faces.image_size", DELETED)
    text = changed(text, "timestep_respacing", "")
    text = changed(text, "schedule_jump_params.t_T", 20)
    check_range(load_config, text, key, taken, refused, accepted)


@pytest.mark.usefixtures("write")
@pytest.mark.parametrize(("key", "taken", "refused", "accepted"), RANGES + TRAINING_RANGES)
def test_ranges_of_training(key, taken, refused, accepted):
    check_range(load_training_config, TRAINING_FILE, key, taken, refused, accepted)


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_pools(write, pool):
    config = load_config(write(USERS_FILE), [*GUIDANCE, f"classifier_pool={pool}"])
    assert config.classifier.pool == pool


# ---- Training ----------------------------------------------------------------------------------


def test_training_file(write):
    config = load_training_config(write(TRAINING_FILE, "small.yml"))
    assert config == TrainingConfig(
        source="",
        name="small",
        network=NetworkConfig(image_size=32, model_channels=32, channel_mult=(1.0, 2.0)),
        diffusion=DiffusionConfig(),
        training=TrainingParams(
            data_dir="photos",
            crop="center",
            scales=None,
            log_dir="log/mine",
            batch_size=8,
            microbatch=-1,
            lr=1e-4,
            weight_decay=0.0,
            ema_rate=(0.99, 0.999),
            total_steps=1000,
            lr_anneal_steps=0,
            warmup_steps=0,
            grad_clip=None,
            schedule_sampler="uniform",
            random_flip=True,
            use_bf16=False,
            save_interval=1000,
            sample_interval=1000,
            log_interval=10,
            sample_number=16,
        ),
        show_progress=True,
        device=None,
        seed=0,
    )
    assert load_training_config("small.yml", ["ema_rate=0.9"]).training.ema_rate == (0.9,)
    for scales in ("[1, 4]", "1,4", "'1,4.0'"):
        config = load_training_config("small.yml", ["crop=random", f"scales={scales}"])
        assert (config.training.crop, config.training.scales) == ("random", (1, 4))


@pytest.mark.parametrize(
    ("path", "value", "fragment"),
    [
        ("data_dir", DELETED, "data_dir: missing; accepted: a path"),
        ("log_dir", DELETED, "log_dir: missing"),
        ("use_fp16", True, "use_fp16: found true; accepted: false in training"),
        ("batch_size", DELETED, "batch_size: missing"),
        ("total_steps", DELETED, "total_steps: missing"),
        ("ema_rate", "0.9,1", "ema_rate: found 0.9,1; accepted: numbers >= 0 and < 1"),
        ("crop", "centre", "crop: found centre; accepted: center or random"),
        ("scales", "1,4", "scales: found 1,4; accepted: null without crop: random"),
        ("scales", "4,1", "scales: found 4,1; accepted: null or two numbers from 1 to 1000"),
        ("scales", "0.5,1", "scales: found 0.5,1; accepted: null or two numbers from 1 to 1000"),
        ("scales", "1,1001", "the smaller first, such as '1,4'"),
        ("scales", 2, "scales: found 2; accepted: null or two numbers"),
        ("scales", "1,2,4", "scales: found 1,2,4; accepted: null or two numbers"),
        ("scales", [1, "x"], "scales: found a list; accepted: null or two numbers"),
        ("schedule_sampler", "loss", "accepted: uniform or loss-second-moment"),
        ("seed", None, "seed: found null; accepted: a whole number >= 0"),
        ("num_channels", 40, "num_channels: found 40; accepted: what makes [40, 80]"),
        ("log_dir", "photos/log", "log_dir: found photos/log; accepted: a folder apart from data"),
        ("model_path", "m.pt", "model_path: a key for test.py alone"),
        ("data", {"eval": {}}, "data: a key for test.py alone"),
        ("schedule_jump_params", {"t_T": 5}, "schedule_jump_params: a key for test.py alone"),
        ("totl_steps", 5, "totl_steps: unknown key; the nearest known key is total_steps"),
        ("use_ddim", True, "use_ddim: found true; accepted: only false"),
        ("ddim_eta", 0.5, "ddim_eta: a key for test.py alone"),
        ("method", "latent", "method: found latent; accepted: only pixel, because train.py trains"),
        ("ddim_steps", 50, "ddim_steps: a key for test.py alone"),
        ("latent", {"unet": {}}, "latent: a key for test.py alone"),
    ],
)
def test_mistakes_in_training_files(write, path, value, fragment):
    message = refusal(load_training_config, write(changed(TRAINING_FILE, path, value)))
    assert message.startswith("mine.yml")
    assert fragment in message


def test_a_latent_file_is_no_training_file(write):
    message = refusal(load_training_config, write(LATENT_FILE))
    assert "method: found latent; accepted: only pixel, because train.py trains models" in message
    text = changed(TRAINING_FILE, "method", "pixel")
    assert load_training_config(write(text)) == load_training_config(write(TRAINING_FILE))


# ---- Round trip --------------------------------------------------------------------------------


@pytest.mark.parametrize("dump", [yaml.safe_dump, json.dumps])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        GUIDANCE,
        ["schedule_jump_params=null", "name='007'", "seed=null", "cond_y=3"],
        ["timestep_respacing=''", "channel_mult=0.5,1.5", "dropout=1e-5", "name='null'"],
    ],
)
def test_round_trip(write, dump, overrides):
    config = load_config(write(USERS_FILE), overrides)
    assert load_config(write(dump(to_yaml_dict(config)), "again.yml")) == config


@pytest.mark.parametrize("dump", [yaml.safe_dump, json.dumps])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["latent={}", "seed=0", "image_size=256"],
        [f"{UNET}.channel_mult=[1,2,4]", f"{UNET}.resblock_updown=false", f"{VAE}.dropout=0.5"],
    ],
)
def test_round_trip_of_latents(write, dump, overrides):
    config = load_config(write(LATENT_FILE), overrides)
    assert load_config(write(dump(to_yaml_dict(config)), "again.yml")) == config


@pytest.mark.parametrize("dump", [yaml.safe_dump, json.dumps])
def test_round_trip_of_training(write, dump):
    config = load_training_config(write(TRAINING_FILE))
    assert load_training_config(write(dump(to_yaml_dict(config)), "again.yml")) == config


def test_yaml_dict_has_the_files_vocabulary(write):
    tree = to_yaml_dict(load_config(write(USERS_FILE)))
    assert tree["image_size"] == 64
    assert tree["attention_resolutions"] == "16"
    assert tree["channel_mult"] == "1,2,3,4"
    assert tree["schedule_jump_params"]["jump_n_sample"] == 10
    assert tree["data"]["eval"]["faces"]["paths"]["srs"] == "out/inpainted"
    assert "source" not in tree


def test_yaml_dict_of_latents_has_their_keys_alone(write):
    config = load_config(write("method: latent\nmodel_path: m.ckpt"), require_data=False)
    tree = to_yaml_dict(config)
    assert tree.keys() == COMMON | {"ddim_steps", "latent"}
    assert (tree["image_size"], tree["latent"]["unet"]["channel_mult"]) == (None, "1,2,3,4")
    assert pixel_settings(config) == {"model_path": "m.ckpt", "method": "latent"}


# ---- Whatever a file holds, it loads or is refused in one line ---------------------------------


def dotted_paths(tree: object, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return []
    paths = [f"{prefix}{key}" for key in tree]
    return paths + [deeper for key in tree for deeper in dotted_paths(tree[key], f"{prefix}{key}.")]


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "0", "1,2", "ddim7", "null", "9" * 400, "\ud800", "1e400", "a\nb", "."])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(SCALARS, inner, max_size=2),
    max_leaves=4,
)


def changes_of(text: str) -> st.SearchStrategy:
    """The tree of a file, and changes of it: at a path, its last name longer, and the value."""
    tree = parsed(text)
    change = st.tuples(st.sampled_from(dotted_paths(tree)), st.text(max_size=3), VALUES)
    return st.tuples(st.just(tree), st.lists(change, min_size=1, max_size=3))


def loads_or_refuses(text: str, folder: Path) -> None:
    file = folder / "mine.yml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        config = load_config(str(file))
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        file.write_text(yaml.safe_dump(to_yaml_dict(config)), encoding="utf-8")
        assert load_config(str(file)) == config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


@settings(max_examples=80, deadline=None)
@given(changes_of(USERS_FILE) | changes_of(LATENT_FILE))
def test_any_value_anywhere(folder, tree_and_changes):
    tree, changes = copy.deepcopy(tree_and_changes)
    for path, suffix, value in changes:
        node = tree
        *sections, last = path.split(".")
        for section in sections:
            node = node[section] if isinstance(node.get(section), dict) else {}
        node[last + suffix] = copy.deepcopy(value)
    loads_or_refuses(yaml.safe_dump(tree), folder)


@settings(max_examples=60, deadline=None)
@given(
    place=st.integers(0, len(USERS_FILE)),
    cut=st.integers(0, 20),
    put=st.text(max_size=6) | st.text("&*!|>-?:[]{}#'\"%@`,\n \t<~.\\", max_size=6),
)
@example(place=0, cut=0, put="%YAML 9.9\n---")
@example(place=1, cut=0, put="!!bool x: !!timestamp y\n")
@example(place=7, cut=4, put="!!int x")
def test_any_text_anywhere(folder, place, cut, put):
    loads_or_refuses(USERS_FILE[:place] + put + USERS_FILE[place + cut :], folder)


# ---- The published configs ---------------------------------------------------------------------

MODELS = {
    "c256": "data/pretrained/celeba256_250000.pt",
    "p256": "data/pretrained/places256_300000.pt",
    "inet256": "data/pretrained/256x256_diffusion.pt",
}
MASKS = ["thin", "thick", "ev2li", "nn2", "ex64", "genhalf"]
PUBLISHED = [("face_example", "c256", "face", "face", 1, 8)] + [
    (f"test_{family}_{mask}", family, family, mask, 4, 100) for family in MODELS for mask in MASKS
]


@pytest.mark.parametrize(("name", "family", "gts", "masks", "batch_size", "max_len"), PUBLISHED)
def test_published_configs(name, family, gts, masks, batch_size, max_len):
    config = load_config(str(CONFS / f"{name}.yml"))
    imagenet = family == "inet256"
    assert config.name == name
    assert config.model_path == MODELS[family]
    assert config.network == NetworkConfig(
        image_size=256,
        model_channels=256,
        num_res_blocks=2,
        num_heads=4,
        num_head_channels=64,
        attention_resolutions=(32, 16, 8),
        channel_mult=(1, 1, 2, 2, 4, 4),
        resblock_updown=True,
        use_scale_shift_norm=True,
        learn_sigma=True,
        class_cond=imagenet,
        use_fp16=imagenet,
    )
    assert config.diffusion == DiffusionConfig(
        diffusion_steps=1000, noise_schedule="linear", timestep_respacing="250"
    )
    assert config.schedule == ScheduleConfig(t_T=250, n_sample=1, jump_length=10, jump_n_sample=10)
    guidance = ClassifierConfig(scale=1.0, path="data/pretrained/256x256_classifier.pt")
    assert config.classifier == (guidance if imagenet else None)
    assert config.dataset == DatasetConfig(
        name=name,
        gt_path=f"data/datasets/gts/{gts}",
        mask_path=f"data/datasets/gt_keep_masks/{masks}",
        batch_size=batch_size,
        max_len=max_len,
        inpainted_dir=f"log/{name}/inpainted",
        gt_masked_dir=f"log/{name}/gt_masked",
        gt_dir=f"log/{name}/gt",
        keep_mask_dir=f"log/{name}/gt_keep_mask",
    )
    assert (config.cond_y, config.device, config.seed) == (None, None, None)
    assert config.clip_denoised
    assert config.merge_known
    assert not config.paste_known


@pytest.mark.parametrize("path", sorted(CONFS.glob("*.yml")), ids=lambda path: path.stem)
def test_every_config_of_the_repository_loads(path):
    load = load_training_config if path.stem.startswith("train") else load_config
    assert load(str(path)).name == path.stem


def test_the_config_of_latent_diffusion():
    config = load_config(str(CONFS / "ldm_inpainting.yml"))
    face_example = load_config(str(CONFS / "face_example.yml"))
    assert asdict(config.latent) == PUBLISHED_LATENT
    assert config.model_path == "data/pretrained/inpainting_big.ckpt"
    assert (config.ddim_eta, config.device, config.seed) == (0.0, None, None)
    assert config.dataset == replace(
        face_example.dataset,
        name="ldm_inpainting",
        inpainted_dir="log/ldm_inpainting/inpainted",
        gt_masked_dir="log/ldm_inpainting/gt_masked",
        gt_dir="log/ldm_inpainting/gt",
        keep_mask_dir="log/ldm_inpainting/gt_keep_mask",
    )


def test_the_hint_for_large_photos_works(write):
    text = (CONFS / "ldm_inpainting.yml").read_text().replace("# fit: region", "fit: region")
    config = load_config(write(text), ["image_size=512"])
    assert (config.dataset.fit, config.image_size) == ("region", 512)


@pytest.mark.parametrize(("path", "refused"), [("there", False), ("gs://b/x", False), ("no", True)])
def test_a_folder_may_hold_images_and_masks(write, tmp_path, monkeypatch, path, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    keys = [f"data.eval.faces.{key}={path}" for key in ("gt_path", "mask_path")]
    if refused:
        assert "masks in a folder of their own" in refusal(load_config, write(USERS_FILE), keys)
    else:
        assert load_config(write(USERS_FILE), keys).dataset.mask_path == path


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ([], "classifier_scale is 4, but there is no classifier_path"),
        (["classifier_scale=0"], ""),
        (["classifier_scale=0", "classifier_path=c.pt"], "classifier_scale is 0"),
    ],
)
def test_half_of_guidance_is_kept_in_words(write, overrides, why):
    unguided = load_config(write(USERS_FILE), overrides).unguided
    assert unguided.endswith(why) and bool(unguided) == bool(why)
