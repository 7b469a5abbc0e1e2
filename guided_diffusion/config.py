"""The YAML vocabulary: frozen dataclasses, one loader, every error a user can make.

A field's name is its YAML key and its type says what the key accepts; the loader knows nothing
else of the vocabulary. To it, a file is a flat table of dotted paths, such as
`schedule_jump_params.t_T`, so that the files' nesting and old names end here.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

CHANNEL_MULT_BY_IMAGE_SIZE: dict[int, tuple[float, ...]] = {
    512: (0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0),
    256: (1.0, 1.0, 2.0, 2.0, 4.0, 4.0),
    128: (1.0, 1.0, 2.0, 3.0, 4.0),
    64: (1.0, 2.0, 3.0, 4.0),
}


CUT = 128  # level of a mask (0 to 255) at which it is cut into black and white, where it is


class UserError(Exception):
    """A mistake of the user; str(error) is the one line to print."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


# ---- The vocabulary --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The denoiser (U-Net)."""

    image_size: Count = 64  # side of the square that the network sees
    num_channels: Count = 128  # base width; level i is channel_mult[i] times as wide
    num_res_blocks: Blocks = 2  # per level
    num_heads: Count = 4
    num_heads_upsample: CountOrDefault = -1  # in the output half; -1 = num_heads
    num_head_channels: CountOrDefault = -1  # if given, num_heads does not count
    attention_resolutions: Sizes = (16, 8)  # image sides, not rates
    channel_mult: Multiples = ()  # where a file has none, the loader takes it by image size
    dropout: Share = 0.0
    class_cond: Flag = False  # 1000 classes
    use_checkpoint: Flag = False  # gradients take less memory and more time
    use_scale_shift_norm: Flag = True
    resblock_updown: Flag = False
    use_fp16: Flag = False
    use_new_attention_order: Flag = False
    learn_sigma: Flag = False  # twice the output channels; the second half is v


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The diffusion process, and what the network predicts of it."""

    diffusion_steps: Count = 1000
    noise_schedule: Literal["linear", "cosine"] = "linear"
    timestep_respacing: Respacing = ""  # left out beside a schedule, the loader takes its t_T
    predict_xstart: Flag = False  # the network predicts x_0 instead of epsilon
    rescale_timesteps: Flag = False  # the network sees t * 1000 / diffusion_steps
    rescale_learned_sigmas: Flag = False  # no effect: training always weighs by N / 1000
    use_kl: Flag = False  # training only: the variational bound alone


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The classifier of noisy images that guides the sampling."""

    scale: NotNegative = 0.0  # strength of the guidance; 0 = off
    path: FilePath | None = None
    use_fp16: Flag = False
    width: Count = 128
    depth: Count = 2  # res blocks per level
    attention_resolutions: Sizes = (32, 16, 8)
    use_scale_shift_norm: Flag = True
    resblock_updown: Flag = True
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] = "attention"


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The times that the sampler visits: how far it jumps back, and how often."""

    t_T: Count  # number of steps
    n_sample: Count
    jump_length: Count
    jump_n_sample: Count
    jump2_length: Count = 1
    jump2_n_sample: Count = 1
    jump3_length: Count = 1
    jump3_n_sample: Count = 1
    start_resampling: CountOrZero = 100_000_000  # no jumps to later times than this


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """A complete picture to begin with, in place of pure noise."""

    path: FilePath | None = None  # folder of pictures, or one for all; None = the images themselves
    t: CountOrZero  # noised to this time of the schedule, which is walked from there on


@dataclass(frozen=True, kw_only=True)
class LatentUNetConfig:
    """The denoiser of latents (U-Net). The defaults are those of the published model."""

    image_size: Count = 64  # nominal side of a latent; any other one works as well
    in_channels: Count = 7  # the noisy latent, the masked picture's latent and the hole
    out_channels: Count = 3  # of a latent
    model_channels: Count = 256  # base width; level i is channel_mult[i] times as wide
    attention_resolutions: Sizes = (8, 4, 2)  # downsampling rates, not sides
    num_res_blocks: Blocks = 2  # per level
    channel_mult: WholeMultiples = (1, 2, 3, 4)
    num_heads: Count = 8
    resblock_updown: Flag = True


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """From pictures to latents and back (VQ). The defaults are those of the published model."""

    attn_type: OnlyNone = "none"
    double_z: OnlyFalse = False
    z_channels: Count = 3  # between encoder and quant_conv
    resolution: Count = 256  # no effect: any size works
    in_channels: Colours = 3
    out_ch: Colours = 3
    ch: Count = 128  # base width; level i is ch_mult[i] times as wide
    ch_mult: WholeMultiples = (1, 2, 4)  # each level but the last halves the sides
    num_res_blocks: Blocks = 2  # per level
    attn_resolutions: OnlyEmpty = ()
    dropout: Share = 0.0  # no effect: it is for training
    n_embed: Count = 8192  # codes in the codebook
    embed_dim: Count = 3  # channels of a latent, and of a code


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Latent diffusion: the steps of its sampler, and its two networks."""

    image_size: Side | None = None  # of the square; None = pictures as they are
    ddim_steps: DDIMSteps = 50
    unet: LatentUNetConfig = LatentUNetConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()

    @property
    def factor(self) -> int:
        """Side of a picture / side of its latent."""
        return 2 ** (len(self.autoencoder.ch_mult) - 1)

    @property
    def multiple(self) -> int:
        """Both networks take pictures whose sides are multiples of this."""
        return self.factor * 2 ** (len(self.unet.channel_mult) - 1)

    @property
    def nominal_size(self) -> int:
        """Side of the squares that it is made fast for: of image_size, or else a nominal one."""
        side = self.image_size or self.factor * self.unet.image_size
        return side + -side % self.multiple


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Where images and masks come from, and where results go."""

    name: str  # what stands for the `*` in the file
    gt_path: FilePath  # folder of images, or one image
    mask_path: FilePath  # folder of masks, or one mask for all images
    mask_convention: Literal["keep", "fill"] = "keep"  # what white (255) in a mask means
    fit: Literal["crop", "region"] = "crop"  # the centre square, or all holes of a whole photo
    batch_size: BatchSize = 1  # auto: as many as fit in the GPU's memory
    offset: CountOrZero = 0  # drop the first pairs
    max_len: Count | None = None  # keep at most so many pairs
    deterministic: Flag = True  # false = work in shuffled order
    random_flip: Flag = False  # image and mask together
    drop_last: Flag = False  # leave out an incomplete last batch
    inpainted_dir: FilePath
    gt_masked_dir: FilePath
    gt_dir: FilePath | None = None  # None = not written
    keep_mask_dir: FilePath


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """How the network is computed. What is None is chosen, see `accel`."""

    fast: Flag = False  # the fastest safe way that this machine offers
    precision: Text | None = None  # of the network's body: fp32, bf16, fp16 or tf32
    compile: Flag | None = None  # torch.compile
    cuda_graph: Flag | None = None  # one evaluation captured and replayed


@dataclass(frozen=True, kw_only=True)
class Config:
    """One inpainting run."""

    source: str = field(compare=False)  # the YAML file
    name: Text  # left out: the file's own
    model_path: FilePath  # or URL: the state dict of the denoiser; with latent, of all networks
    method: Literal["pixel", "latent"] = "pixel"
    latent: LatentConfig | None = None  # None = method pixel
    network: NetworkConfig | None  # None = method latent
    diffusion: DiffusionConfig | None  # None = method latent
    clip_denoised: Flag = True  # clamp the predicted x_0 to [-1, 1]
    use_ddim: Flag = False  # DDIM's steps down instead of the ancestral ones
    ddim_eta: NotNegative = 0.0  # their noise: 0 = none, 1 = the posterior's
    schedule: ScheduleConfig | None  # None = plain ancestral sampling
    start_from: StartConfig | None = None  # None = pure noise
    inpa_inj_sched_prev: Flag = True  # merge the known region
    inpa_inj_time_shift: Shift = 1  # going up from t takes beta[t + shift]
    classifier: ClassifierConfig | None  # None = no guidance
    cond_y: Label | None = None  # None = a random class per image
    show_progress: Flag = True
    device: Device | None = None  # None = cuda if there is one, else cpu
    speed: SpeedConfig = SpeedConfig()
    seed: Seed | None = None  # None = drawn afresh
    paste_known: Flag = False  # write the known pixels exactly
    samples_per_image: Samples = 1  # if several: x_0.png, x_1.png, ...
    checkpoint_every: NotNegative = 300  # seconds after which a picture's state is saved
    log_every: CountOrZero = 0  # transitions after which the process is shown; 0 = never
    dataset: DatasetConfig | None

    @property
    def image_size(self) -> int | None:
        """Side of the square that pictures become for the network; None: they stay as they are."""
        return self.latent.image_size if self.latent else self.network.image_size

    @property
    def known_from(self) -> int | None:
        """Level of the mask (0 to 255) from which the input's own bytes come out; None: never."""
        if self.latent:
            return CUT
        return 255 if self.paste_known else None

    @property
    def start_path(self) -> str | None:
        """Folder or file of the pictures to start from; None: sampling starts from pure noise."""
        return self.start_from and (self.start_from.path or self.dataset.gt_path)


@dataclass(frozen=True, kw_only=True)
class TrainingParams:
    """How a network is trained."""

    data_dir: FilePath  # folder of images
    log_dir: FilePath  # checkpoints and grids of samples
    batch_size: Count
    microbatch: CountOrDefault = -1  # images at a time; -1 = the whole batch
    lr: Positive = 1e-4
    weight_decay: NotNegative = 0.0
    ema_rate: Rates = (0.9999,)
    total_steps: Count
    lr_anneal_steps: CountOrZero = 0  # 0 = constant; N = linearly to zero at step N
    warmup_steps: CountOrZero = 0
    grad_clip: Positive | None = None  # largest norm of the gradient
    schedule_sampler: Literal["uniform", "loss-second-moment"] = "uniform"
    random_flip: Flag = True
    use_bf16: Flag = False  # autocast
    save_interval: Count = 1000  # steps
    sample_interval: CountOrZero = 1000  # steps; 0 = never
    log_interval: Count = 10  # steps
    sample_number: Count = 16  # pictures in a grid


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training run."""

    source: str = field(compare=False)  # the YAML file
    name: Text  # left out: the file's own
    network: NetworkConfig
    diffusion: DiffusionConfig
    training: TrainingParams
    show_progress: Flag = True
    device: Device | None = None  # None = cuda if there is one, else cpu
    seed: Seed = 0


# ---- What the types of keys accept -----------------------------------------------------------


_END = 2**63 - 1  # of the whole numbers that torch and numpy hold


@dataclass(frozen=True)
class _Kind:
    """What a key accepts: in words, and as a parser that raises ValueError for anything else."""

    accepts: str
    parse: Callable[[yaml.Node], Any]


def _is_null(node: yaml.Node) -> bool:
    plain = isinstance(node, yaml.ScalarNode) and not node.style
    return plain and node.value in ("", "~", "null", "Null", "NULL")


def _text(node: yaml.Node) -> str:
    """The text as it was written: without quotes too, `250`, `007` and `1.10` mean themselves."""
    if not isinstance(node, yaml.ScalarNode) or (_is_null(node) and node.value):
        raise ValueError
    return node.value


def _unquoted(node: yaml.Node) -> str:
    """The text of a number or a boolean, which quotes would turn into mere text."""
    text = _text(node)
    if node.style:
        raise ValueError
    return text


def _flag(node: yaml.Node) -> bool:
    word = _unquoted(node).lower()
    if word not in ("true", "yes", "on", "false", "no", "off"):
        raise ValueError
    return word in ("true", "yes", "on")


def _kind(accepts: str, read: Callable[[yaml.Node], Any], valid: Callable[[Any], Any]) -> _Kind:
    def parse(node: yaml.Node) -> Any:
        value = read(node)
        if not valid(value):
            raise ValueError
        return value

    return _Kind(accepts, parse)


def _number(cast: type, accepts: str, valid: Callable[[Any], bool]) -> _Kind:
    return _kind(accepts, lambda node: cast(_unquoted(node)), valid)


def _whole(low: int, high: int = _END) -> _Kind:
    bounds = f">= {low}" if high == _END else f"from {low} to {high}"
    return _number(int, f"a whole number {bounds}", lambda n: low <= n <= high)


def _items(node: yaml.Node) -> list[str]:
    """The members of a list, which may be written as `[4, 2]` or as `'4,2'`."""
    if isinstance(node, yaml.SequenceNode):
        return [_text(item) for item in node.value]
    text = _text(node)
    return text.split(",") if text else []


def _numbers(cast: type, accepts: str, valid: Callable[[Any], bool]) -> _Kind:
    def read(node: yaml.Node) -> tuple:
        return tuple(cast(number) for number in _items(node))

    return _kind(accepts, read, lambda numbers: numbers and all(map(valid, numbers)))


def _matching(pattern: str, accepts: str) -> _Kind:
    return _kind(accepts, _text, re.compile(pattern, re.DOTALL).fullmatch)


def _null_or(kind: _Kind) -> _Kind:
    def parse(node: yaml.Node) -> Any:
        return None if _is_null(node) else kind.parse(node)

    return _Kind(f"null or {kind.accepts}", parse)


def _or_auto(kind: _Kind) -> _Kind:
    def parse(node: yaml.Node) -> Any:
        return "auto" if _text(node) == "auto" else kind.parse(node)

    return _Kind(f"{kind.accepts}, or auto", parse)


def _empty_or(kind: _Kind) -> _Kind:
    return _Kind(f"'' or {kind.accepts}", lambda node: kind.parse(node) if _items(node) else ())


def _only_false(why: str) -> _Kind:
    return _kind(f"only false, because {why}; remove the key", _flag, lambda value: not value)


_ANYTHING = _Kind("anything", lambda node: None)
Flag = Annotated[bool, _Kind("true or false", _flag)]
_TEXT = re.compile(r"[^\0\ud800-\udfff]+", re.DOTALL)
Text = Annotated[str, _kind("text", _text, _TEXT.fullmatch)]
_PATH = re.compile(r"(?!(gs|az|https):/[^/])" + _TEXT.pattern, re.DOTALL)  # a URL that lacks a /
FilePath = Annotated[
    str,
    _kind("a path", lambda node: os.path.expanduser(_text(node)), _PATH.fullmatch),
]
Count = Annotated[int, _whole(1)]
CountOrZero = Annotated[int, _whole(0)]
BatchSize = Annotated[int | Literal["auto"], _or_auto(_whole(1))]
Samples = Annotated[int, _whole(1, 10**6)]
CountOrDefault = Annotated[
    int, _number(int, "-1 or a whole number >= 1", lambda n: n == -1 or 1 <= n <= _END)
]
Share = Annotated[float, _number(float, "a number >= 0 and < 1", lambda x: 0 <= x < 1)]
Positive = Annotated[float, _number(float, "a number > 0", lambda x: 0 < x < math.inf)]
NotNegative = Annotated[float, _number(float, "a number >= 0", lambda x: 0 <= x < math.inf)]
Blocks = Annotated[int, _whole(1, 100)]
Side = Annotated[int, _whole(1, 2**14)]
Label = Annotated[int, _whole(0, 999)]
Shift = Annotated[int, _whole(-(10**6), 10**6)]
# Streams take seed + image + sample * 2**32, which has to stay below the end.
Seed = Annotated[int, _number(int, "a whole number >= 0 and < 2**62", lambda n: 0 <= n < 2**62)]
Sizes = Annotated[
    tuple[int, ...],
    _numbers(int, "whole numbers >= 1 with commas, such as '32,16,8'", lambda n: n >= 1),
]
Multiples = Annotated[
    tuple[float, ...],
    _empty_or(_numbers(float, "numbers > 0, such as '1,2,2,4'", lambda x: 0 < x < 1000)),
]
WholeMultiples = Annotated[
    tuple[int, ...],
    _numbers(int, "whole numbers from 1 to 999, such as '1,2,4'", lambda n: 1 <= n < 1000),
]
DDIMSteps = Annotated[int, _whole(1, 1000)]
Colours = Annotated[int, _number(int, "3 (red, green and blue)", lambda n: n == 3)]
OnlyFalse = Annotated[bool, _only_false("KL autoencoders are not supported")]
OnlyNone = Annotated[
    str, _matching("none", "only none, because attention in the autoencoder is not supported")
]
OnlyEmpty = Annotated[
    tuple[()],
    _kind(
        "only [], because attention in the autoencoder is not supported",
        lambda node: tuple(_items(node)),
        lambda items: not items,
    ),
]
Rates = Annotated[
    tuple[float, ...],
    _numbers(float, "numbers >= 0 and < 1, such as '0.99,0.9999'", lambda x: 0 <= x < 1),
]
Respacing = Annotated[
    str,
    _matching(
        r"|(ddim)?[0-9]{1,9}|[0-9]{1,9}( *, *[0-9]{1,9})+",
        "'' (all steps), 'N', 'N1,N2,...' or 'ddimN', such as '250'",
    ),
]
Device = Annotated[str, _matching(r"cpu|mps|cuda(:[0-9]{1,3})?", "cpu, cuda, cuda:N or mps")]


# Where keys are in a file: prefixes (`*` stands for the dataset's name), and four older names.
_PREFIXES = {
    ClassifierConfig: "classifier_",
    ScheduleConfig: "schedule_jump_params.",
    StartConfig: "start_from.",
    LatentUNetConfig: "latent.unet.",
    AutoencoderConfig: "latent.autoencoder.",
    DatasetConfig: "data.eval.*.",
}
_YAML_NAMES = {
    "inpainted_dir": "paths.srs",
    "gt_masked_dir": "paths.lrs",
    "gt_dir": "paths.gts",
    "keep_mask_dir": "paths.gt_keep_masks",
}

# Found in users' files, of no effect.
_NO_EFFECT = {
    **dict.fromkeys(("latex_name", "method_name", "n_jobs", "num_samples"), _ANYTHING),
    **dict.fromkeys(("lr_kernel_n_std", "print_estimated_vars"), _ANYTHING),
    "inpa_inj_sched_prev_cumnoise": _only_false("cumulative noise is not supported"),
    "respace_interpolate": _only_false("interpolated respacing is not supported"),
}
_NO_EFFECT_IN_TRAINING = {
    "use_ddim": _only_false("it is for sampling with test.py"),
    "method": _matching("pixel", "only pixel, because train.py trains models of pixels"),
}
_NO_EFFECT_IN_DATASET = {
    "data.eval.*.ds_conf": _ANYTHING,
    "data.eval.*.mask_loader": _ANYTHING,
    "data.eval.*.return_dict": _ANYTHING,
    "data.eval.*.return_dataloader": _ANYTHING,
    "data.eval.*.image_size": _whole(1),  # repeats the one at the top
    "data.eval.*.random_crop": _only_false("random crops are not supported"),
    "data.eval.*.class_cond": _only_false("classes come from cond_y at the top"),
}


def _kind_of(hint: Any) -> _Kind | None:
    """What a field's type accepts; None for a field that no key sets."""
    options = get_args(hint)
    if type(None) in options:
        kind = _kind_of(options[0])
        return kind and _null_or(kind)
    if get_origin(hint) is Literal:
        return _matching("|".join(options), " or ".join(options))
    return next((option for option in options if isinstance(option, _Kind)), None)


@cache
def _kinds(cls: type) -> dict[str, _Kind]:
    """Field -> what its key accepts, for the fields that keys set."""
    kinds = {
        name: _kind_of(hint) for name, hint in get_type_hints(cls, include_extras=True).items()
    }
    return {name: kind for name, kind in kinds.items() if kind}


def _key(cls: type, name: str) -> str:
    """The dotted path in YAML of a dataclass's field."""
    return _PREFIXES.get(cls, "") + _YAML_NAMES.get(name, name)


def _vocabulary(*classes: type) -> dict[str, _Kind]:
    return {_key(cls, name): kind for cls in classes for name, kind in _kinds(cls).items()}


_NO = "method: latent {}; remove it".format
_INSTEAD = "method: latent takes {} instead".format
# What to do with keys of method pixel where the method is latent.
_NOT_LATENT = {
    **dict.fromkeys(_vocabulary(NetworkConfig), _NO("has no such choice")),
    **dict.fromkeys(_vocabulary(DiffusionConfig), _NO("has a diffusion process of its own")),
    **dict.fromkeys(_vocabulary(ScheduleConfig), _NO("does not resample")),
    **dict.fromkeys(_vocabulary(StartConfig), _NO("always starts from noise")),
    **dict.fromkeys(_vocabulary(ClassifierConfig), _NO("takes no guidance")),
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
_NETWORK_KEYS = _vocabulary(NetworkConfig, DiffusionConfig) | _NO_EFFECT
_SHARED_KEYS = _vocabulary(Config, SpeedConfig, DatasetConfig) | _NO_EFFECT | _NO_EFFECT_IN_DATASET
_PIXEL_KEYS = {
    **_SHARED_KEYS,
    **_NETWORK_KEYS,
    **_vocabulary(ClassifierConfig, ScheduleConfig, StartConfig),
    "image_size": replace(_whole(1), accepts="a whole number >= 1, or null with method: latent"),
}
_LATENT_KEYS = {
    **{key: kind for key, kind in _SHARED_KEYS.items() if key not in _NOT_LATENT},
    **_vocabulary(LatentConfig, LatentUNetConfig, AutoencoderConfig),
    "data.eval.*.image_size": _null_or(_whole(1)),
}
_TRAINING_KEYS = {
    **_vocabulary(TrainingConfig, TrainingParams),
    **_NETWORK_KEYS,
    **_NO_EFFECT_IN_TRAINING,
}


@dataclass(frozen=True)
class _Vocabulary:
    """The keys of one kind of run, and what to do there with those of other kinds."""

    known: Mapping[str, _Kind]
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
_METHODS = {
    "pixel": _Vocabulary(_PIXEL_KEYS, _FOR_TRAINING | _FOR_LATENT),
    "latent": _Vocabulary(_LATENT_KEYS, _FOR_TRAINING | _NOT_LATENT),
}
_TRAINING = _Vocabulary(_TRAINING_KEYS, _FOR_SAMPLING)


# ---- The loader ------------------------------------------------------------------------------


def load_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), require_data: bool = True
) -> Config:
    """Read the YAML file of an inpainting run.

    path: a local file.
    overrides: KEY=VALUE each, with a dotted path and a YAML value; they win over the file.
    require_data: False allows a file without a dataset (`Config.dataset` is None then).

    Raises UserError, one line, for everything that can be wrong with it.
    """
    file = _File(os.fspath(path), overrides, _METHODS)
    if require_data and not file.dataset_name:
        file.refuse("data.eval", "exactly one dataset, as data.eval.NAME")
    config = _latent_config(file) if file.method == "latent" else _pixel_config(file)
    file.refuse_first(_dataset_problems(file.values, config.image_size))
    return config


def _pixel_config(file: _File) -> Config:
    schedule = file.make(ScheduleConfig) if file.has("schedule_jump_params.") else None
    if schedule:
        file.values.setdefault("timestep_respacing", str(schedule.t_T))
    classifier = file.make(ClassifierConfig)
    config = _config(
        file,
        network=file.make_network(),
        diffusion=file.make(DiffusionConfig),
        schedule=schedule,
        start_from=file.make(StartConfig) if file.has_section("start_from") else None,
        classifier=classifier if classifier.scale and classifier.path else None,
    )
    file.refuse_first(
        _network_problems(config.network),
        _diffusion_problems(config.diffusion, schedule),
        _ddim_problems(config),
        _start_problems(config),
        _classifier_problems(config.classifier, config.network.image_size),
    )
    return config


def _latent_config(file: _File) -> Config:
    unet, autoencoder = file.make(LatentUNetConfig), file.make(AutoencoderConfig)
    latent = file.make(LatentConfig, unet=unet, autoencoder=autoencoder)
    config = _config(
        file, latent=latent, network=None, diffusion=None, schedule=None, classifier=None
    )
    file.refuse_first(_latent_unet_problems(unet, autoencoder), _autoencoder_problems(autoencoder))
    return config


def _config(file: _File, **parts: Any) -> Config:
    """The run, from the keys that all methods have, and the parts that one of them has."""
    dataset = file.make(DatasetConfig, name=file.dataset_name) if file.dataset_name else None
    speed = file.make(SpeedConfig)
    return file.make(Config, source=file.source, speed=speed, dataset=dataset, **parts)


def load_training_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> TrainingConfig:
    """Read the YAML file of a training run; arguments and errors as in `load_config`."""
    file = _File(os.fspath(path), overrides, {"pixel": _TRAINING})
    config = file.make(
        TrainingConfig,
        source=file.source,
        network=file.make_network(),
        diffusion=file.make(DiffusionConfig),
        training=file.make(TrainingParams),
    )
    file.refuse_first(
        _network_problems(config.network),
        _diffusion_problems(config.diffusion, None),
        _precision_problems(config.network),
        _folder_problems(file.values, outputs=["log_dir"], inputs=["data_dir"]),
    )
    return config


def to_yaml_dict(config: Config | TrainingConfig, defaults: bool = True) -> dict[str, Any]:
    """The effective config as YAML files write it; written out and loaded, it is equal again.

    defaults: False leaves out what is at its default.
    """
    vocabulary = _METHODS[config.method] if isinstance(config, Config) else _TRAINING
    tree: dict[str, Any] = {}
    for part in _parts(config):
        for name in _kinds(type(part)):
            if not defaults and getattr(part, name) == getattr(type(part), name, _NO_DEFAULT):
                continue
            key = _key(type(part), name)
            if key not in vocabulary.known:
                continue  # of another method
            *sections, last = key.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(part.name if section == "*" else section, {})
            node[last] = _as_yaml(getattr(part, name))
    return tree


def _parts(config: Any) -> Iterator[Any]:
    """A dataclass and those in its fields, however deep."""
    yield config
    for value in filter(is_dataclass, vars(config).values()):
        yield from _parts(value)


_NO_DEFAULT = object()


def _as_yaml(value: Any) -> Any:
    if isinstance(value, tuple):
        return ",".join(str(number).removesuffix(".0") for number in value)
    return value


_Part = TypeVar("_Part")
_Path = tuple[str, ...]  # a dotted path in its parts
_Problems = Iterator[tuple[str, str]]  # a key of the vocabulary, and what it accepts


class _File:
    """A YAML file and its overrides as a flat table: key of the vocabulary -> parsed value."""

    def __init__(
        self, source: str, overrides: Sequence[str], vocabularies: Mapping[str, _Vocabulary]
    ):
        """vocabularies: by the method that the file names."""
        self.source = source
        self.known = {key: kind for v in vocabularies.values() for key, kind in v.known.items()}
        self.nodes: dict[_Path, yaml.Node] = {}
        self.origins: dict[_Path, str] = {}  # for messages: a line of the file, or an override
        self.record(_read(source), (), source)
        for override in overrides:
            self.record_override(override)
        self.dataset_name = self.find_dataset()
        self.method = self.parse(("method",)) if ("method",) in self.nodes else "pixel"
        vocabulary = vocabularies[self.method]
        self.known = vocabulary.known
        self.elsewhere = {k: v for k, v in vocabulary.elsewhere.items() if k not in self.known}
        self.values = {"name": Path(source).stem} | dict(self.parse_all())

    def has(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.values)

    def has_section(self, name: str) -> bool:
        """Whether there is such a section, be it an empty one."""
        return self.has(f"{name}.") or isinstance(self.nodes.get((name,)), yaml.MappingNode)

    def make(self, cls: type[_Part], **parts: Any) -> _Part:
        """`cls` from the values of its keys; `parts` are the fields that no key sets."""
        given = {}
        for name, kind in _kinds(cls).items():
            key = _key(cls, name)
            if key in self.values:
                given[name] = self.values[key]
            elif not hasattr(cls, name):  # no default
                self.refuse(key, kind.accepts)
        return cls(**given, **parts)

    def make_network(self) -> NetworkConfig:
        """The network, with `channel_mult` by image size where the file leaves it open."""
        network = self.make(NetworkConfig)
        if network.channel_mult:
            return network
        if network.image_size not in CHANNEL_MULT_BY_IMAGE_SIZE:
            self.refuse(
                "image_size", "64, 128, 256, 512, or any if channel_mult is set, as in '1,2,2,4'"
            )
        return replace(network, channel_mult=CHANNEL_MULT_BY_IMAGE_SIZE[network.image_size])

    def refuse_first(self, *problems: _Problems) -> None:
        for key, accepted in chain(*problems):
            self.refuse(key, accepted)

    def refuse(self, key: str, accepted: str) -> NoReturn:
        """Raise the one-line error about a key, or a section, of the vocabulary."""
        name = self.dataset_name or "NAME"
        path = tuple(name if part == "*" else part for part in key.split("."))
        found = f"found {_shown(self.nodes[path])}" if path in self.nodes else "missing"
        self.refuse_path(path, f"{found}; accepted: {accepted}")

    def refuse_path(self, path: _Path, problem: str) -> NoReturn:
        where = ": ".join(filter(None, [self.origins.get(path, self.source), ".".join(path)]))
        raise UserError(f"{where}: {problem}")

    def record(self, node: yaml.Node, path: _Path, origin: str, override: str = "") -> None:
        """Note the key at `path` and, if it is a section, the keys below it."""
        first = self.origins.get(path)
        self.nodes[path], self.origins[path] = node, origin
        if first:
            self.refuse_path(path, f"the same key as in {first}; accepted: each key once")
        if not _is_section(path, self.known) or not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else _shown(key)
            line = f"{self.source}, line {key.start_mark.line + 1}"
            self.record(value, (*path, name), override or line, override)

    def record_override(self, override: str) -> None:
        key, equals, text = override.partition("=")
        if not (key and equals):
            raise UserError(f"--set {override}: accepted: KEY=VALUE, such as --set seed=5")
        if " #" in text and text.lstrip()[:1] not in ("'", '"'):
            raise UserError(
                f"--set {override}: what follows ' #' is a comment in YAML; for a text with it, "
                "put quotes inside the others: --set 'KEY=\"a #1.png\"'"
            )
        path = tuple(key.split("."))
        for old in [old for old in self.nodes if old[: len(path)] == path]:
            del self.nodes[old], self.origins[old]
        origin = f"{self.source} with --set {override}"
        self.record(_compose(text, origin), path, origin, override=origin)

    def find_dataset(self) -> str:
        """The dataset's name; '' if there is none."""
        paths = [path for path in self.nodes if path[:2] == _DATASETS and path[2:]]
        names = list(dict.fromkeys(path[2] for path in paths))
        if len(names) > 1:
            found = f"found {len(names)} datasets ({', '.join(names)})"
            remedy = "make a file for each"
            if any(" with --set " in self.origins[path] for path in paths):
                remedy = f"with --set, write data.eval.{names[0]}, as in the file"
            self.refuse_path(_DATASETS, f"{found}; accepted: exactly one; {remedy}")
        return names[0] if names else ""

    def parse(self, path: _Path) -> Any:
        """The value of the key at `path`."""
        key = _pattern(path)
        try:
            return self.known[key].parse(self.nodes[path])
        except ValueError:
            self.refuse(key, self.known[key].accepts)

    def parse_all(self) -> Iterator[tuple[str, Any]]:
        """Key and value of every setting. Raises UserError for an unknown key or a wrong value."""
        for path, node in self.nodes.items():
            if _pattern(path) in self.known:
                yield _pattern(path), self.parse(path)
            elif not _is_section(path, self.known):
                self.refuse_path(path, self.unknown_problem(path))
            elif not isinstance(node, yaml.MappingNode) and not (path and _is_null(node)):
                self.refuse_path(path, f"found {_shown(node)}; accepted: a map of keys")

    def unknown_problem(self, path: _Path) -> str:
        """What to do with a key, or a section, that is not of this vocabulary."""
        what = _for_section(self.elsewhere, _pattern(path))
        if what:
            return what
        own = _with_sections(key for key, kind in self.known.items() if kind is not _ANYTHING)
        dataset = self.dataset_name or "NAME"

        def likeness(key: str) -> tuple[float, bool, float]:
            # The last word counts first, so that a misplaced key is shown its place.
            name = key.replace("*", dataset)
            pairs = (path[-1], name.rpartition(".")[2]), (".".join(path), name)
            last, whole = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
            if key not in own and last < 0.9:
                last = 0  # a key of another kind of run has to be meant for sure
            return last, key in own, whole

        nearest = max(sorted(own | _with_sections(self.elsewhere)), key=likeness)
        problem = f"unknown key; the nearest known key is {nearest.replace('*', dataset)}"
        what = None if nearest in own else _for_section(self.elsewhere, nearest)
        return f"{problem} ({what})" if what else problem


_DATASETS = ("data", "eval")


def _pattern(path: _Path) -> str:
    """A found path as the vocabulary writes it: `*` is the dataset's name."""
    parts = [part.replace(".", r"\.") for part in path]  # a dot in a name opens no section
    if path[:2] == _DATASETS and path[2:]:
        parts[2] = "*"
    return ".".join(parts)


def _is_section(path: _Path, known: Mapping) -> bool:
    return not path or any(key.startswith(_pattern(path) + ".") for key in known)


def _with_sections(keys: Iterable[str]) -> set[str]:
    """Keys, and the sections that they are in."""
    return {
        ".".join(parts[: i + 1])
        for parts in (key.split(".") for key in keys)
        for i in range(len(parts))
    }


def _for_section(elsewhere: Mapping[str, str], section: str) -> str | None:
    """What to do with a key, or with a section by its first key; None: it is not elsewhere."""
    found = (what for key, what in elsewhere.items() if f"{key}.".startswith(f"{section}."))
    return next(found, None)


def _read(source: str) -> yaml.Node:
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{source}: not a text file in UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{source}: cannot read this config file: {reason}") from None
    node = _compose(text, source)
    if _is_null(node):
        raise UserError(f"{source}: the file is empty; copy one from confs/ and edit it")
    return node


def _compose(text: str, origin: str) -> yaml.Node:
    """The YAML node of `text`, its scalars as they are written; a null where there is nothing."""
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader) or yaml.ScalarNode("", "")
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        hint = "; indent with spaces, not with tabs" if r"'\t'" in str(problem) else ""
        raise UserError(f"{origin}{place}: not valid YAML: {problem}{hint}") from None


def _shown(node: yaml.Node) -> str:
    """A found value for a message."""
    if not isinstance(node, yaml.ScalarNode):
        return "a map" if isinstance(node, yaml.MappingNode) else "a list"
    text = node.value if len(node.value) <= 80 else f"{node.value[:80]}..."
    return repr(text) if node.style else text or "nothing"


# ---- Combinations that cannot work -----------------------------------------------------------


def _network_problems(network: NetworkConfig) -> _Problems:
    yield from _side_problems("image_size", network.image_size, len(network.channel_mult))
    widths = [int(mult * network.num_channels) for mult in network.channel_mult]
    yield from _multiple_problems("num_channels", 32, "the widths of the levels", widths)
    attended = _attended(network.image_size, widths, network.attention_resolutions)
    if network.num_head_channels != -1:
        heads = {"num_head_channels": [*attended, widths[-1]]}
    else:
        heads = {"num_heads": [*attended, widths[-1]], "num_heads_upsample": attended}
    for key, divided in heads.items():
        yield from _head_problems(key, getattr(network, key), divided)


def _side_problems(key: str, side: int, levels: int) -> _Problems:
    if side % 2 ** (levels - 1):
        yield key, f"multiples of 2**{levels - 1}, for {levels} levels of channel_mult"


def _latent_unet_problems(unet: LatentUNetConfig, autoencoder: AutoencoderConfig) -> _Problems:
    channels = autoencoder.embed_dim
    if unet.in_channels != 2 * channels + 1:
        what = "two latents of latent.autoencoder.embed_dim channels each, and the hole"
        yield "latent.unet.in_channels", f"{2 * channels + 1}, for {what}"
    if unet.out_channels != channels:
        yield "latent.unet.out_channels", f"{channels}, as latent.autoencoder.embed_dim"
    yield from _side_problems("latent.unet.image_size", unet.image_size, len(unet.channel_mult))
    widths = [mult * unet.model_channels for mult in unet.channel_mult]
    what = "the widths of the levels"
    yield from _multiple_problems("latent.unet.model_channels", 32, what, widths)
    rates = [2**level for level in range(len(widths))]
    if not {*unet.attention_resolutions} <= {*rates}:
        yield "latent.unet.attention_resolutions", f"among {rates}, the rates of the levels"
    attended = [
        width
        for width, rate in zip(widths, rates, strict=True)
        if rate in unet.attention_resolutions
    ]
    yield from _head_problems("latent.unet.num_heads", unet.num_heads, [*attended, widths[-1]])


def _autoencoder_problems(autoencoder: AutoencoderConfig) -> _Problems:
    if autoencoder.ch % 32:
        yield "latent.autoencoder.ch", "multiples of 32"


def _head_problems(key: str, divisor: int, widths: list[int]) -> _Problems:
    if divisor != -1 and any(width % divisor for width in widths):
        yield key, f"divisors of {widths}, the widths of the levels with attention"


def _precision_problems(network: NetworkConfig) -> _Problems:
    if network.use_fp16:
        yield "use_fp16", "false in training, where use_bf16 is the switch to half precision"


def _classifier_problems(classifier: ClassifierConfig | None, image_size: int) -> _Problems:
    if not classifier:
        return
    if image_size not in CHANNEL_MULT_BY_IMAGE_SIZE:
        yield "image_size", "64, 128, 256 or 512, which the classifier can see"
        return
    widths = [int(mult * classifier.width) for mult in CHANNEL_MULT_BY_IMAGE_SIZE[image_size]]
    yield from _multiple_problems("classifier_width", 32, "the widths of the levels", widths)
    attended = _attended(image_size, widths, classifier.attention_resolutions)
    what = "the widths of the levels with attention"
    yield from _multiple_problems("classifier_width", 64, what, [*attended, widths[-1]])


def _multiple_problems(key: str, divisor: int, what: str, widths: list[int]) -> _Problems:
    if any(width == 0 or width % divisor for width in widths):
        yield key, f"what makes {widths}, {what}, multiples of {divisor}"


def _attended(image_size: int, widths: list[int], sides: tuple[int, ...]) -> list[int]:
    """The widths of the levels with attention; level i works at 1 / 2**i of the image's side."""
    rates = {image_size // side for side in sides}
    return [width for level, width in enumerate(widths) if 2**level in rates]


def _diffusion_problems(diffusion: DiffusionConfig, schedule: ScheduleConfig | None) -> _Problems:
    steps = diffusion.diffusion_steps
    if diffusion.noise_schedule == "linear" and steps <= 20:
        yield "diffusion_steps", "numbers > 20 (linear betas reach 1 at 20), or a cosine schedule"
    kept = _kept_steps(diffusion)
    if schedule and schedule.t_T > min(kept, steps) > 0:
        limit = "the steps that diffusion_steps and timestep_respacing leave"
        yield "schedule_jump_params.t_T", f"at most {min(kept, steps)}, {limit}"
    if not 1 <= kept <= steps:
        yield "timestep_respacing", f"from 1 to {steps} steps in all, the diffusion_steps"


def _ddim_problems(config: Config) -> _Problems:
    if config.ddim_eta and not config.use_ddim:
        yield "ddim_eta", "0 without use_ddim: true, since it has no effect then"


def _kept_steps(diffusion: DiffusionConfig) -> int:
    counts = [int(count) for count in re.findall("[0-9]+", diffusion.timestep_respacing)]
    return sum(counts) if counts else diffusion.diffusion_steps


def _start_problems(config: Config) -> _Problems:
    steps = config.schedule.t_T if config.schedule else _kept_steps(config.diffusion)
    if config.start_from and config.start_from.t >= steps:
        yield "start_from.t", f"from 0 to {steps - 1}, the times of the schedule"


def _dataset_problems(values: Mapping[str, Any], image_size: int | None) -> _Problems:
    if values.get("data.eval.*.image_size", image_size) != image_size:
        same = f"{image_size or 'null'}, as image_size at the top, or no such key"
        yield "data.eval.*.image_size", same
    if values.get("data.eval.*.fit") == "region" and image_size is None:
        yield "data.eval.*.fit", "crop, or set image_size, the side of the squares around holes"
    gt_path, mask_path = (values.get(f"data.eval.*.{key}") for key in ("gt_path", "mask_path"))
    if gt_path and mask_path and os.path.realpath(gt_path) == os.path.realpath(mask_path):
        yield "data.eval.*.mask_path", "masks in a folder of their own, apart from gt_path"
    if values.get("data.eval.*.batch_size") == "auto" and values.get("data.eval.*.drop_last"):
        yield "data.eval.*.drop_last", "false with batch_size auto, or a number as batch_size"
    if values.get("data.eval.*.fit") == "region" and values.get("data.eval.*.random_flip"):
        yield "data.eval.*.random_flip", "false with fit: region, which gives whole photos back"
    outputs = [key for key in values if ".paths." in key]
    inputs = ["data.eval.*.gt_path", "data.eval.*.mask_path", "start_from.path"]
    yield from _folder_problems(values, outputs, inputs)


def _folder_problems(
    values: Mapping[str, Any], outputs: Sequence[str], inputs: Sequence[str]
) -> _Problems:
    """Outputs that would overwrite inputs or one another, or be found among the inputs later."""
    owners: dict[str, str] = {}
    for key in filter(values.get, outputs):
        folder = os.path.realpath(values[key])
        if folder in owners:
            yield key, f"a folder of its own; this is that of {owners[folder]}"
        owners[folder] = key.rpartition(".")[2]
        for source in filter(values.get, inputs):
            if _is_among(folder, os.path.realpath(values[source])):
                name = source.removeprefix("data.eval.*.")
                yield key, f"a folder apart from {name}, which is input"


def _is_among(folder: str, source: str) -> bool:
    if os.path.isfile(source):
        return folder == os.path.dirname(source)
    return os.path.commonpath([folder, source]) == source
