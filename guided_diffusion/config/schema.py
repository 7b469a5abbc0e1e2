"""All settings, as frozen dataclasses.

A field's name is its YAML key, if `vocabulary` gives it no other, and its type says what the key
accepts. A field is made by `pixels` if a result's pixels depend on its value, else by `aside`.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, TypeVar

from guided_diffusion.config.kinds import (
    Attraction,
    BatchSize,
    Blocks,
    Channels,
    Colours,
    Count,
    CountOrDefault,
    CountOrZero,
    DDIMSteps,
    Device,
    Evaluations,
    FilePath,
    Flag,
    Label,
    Multiples,
    NotNegative,
    OnlyEmpty,
    OnlyFalse,
    OnlyNone,
    Positive,
    Rates,
    Respacing,
    Samples,
    Scales,
    Seed,
    Share,
    Shift,
    Side,
    Sizes,
    Text,
    WholeMultiples,
)
from guided_diffusion.networks.params import (
    NUM_CLASSES,
    AutoencoderParams,
    ClassifierParams,
    UNetParams,
)

CUT = 128  # level of a mask (0 to 255) at which it is cut into black and white, where it is
LITTLE = 0.2  # of a picture: masks that keep less are often meant the other way round

_Params = TypeVar("_Params")


def pixels(default: Any = MISSING) -> Any:
    """A field that a result's pixels depend on: with another value, it is made again."""
    return field(default=default, metadata={"pixels": True})


def aside(default: Any = MISSING) -> Any:
    """A field that changes no pixel, or counts in another way.

    Another way: in what is recorded of each result's inputs, or as the `Speed` that it comes to.
    """
    return field(default=default, metadata={"pixels": False})


def _params(cls: type[_Params], part: Any, **others: Any) -> _Params:
    """`cls` of the others, and of the fields that this part of a config has too."""
    shared = {f.name: getattr(part, f.name) for f in fields(cls) if hasattr(part, f.name)}
    return cls(**shared | others)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The denoiser (U-Net)."""

    image_size: Count = pixels(64)  # side of the square that the network sees
    in_channels: Channels = pixels(3)  # 1 = grey
    model_channels: Count = pixels(128)  # base width; level i is channel_mult[i] times as wide
    num_res_blocks: Blocks = pixels(2)  # per level
    num_heads: Count = pixels(4)
    num_heads_upsample: CountOrDefault = pixels(-1)  # in the output half; -1 = num_heads
    num_head_channels: CountOrDefault = pixels(-1)  # if given, num_heads does not count
    attention_resolutions: Sizes = pixels((16, 8))  # image sides, not rates
    channel_mult: Multiples = pixels(())  # where a file has none, the loader takes it by image size
    dropout: Share = pixels(0.0)
    class_cond: Flag = pixels(False)  # num_classes of them
    num_classes: Count = pixels(NUM_CLASSES)
    use_checkpoint: Flag = pixels(False)  # gradients take less memory and more time
    use_scale_shift_norm: Flag = pixels(True)
    resblock_updown: Flag = pixels(False)
    use_fp16: Flag = aside(False)
    use_new_attention_order: Flag = pixels(False)
    learn_sigma: Flag = pixels(False)  # twice the output channels; the second half is v

    @property
    def params(self) -> UNetParams:
        """Raises ShapeError."""
        out_channels = self.in_channels * (2 if self.learn_sigma else 1)
        num_classes = self.num_classes if self.class_cond else None
        return _params(UNetParams, self, out_channels=out_channels, num_classes=num_classes)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The diffusion process, and what the network predicts of it."""

    diffusion_steps: Count = pixels(1000)
    noise_schedule: Literal["linear", "cosine"] = pixels("linear")
    timestep_respacing: Respacing = pixels("")  # left out beside a schedule: its t_T
    predict_xstart: Flag = pixels(False)  # the network predicts x_0 instead of epsilon
    rescale_timesteps: Flag = pixels(False)  # the network sees t * 1000 / diffusion_steps
    rescale_learned_sigmas: Flag = pixels(False)  # no effect: training always weighs by N / 1000
    use_kl: Flag = pixels(False)  # training only: the variational bound alone

    @property
    def kept_steps(self) -> int:
        """Steps of the base process that the respacing keeps, if there is room for them."""
        counts = [int(count) for count in re.findall("[0-9]+", self.timestep_respacing)]
        return sum(counts) if counts else self.diffusion_steps


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The classifier of noisy images that guides the sampling."""

    scale: NotNegative = pixels(0.0)  # strength of the guidance; 0 = off
    path: FilePath | None = pixels(None)
    use_fp16: Flag = pixels(False)
    width: Count = pixels(128)
    depth: Count = pixels(2)  # res blocks per level
    attention_resolutions: Sizes = pixels((32, 16, 8))
    use_scale_shift_norm: Flag = pixels(True)
    resblock_updown: Flag = pixels(True)
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] = pixels("attention")

    @property
    def missing(self) -> str:
        """What guidance lacks where only half of it is set, in words; else ""."""
        if self.scale and not self.path:
            return f"classifier_scale is {self.scale:g}, but there is no classifier_path"
        if self.path and not self.scale:
            return "there is a classifier_path, but classifier_scale is 0"
        return ""

    def params(
        self, image_size: int, in_channels: int = 3, num_classes: int = NUM_CLASSES
    ) -> ClassifierParams:
        """What it shares with the denoiser is given. Raises ShapeError."""
        return _params(
            ClassifierParams,
            self,
            image_size=image_size,
            in_channels=in_channels,
            num_classes=num_classes,
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The times that the sampler visits: how far it jumps back, and how often."""

    t_T: Count = pixels()  # number of steps
    n_sample: Count = pixels()
    jump_length: Count = pixels()
    jump_n_sample: Count = pixels()
    jump2_length: Count = pixels(1)
    jump2_n_sample: Count = pixels(1)
    jump3_length: Count = pixels(1)
    jump3_n_sample: Count = pixels(1)
    start_resampling: CountOrZero = pixels(100_000_000)  # no jumps to later times than this


@dataclass(frozen=True, kw_only=True)
class LangevinConfig:
    """The quick sampler: its evaluations, and for experts what it does with them."""

    evaluations: Evaluations = pixels(48)  # of the network for an image, at most; a key at the top
    levels: Count | None = pixels(None)  # noise levels; None = as many as evaluations allow
    inner_steps: CountOrZero = pixels(1)  # Langevin steps at each level at middle noise
    inner_from: NotNegative = pixels(0.15)  # σ of middle noise
    inner_to: NotNegative = pixels(6.0)
    step_size: Positive = pixels(2.0)  # the largest h of a Langevin step; h is at most σ
    noise: NotNegative = pixels(1.0)  # of a Langevin step, times what keeps the variance
    attraction: Attraction = pixels(1.6)  # how far known pixels move, and pull the others
    rho: Positive = pixels(6.0)  # the higher, the more levels at low noise
    sigma_min: Positive = pixels(0.035)  # σ of the lowest level, and of the highest
    sigma_max: Positive = pixels(20.0)


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """A complete picture to begin with, in place of pure noise."""

    path: FilePath | None = aside(None)  # folder, or one for all; None = the images themselves
    t: CountOrZero = pixels()  # noised to this time of the schedule, which is walked from there on


@dataclass(frozen=True, kw_only=True)
class LatentUNetConfig:
    """The denoiser of latents (U-Net). The defaults are those of the published model."""

    image_size: Count = pixels(64)  # nominal side of a latent; any other one works as well
    in_channels: Count = pixels(7)  # the noisy latent, the masked picture's latent and the hole
    out_channels: Count = pixels(3)  # of a latent
    model_channels: Count = pixels(256)  # base width; level i is channel_mult[i] times as wide
    attention_resolutions: Sizes = pixels((8, 4, 2))  # downsampling rates, not sides
    num_res_blocks: Blocks = pixels(2)  # per level
    channel_mult: WholeMultiples = pixels((1, 2, 3, 4))
    num_heads: Count = pixels(8)
    resblock_updown: Flag = pixels(True)

    def params(self, side: int) -> UNetParams:
        """side: of the latents that it is made for. Raises ShapeError."""
        sides = tuple(side // rate for rate in self.attention_resolutions)
        return _params(
            UNetParams,
            self,
            image_size=side,
            attention_resolutions=sides,
            use_scale_shift_norm=False,
        )


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """From pictures to latents and back (VQ). The defaults are those of the published model."""

    attn_type: OnlyNone = pixels("none")
    double_z: OnlyFalse = pixels(False)
    z_channels: Count = pixels(3)  # between encoder and quant_conv
    resolution: Count = aside(256)  # no effect: any size works
    in_channels: Colours = pixels(3)
    out_ch: Colours = pixels(3)
    ch: Count = pixels(128)  # base width; level i is ch_mult[i] times as wide
    ch_mult: WholeMultiples = pixels((1, 2, 4))  # each level but the last halves the sides
    num_res_blocks: Blocks = pixels(2)  # per level
    attn_resolutions: OnlyEmpty = pixels(())
    dropout: Share = aside(0.0)  # no effect: it is for training
    n_embed: Count = pixels(8192)  # codes in the codebook
    embed_dim: Count = pixels(3)  # channels of a latent, and of a code

    @property
    def params(self) -> AutoencoderParams:
        """Raises ShapeError."""
        return _params(AutoencoderParams, self)


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Latent diffusion: the steps of its sampler, and its two networks."""

    image_size: Side | None = pixels(None)  # of the square; None = pictures as they are
    ddim_steps: DDIMSteps = pixels(50)
    unet: LatentUNetConfig = LatentUNetConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()

    @property
    def factor(self) -> int:
        """Side of a picture / side of its latent."""
        return self.autoencoder.params.factor

    @property
    def multiple(self) -> int:
        """Both networks take pictures whose sides are multiples of this."""
        return self.factor * 2 ** (len(self.unet.channel_mult) - 1)

    @property
    def nominal_size(self) -> int:
        """Side of the squares that it is made fast for: of image_size, or else a nominal one."""
        side = self.image_size or self.factor * self.unet.image_size
        return side + -side % self.multiple

    @property
    def unet_params(self) -> UNetParams:
        """The denoiser's shape, for latents of the nominal size."""
        return self.unet.params(self.nominal_size // self.factor)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Where images and masks come from, and where results go."""

    name: str  # what stands for the `*` in the file
    gt_path: FilePath = aside()  # folder of images, or one image
    mask_path: FilePath = aside()  # folder of masks, or one mask for all images
    mask_convention: Literal["keep", "fill"] = pixels("keep")  # what white (255) in a mask means
    # the centre square; or all holes, from squares around them, or from windows over them
    fit: Literal["crop", "region", "tile"] = pixels("crop")
    batch_size: BatchSize = aside(1)  # auto: as many as fit in the GPU's memory
    offset: CountOrZero = aside(0)  # drop the first pairs
    max_len: Count | None = aside(None)  # keep at most so many pairs
    deterministic: Flag = aside(True)  # false = work in shuffled order
    random_flip: Flag = aside(False)  # image and mask together
    drop_last: Flag = aside(False)  # leave out an incomplete last batch
    inpainted_dir: FilePath = aside()
    gt_masked_dir: FilePath = aside()
    gt_dir: FilePath | None = aside(None)  # None = not written
    keep_mask_dir: FilePath = aside()


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """How the network is computed. What is None is chosen, see `speed.choice`."""

    fast: Flag = aside(False)  # the fastest safe way that this machine offers
    precision: Text | None = aside(None)  # of the network's body: fp32, bf16, fp16 or tf32
    compile: Flag | None = aside(None)  # torch.compile
    cuda_graph: Flag | None = aside(None)  # one evaluation captured and replayed


@dataclass(frozen=True, kw_only=True)
class Config:
    """One inpainting run."""

    source: str = field(compare=False)  # the YAML file
    name: Text = aside()  # left out: the file's own
    model_path: FilePath = pixels()  # or URL: of the denoiser; with latent, of all networks
    method: Literal["pixel", "latent"] = pixels("pixel")
    latent: LatentConfig | None = None  # None = method pixel
    network: NetworkConfig | None  # None = method latent
    diffusion: DiffusionConfig | None  # None = method latent
    clip_denoised: Flag = pixels(True)  # clamp the predicted x_0 to [-1, 1]
    use_ddim: Flag = pixels(False)  # DDIM's steps down instead of the ancestral ones
    ddim_eta: NotNegative = pixels(0.0)  # their noise: 0 = none, 1 = the posterior's
    sampler: Literal["repaint", "langevin"] = pixels("repaint")
    langevin: LangevinConfig | None = None  # None = sampler repaint
    schedule: ScheduleConfig | None  # None = plain ancestral sampling, or sampler langevin
    start_from: StartConfig | None = None  # None = pure noise
    merge_known: Flag = pixels(True)  # merge the known region
    time_shift: Shift = pixels(1)  # going up from t takes beta[t + shift]
    classifier: ClassifierConfig | None  # None = no guidance
    unguided: str = field(default="", compare=False)  # why, where half of it is set; in words
    cond_y: Label | None = pixels(None)  # None = a random class per image
    show_progress: Flag = aside(True)
    device: Device | None = aside(None)  # None = cuda if there is one, else cpu
    speed: SpeedConfig = SpeedConfig()
    seed: Seed | None = aside(None)  # None = drawn afresh
    paste_known: Flag = pixels(False)  # write the known pixels exactly
    samples_per_image: Samples = aside(1)  # if several: x_0.png, x_1.png, ...
    checkpoint_every: NotNegative = aside(300)  # seconds after which a picture's state is saved
    log_every: CountOrZero = aside(0)  # transitions after which the process is shown; 0 = never
    dataset: DatasetConfig | None

    @property
    def image_size(self) -> int | None:
        """Side of the square that pictures become for the network; None: they stay as they are."""
        return self.latent.image_size if self.latent else self.network.image_size

    @property
    def grey(self) -> bool:
        """Whether the network knows no colours, so that pictures are grey, too."""
        return self.network is not None and self.network.in_channels == 1

    @property
    def known_from(self) -> int | None:
        """Level of the mask (0 to 255) from which the input's own bytes come out; None: never."""
        if self.latent:
            return CUT
        return 255 if self.paste_known or self.langevin else None

    @property
    def start_path(self) -> str | None:
        """Folder or file of the pictures to start from; None: sampling starts from pure noise."""
        return self.start_from and (self.start_from.path or self.dataset.gt_path)


@dataclass(frozen=True, kw_only=True)
class TrainingParams:
    """How a network is trained."""

    data_dir: FilePath  # folder of images
    crop: Literal["center", "random"] = "center"  # of an image: all that fits, or a random square
    scales: Scales | None = None  # of random crops: S*s pixels are reduced to S; None = s is 1
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
