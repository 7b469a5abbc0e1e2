"""Where the fields of the dataclasses are in a YAML file, and which keys each kind of run knows.

A file is a flat table of dotted paths, such as `schedule_jump_params.t_T`, so that the files'
nesting and old names end here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from guided_diffusion.config import schema
from guided_diffusion.config.kinds import ANYTHING, Kind, matching, null_or, only_false, whole

# Where keys are in a file: prefixes (`*` stands for the dataset's name), and older names.
_PREFIXES = {
    schema.ClassifierConfig: "classifier_",
    schema.ScheduleConfig: "schedule_jump_params.",
    schema.StartConfig: "start_from.",
    schema.LangevinConfig: "langevin.",
    schema.LatentUNetConfig: "latent.unet.",
    schema.AutoencoderConfig: "latent.autoencoder.",
    schema.DatasetConfig: "data.eval.*.",
}
_YAML_NAMES = {
    schema.Config: {
        "merge_known": "inpa_inj_sched_prev",
        "time_shift": "inpa_inj_time_shift",
    },
    schema.NetworkConfig: {"model_channels": "num_channels"},
    schema.DatasetConfig: {
        "inpainted_dir": "paths.srs",
        "gt_masked_dir": "paths.lrs",
        "gt_dir": "paths.gts",
        "keep_mask_dir": "paths.gt_keep_masks",
    },
}

_AT_THE_TOP = ((schema.LangevinConfig, "evaluations"),)  # apart from those of experts

# Found in users' files, of no effect.
_NO_EFFECT = {
    **dict.fromkeys(("latex_name", "method_name", "n_jobs", "num_samples"), ANYTHING),
    **dict.fromkeys(("lr_kernel_n_std", "print_estimated_vars"), ANYTHING),
    "inpa_inj_sched_prev_cumnoise": only_false("cumulative noise is not supported"),
    "respace_interpolate": only_false("interpolated respacing is not supported"),
}
_NO_EFFECT_IN_TRAINING = {
    "use_ddim": only_false("it is for sampling with test.py"),
    "method": matching("pixel", "only pixel, because train.py trains models of pixels"),
}
_NO_EFFECT_IN_DATASET = {
    "data.eval.*.ds_conf": ANYTHING,
    "data.eval.*.mask_loader": ANYTHING,
    "data.eval.*.return_dict": ANYTHING,
    "data.eval.*.return_dataloader": ANYTHING,
    "data.eval.*.image_size": whole(1),  # repeats the one at the top
    "data.eval.*.random_crop": only_false("random crops are not supported"),
    "data.eval.*.class_cond": only_false("classes come from cond_y at the top"),
}


def _kind_of(hint: Any) -> Kind | None:
    """What a field's type accepts; None for a field that no key sets."""
    options = get_args(hint)
    if type(None) in options:
        kind = _kind_of(options[0])
        return kind and null_or(kind)
    if get_origin(hint) is Literal:
        return matching("|".join(options), " or ".join(options))
    return next((option for option in options if isinstance(option, Kind)), None)


@cache
def kinds_of(cls: type) -> dict[str, Kind]:
    """Field -> what its key accepts, for the fields that keys set."""
    kinds = {
        name: _kind_of(hint) for name, hint in get_type_hints(cls, include_extras=True).items()
    }
    return {name: kind for name, kind in kinds.items() if kind}


def key_of(cls: type, name: str) -> str:
    """The dotted path in YAML of a dataclass's field."""
    if (cls, name) in _AT_THE_TOP:
        return name
    return _PREFIXES.get(cls, "") + _YAML_NAMES.get(cls, {}).get(name, name)


def _vocabulary(*classes: type) -> dict[str, Kind]:
    return {key_of(cls, name): kind for cls in classes for name, kind in kinds_of(cls).items()}


_NO = "method: latent {}; remove it".format
_INSTEAD = "method: latent takes {} instead".format
# What to do with keys of method pixel where the method is latent.
_NOT_LATENT = {
    **dict.fromkeys(_vocabulary(schema.NetworkConfig), _NO("has no such choice")),
    **dict.fromkeys(_vocabulary(schema.DiffusionConfig), _NO("has a diffusion process of its own")),
    **dict.fromkeys(_vocabulary(schema.ScheduleConfig), _NO("does not resample")),
    **dict.fromkeys(_vocabulary(schema.StartConfig), _NO("always starts from noise")),
    **dict.fromkeys(_vocabulary(schema.LangevinConfig), _NO("has a sampler of its own")),
    **dict.fromkeys(("sampler", "evaluations"), _NO("has a sampler of its own, see ddim_steps")),
    **dict.fromkeys(_vocabulary(schema.ClassifierConfig), _NO("takes no guidance")),
    "num_channels": _INSTEAD("latent.unet.model_channels"),
    "num_res_blocks": _INSTEAD("latent.unet.num_res_blocks"),
    "num_heads": _INSTEAD("latent.unet.num_heads"),
    "attention_resolutions": _INSTEAD("latent.unet.attention_resolutions (rates, not sides)"),
    "channel_mult": _INSTEAD("latent.unet.channel_mult"),
    "resblock_updown": _INSTEAD("latent.unet.resblock_updown"),
    "use_fp16": _INSTEAD("precision: fp16"),
    "timestep_respacing": _INSTEAD("ddim_steps"),
    "use_ddim": _NO("always takes DDIM's steps, as many as ddim_steps says"),
    "clip_denoised": _NO("never clamps"),
    "cond_y": _NO("knows no classes"),
    "paste_known": _NO("always keeps the known pixels exactly"),
    "inpa_inj_sched_prev": _NO("shows the known pixels to its network"),
    "inpa_inj_time_shift": _NO("never goes up in time"),
}
_NETWORK_KEYS = _vocabulary(schema.NetworkConfig, schema.DiffusionConfig) | _NO_EFFECT
_SHARED_KEYS = (
    _vocabulary(schema.Config, schema.SpeedConfig, schema.DatasetConfig)
    | _NO_EFFECT
    | _NO_EFFECT_IN_DATASET
)
_PIXEL_KEYS = {
    **_SHARED_KEYS,
    **_NETWORK_KEYS,
    **_vocabulary(schema.ClassifierConfig, schema.ScheduleConfig, schema.StartConfig),
    **_vocabulary(schema.LangevinConfig),
    "image_size": replace(whole(1), accepts="a whole number >= 1, or null with method: latent"),
}
_LATENT_KEYS = {
    **{key: kind for key, kind in _SHARED_KEYS.items() if key not in _NOT_LATENT},
    **_vocabulary(schema.LatentConfig, schema.LatentUNetConfig, schema.AutoencoderConfig),
    "data.eval.*.image_size": null_or(whole(1)),
}
_TRAINING_KEYS = {
    **_vocabulary(schema.TrainingConfig, schema.TrainingParams),
    **_NETWORK_KEYS,
    **_NO_EFFECT_IN_TRAINING,
}


@dataclass(frozen=True)
class Vocabulary:
    """The keys of one kind of run, and what to do there with those of other kinds."""

    known: Mapping[str, Kind]
    elsewhere: Mapping[str, str]  # counts only for keys that are not known


_FOR_TRAINING = {
    key: "a key for train.py alone; remove it here"
    for key in _TRAINING_KEYS
    if f"data.eval.*.{key}" not in _SHARED_KEYS  # else it is rather a misplaced one
}
_FOR_LATENT = dict.fromkeys(
    _LATENT_KEYS, "a key of method: latent alone; set that method, or remove it"
)
_FOR_SAMPLING = dict.fromkeys(_PIXEL_KEYS | _LATENT_KEYS, "a key for test.py alone; remove it here")
METHODS = {
    "pixel": Vocabulary(_PIXEL_KEYS, _FOR_TRAINING | _FOR_LATENT),
    "latent": Vocabulary(_LATENT_KEYS, _FOR_TRAINING | _NOT_LATENT),
}
TRAINING = Vocabulary(_TRAINING_KEYS, _FOR_SAMPLING)
