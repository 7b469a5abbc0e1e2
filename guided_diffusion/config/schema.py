"""All settings, as frozen dataclasses.

A field's name is its YAML key, and its type says what the key accepts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from guided_diffusion.config.kinds import (
    BatchSize,
    Blocks,
    Colours,
    Count,
    CountOrDefault,
    CountOrZero,
    DDIMSteps,
    Device,
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

CHANNEL_MULT_BY_IMAGE_SIZE: dict[int, tuple[float, ...]] = {
    512: (0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0),
    256: (1.0, 1.0, 2.0, 2.0, 4.0, 4.0),
    128: (1.0, 1.0, 2.0, 3.0, 4.0),
    64: (1.0, 2.0, 3.0, 4.0),
}

CUT = 128  # level of a mask (0 to 255) at which it is cut into black and white, where it is


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
