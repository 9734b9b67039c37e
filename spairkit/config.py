"""The settings of a run: frozen, strict dataclasses whose defaults are the paper's (Table 1).

A `Config` holds data, preparation, model and training. `config_values` reads and writes it.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Pixels = Annotated[int, Field(ge=1, le=4096)]
Width = Annotated[int, Field(ge=1, le=4096)]
Steps = Annotated[int, Field(ge=0, le=10**9)]
Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Weight = Annotated[float, Field(ge=-1.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, le=1e9)]
NonNegative = Annotated[float, Field(ge=0.0, le=1e9)]
Real = Annotated[float, Field(ge=-1e3, le=1e3)]
# so that 1 / (1 + odds) differs from 0 and 1 in float32
Odds = Annotated[float, Field(ge=1e-6, le=1e9)]
# with a step of 30 bits and a purpose of 2 bits it fits 64 bits
Seed = Annotated[int, Field(ge=0, lt=2**30)]


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class DataConfig:
    """The images, and the layout of synthetic scenes (docs/model.md 10)."""

    name: Literal["digits", "mnist", "emnist", "cards", "folder"] = "digits"
    """Dataset. `digits` ships with the package, `cards` of the game SET are drawn by code; the
    others read `path`."""
    path: str = ""
    """MNIST or EMNIST file (npz, IDX, gzip), or the folder of images, or one image."""
    image_height: Pixels = 48
    """Height of a scene or of a training crop, in pixels."""
    image_width: Pixels = 48
    """Width of a scene or of a training crop, in pixels."""
    scene_height: Annotated[int, Field(ge=0, le=4096)] = 0
    """Height of a scene of which training and validation see crops, while test scenes are whole;
    0: scenes are not cut. A folder has images of its own sizes."""
    scene_width: Annotated[int, Field(ge=0, le=4096)] = 0
    """Width of such a scene."""
    crops: Literal["uniform", "objects"] = "uniform"
    """Places of the crops of a folder: `objects` puts half of them where prepared images are
    bright, for images most of which are empty."""
    min_objects: Annotated[int, Field(ge=0, le=256)] = 1
    """Least number of objects in a scene; the number is uniform."""
    max_objects: Annotated[int, Field(ge=0, le=256)] = 9
    """Greatest number of objects in a scene."""
    glyph_size: Annotated[int, Field(ge=4, le=256)] = 14
    """Side of the square patch of a glyph, in pixels."""
    glyph_jitter: Annotated[int, Field(ge=0, le=64)] = 0
    """The side of a patch varies by up to this many pixels, up and down."""
    max_overlap: Unit = 0.5
    """Largest overlap of a patch with all earlier ones together, as a share of a patch."""
    colour: Literal["white", "random"] = "white"
    """Colour of the glyphs; `random` draws a bright colour for each."""
    background: Literal["black", "random"] = "black"
    """Background of scenes; `random` draws a dark colour for each image."""
    train_images: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Number of training scenes, which repeat in order; 0: every update has new ones."""
    validation_images: Annotated[int, Field(ge=1, le=10**6)] = 1000
    """Number of validation scenes; of a folder, of crops of its validation files, at most."""
    test_images: Annotated[int, Field(ge=1, le=10**6)] = 1000
    """Number of test scenes; a folder uses all of its files instead."""
    seed: Seed = 0
    """Seed of scenes and crops, and of their order; independent of `train.seed`."""

    @property
    def whole_size(self) -> tuple[int, int]:
        """Height and width of a whole scene, in pixels."""
        return self.scene_height or self.image_height, self.scene_width or self.image_width

    def __post_init__(self) -> None:
        if (self.scene_height or self.scene_width) and self.name == "folder":
            raise ValueError("scene_height and scene_width are for scenes, not for a folder")
        if self.train_images and self.name == "folder":
            raise ValueError("train_images is for scenes, not for a folder")
        height, width = self.whole_size
        if self.image_height > height or self.image_width > width:
            raise ValueError(
                f"a crop of {self.image_height}x{self.image_width} px does not fit a scene of "
                f"{height}x{width} px"
            )
        if self.min_objects > self.max_objects:
            raise ValueError(
                f"min_objects ({self.min_objects}) must not exceed max_objects ({self.max_objects})"
            )
        side = self.glyph_size + self.glyph_jitter
        if self.name != "folder" and side > min(height, width):
            raise ValueError(f"a glyph of {side} px does not fit an image of {height}x{width} px")
        if self.glyph_jitter >= self.glyph_size:
            raise ValueError(
                f"glyph_jitter ({self.glyph_jitter}) must be less than "
                f"glyph_size ({self.glyph_size})"
            )
        if self.name == "folder" and not self.path:
            raise ValueError("name = 'folder' needs path, the folder of images")
        if self.name == "cards":
            if not 3 <= self.min_objects == self.max_objects <= 7:
                raise ValueError(
                    f"name = 'cards' needs min_objects and max_objects equal, from 3 to 7, got "
                    f"{self.min_objects} and {self.max_objects}"
                )
            if (self.colour, self.background, self.glyph_jitter) != ("white", "black", 0):
                raise ValueError(
                    "cards have colours, backgrounds and a size of their own; leave out colour, "
                    "background and glyph_jitter"
                )


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class PrepareConfig:
    """Preparation of every image, in training and wherever the model is used."""

    scale: Annotated[float, Field(ge=0.005, le=16.0)] = 1.0
    """Factor by which images are resized; objects should become about 12 px."""
    contrast: Literal["none", "direction", "distance"] = "none"
    """`none` keeps the colours. Otherwise images become grey, with bright objects: `direction` adds
    the channels with the weights `direction`; `distance` is that to the background's colour."""
    direction: tuple[Weight, Weight, Weight] = (1 / 3, 1 / 3, 1 / 3)
    """Weights of red, green and blue; negative ones turn dark objects into bright ones."""
    background: Literal["none", "image", "surface"] = "none"
    """Background that a contrast is measured from: 0, one value for each image, or a smooth
    surface, for uneven light."""
    levels: Literal["fixed", "image"] = "fixed"
    """`fixed`: `black` and `white` become 0 and 1. `image`: of each image, the background and 2.5
    times the contrast of a typical object, but at least 8 times the noise and a tenth of
    `typical_white`; and `typical_white`, if no object stands out from the noise."""
    typical_white: Unit = 0.0
    """Contrast that becomes 1 in a typical image; keeps those without objects dark."""
    black: Unit = 0.0
    """Intensity, as a share of the file's range, that becomes 0; all below it too."""
    white: Unit = 1.0
    """Intensity, as a share of the file's range, that becomes 1; all above it too."""

    def __post_init__(self) -> None:
        if self.black >= self.white:
            raise ValueError(f"black ({self.black:g}) must be less than white ({self.white:g})")
        if self.contrast == "none" and (self.background, self.levels) != ("none", "fixed"):
            raise ValueError("contrast 'none' goes with background 'none' and levels 'fixed'")


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class SPAIRConfig:
    """SPAIR (docs/model.md 1-5). Widths are numbers of units; sizes are in pixels."""

    kind: Literal["spair"] = "spair"
    count_is_given: ClassVar[bool] = False
    """Whether the model is given the true number of objects."""
    cell: Annotated[int, Field(ge=2, le=64)] = 12
    """Side of a grid cell, in pixels; its prime factors are the strides of the backbone."""
    stride_order: Literal["ascending", "descending"] = "ascending"
    """Order of the strides: for 12, 2, 2, 3, or (descending) 3, 2, 2 as in the authors' later code,
    which is faster."""
    anchor: Positive = 48.0
    """Largest side of a box, in pixels (a_h = a_w)."""
    object_size: Annotated[int, Field(ge=2, le=64)] = 14
    """Side of a glimpse and of a rendered object map, in texels."""
    centre_min: Real = -0.5
    """b_min: least position of a box centre, in cells from the upper left corner of its cell."""
    centre_max: Real = 1.5
    """b_max: greatest position of a box centre, in cells from the same corner."""

    backbone_channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)] = (128,)
    """Channels of the strided layers in order; the last number applies to all further layers."""
    pointwise_kernel: Annotated[int, Field(ge=1, le=2)] = 1
    """Kernel of the last three layers of the backbone: 1, or 2 as in Fig. 7."""
    features: Width = 100
    """Channels of the backbone's output for each cell."""
    lateral: bool = True
    """Whether a cell sees its four earlier neighbours (main text, section 4.3)."""
    hidden: Width = 100
    """Units of both hidden layers of the where, depth and pres networks."""
    passthrough: Annotated[int, Field(ge=0, le=4096)] = 100
    """Features passed from the where network to the depth network, and from depth to pres."""
    what: Width = 50
    """A, the dimension of z_what."""
    encoder_hidden: Annotated[tuple[Width, ...], Field(max_length=8)] = (512, 256)
    """Widths of the hidden layers of the glimpse encoder."""
    decoder_hidden: Annotated[tuple[Width, ...], Field(max_length=8)] = (256, 512)
    """Widths of the hidden layers of the object decoder."""
    activation: Literal["relu", "celu"] = "relu"
    """Activation of every network except that of the background."""

    std_bias: Real = 0.0
    """Initial raw value of standard deviations, 2 sigmoid(raw); -3 gives .1."""
    size_bias: Real = 0.0
    """Initial mean of z_h and z_w; -.9 gives boxes of .29 of the anchor."""
    presence_bias: Real = 0.0
    """Initial log-odds of presence."""
    colour_scale: Positive = 2.0
    """Colour is sigmoid(colour_scale * logit)."""
    alpha_scale: Positive = 0.1
    """Alpha is sigmoid(alpha_scale * logit + alpha_bias)."""
    alpha_bias: Real = 5.0
    """Bias of alpha's logit; 5 starts objects nearly opaque (.993)."""
    importance_floor: NonNegative = 0.0025
    """Least importance of a texel: the authors' .01, for a sigmoid(-z_depth) not scaled by 4."""

    background: Literal["black", "solid", "mode", "mlp"] = "black"
    """Black, one learned colour, the commonest colour of training images, or an image's MLP."""
    temperature: Positive = 1.0
    """Temperature of the Concrete relaxation of z_pres."""

    position_prior_std: Positive = 1.0
    """Prior of the position: z_y, z_x ~ N(0, position_prior_std^2)."""
    size_prior_mean: Real = -2.1972
    """Prior of the size: z_h, z_w ~ N(size_prior_mean, size_prior_std^2); median side 4.8 px."""
    size_prior_std: Positive = 0.5
    """Standard deviation of the size prior, in logits."""
    odds_start: Odds = 1e6
    """Odds of the count prior at the start, s = 1 / (1 + odds); 1e6 is nearly flat."""
    odds_end: Odds = 0.0125
    """Odds of the count prior at the end; .0125 is s = .98765."""
    odds_decay: Annotated[float, Field(ge=1.0, le=1e9)] = 1000.0
    """Updates for a factor of ten (exponential), or from start to end (log-linear)."""
    odds_schedule: Literal["exponential", "log-linear"] = "exponential"

    box_contrast: Share = 0.0
    """Draws boxes round masks: pixels that an object owns, and in which the image's contrast to the
    background exceeds this fraction of the object's height; .5 suits blurred edges, 0 keeps the
    boxes of z_where, as in the paper."""
    likelihood: Literal["bernoulli", "normal"] = "bernoulli"
    """Likelihood of a pixel. `normal` has a standard deviation that training measures, and counts
    the three equal channels of a grey image once."""
    least_noise: Annotated[float, Field(ge=1e-3, le=1.0)] = 1 / 255
    """Least standard deviation of a pixel with the likelihood `normal`: objects have texture and
    odd shapes that the model cannot draw, and should not explain by more objects."""
    likelihood_floor: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-9
    """Number added inside the logarithms of the Bernoulli likelihood."""
    beta: Positive = 1.0
    """Weight of the KL terms of where, depth and what."""

    def __post_init__(self) -> None:
        if not self.centre_min < self.centre_max:
            raise ValueError(
                f"centre_min ({self.centre_min}) must be less than centre_max ({self.centre_max})"
            )

    @property
    def strides(self) -> tuple[int, ...]:
        """The prime factors of `cell` in `stride_order`."""
        factors, rest = [], self.cell
        for prime in range(2, self.cell + 1):
            while rest % prime == 0:
                factors.append(prime)
                rest //= prime
        return tuple(factors if self.stride_order == "ascending" else reversed(factors))


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class ConnCompConfig:
    """Connected components of pixels that differ from the background (docs/model.md 9).

    `train.steps` is the number of thresholds tried, from .01 to 3 in equal steps.
    """

    kind: Literal["conncomp"] = "conncomp"
    count_is_given: ClassVar[bool] = False
    """Whether the model is given the true number of objects."""
    threshold: Literal["fit", "otsu"] | Annotated[float, Field(ge=0.0, le=3.0)] = "fit"
    """Least distance of an object's pixel to the background, summed over channels: fitted to known
    boxes as in the paper, by Otsu's rule (needs no boxes), or a number. Without boxes, `fit` is
    Otsu's rule too."""
    min_area: Annotated[int, Field(ge=1, le=10**6)] = 1
    """Least number of pixels of an object; presets take 12 for a folder, to pass over specks."""
    criterion: Literal["ap", "ap_spair", "count_accuracy", "count_error"] = "ap"
    """The figure that the fitted threshold is best at, on training images; `ap_spair` is the
    authors'."""
    images: Annotated[int, Field(ge=1, le=10**5)] = 1000
    """Number of training images for fitting threshold and background."""
    background: Literal["black", "mode", "median", "given"] = "black"
    """Background: black, the commonest colour, the median of each channel, or `colour`."""
    colour: tuple[Unit, Unit, Unit] = (0.0, 0.0, 0.0)
    """Colour of the background "given": red, green, blue."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class WatershedConfig:
    """A local threshold and a watershed, without weights (docs/model.md 9.1)."""

    kind: Literal["watershed"] = "watershed"
    count_is_given: ClassVar[bool] = False
    """Whether the model is given the true number of objects."""
    diameter: Annotated[float, Field(ge=1.0, le=4096.0)] = 12.0
    """Diameter of a typical object in a prepared image, in pixels. Objects are bright on dark."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class AIRConfig:
    """The baselines AIR and DAIR (docs/model.md 7 and 8). Widths are numbers of units.

    The networks take images of one size only, that of `data`.
    """

    kind: Literal["air", "dair"] = "air"
    """`air`: an LSTM that sees the image. `dair`: a stateless network that sees the difference
    between the image and the canvas so far."""
    count: Literal["given", "inferred"] = "given"
    """`given`: the model is given the true number of objects, always, as in the paper."""
    max_objects: Annotated[int, Field(ge=1, le=256)] = 3
    """Greatest number of steps, hence of objects; given counts may be higher."""
    presence: Literal["concrete", "exact"] = "concrete"
    """Training of an inferred count. `concrete`: one relaxed sample for each step, cut off after
    the stop, as in the released code. `exact`: the expectation over all counts."""
    object_size: Annotated[int, Field(ge=2, le=64)] = 14
    """Side of a glimpse and of an object map, in texels."""
    grey: bool = False
    """Whether step networks see the mean of the three channels: a third of the work."""
    units: Width = 256
    """Units of the LSTM, or outputs of DAIR's stateless network."""
    difference_hidden: Annotated[tuple[Width, ...], Field(max_length=8)] = (256, 256, 256, 256)
    """Widths of the hidden layers of DAIR's stateless network, with ReLU."""
    output_hidden: Width = 128
    """Hidden units, with ReLU, before the nine numbers of a step."""
    what: Width = 50
    """A, the dimension of z_what."""
    encoder_hidden: Annotated[tuple[Width, ...], Field(max_length=8)] = (512, 256)
    """Widths of the hidden layers of the glimpse encoder."""
    decoder_hidden: Annotated[tuple[Width, ...], Field(max_length=8)] = (256, 512)
    """Widths of the hidden layers of the object decoder."""
    activation: Literal["softplus", "relu", "celu"] = "softplus"
    """Activation of the glimpse encoder and the object decoder."""
    background: Literal["black"] = "black"
    """Background of the canvas, to which objects add their light."""

    std_bias: Real = 0.0
    """Initial raw value of standard deviations, exp(raw); -2.3 gives .1."""
    scale_bias: Real = 0.0
    """Initial mean of the logits of scale; -.9 gives boxes of .29 of the image."""
    presence_bias: Real = 0.0
    """Initial log-odds of one more object."""
    presence_limit: Annotated[float, Field(gt=0.0, le=10.0)] = 10.0
    """Bound on the absolute log-odds of one more object. With `exact`, a lower bound keeps the
    gradients of later steps alive."""
    colour_bias: Real = 0.0
    """Bias of the colour's logit: objects start grey at 0, darker below."""
    temperature: Positive = 1.0
    """Temperature of the Concrete relaxation of z_pres."""

    scale_prior_mean: Real = -2.944
    """Mean of the scale prior: logits of width and height as shares of the image. The defaults of
    the three priors are the authors' for five digits; `presets` has those for other numbers."""
    scale_prior_std: Positive = 0.75
    """Standard deviation of the scale prior, in logits."""
    shift_prior_std: Positive = 0.5
    """Prior of the centre, before tanh: N(0, shift_prior_std^2)."""
    odds_start: Odds = 1e4
    """Prior odds of one more object at the start."""
    odds_end: Odds = 1.001e-6
    """Prior odds at the end: the authors' 1e-9 plus the 1e-6 inside their logarithm."""
    odds_decay: Annotated[float, Field(ge=1.0, le=1e9)] = 3000.0
    """Updates for a factor of ten (exponential), or from start to end (log-linear)."""
    odds_schedule: Literal["exponential", "log-linear"] = "exponential"

    box_contrast: Share = 0.0
    """Tightens boxes, in whole pixels, to texels above this fraction of the object's maximum
    brightness; 0 keeps scale and shift, as in the paper."""
    likelihood_floor: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-9
    """Number added inside the logarithms of the reconstruction term."""
    beta: Positive = 1.0
    """Weight of the KL terms of where and what."""

    @property
    def count_is_given(self) -> bool:
        """Whether the model is given the true number of objects."""
        return self.count == "given"


SearchMode = Literal["off", "refine", "full"]
"""Values of `search.mode`."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class SearchConfig:
    """The search for the objects of the highest posterior probability, by SPAIR only."""

    mode: SearchMode = "off"
    """`off` keeps what the encoder finds, as in the paper; `refine` also fits its objects to the
    image by gradients; `full` also tries births, deaths, merges and splits."""
    beta: NonNegative = 0.5
    """Weight of the KL terms of where, what and depth in the energy that the search lowers."""
    start: Literal["encoder", "watershed"] = "encoder"
    """Objects that the search begins with. `watershed`: the parts that a watershed finds in a
    prepared image; with the mode `full`, these or the encoder's, whichever has lower energy."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class TrainConfig:
    """The training loop (docs/model.md 6)."""

    seed: Seed = 0
    """Seed of initial weights, noise and the choice of training scenes."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 32
    """Images in an update, over all processes."""
    steps: Annotated[int, Field(ge=1, le=10**9)] = 300_000
    """Total number of updates."""
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-4
    """Learning rate of Adam at the first update."""
    learning_rate_end: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-4
    """Learning rate that a linear schedule reaches after the last update."""
    clip_norm: NonNegative = 1.0
    """Clips the global gradient norm; 0 does not clip."""
    gradient_noise: NonNegative = 0.001
    """Initial standard deviation of the noise added to gradients after clipping."""
    gradient_noise_decay: Annotated[float, Field(ge=1.0, le=1e9)] = 1000.0
    """Updates in which the gradient noise falls to a tenth."""
    training_wheels: Steps = 1000
    """Updates during which where, depth and pres get no gradient."""
    validation_every: Annotated[int, Field(ge=1, le=10**9)] = 1000
    """Updates between validations; each writes a checkpoint and a picture."""
    patience: Steps = 50_000
    """Updates without a better validation after which training stops; 0 never stops early."""
    select: Literal["elbo", "ap"] = "elbo"
    """Criterion of the best checkpoint: validation ELBO (needs no labels), or AP paper
    (`ap_spair`), as the authors used."""
    retries: Annotated[tuple[Literal["background", "prior", "seed"], ...], Field(max_length=3)] = ()
    """What a training of SPAIR on images with a contrast may change, each once and in this order,
    to start again when it shows signs of failure in its first half: `prepare.background`,
    `model.least_noise` and `train.seed`. A look at a folder takes those that the user has not
    set."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Precision of products and convolutions in training. `tf32` (NVIDIA GPUs only) keeps 10 bits
    of the mantissa. `bf16` (7 bits) applies to all networks, but SPAIR's loop over cells stays
    float32 on a CPU; weights, Adam, losses and operators stay float32, as do validation and all
    other commands. A CPU without bfloat16 instructions is slower with it."""
    backend: Literal["auto", "triton"] = "auto"
    """Implementation, on a GPU, of SPAIR's loop over cells, KL terms, likelihood and decoder's
    sigmoid. `auto` is plain torch inside a CUDA graph. `triton` is Triton kernels, a tenth of the
    launches; they were checked in Triton's interpreter and never ran on a GPU."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads; 0 is torch's choice. Results depend on it in the last bits."""


ClassicalConfig = ConnCompConfig | WatershedConfig
"""The config of a model without weights."""

ModelConfig = SPAIRConfig | AIRConfig | ClassicalConfig
"""The config of a model, by `kind`; "spair" if it is absent."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    preset: str = "paper"
    """The preset of this config."""
    data: DataConfig = Field(default_factory=DataConfig)
    prepare: PrepareConfig = Field(default_factory=PrepareConfig)
    model: ModelConfig = Field(default_factory=SPAIRConfig, discriminator="kind")
    search: SearchConfig = Field(default_factory=SearchConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.search.mode != "off" and not isinstance(self.model, SPAIRConfig):
            raise ValueError(f"search.mode: {self.model.kind} has no search; use 'off'")
        levels = PrepareConfig(black=self.prepare.black, white=self.prepare.white)
        if self.data.name != "folder" and self.prepare != levels:
            raise ValueError("prepare: generated scenes take black and white only")
